"""`revit-fast env`: what the installation consists of and what it can use."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

import revit_fast
from revit_fast.memory import allocator_state
from revit_fast.ops import _library


def environment() -> dict[str, Any]:
    """Versions, processor and backends; None or empty for whatever is missing or fails."""

    def attempt(probe: Callable[[], Any], default: Any = None) -> Any:
        try:
            return probe()
        except Exception:  # a broken installation is what this command is called for
            return default

    def has_kernel(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("revit_fast::varlen_attention", key)

    cpu_kernel = f"C++ ({_library.cpu_isa()})" if _library.HAS_EXTENSION else "PyTorch reference"
    backends = {"cpu": ("CPU", cpu_kernel), "cuda": ("CUDA", "Triton")}
    return {
        "revit_fast": revit_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": attempt(lambda: import_module("triton").__version__),
        **{name: attempt(lambda name=name: metadata.version(name)) for name in ("timm", "pillow", "numpy")},
        "platform": platform.platform(),
        "cpu": attempt(cpu_name),
        "threads": torch.get_num_threads(),
        "malloc": attempt(allocator_state),
        "extension": _library.HAS_EXTENSION,
        "isa": attempt(_library.cpu_isa),
        "isas": attempt(_library.cpu_isas, []),
        "attention": {d: name for d, (key, name) in backends.items() if attempt(lambda key=key: has_kernel(key))},
        "cuda": attempt(
            lambda: [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            [],
        ),
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast env`."""
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        elif isinstance(value, bool):
            value = "built" if value else "not built"
        print(f"{name:<12}{value or 'none'}")
    return 0

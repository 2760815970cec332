"""`revit-fast env`: the parts of the installation and the backends that it can use."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from revit_fast.environment import attempt, versions
from revit_fast.io.jpeg import matching_decoder
from revit_fast.io.memory import allocator_state
from revit_fast.ops import _library
from revit_fast.ops.linear import cpu_integer_depths, cpu_multiplies_bf16, cpu_untried


def products(dtype: torch.dtype, multiplied: bool, otherwise: str) -> str:
    """How the CPU kernels multiply with weights of a dtype."""
    said = ", by kernels that were tested in emulation and never executed on hardware" if cpu_untried(dtype) else ""
    return ("multiplied" if multiplied else f"widened to {otherwise}") + said


def environment() -> dict[str, Any]:
    """Versions, processor and backends; None or empty for whatever is missing or fails."""

    def has_kernel(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("revit_fast::varlen_attention", key)

    def gpu_names() -> list[str]:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

    cpu_kernel = f"C++ ({_library.cpu_isa()})" if _library.HAS_EXTENSION else "PyTorch reference"
    backends = {"cpu": ("CPU", cpu_kernel), "cuda": ("CUDA", "Triton")}
    return {
        **versions(),
        "jpeg": "simplejpeg" if matching_decoder() else "Pillow",
        "malloc": attempt(allocator_state),
        "extension": _library.HAS_EXTENSION,
        "isa": attempt(_library.cpu_isa),
        "isas": attempt(_library.cpu_isas, []),
        "bfloat16": attempt(lambda: products(torch.bfloat16, cpu_multiplies_bf16(), "float32")),
        "int8": attempt(lambda: products(torch.int8, cpu_integer_depths() == 4, "int16")),
        "attention": {d: name for d, (key, name) in backends.items() if attempt(lambda key=key: has_kernel(key))},
        "cuda": attempt(gpu_names, []),
    }


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

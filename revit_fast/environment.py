"""Versions of this package and of its environment, for reports and bug reports. torch is imported only when needed."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from revit_fast.version import __version__


def versions() -> dict[str, Any]:
    """Versions of packages, the platform, the processor and PyTorch's threads; None for what is missing or fails."""
    import torch

    return {
        "revit_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": attempt(lambda: import_module("triton").__version__),
        **{name: attempt(lambda name=name: metadata.version(name)) for name in ("timm", "pillow", "numpy")},
        "platform": platform.platform(),
        "cpu": attempt(cpu_name),
        "threads": torch.get_num_threads(),
    }


def attempt(probe: Callable[[], Any], default: Any = None) -> Any:
    """The result of `probe`, or `default` if it raises any exception: an installation may be broken."""
    try:
        return probe()
    except Exception:
        return default


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()

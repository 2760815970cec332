"""Versions of this package and what its environment grants, for reports. torch is imported only when needed."""

from __future__ import annotations

import os
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
    names = (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Number of CPUs that this process may run on: an affinity mask may leave fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(system: Path = Path("/")) -> float | None:
    """CPUs' worth of time that Linux control groups grant to this process, the least of its groups; None: no limit.

    Args:
        system: the folder that holds `proc` and `sys`.
    """
    limits = []
    for line in _lines(system / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = root / group.lstrip("/")
        for folder in (own, *own.parents):
            if controllers:  # version 1: two files
                limit = [*_lines(folder / "cpu.cfs_quota_us")[:1], *_lines(folder / "cpu.cfs_period_us")[:1]]
            else:
                limit = " ".join(_lines(folder / "cpu.max")).split()
            if len(limit) == 2 and limit[0] not in ("max", "-1"):
                limits.append(int(limit[0]) / int(limit[1]))
            if folder == root:
                break
    return min(limits, default=None)


def huge_pages(system: Path = Path("/")) -> str | None:
    """Which memory Linux puts on huge pages: "always" all, "madvise" what asks for it, "never" none; None: unknown."""
    choices = " ".join(_lines(system / "sys/kernel/mm/transparent_hugepage/enabled")).split()
    return next((choice.strip("[]") for choice in choices if choice.startswith("[")), None)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.is_file() else []

"""Shared parts of the benches' tables: the machine, medians with quartiles, files written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import revit_fast
from bench.files import write_file
from revit_fast.environment import cpu_name
from revit_fast.io.memory import keep_freed_pages
from revit_fast.ops import _library

RESULTS = Path(__file__).parent / "results"


def machine_header() -> dict:
    """The machine and the software.

    Call it before anything is measured. It makes the allocator keep freed pages, as `optimize` does, so that ours and
    the peers are measured alike; `freed_pages_kept` says whether that worked.
    """
    return {
        "machine": platform.machine(),
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "isa": _library.cpu_isa(),
        "revit_fast": revit_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "freed_pages_kept": keep_freed_pages(),
    }


def spread_ms(samples_s: Sequence[float]) -> tuple[float, list[float]]:
    """Median and quartiles in milliseconds."""
    low, median, high = np.quantile(samples_s, [0.25, 0.5, 0.75])
    return median * 1e3, [low * 1e3, high * 1e3]


def error_text(error: float | None) -> str:
    """An error as a table shows it; a dash where there is none."""
    return "–" if error is None else f"{error:.1e}"


def header_line(header: dict) -> str:
    return " · ".join(f"{key} {value}" for key, value in header.items())


def write(name: str, header: dict, content: dict, table: str, folder: Path = RESULTS) -> None:
    """Writes `name`.json and `name`.md."""
    write_file(folder / f"{name}.json", json.dumps({"machine": header, **content}, indent=1))
    write_file(folder / f"{name}.md", table)

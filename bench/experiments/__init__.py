"""Experiments on the method's parts, each one command that writes a report: see `revit-fast experiment list`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

NAMES = (
    "tal-ln",
    "tlsd",
    "synthetic",
    "cross-dataset",
    "extremes",
    "overhead",
    "stability",
    "fairness",
    "convergence",
    "robustness",
    "lengths",
)
"""In the order of their numbers; `get` gives their modules."""


def get(name: str) -> ModuleType:
    """The module of an experiment: NUMBER, TITLE, QUESTION, PAPER, OURS, `measure`, `report` and `panels`.

    Raises:
        ValueError: for a name that is none.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, or all, got {name!r}")
    return import_module(f"{__name__}.{name.replace('-', '_')}")

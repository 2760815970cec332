"""Experiments on the parts of the method, each with a report: see `python -m bench.experiments list`."""

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
"""Names of the experiments in the order of their numbers; `get` gives their modules."""


def get(name: str) -> ModuleType:
    """The module of an experiment: NUMBER, TITLE, QUESTION, PAPER, OURS, `measure`, `report` and `panels`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, or all, got {name!r}")
    return import_module(f"{__name__}.{name.replace('-', '_')}")

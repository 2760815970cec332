"""The check of a budget that a user gives for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SLACK = 1.01
"""A budget may be this much above the longest length: prefix tokens may be counted, or multiply-adds rounded."""


def check_budget(budget: Mapping[str, float], grids: Sequence[int], macs: Sequence[float]) -> None:
    """Raises a ValueError for a budget above the cost of the longest length, which no image can spend.

    Args:
        budget: `{"mean_tokens": n}` or `{"mean_gmacs": n}`.
        grids: grids of the model, the longest first.
        macs: multiply-adds of an image at each grid.
    """
    [(name, value)] = budget.items()
    costs = [grid * grid for grid in grids] if name == "mean_tokens" else [n / 1e9 for n in macs]
    if value > SLACK * costs[0]:
        raise ValueError(
            f"budget: {name} {value:g} is above the cost of the longest length; expected {costs[-1]:g} (every image at "
            f"the shortest length) to {costs[0]:g} (every image at the longest)"
        )

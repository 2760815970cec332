"""The token grids of a model: the numbers of patches per side that its images may have.

Imports neither torch nor NumPy, so that the command line can read its defaults without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

DEFAULT_GRIDS = (14, 10, 7)
"""Patches per side for each of the three lengths, the longest first."""

MATCH_NORMS = ("length", "order")
"""How norms go to a model of other grids, see `rows_of_lengths`."""


def check_grids(grids: Sequence[int]) -> tuple[int, ...]:
    """The grids as a tuple of ints, after a check that they are positive and strictly decreasing."""
    try:
        grids = tuple(int(g) for g in grids)
    except TypeError:
        raise TypeError(f"grids: expected a sequence of ints such as (14, 10, 7), got {grids!r}") from None
    if not grids or grids[-1] < 1 or any(a <= b for a, b in pairwise(grids)):
        raise ValueError(f"grids: expected strictly decreasing positive ints such as (14, 10, 7), got {grids}")
    return grids


def scaled_grids(grids: Sequence[int], base_grid: tuple[int, int]) -> tuple[int, ...]:
    """Square grids in the proportions of `grids`; the largest has about as many tokens as `base_grid`.

    Equal grids are merged, so small images have fewer lengths.
    """
    factor = math.sqrt(base_grid[0] * base_grid[1]) / grids[0]
    return tuple(dict.fromkeys(max(1, round(g * factor)) for g in grids))


def rows_of_lengths(saved: Sequence[int], own: Sequence[int], match_norms: str = "length") -> list[int]:
    """For every own grid the row of its norm among those of the saved grids.

    Args:
        saved: grids that the norms were trained for.
        own: grids of the model that takes them.
        match_norms: "length": the row of the same grid, else that of the nearest number of patches, ties to the longer;
            "order": the longest gets the longest's, and so on, for a model whose lengths are all scaled.

    Raises:
        ValueError: for another choice, or "order" with another number of grids.
    """
    if match_norms not in MATCH_NORMS:
        raise ValueError(f"match_norms: expected one of {', '.join(MATCH_NORMS)}, got {match_norms!r}")
    if match_norms == "order":
        if len(saved) != len(own):
            raise ValueError(
                f"match_norms: by order, {len(saved)} grids {tuple(saved)} cannot give {len(own)} grids {tuple(own)} "
                'their norms; give as many grids, or match_norms="length"'
            )
        return list(range(len(own)))
    return [min(range(len(saved)), key=lambda i: (abs(saved[i] ** 2 - grid**2), -saved[i])) for grid in own]

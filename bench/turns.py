"""Timing candidates in alternation."""

from __future__ import annotations

import time
from collections.abc import Callable


def take_turns(
    candidates: dict[str, Callable[[int], object]], rounds: int, pause_s: float = 0.0
) -> dict[str, list[float]]:
    """Seconds that every candidate takes in each round, called with the round's number; the order turns every round."""
    samples = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in candidates if turn % 2 == 0 else reversed(candidates):
            if pause_s:
                time.sleep(pause_s)
            begin = time.perf_counter()
            candidates[name](turn)
            samples[name].append(time.perf_counter() - begin)
    return samples

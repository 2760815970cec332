"""What a candidate of the model bench is, and how a peer's best variant is found."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.model_work import SLOW_S, Case, Flops
from bench.probe import Instruction

Run = Callable[[int], Tensor]
"""The logits of a batch, from the number of the round, which says which set of inputs to take."""


class Unsuited(Exception):
    """A peer has no sensible form for a case; the message says why."""


@dataclass
class Peer:
    """A candidate.

    Attributes:
        run: computes the logits.
        order: image that each row of the logits belongs to; None where no image's logits can be compared with timm's.
        flops: what it executes.
        note: the variant taken, or what else is particular to the case.
        precision: the lowest among the operands of its matrix products, a key of `TOLERANCES`.
        instruction: what its rate is compared with; None for the best one of that precision.
    """

    run: Run
    order: Sequence[int] | None
    flops: Flops
    note: str = ""
    precision: str = "float32"
    instruction: Instruction | None = None


def precision_name(dtype: torch.dtype) -> str:
    """A dtype as a key of `TOLERANCES`, "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fastest(variants: dict[str, Run], pause_s: float = 0.1) -> tuple[str, Run]:
    """Name and function of the fastest, by the best of three calls after a first one; by one where all are slow."""
    seconds = {name: [] for name in variants}
    for turn in range(4):
        for name, run in variants.items():
            time.sleep(pause_s)
            begin = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - begin)
        if turn == 1 and min(map(min, seconds.values())) > SLOW_S:
            break
    name = min(variants, key=lambda name: min(seconds[name][1:]))
    return name, variants[name]


@dataclass(frozen=True)
class Kind:
    """A candidate as the tables name it."""

    name: str
    build: Callable[[Case], Peer]
    note: str

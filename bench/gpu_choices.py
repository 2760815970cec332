"""Other entries for the tables of `kernels/schedules.py`: what they are, and how one is used in place of the chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from revit_fast.kernels import schedules
from revit_fast.kernels.schedules import Choices

FLOAT32 = 0
"""In place of the bound of the head dimension: the table of float32, which is timed at head dimension 64."""

SEQLENS = {
    "short": (50, 101, 197, 256),
    "streaming": (577, 1025),
    "grad_q_short": (101, 197, 256),
    "grad_q": (577, 1025),
    "grad_kv": (197, 577),
    "fused_warps": (50,),
}
"""Lengths that a field of `Choices` matters for."""

CANDIDATES: dict[tuple[int, str], tuple] = {
    (64, "short"): ((256, 256, 256, 4), (256, 128, 256, 4), (256, 64, 256, 4), (256, 208, 64, 4), (256, 208, 256, 8)),
    (64, "streaming"): ((32, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2)),
    (64, "grad_q_short"): ((32, 64, 4), (64, 64, 4), (256, 64, 4), (128, 64, 8)),
    (64, "grad_q"): ((32, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2)),
    (64, "grad_kv"): ((64, 32, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2), (64, 128, 8, 1)),
    (64, "fused_warps"): (0, 2, 8),
    (128, "short"): ((256, 208, 256, 8), (256, 128, 256, 4), (256, 32, 256, 4), (256, 64, 64, 4)),
    (128, "streaming"): ((32, 64, 4, 2), (64, 64, 4, 1), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2)),
    (128, "grad_q_short"): ((32, 64, 4), (128, 64, 4), (64, 64, 8)),
    (128, "grad_q"): ((32, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2)),
    (128, "grad_kv"): ((64, 32, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
    (128, "fused_warps"): (0, 2, 8),
    (256, "streaming"): ((32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
    (256, "grad_q"): ((32, 32, 8, 1), (32, 64, 8, 1)),
    (256, "grad_kv"): ((32, 32, 4, 1), (64, 32, 8, 1)),
    (FLOAT32, "streaming"): ((32, 16, 4), (16, 32, 4), (32, 32, 4)),
    (FLOAT32, "grad_q"): ((16, 16, 2), (32, 16, 4), (32, 32, 4)),
    (FLOAT32, "grad_kv"): ((16, 16, 2), (16, 32, 4), (32, 32, 4)),
}
"""(bound of the head dimension, field of `Choices`) -> values to time beside the chosen one; for chips of compute
capability 9.0. Tiles have at most 64 rows, those of grad_kv at most 64 keys: the tiles of the work list.
"""


class Override(NamedTuple):
    """Another value of one entry.

    Attributes:
        bound: bound of the head dimension, as in the table; or `FLOAT32`.
        field: field of `Choices`; or of `Float32`.
        value: the value.
    """

    bound: int
    field: str
    value: tuple[int, ...] | int | None

    @contextlib.contextmanager
    def applied(self, target: str) -> Iterator[None]:
        """Uses the value for a chip."""
        table, key = schedules._CHOICES, (target, self.bound)
        if self.bound == FLOAT32:
            table, key = schedules._FLOAT32, target
        before = table.get(key)
        table[key] = entry(target, self.bound)._replace(**{self.field: self.value})
        _forget()
        try:
            yield
        finally:
            if before is None:
                del table[key]
            else:
                table[key] = before
            _forget()


class Float32(NamedTuple):
    """An entry of the tables of float32 by its fields."""

    streaming: tuple[int, int, int]
    grad_q: tuple[int, int, int]
    grad_kv: tuple[int, int, int]


def entry(target: str, bound: int) -> Choices | Float32:
    """The entry in use."""
    if bound == FLOAT32:
        return Float32(*schedules._FLOAT32.get(target, schedules._FLOAT32["sm_80"]))
    return schedules._CHOICES.get((target, bound), schedules._INTERPRETED)


def _forget() -> None:
    schedules.forward.cache_clear()
    schedules.backward.cache_clear()


def chosen(target: str, bound: int, field: str) -> Override:
    """The entry in use, as an override that changes nothing."""
    return Override(bound, field, getattr(entry(target, bound), field))


def tunable(target: str) -> list[tuple[int, str]]:
    """The keys of `CANDIDATES` that have an entry for a chip."""
    return [key for key in CANDIDATES if key[0] == FLOAT32 or (target, key[0]) in schedules._CHOICES]


def is_backward(field: str) -> bool:
    return field not in ("short", "streaming")

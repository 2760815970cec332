"""Which attention kernel computes which tiles, and how: pure functions of the chip, the head dimension and the dtype.

The tables were chosen by what the compiler makes of each candidate (registers, spills, instructions per useful product;
`python -m bench.gpu_code`), not by a stopwatch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from revit_fast.kernels.launch import Target

TILE_ROWS = 64
"""Query rows of one tile of the work list."""

KEY_CLASSES = (32, 64, 112, 160, 208, 256)
"""Most keys of a sequence in each short class, whose kernel holds all keys of a head at once.

Multiples of 16, the depth of a tensor-core product: 7² = 49 patches fit 64, 10² = 100 fit 112, 14² = 196 fit 208, each
with its prefix tokens, so that padded keys cost 4 to 28 % rather than up to twice the work.
"""

STREAMING, PADDING = len(KEY_CLASSES), len(KEY_CLASSES) + 1
"""Classes of tiles whose keys are walked block by block, and of tiles of padding rows, whose result is zero."""

N_CLASSES = PADDING + 1

Parts = tuple[tuple[int, int], ...]


def parts_of(extent: int, widest: int = 256) -> Parts:
    """Cuts an extent, rounded up to a multiple of 16, into (start, width), widths being powers of two, widest first."""
    extent = -(-extent // 16) * 16
    parts, start = [], 0
    while start < extent:
        width = min(1 << ((extent - start).bit_length() - 1), widest)
        parts.append((start, width))
        start += width
    return tuple(parts)


def head_dim_parts(head_dim: int, dtype: torch.dtype) -> Parts:
    """Parts of the head dimension; narrow for float32, where without tensor cores a thread holds whole rows of them."""
    return parts_of(head_dim, 16 if dtype == torch.float32 else 256)


@dataclass(frozen=True)
class Schedule:
    """How the tiles of some classes are computed.

    Attributes:
        name: "short" or "streaming".
        first_class: first class of the work list that it serves.
        last_class: the last one.
        keys: keys held at once: all of a short tile, one block of a streaming one.
        block_m: query rows computed at a time.
        num_warps: warps of a program.
        num_stages: blocks of keys in flight.
        block_keys: most keys of a short tile whose scores are held at once.
        widest_part: most keys of one product of a short tile.
    """

    name: str
    first_class: int
    last_class: int
    keys: int
    block_m: int = 64
    num_warps: int = 4
    num_stages: int = 1
    block_keys: int = 256
    widest_part: int = 256

    @property
    def key_parts(self) -> Parts:
        """The keys of a short tile as parts."""
        return parts_of(self.keys, self.widest_part)

    @property
    def key_blocks(self) -> tuple[tuple[tuple[int, int, bool], ...], ...]:
        """The keys of a short tile as blocks of much the same size, each as parts (start, width, needs a mask)."""
        n_blocks = -(-self.keys // self.block_keys)
        size = -(-self.keys // n_blocks // 16) * 16
        return tuple(
            tuple(
                (start + offset, width, start + offset + width > self.full_keys)
                for offset, width in parts_of(min(size, self.keys - start), self.widest_part)
            )
            for start in range(0, self.keys, size)
        )

    @property
    def full_keys(self) -> int:
        """Keys that every sequence of a short class has."""
        return KEY_CLASSES[self.first_class - 1] + 1 if self.first_class > 0 else 0

    def launch_options(self) -> dict[str, int]:
        """What every attention kernel is launched with."""
        return {
            "FIRST_CLASS": self.first_class,
            "LAST_CLASS": self.last_class,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def beyond(self, max_seqlen_k: int | None) -> bool:
        """Whether no sequence of at most that many keys has one of these classes."""
        return max_seqlen_k is not None and self.first_class > bisect_left(KEY_CLASSES, max_seqlen_k)


@lru_cache(maxsize=256)
def forward(target: Target, head_dim: int, dtype: torch.dtype) -> tuple[Schedule, ...]:
    """Schedules of the forward pass, which together serve every class once."""
    if dtype == torch.float32:
        return (Schedule("streaming", 0, STREAMING, 64, block_m=32, num_warps=8),)
    short = [Schedule("short", i, i, keys) for i, keys in enumerate(KEY_CLASSES)]
    return (*short, Schedule("streaming", STREAMING, STREAMING, 64, num_stages=2))


class Backward(NamedTuple):
    """Schedules of the backward pass: `fused` serves its classes alone, `grad_q` and `grad_kv` together all others."""

    fused: tuple[Schedule, ...]
    grad_q: tuple[Schedule, ...]
    grad_kv: tuple[Schedule, ...]


@lru_cache(maxsize=256)
def backward(target: Target, head_dim: int, dtype: torch.dtype, self_attention: bool) -> Backward:
    """Schedules of the backward pass."""
    if dtype == torch.float32:
        grad_q = Schedule("streaming", 0, STREAMING, 64, block_m=32, num_warps=8)
        return Backward((), (grad_q,), (Schedule("streaming", 0, STREAMING, 32, block_m=32, num_warps=8),))
    n_fused = bisect_right(KEY_CLASSES, TILE_ROWS) if self_attention else 0
    fused = [Schedule("fused", i, i, KEY_CLASSES[i], block_m=KEY_CLASSES[i]) for i in range(n_fused)]
    short = [Schedule("short", i, i, KEY_CLASSES[i]) for i in range(n_fused, STREAMING)]
    grad_q = (*short, Schedule("streaming", STREAMING, STREAMING, 64, num_stages=2))
    grad_kv = (Schedule("streaming", n_fused, STREAMING, 64, num_stages=2),)
    return Backward(tuple(fused), grad_q, grad_kv)

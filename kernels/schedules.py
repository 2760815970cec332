"""Which attention kernel computes which tiles, and how: pure functions of the chip, the head dimension and the dtype.

The tables were chosen before any kernel had run on a GPU, from the machine code of each candidate: its registers, its
spills, and an estimate of its instructions per useful product. No candidate was timed against another. `docs/gpu.md`
lists what has been measured since.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from .constants import KEY_CLASSES, STREAMING, TILE_ROWS
from .launch import INTERPRETER, Target

Parts = tuple[tuple[int, int], ...]


def parts_of(extent: int, widest: int = 256) -> Parts:
    """Cuts an extent, rounded up to a multiple of 16, into (start, width); widths are powers of two, widest first."""
    extent = -(-extent // 16) * 16
    parts, start = [], 0
    while start < extent:
        width = min(1 << ((extent - start).bit_length() - 1), widest)
        parts.append((start, width))
        start += width
    return tuple(parts)


SHARED_OPERANDS = ("sm_90", "sm_100")
"""Chips whose tensor cores read operands from shared memory by descriptors."""


@lru_cache(maxsize=256)
def head_dim_parts(target: Target, head_dim: int, dtype: torch.dtype) -> Parts:
    """Parts of the head dimension.

    For float32 they are narrow: without tensor cores a thread holds whole rows of a part. For chips in
    `SHARED_OPERANDS` there is one part, rounded up: on an H200, Triton 3.6's code for 64 + 16 columns read beyond the
    shared memory that it had allocated.
    """
    if dtype == torch.float32:
        return parts_of(head_dim, 64 if target == INTERPRETER else 16)
    if target.name in SHARED_OPERANDS:
        return ((0, max(16, 1 << (head_dim - 1).bit_length())),)
    return parts_of(head_dim)


@dataclass(frozen=True)
class Schedule:
    """How the tiles of some classes are computed.

    Attributes:
        name: "short" or "streaming".
        first_class: first class of the work list that this schedule covers.
        last_class: last class that it covers.
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

    @cached_property
    def key_parts(self) -> Parts:
        """The keys of a short tile as parts."""
        return parts_of(self.keys, self.widest_part)

    @cached_property
    def key_blocks(self) -> tuple[tuple[tuple[int, int, bool], ...], ...]:
        """The keys of a short tile as blocks of similar size, each as parts (start, width, needs a mask)."""
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
        """The number of keys that every sequence of a short class has."""
        return KEY_CLASSES[self.first_class - 1] + 1 if self.first_class > 0 else 0

    def launch_options(self) -> dict[str, int]:
        """The options with which every attention kernel is launched."""
        return {
            "FIRST_CLASS": self.first_class,
            "LAST_CLASS": self.last_class,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def beyond(self, max_seqlen_k: int | None) -> bool:
        """Whether sequences of at most `max_seqlen_k` keys never have one of these classes."""
        return max_seqlen_k is not None and self.first_class > bisect_left(KEY_CLASSES, max_seqlen_k)


@dataclass(frozen=True)
class ForwardLaunch:
    """Successive classes that one launch of the forward pass computes.

    Attributes:
        schedules: how each class is computed, ordered by class: short ones, then perhaps the streaming one.
    """

    schedules: tuple[Schedule, ...]

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options of the launch that depend on its classes."""
        first, last = self.schedules[0], self.schedules[-1]
        short = [one for one in self.schedules if one.name == "short"]
        return {
            "FULL_KEYS": tuple(one.full_keys for one in short),
            "KEY_BLOCKS": tuple(one.key_blocks for one in short),
            "STREAMING": (last.block_m, last.keys) if last.name == "streaming" else None,
            **last.launch_options(),
            "FIRST_CLASS": first.first_class,
        }

    @property
    def classes(self) -> tuple[int, int]:
        """First and last class of the work list."""
        return self.schedules[0].first_class, self.schedules[-1].last_class

    def beyond(self, max_seqlen_k: int | None) -> bool:
        """Whether sequences of at most `max_seqlen_k` keys never have one of these classes."""
        return self.schedules[0].beyond(max_seqlen_k)


BOUNDS = (64, 80, 128, 256)
"""Bounds of the head dimension at which the tables of choices change."""


class Choices(NamedTuple):
    """Tiles of the 16-bit kernels of one chip, at head dimensions up to a bound: (keys, rows, warps, stages).

    Attributes:
        short: (most keys of a class, keys whose scores are held at once, widest part of them, warps), or None if no
            class is short.
        streaming: forward pass, block by block.
        grad_q_short: (widest part of the keys, rows, warps), or None if only block by block fits.
        grad_q: gradient of the queries, block by block.
        grad_kv: gradient of the keys and values.
        fused_warps: warps of the single backward pass over sequences of one tile, or 0 if it does not fit; such
            sequences then take two passes.
    """

    short: tuple[int, int, int, int] | None
    streaming: tuple[int, int, int, int]
    grad_q_short: tuple[int, int, int, int] | None
    grad_q: tuple[int, int, int, int]
    grad_kv: tuple[int, int, int, int]
    fused_warps: int


_CHOICES: dict[tuple[str, int], Choices] = {
    ("sm_80", 64): Choices((256, 208, 256, 4), (64, 64, 4, 2), (32, 64, 4), (32, 64, 4, 2), (64, 32, 4, 2), 4),
    ("sm_80", 80): Choices((256, 32, 256, 4), (64, 64, 4, 2), (32, 64, 8), (32, 64, 4, 1), (64, 32, 4, 2), 0),
    ("sm_80", 128): Choices((112, 112, 256, 4), (64, 64, 4, 2), None, (64, 64, 4, 2), (64, 32, 4, 2), 4),
    ("sm_80", 256): Choices(None, (32, 64, 8, 2), None, (32, 64, 8, 1), (64, 32, 8, 1), 0),
    ("sm_90", 64): Choices((256, 208, 256, 4), (64, 64, 4, 2), (128, 64, 4), (64, 64, 4, 2), (64, 64, 4, 2), 4),
    ("sm_90", 128): Choices((256, 64, 256, 4), (64, 64, 4, 2), (64, 64, 4), (64, 64, 4, 2), (64, 32, 4, 2), 4),
    ("sm_90", 256): Choices(None, (32, 64, 8, 2), None, (32, 32, 4, 1), (32, 32, 8, 1), 0),
    ("sm_100", 64): Choices((256, 208, 256, 4), (64, 64, 4, 2), (128, 64, 4), (64, 64, 4, 2), (64, 64, 4, 2), 4),
    ("sm_100", 128): Choices((256, 208, 256, 4), (64, 64, 4, 2), (128, 64, 4), (64, 64, 4, 2), (64, 32, 4, 2), 4),
    ("sm_100", 256): Choices(None, (32, 64, 8, 2), None, (32, 64, 8, 1), (64, 32, 8, 1), 0),
    ("sm_120", 64): Choices((256, 208, 256, 4), (64, 64, 4, 2), (32, 64, 4), (32, 64, 4, 2), (64, 32, 4, 2), 4),
    ("sm_120", 80): Choices((256, 64, 32, 4), (64, 64, 4, 2), None, (32, 64, 4, 2), (64, 32, 4, 1), 0),
    ("sm_120", 128): Choices((64, 64, 256, 4), (32, 64, 4, 2), None, (32, 64, 4, 1), (64, 32, 4, 1), 8),
    ("sm_120", 256): Choices(None, (32, 64, 8, 1), None, (32, 64, 8, 1), (64, 16, 8, 1), 0),
    ("gfx942", 64): Choices((256, 208, 256, 4), (64, 64, 4, 1), (128, 64, 4), (64, 64, 4, 1), (64, 32, 4, 1), 4),
    ("gfx942", 80): Choices((256, 208, 256, 4), (64, 64, 4, 1), (128, 64, 4), (64, 64, 4, 1), (64, 32, 4, 1), 4),
    ("gfx942", 128): Choices((256, 208, 256, 4), (64, 64, 4, 1), (64, 64, 4), (64, 64, 4, 1), (64, 32, 4, 1), 4),
    ("gfx942", 256): Choices(None, (32, 64, 4, 1), None, (32, 64, 4, 1), (64, 16, 4, 1), 0),
}

_INTERPRETED = Choices((256, 256, 256, 4), (64, 64, 4, 1), (256, 64, 4), (64, 64, 4, 1), (64, 64, 4, 1), 4)

_FLOAT32 = {
    "sm_80": ((16, 16, 2), (16, 32, 4), (32, 16, 4)),
    "sm_100": ((16, 16, 2), (16, 16, 2), (32, 16, 4)),
    "sm_120": ((16, 16, 2), (16, 16, 2), (32, 16, 4)),
    "gfx942": ((32, 32, 2), (32, 16, 2), (32, 16, 2)),
    "interpreter": ((64, 64, 4), (64, 64, 4), (64, 64, 4)),
}
"""(keys, rows, warps) of the forward pass, of the gradient of queries, and of that of keys and values, in float32.

Tiles have few rows because the products run without tensor cores. Programs have few threads, so that each thread reads
and writes 16 bytes at a time.
"""

_FLOAT32_AT = {
    ("sm_90", 80): ((16, 16, 2), (32, 16, 2), (32, 16, 4)),
    ("sm_100", 80): ((16, 32, 4), (16, 16, 2), (32, 16, 4)),
    ("sm_120", 128): ((16, 32, 4), (16, 16, 2), (32, 16, 4)),
}
"""The same, in its place for head dimensions up to a bound, and beyond the bound before, where that would spill."""

_TWO_WARPS_KEYS = {"sm_80": 112, "sm_120": 64}
"""Classes of at most this many keys take two warps at head dimensions up to 64.

These chips' products are per warp (mma.sync). A key that a warp reads from shared memory then serves 32 rows instead of
16. More keys would not fit the registers.
"""


_LAUNCHES: dict[tuple[str, int], tuple[int, ...]] = {
    ("sm_80", 64): (112, 208),
    ("sm_80", 80): (64, 160, 256),
    ("sm_80", 128): (32, 256),
    ("sm_120", 64): (64, 112, 160, 208),
    ("sm_120", 80): (112, 208, 256),
    ("gfx942", 64): (112, 208),
    ("gfx942", 128): (64, 160, 208, 256),
}
"""Most keys of the short classes of each launch of the forward pass but the last, where they are not (112, 256).

One launch for all classes would fill the GPU best while few tiles are left, and cost the host least. But its programs
would have the registers and the shared memory of its largest class, and `docs/gpu.md` shows what that is: of the
classes up to 112 keys, which wait for memory most of the time, a multiprocessor holds twice as many programs or more.
So classes share a launch as long as nothing spills, all have the same number of warps, a class of four or more programs
keeps at least three, and any other at least two.
"""


def _bound(target: Target, head_dim: int) -> tuple[str, int] | None:
    """The key of `_CHOICES` for a chip and a head dimension; None for the interpreter."""
    bounds = ((target.name, bound) for bound in BOUNDS if head_dim <= bound)
    return next((key for key in bounds if key in _CHOICES), None)


def _choices(target: Target, head_dim: int) -> Choices:
    return _CHOICES.get(_bound(target, head_dim), _INTERPRETED)


def _block(name: str, first_class: int, tile: tuple[int, int, int, int]) -> Schedule:
    keys, rows, warps, stages = tile
    return Schedule(name, first_class, STREAMING, keys, block_m=rows, num_warps=warps, num_stages=stages)


def _float32(target: Target, head_dim: int) -> tuple[Schedule, ...]:
    bound = next((bound for bound in BOUNDS if head_dim <= bound), None)
    tiles = _FLOAT32_AT.get((target.name, bound)) or _FLOAT32.get(target.name, _FLOAT32["sm_80"])
    return tuple(
        Schedule("streaming", 0, STREAMING, keys, block_m=rows, num_warps=warps) for keys, rows, warps in tiles
    )


@lru_cache(maxsize=256)
def forward(target: Target, head_dim: int, dtype: torch.dtype) -> tuple[ForwardLaunch, ...]:
    """Launches of the forward pass, by class. Together they cover every class once."""
    if dtype == torch.float32:
        return (ForwardLaunch((_float32(target, head_dim)[0],)),)
    choices = _choices(target, head_dim)
    most_keys, block_keys, widest, warps = choices.short or (0, 0, 0, 0)
    short = []
    for i, keys in enumerate(KEY_CLASSES[: bisect_right(KEY_CLASSES, most_keys)]):
        if head_dim <= 64 and keys <= _TWO_WARPS_KEYS.get(target.name, 0):
            short.append(Schedule("short", i, i, keys, num_warps=2, widest_part=32))
        else:
            short.append(Schedule("short", i, i, keys, num_warps=warps, block_keys=block_keys, widest_part=widest))
    launches, start = [], 0
    for keys in _LAUNCHES.get(_bound(target, head_dim), (112, 256)):
        end = min(bisect_right(KEY_CLASSES, keys), len(short))
        if start < end:
            launches.append(ForwardLaunch(tuple(short[start:end])))
        start = end
    return (*launches, ForwardLaunch((*short[start:], _block("streaming", len(short), choices.streaming))))


class Backward(NamedTuple):
    """Schedules of the backward pass. `fused` covers its classes alone, `grad_q` and `grad_kv` all others together."""

    fused: tuple[Schedule, ...]
    grad_q: tuple[Schedule, ...]
    grad_kv: tuple[Schedule, ...]


@lru_cache(maxsize=256)
def backward(
    target: Target, head_dim: int, dtype: torch.dtype, self_attention: bool, grouped: bool = False
) -> Backward:
    """Schedules of the backward pass.

    Args:
        target: the chip.
        head_dim: D.
        dtype: of the rows.
        self_attention: whether queries and keys are the same rows, so that one tile may hold a whole sequence.
        grouped: whether several query heads share a key head; the loop over them takes registers of its own.
    """
    if dtype == torch.float32:
        _, grad_q, grad_kv = _float32(target, head_dim)
        return Backward((), (grad_q,), (grad_kv,))
    choices = _choices(target, head_dim)
    n_fused = bisect_right(KEY_CLASSES, TILE_ROWS) if self_attention and choices.fused_warps else 0
    fused = tuple(
        Schedule("fused", i, i, KEY_CLASSES[i], block_m=KEY_CLASSES[i], num_warps=choices.fused_warps)
        for i in range(n_fused)
    )
    keys, rows, warps, stages = choices.grad_kv
    grad_kv = (_block("streaming", n_fused, (keys, min(rows, 32) if grouped else rows, warps, stages)),)
    if choices.grad_q_short is None:
        return Backward(fused, (_block("streaming", n_fused, choices.grad_q),), grad_kv)
    widest, rows, warps = choices.grad_q_short
    short = [
        Schedule("short", i, i, KEY_CLASSES[i], block_m=rows, num_warps=warps, widest_part=widest)
        for i in range(n_fused, STREAMING)
    ]
    return Backward(fused, (*short, _block("streaming", STREAMING, choices.grad_q)), grad_kv)

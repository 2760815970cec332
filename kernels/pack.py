"""Shared parts of the kernels over packed rows: the sequence of a row, and rows that are read 16 bytes at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

VECTOR_BYTES = 16
"""The widest access of one thread to global memory."""


@triton.jit
def sequence_of(position, cu_seqlens, n_sequences, n_bits, unit=1, gap=0):
    """Index of the sequence at each `position`, n_sequences for padding, by binary search.

    Sequence b begins at `cu_seqlens[b] // unit + b * gap`. With the defaults, positions are rows. `gap` is the number
    of positions put before (or after) the rows of every sequence; `unit` makes positions count blocks of rows. If
    several sequences begin at a position, the result is the last: an empty sequence owns nothing.

    Args:
        position: int32, of any shape.
        cu_seqlens: int32 `[n_sequences + 1]`; whatever its values are, the result is in [0, n_sequences].
        n_sequences: B.
        n_bits: number of bits of B, which is the number of steps of the search (`search_bits`).
        unit: rows of a block.
        gap: positions added per sequence.
    """
    sequence = position * 0
    for i in range(n_bits):
        candidate = sequence + (1 << (n_bits - 1 - i))
        exists = candidate <= n_sequences
        begin = tl.load(cu_seqlens + candidate, mask=exists, other=0) // unit + candidate * gap
        sequence = tl.where(exists & (begin <= position), candidate, sequence)
    return sequence


def search_bits(n_sequences: int) -> int:
    """Number of steps of `sequence_of`."""
    return n_sequences.bit_length()


def readable(t: torch.Tensor) -> torch.Tensor:
    """The matrix itself if its rows load in vectors as wide as those of a contiguous one, else a contiguous copy.

    The width decides which thread holds which channel and therefore the order of a reduction. A slice of a pack must be
    summed in the same order as the pack, so no kernel ever gets less alignment than a new tensor has.
    """
    n_channels, itemsize = t.shape[1], t.element_size()
    if not t.is_contiguous():
        bytes_apart = (t.stride(0) * itemsize, n_channels * itemsize)
        if t.stride(1) != 1 or any(n % VECTOR_BYTES for n in bytes_apart):
            return t.contiguous()
    return t if t.storage_offset() * itemsize % VECTOR_BYTES == 0 else t.clone(memory_format=torch.contiguous_format)


def row_stride(t: torch.Tensor) -> int:
    """Elements from one row to the next; the stride of a single row has no meaning."""
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]

"""Which sequence each row of a pack belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from revit_fast.packing import Layout, device_cu_seqlens


def sequences_of_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the sequence that each row of `x` belongs to, int64 `[T]`; the number of sequences for padding."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def sequence_max(x: Tensor, cu_seqlens: Tensor, skip: int) -> Tensor:
    """Largest value of every channel within each sequence, without its first `skip` rows.

    Args:
        x: `[T, C]`.
        cu_seqlens: int32 `[B + 1]`.
        skip: leading rows of every sequence to leave out.

    Returns:
        `[B, C]`, zero for a sequence without remaining rows.
    """
    n_sequences = cu_seqlens.shape[0] - 1
    sequence = sequences_of_rows(x, cu_seqlens)
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    sequence = torch.where(rows < cu_seqlens[sequence] + skip, n_sequences, sequence)  # last slot: skipped rows
    out = x.new_zeros(n_sequences + 1, x.shape[1])
    return out.scatter_reduce(0, sequence.unsqueeze(1).expand_as(x), x, "amax", include_self=False)[:-1]


def rows_without_first(x: Tensor, layout: Layout, skip: int) -> tuple[Tensor, Layout]:
    """The rows of every sequence except its first `skip`, and their layout.

    Args:
        x: `[T, C]`.
        layout: layout of x.
        skip: leading rows of every sequence to leave out.

    Returns:
        `[T - B * skip, C]`; rows at its end may be padding.
    """
    if skip == 0:
        return x, layout
    starts = layout.cu_seqlens[:-1]
    cu_seqlens = device_cu_seqlens((layout.cu_seqlens.diff() - skip).clamp(min=0))
    kept = x.new_empty(x.shape[0] - skip * starts.shape[0], 0)
    sequence = sequences_of_rows(kept, cu_seqlens).clamp(max=starts.shape[0] - 1)
    rows = torch.arange(kept.shape[0], dtype=torch.int32, device=x.device)
    rows = (rows - cu_seqlens[sequence] + starts[sequence] + skip).clamp(max=x.shape[0] - 1)
    return x.index_select(0, rows), Layout(cu_seqlens, layout.length_index, None)

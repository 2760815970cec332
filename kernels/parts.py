"""Shared parts of the attention kernels: rows as parts of the head dimension, and their products.

Extents that are not powers of two, such as head dimension 80 and 208 keys, are cut into parts that are: 64 + 16, and
128 + 64 + 16. A part is a pair (start, width); a tensor of rows is a tuple of tensors, one per part.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rounding import INTERPRETED, rounded


@triton.constexpr_function
def element(nested, *path):
    """nested[i][j]... of a compile-time value: Triton 3.6 reads subscripts of two levels at most."""
    for i in path:
        nested = nested[i]
    return nested


@triton.constexpr_function
def n_elements(nested, *path):
    """len(nested[i][j]...) of a compile-time value."""
    for i in path:
        nested = nested[i]
    return len(nested)


@triton.jit
def sequence_rows(cu_seqlens, sequence, n_rows):
    """First row and end of a sequence, clamped to the existing rows."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), n_rows)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), begin), n_rows)
    return begin, end - begin


@triton.jit
def n_steps(first, n, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Number of blocks that hold any row, in a tile that begins at row `first` of n."""
    if BLOCK == TILE:
        steps: tl.constexpr = 1  # the compiler then generates no loop
    else:
        steps = tl.cdiv(tl.minimum(n - first, TILE), BLOCK)
    return steps


@triton.jit
def load_parts(base, rows, n_rows, stride, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Rows `[len(rows), HEAD_DIM]` from `base` as one tensor per part of the head dimension, zero beyond the ends."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        columns = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        pointers = base + rows[:, None] * stride + columns[None, :]
        if PARTS[i][0] + PARTS[i][1] > HEAD_DIM:
            inside = columns[None, :] < HEAD_DIM
            if MASK_ROWS:
                inside = inside & (rows[:, None] < n_rows)
            part = tl.load(pointers, mask=inside, other=0.0)
        elif MASK_ROWS:
            part = tl.load(pointers, mask=rows[:, None] < n_rows, other=0.0)
        else:
            part = tl.load(pointers)
        parts = parts + (part,)
    return parts


@triton.jit
def store_parts(base, rows, n_rows, stride, parts, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    for i in tl.static_range(len(PARTS)):
        columns = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        inside = rows[:, None] < n_rows
        if PARTS[i][0] + PARTS[i][1] > HEAD_DIM:
            inside = inside & (columns[None, :] < HEAD_DIM)
        pointers = base + rows[:, None] * stride + columns[None, :]
        tl.store(pointers, rounded(parts[i], base.dtype.element_ty), mask=inside)


@triton.jit
def zero_parts(N_ROWS: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (tl.zeros((N_ROWS, int(PARTS[i][1])), tl.float32),)
    return parts


@triton.jit
def scale_parts(parts, factor):
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def multiply_rows(parts, factor):
    """parts · factor in their own dtype."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        # This goes by way of float32 because the interpreter cannot make a bfloat16 constant.
        scaled = scaled + ((parts[i].to(tl.float32) * factor).to(parts[i].dtype),)
    return scaled


@triton.jit
def _dot(a, b, acc):
    """a b + acc; acc float32 or None."""
    if INTERPRETED:  # the interpreter's product reads the bits of a bfloat16 as an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _inner_part(a, b, acc):
    """a bᵀ + acc; acc float32 or None."""
    # A GPU adds float32 products in the order of the depth, so a bᵀ and b aᵀ have the same bits. The backward passes
    # rely on this because they compute scores both ways. NumPy's matrix product does not do so on every processor.
    if INTERPRETED and a.dtype == tl.float32:
        s = tl.sum(a[:, None, :] * b[None, :, :], 2)
        if acc is not None:
            s += acc
    else:
        s = _dot(a, tl.trans(b), acc)
    return s


@triton.jit
def inner(a, b):
    """a bᵀ, summed over the parts of the head dimension."""
    s = _inner_part(a[0], b[0], None)
    for i in tl.static_range(1, len(a)):
        s = _inner_part(a[i], b[i], s)
    return s


@triton.jit
def add_outer(parts, weights, rows):
    """parts + weights rows, part by part of the head dimension."""
    summed = ()
    for i in tl.static_range(len(parts)):
        if weights.dtype == tl.float32:
            # A GPU rounds a float32 product after every row. Begun at `parts`, it would round the whole sum each time,
            # and sums over hundreds of rows would lose digits; so every block is summed alone. The compiler would turn
            # parts + product into a product begun at `parts`; it leaves a difference as it is.
            summed = summed + (parts[i] - _dot(-weights, rows[i], None),)
        else:
            summed = summed + (_dot(weights, rows[i], parts[i]),)
    return summed


@triton.jit
def visible(rows, keys, n_keys, diagonal, CAUSAL: tl.constexpr):
    """Whether a query row sees a key: any existing key, if causal only up to the diagonal (aligned bottom right)."""
    seen = keys < n_keys
    if CAUSAL:
        seen = seen & (keys <= rows + diagonal)
    return seen


def rows_contiguous(t: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()

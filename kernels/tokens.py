"""Assembly of packed token sequences from embedded patches, and mean pooling; forward and backward.

`patches` is `[Tp, C]`, `cu_seqlens` counts patches. Sequence b of the assembled tokens begins at
`cu_seqlens[b] + b n_prefix`. It holds its prefix tokens, then each patch plus its row of the position table,
`pos_offset[b] + i` for patch i. Padding rows are never read and their results are zero.

This is the epilogue of the patch embedding without its bias: the matrix product that computes `patches` adds the bias
at no cost, and here it would be one more operand. The kernels move memory: each program gathers a block of rows and
columns of the result. Sums are in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, target_of
from .pack import readable, row_stride, search_bits, sequence_of
from .rounding import rounded

THREADS = 128
"""Threads of one program, whatever the size of a warp."""

TILE_BYTES = 8192
"""Result bytes of one program of the kernels that gather: four 16-byte accesses for each thread."""


def _tile(t: Tensor) -> tuple[int, int]:
    """Rows and columns of one program that gathers; the columns divide C if C is a multiple of 64."""
    n_channels = t.shape[1]
    divisor = n_channels & -n_channels
    columns = min(divisor if divisor >= 64 else triton.next_power_of_2(n_channels), 512)
    return min(TILE_BYTES // (columns * t.element_size()), 64), columns


@triton.jit(do_not_specialize=["n_rows", "n_patches", "n_sequences", "n_bits", "n_prefix", "n_positions"])
def patch_embed_assemble_kernel(
    patches,
    prefix,
    pos_table,
    pos_offset,
    cu_seqlens,
    tokens,
    n_rows,
    n_patches,
    n_sequences,
    n_bits,
    n_prefix,
    n_positions,
    PATCH_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    sequence = sequence_of(rows, cu_seqlens, n_sequences, n_bits, 1, n_prefix)
    valid = (rows < n_rows) & (sequence < n_sequences)
    begin = tl.load(cu_seqlens + sequence, mask=valid, other=0)
    local = rows - begin - sequence * n_prefix
    of_patch = local - n_prefix
    patch = begin + of_patch
    position = tl.load(pos_offset + sequence, mask=valid, other=0) + of_patch
    is_patch = valid & (of_patch >= 0) & (patch >= 0) & (patch < n_patches)
    has_position = is_patch & (position >= 0) & (position < n_positions)
    in_row = cols < C
    tokens_of_prefix = tl.load(
        prefix + local[:, None].to(tl.int64) * C + cols,
        mask=(valid & (local >= 0) & (of_patch < 0))[:, None] & in_row,
        other=0.0,
    )
    of_patches = tl.load(
        patches + patch[:, None].to(tl.int64) * PATCH_STRIDE + cols, mask=is_patch[:, None] & in_row, other=0.0
    )
    positions = tl.load(
        pos_table + position[:, None].to(tl.int64) * C + cols, mask=has_position[:, None] & in_row, other=0.0
    )
    # At most one of patch and prefix token is not zero here, so the sums round once.
    out = of_patches.to(tl.float32) + positions.to(tl.float32) + tokens_of_prefix.to(tl.float32)
    tl.store(
        tokens + rows[:, None].to(tl.int64) * C + cols,
        rounded(out, tokens.dtype.element_ty),
        mask=(rows < n_rows)[:, None] & in_row,
    )


@triton.jit(do_not_specialize=["n_rows", "n_patches", "n_sequences", "n_bits", "n_prefix"])
def patch_embed_backward_kernel(
    grad_tokens,
    cu_seqlens,
    grad_patches,
    n_rows,
    n_patches,
    n_sequences,
    n_bits,
    n_prefix,
    GRAD_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Each patch's gradient is that of its token."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    sequence = sequence_of(rows, cu_seqlens, n_sequences, n_bits)
    token = rows + (sequence + 1) * n_prefix
    write = (rows < n_patches)[:, None] & (cols < C)
    read = write & ((sequence < n_sequences) & (token < n_rows))[:, None]
    grad = tl.load(grad_tokens + token[:, None].to(tl.int64) * GRAD_STRIDE + cols, mask=read, other=0.0)
    tl.store(grad_patches + rows[:, None].to(tl.int64) * C + cols, grad, mask=write)


@triton.jit(do_not_specialize=["n_rows", "n_sequences", "n_prefix"])
def patch_embed_table_backward_kernel(
    grad_tokens,
    pos_offset,
    cu_seqlens,
    grad_prefix,
    grad_pos_table,
    n_rows,
    n_sequences,
    n_prefix,
    GRAD_STRIDE: tl.constexpr,
    C: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A row of grad_prefix or grad_pos_table: the sum, over sequences in order, of the gradients of its tokens."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    is_prefix = row < n_prefix
    total = tl.zeros((SEQUENCES, BLOCK_C), tl.float32)
    for first in range(0, n_sequences, SEQUENCES):
        sequence = first + tl.arange(0, SEQUENCES)
        exists = sequence < n_sequences
        begin = tl.load(cu_seqlens + sequence, mask=exists, other=0)
        end = tl.load(cu_seqlens + sequence + 1, mask=exists, other=0)
        patch = row - n_prefix - tl.load(pos_offset + sequence, mask=exists, other=0)
        local = tl.where(is_prefix, row, n_prefix + patch)
        token = begin + sequence * n_prefix + local
        has_token = (
            exists
            & ((row + sequence * 0 < n_prefix) | ((patch >= 0) & (patch < end - begin)))
            & (token >= 0)
            & (token < n_rows)
        )
        total += tl.load(
            grad_tokens + token[:, None].to(tl.int64) * GRAD_STRIDE + cols[None, :],
            mask=has_token[:, None] & in_row[None, :],
            other=0.0,
        ).to(tl.float32)
    out = rounded(tl.sum(total, axis=0), grad_prefix.dtype.element_ty)
    tl.store(grad_prefix + row.to(tl.int64) * C + cols, out, mask=in_row & (row + cols * 0 < n_prefix))
    tl.store(grad_pos_table + (row - n_prefix).to(tl.int64) * C + cols, out, mask=in_row & (row + cols * 0 >= n_prefix))


@triton.jit(do_not_specialize=["n_rows", "skip"])
def mean_pool_kernel(
    x,
    cu_seqlens,
    out,
    n_rows,
    skip,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sequence = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    begin = tl.maximum(tl.load(cu_seqlens + sequence), 0) + skip
    end = tl.minimum(tl.load(cu_seqlens + sequence + 1), n_rows)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & in_row[None, :]
        total += tl.load(x + rows[:, None].to(tl.int64) * X_STRIDE + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # The sum has two steps because rounding errors grow with the number of successive additions.
    total = tl.sum(tl.reshape(total, (ROWS // 8, 8, BLOCK_C)), axis=0)
    mean = tl.div_rn(tl.sum(total, axis=0), tl.maximum(end - begin, 1).to(tl.float32))
    tl.store(out + sequence.to(tl.int64) * C + cols, rounded(mean, out.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["n_rows", "n_sequences", "n_bits", "skip"])
def mean_pool_backward_kernel(
    grad_out,
    cu_seqlens,
    grad_x,
    n_rows,
    n_sequences,
    n_bits,
    skip,
    GRAD_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    sequence = sequence_of(rows, cu_seqlens, n_sequences, n_bits)
    valid = (rows < n_rows) & (sequence < n_sequences)
    begin = tl.load(cu_seqlens + sequence, mask=valid, other=0) + skip
    count = tl.maximum(tl.load(cu_seqlens + sequence + 1, mask=valid, other=0) - begin, 1)
    read = (valid & (rows >= begin))[:, None] & (cols < C)
    grad = tl.load(grad_out + sequence[:, None].to(tl.int64) * GRAD_STRIDE + cols, mask=read, other=0.0)
    grad = tl.div_rn(grad.to(tl.float32), tl.broadcast_to(count[:, None].to(tl.float32), grad.shape))
    tl.store(
        grad_x + rows[:, None].to(tl.int64) * C + cols,
        rounded(grad, grad_x.dtype.element_ty),
        mask=(rows < n_rows)[:, None] & (cols < C),
    )


def assemble_tokens(
    patches: Tensor, prefix: Tensor, pos_table: Tensor, pos_offset: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Launches the op of the same name."""
    (n_patches, n_channels), n_sequences, n_prefix = patches.shape, pos_offset.shape[0], prefix.shape[0]
    n_rows = n_patches + n_sequences * n_prefix
    patches, prefix, pos_table = readable(patches), readable(prefix.contiguous()), readable(pos_table.contiguous())
    tokens = patches.new_empty(n_rows, n_channels)
    rows, columns = _tile(tokens)
    launch(
        patch_embed_assemble_kernel,
        (triton.cdiv(n_rows, rows), triton.cdiv(n_channels, columns)),
        *(patches, prefix, pos_table, pos_offset, cu_seqlens, tokens),
        *(n_rows, n_patches, n_sequences, search_bits(n_sequences), n_prefix, pos_table.shape[0]),
        num_warps=THREADS // target_of(patches.device).warp_size,
        PATCH_STRIDE=row_stride(patches),
        C=n_channels,
        ROWS=rows,
        BLOCK_C=columns,
    )
    return tokens


def assemble_tokens_backward(
    grad_tokens: Tensor, pos_table: Tensor, pos_offset: Tensor, cu_seqlens: Tensor, n_prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the op of the same name."""
    (n_rows, n_channels), n_sequences, n_positions = grad_tokens.shape, pos_offset.shape[0], pos_table.shape[0]
    n_patches = n_rows - n_sequences * n_prefix
    grad_tokens = readable(grad_tokens)
    grad_patches = grad_tokens.new_empty(n_patches, n_channels)
    grad_prefix = grad_tokens.new_empty(n_prefix, n_channels)
    grad_pos_table = grad_tokens.new_empty(n_positions, n_channels)
    rows, columns = _tile(grad_tokens)
    launch(
        patch_embed_backward_kernel,
        (triton.cdiv(n_patches, rows), triton.cdiv(n_channels, columns)),
        *(grad_tokens, cu_seqlens, grad_patches),
        *(n_rows, n_patches, n_sequences, search_bits(n_sequences), n_prefix),
        num_warps=THREADS // target_of(grad_tokens.device).warp_size,
        GRAD_STRIDE=row_stride(grad_tokens),
        C=n_channels,
        ROWS=rows,
        BLOCK_C=columns,
    )
    launch(
        patch_embed_table_backward_kernel,
        (n_prefix + n_positions, triton.cdiv(n_channels, columns)),
        *(grad_tokens, pos_offset, cu_seqlens, grad_prefix, grad_pos_table),
        *(n_rows, n_sequences, n_prefix),
        num_warps=THREADS // target_of(grad_tokens.device).warp_size,
        GRAD_STRIDE=row_stride(grad_tokens),
        C=n_channels,
        SEQUENCES=min(rows, 16),
        BLOCK_C=columns,
    )
    return grad_patches, grad_prefix, grad_pos_table


def mean_pool(x: Tensor, cu_seqlens: Tensor, skip: int) -> Tensor:
    """Launches the op of the same name."""
    (n_rows, n_channels), n_sequences = x.shape, cu_seqlens.shape[0] - 1
    x = readable(x)
    out = x.new_empty(n_sequences, n_channels)
    # Few sequences need many programs, so each program takes the columns of one cache line and as many rows at a time
    # as it has threads.
    columns = 128 // x.element_size()
    launch(
        mean_pool_kernel,
        (n_sequences, triton.cdiv(n_channels, columns)),
        *(x, cu_seqlens, out, n_rows, min(skip, n_rows)),  # bounded: a kernel adds it to an offset
        num_warps=THREADS // target_of(x.device).warp_size,
        X_STRIDE=row_stride(x),
        C=n_channels,
        ROWS=64,
        BLOCK_C=columns,
    )
    return out


def mean_pool_backward(grad_out: Tensor, cu_seqlens: Tensor, skip: int, n_rows: int) -> Tensor:
    """Launches the op of the same name."""
    n_sequences, n_channels = grad_out.shape
    grad_out = readable(grad_out)
    grad_x = grad_out.new_empty(n_rows, n_channels)
    rows, columns = _tile(grad_x)
    launch(
        mean_pool_backward_kernel,
        (triton.cdiv(n_rows, rows), triton.cdiv(n_channels, columns)),
        *(grad_out, cu_seqlens, grad_x, n_rows, n_sequences, search_bits(n_sequences), min(skip, n_rows)),
        num_warps=THREADS // target_of(grad_out.device).warp_size,
        GRAD_STRIDE=row_stride(grad_out),
        C=n_channels,
        ROWS=rows,
        BLOCK_C=columns,
    )
    return grad_x

"""LayerNorm (TAL-LN) and RMSNorm with the affine parameters of each sequence's token length, forward and backward.

With s the row (or the sum of the row and its residual, as rounded to the dtype of x) and l its sequence's length:

    mean = sum(s) / C,  rstd = 1 / sqrt(sum((s - mean)^2) / C + eps),  xhat = (s - mean) rstd
    y = xhat weight[l] + bias[l]

    h = grad_y weight[l]
    grad_x = rstd (h - mean(h) - xhat mean(h xhat)) + grad_sum
    grad_weight[l] = sum over rows of length l of grad_y xhat,  grad_bias[l] = the same sum of grad_y

RMSNorm (arXiv 1910.07467) is the same without mean, bias and mean(h): rstd = 1 / sqrt(sum(s^2) / C + eps). A kernel is
compiled for it where the bias, the mean or grad_bias is None.

Rows are `[T, C]`; those from `cu_seqlens[-1]` on are padding, which is never read and whose results are zero.
Arithmetic is in float32. A program holds whole rows in registers, so that each row is read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Target, launch, target_of
from .pack import readable, row_stride, search_bits, sequence_of
from .rounding import rounded

MAX_CHANNELS = 16384
"""Longest row that 32 warps can hold twice in registers without spilling."""

VALUES_PER_THREAD = 32
"""Values per thread of a row with its own warps. Rows that share a warp have half as many: more made ptxas spill."""


def _tile(target: Target, n_channels: int) -> tuple[int, int, int]:
    """Rows and columns of one program and its warps.

    One warp works on a row if its registers can hold it: every sum across warps would cost a barrier. Short rows share
    a warp.
    """
    block = triton.next_power_of_2(n_channels)
    of_a_warp = VALUES_PER_THREAD * target.warp_size
    warps = min(max(1, block // of_a_warp), 1024 // target.warp_size)
    return min(max(1, of_a_warp // 2 // block), 16), block, warps


@triton.jit
def _rows(matrix, first, local, STRIDE: tl.constexpr):
    """Pointers `[len(local), 1]` to rows first + local: one 64-bit base, 32-bit steps."""
    return matrix + tl.cast(first, tl.int64) * STRIDE + local[:, None] * STRIDE


@triton.jit(do_not_specialize=["n_rows", "n_sequences", "n_bits", "n_lengths"])
def tal_layer_norm_kernel(
    x,
    residual,
    weight,
    bias,
    cu_seqlens,
    length_index,
    y,
    total,
    mean,
    rstd,
    n_rows,
    n_sequences,
    n_bits,
    n_lengths,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    local = tl.arange(0, ROWS)
    rows = first + local
    cols = tl.arange(0, BLOCK_C)[None, :]
    exists = rows < n_rows
    sequence = sequence_of(rows, cu_seqlens, n_sequences, n_bits)
    valid = exists & (sequence < n_sequences)
    length = tl.load(length_index + sequence, mask=valid, other=0)
    length = tl.minimum(tl.maximum(length, 0), n_lengths - 1)

    read = valid[:, None] & (cols < C)
    write = exists[:, None] & (cols < C)
    s = tl.load(_rows(x, first, local, X_STRIDE) + cols, mask=read, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(_rows(residual, first, local, RESIDUAL_STRIDE) + cols, mask=read, other=0.0).to(tl.float32)
        as_stored = rounded(s, total.dtype.element_ty)
        tl.store(_rows(total, first, local, C) + cols, as_stored, mask=write)
        s = as_stored.to(tl.float32)

    if bias is not None:
        # The first mean has the rounding error of a long sum. The mean of the centred row corrects both the mean and
        # the variance (Chan, Golub and LeVeque, 1983), so that rows far from zero are as accurate as centred ones.
        estimate = tl.sum(s, axis=1) / C
        centred = tl.where(cols < C, s - estimate[:, None], 0.0)
        correction = tl.sum(centred, axis=1) / C
        variance = tl.maximum(tl.sum(centred * centred, axis=1) / C - correction * correction, 0.0)
    else:
        variance = tl.sum(s * s, axis=1) / C
    # These are correctly rounded: chips only approximate 1 / sqrt, which is visible in rows with little variance.
    deviation = tl.sqrt_rn(variance + eps)
    scale = tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)

    w = tl.load(weight + length[:, None] * C + cols, mask=read, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + length[:, None] * C + cols, mask=read, other=0.0).to(tl.float32)
        xhat = (centred - correction[:, None]) * scale[:, None]
        out = xhat * w + shift
    else:
        out = s * scale[:, None] * w
    out = tl.where(valid[:, None], out, 0.0)
    tl.store(_rows(y, first, local, C) + cols, rounded(out, y.dtype.element_ty), mask=write)
    if bias is not None:
        tl.store(mean + rows, tl.where(valid, estimate + correction, 0.0), mask=exists)
    tl.store(rstd + rows, tl.where(valid, scale, 0.0), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "n_sequences", "n_bits", "n_lengths", "part_rows"])
def tal_layer_norm_backward_kernel(
    grad_y,
    grad_sum,
    x,
    weight,
    mean,
    rstd,
    cu_seqlens,
    length_index,
    grad_x,
    part_sums,
    part_length,
    n_rows,
    n_sequences,
    n_bits,
    n_lengths,
    part_rows,
    GRAD_Y_STRIDE: tl.constexpr,
    GRAD_SUM_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x of one part, and the part's share of grad_weight and grad_bias.

    The pack is cut at every multiple of `part_rows` and where a sequence begins, so that a part has only one length.
    The parts of sequence b (the padding rows count as the last one) are numbered from `cu_seqlens[b] // part_rows + b`
    on. No two parts share a number; the unused numbers are parts without rows.
    """
    part = tl.program_id(0)
    sequence = sequence_of(part, cu_seqlens, n_sequences, n_bits, part_rows, 1)
    in_pack = sequence < n_sequences
    begin = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1, mask=in_pack, other=n_rows)
    cut = (part - sequence) * part_rows
    start = tl.maximum(tl.maximum(cut, begin), 0)
    stop = tl.minimum(tl.minimum(cut + part_rows, end), n_rows)
    length = tl.load(length_index + sequence, mask=in_pack, other=0)
    length = tl.minimum(tl.maximum(length, 0), n_lengths - 1)

    local = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_C)[None, :]
    in_row = cols < C
    # Masks are compared as vectors: Triton 3.9's interpreter treats a vector and a scalar boolean as integers.
    row_in_pack = sequence + local * 0 < n_sequences
    w = tl.load(weight + length * C + cols, mask=in_row & (sequence + cols * 0 < n_sequences), other=0.0).to(tl.float32)
    sum_weight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(start, stop, ROWS):
        rows = first + local
        exists = rows < stop
        write = exists[:, None] & in_row
        read = write & row_in_pack[:, None]
        grad = tl.load(_rows(grad_y, first, local, GRAD_Y_STRIDE) + cols, mask=read, other=0.0).to(tl.float32)
        s = tl.load(_rows(x, first, local, X_STRIDE) + cols, mask=read, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, mask=exists & row_in_pack, other=0.0)[:, None]
        if mean is not None:
            centre = tl.load(mean + rows, mask=exists & row_in_pack, other=0.0)[:, None]
            # The stored mean is rounded. The remaining mean is subtracted, as in the forward pass.
            centred = tl.where(in_row, s - centre, 0.0)
            correction = tl.sum(centred, axis=1, keep_dims=True) / C
            xhat = tl.where(in_row, (centred - correction) * scale, 0.0)
        else:
            xhat = s * scale
        sum_weight += grad * xhat
        h = grad * w
        if mean is not None:
            sum_bias += grad
            # mean((h - mean(h)) xhat) is mean(h xhat) without the rounding error of mean(h) mean(xhat).
            h = tl.where(in_row, h - tl.sum(h, axis=1, keep_dims=True) / C, 0.0)
        mean_hx = tl.sum(h * xhat, axis=1, keep_dims=True) / C
        out = (h - xhat * mean_hx) * scale
        if grad_sum is not None:
            out += tl.load(_rows(grad_sum, first, local, GRAD_SUM_STRIDE) + cols, mask=read, other=0.0).to(tl.float32)
        tl.store(_rows(grad_x, first, local, C) + cols, rounded(out, grad_x.dtype.element_ty), mask=write)

    counts = in_pack & (start < stop)
    tl.store(part_length + part, tl.where(counts, length, -1))
    channels = tl.arange(0, BLOCK_C)
    sums = part_sums + part.to(tl.int64) * (2 * C) + channels
    written = (channels < C) & (start + channels * 0 < stop) & (sequence + channels * 0 < n_sequences)
    tl.store(sums, tl.sum(sum_weight, axis=0), mask=written)
    if mean is not None:
        tl.store(sums + C, tl.sum(sum_bias, axis=0), mask=written)


@triton.jit(do_not_specialize=["n_parts"])
def tal_layer_norm_backward_reduce_kernel(
    part_sums,
    part_length,
    grad_weight,
    grad_bias,
    n_parts,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_weight and grad_bias of one length and a block of channels: the sum over the parts of that length."""
    length = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_row = cols < C
    sum_weight = tl.zeros((PARTS, BLOCK_C), tl.float32)
    sum_bias = tl.zeros((PARTS, BLOCK_C), tl.float32)
    for first in range(0, n_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        counts = tl.load(part_length + parts, mask=parts < n_parts, other=-1) == length
        sums = part_sums + parts[:, None].to(tl.int64) * (2 * C) + cols[None, :]
        mask = counts[:, None] & in_row[None, :]
        sum_weight += tl.load(sums, mask=mask, other=0.0)
        if grad_bias is not None:
            sum_bias += tl.load(sums + C, mask=mask, other=0.0)
    # The last step is in float64. It has too few additions to be slow; for a small pack it has all of them.
    sum_weight = tl.sum(sum_weight.to(tl.float64), axis=0).to(tl.float32)
    out = length * C + cols
    tl.store(grad_weight + out, rounded(sum_weight, grad_weight.dtype.element_ty), mask=in_row)
    if grad_bias is not None:
        sum_bias = tl.sum(sum_bias.to(tl.float64), axis=0).to(tl.float32)
        tl.store(grad_bias + out, rounded(sum_bias, grad_bias.dtype.element_ty), mask=in_row)


def tal_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    length_index: Tensor,
    eps: float,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the op of the same name."""
    y, _, mean, rstd = _forward(x, None, weight, bias, cu_seqlens, length_index, eps)
    return y, mean, rstd


def tal_layer_norm_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    length_index: Tensor,
    eps: float,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the op of the same name."""
    return _forward(x, residual, weight, bias, cu_seqlens, length_index, eps)


def _check(x: Tensor, weight: Tensor, n_sequences: int) -> None:
    if x.shape[1] > MAX_CHANNELS:
        raise ValueError(
            f"x: the GPU kernels normalise rows of at most {MAX_CHANNELS} channels, got {x.shape[1]}; "
            "move this layer to the CPU"
        )
    if n_sequences and not weight.shape[0]:
        raise ValueError(f"weight: expected at least one length, got shape {list(weight.shape)}")


def _forward(x, residual, weight, bias, cu_seqlens, length_index, eps):
    n_rows, n_channels = x.shape
    n_sequences = length_index.shape[0]
    _check(x, weight, n_sequences)
    x, weight = readable(x), readable(weight.contiguous())
    bias = None if bias is None else readable(bias.contiguous())
    residual = None if residual is None else readable(residual)
    y = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(n, dtype=torch.float32) for n in (0 if bias is None else n_rows, n_rows))
    rows, block, warps = _tile(target_of(x.device), n_channels)
    launch(
        tal_layer_norm_kernel,
        (triton.cdiv(n_rows, rows),),
        *(x, residual, weight, bias, cu_seqlens, length_index, y, total, mean, rstd),
        *(n_rows, n_sequences, search_bits(n_sequences), weight.shape[0], eps),
        num_warps=warps,
        X_STRIDE=row_stride(x),
        RESIDUAL_STRIDE=0 if residual is None else row_stride(residual),
        C=n_channels,
        ROWS=rows,
        BLOCK_C=block,
    )
    return y, total, mean, rstd


def _part_rows(n_rows: int) -> int:
    """Rows of one part: enough parts to fill a GPU but not more, because each part writes two rows of sums."""
    return min(max(triton.next_power_of_2(triton.cdiv(n_rows, 1024)), 4), 64)


def tal_layer_norm_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the op of the same name.

    One pass over the rows gives grad_x and the sums per part; a second kernel adds up these sums. Rows are read only
    once because the sums cost 16 / (3 part_rows) of a 16-bit row's traffic, while a second reading would cost 2 / 3.
    """
    n_rows, n_channels = x.shape
    n_lengths, n_sequences = weight.shape[0], length_index.shape[0]
    _check(x, weight, n_sequences)
    x, grad_y, weight = readable(x), readable(grad_y), readable(weight.contiguous())
    grad_sum = None if grad_sum is None else readable(grad_sum)
    part_rows = _part_rows(n_rows)
    n_parts = triton.cdiv(n_rows, part_rows) + n_sequences
    grad_x = x.new_empty(x.shape)
    mean = None if mean is None else mean.contiguous()
    grad_weight, grad_bias = (weight.new_empty(shape) for shape in (weight.shape, 0 if mean is None else weight.shape))
    part_sums = x.new_empty(n_parts, 2, n_channels, dtype=torch.float32)
    part_length = x.new_empty(n_parts, dtype=torch.int32)
    rows, block, warps = _tile(target_of(x.device), n_channels)
    launch(
        tal_layer_norm_backward_kernel,
        (n_parts,),
        *(grad_y, grad_sum, x, weight, mean, rstd.contiguous(), cu_seqlens, length_index),
        *(grad_x, part_sums, part_length),
        *(n_rows, n_sequences, search_bits(n_sequences), n_lengths, part_rows),
        num_warps=warps,
        GRAD_Y_STRIDE=row_stride(grad_y),
        GRAD_SUM_STRIDE=0 if grad_sum is None else row_stride(grad_sum),
        X_STRIDE=row_stride(x),
        C=n_channels,
        ROWS=rows,
        BLOCK_C=block,
    )
    launch(
        tal_layer_norm_backward_reduce_kernel,
        (triton.cdiv(n_channels, 32), n_lengths),
        *(part_sums, part_length, grad_weight, None if mean is None else grad_bias, n_parts),
        num_warps=8,
        C=n_channels,
        PARTS=128,
        BLOCK_C=32,
    )
    return grad_x, grad_weight, grad_bias

"""LayerNorm (TAL-LN) and RMSNorm whose affine parameters are chosen by each sequence's token length.

For RMSNorm the ops take None as bias and return an empty mean; the backward op takes None as mean and returns an empty
gradient of the bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library


def tal_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    tiles: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token-length-aware LayerNorm: row i of sequence b becomes `norm(x_i) * weight[l] + bias[l]`, l = length_index[b].

    The residual form reads both summands once and returns their sum too, so that a pre-norm block needs one pass.
    Statistics are kept in float32 (float64 for float64 rows) and stay accurate for rows whose mean is large compared
    with their deviation. The sum is rounded to the dtype of `x` before it is normalised, as in eager PyTorch.

    Args:
        x: `[T, C]` rows of the pack; rows beyond `cu_seqlens[-1]` are padding.
        weight: `[n_lengths, C]`, in the dtype of `x`, or float32 with bfloat16 and float16 rows.
        bias: `[n_lengths, C]` in the dtype of `weight`.
        cu_seqlens: int32 `[B + 1]`, first row of each sequence, then the end of the last.
        length_index: int32 `[B]`, row of `weight` and `bias` of each sequence.
        eps: added to the variance; not negative.
        residual: `[T, C]` in the dtype of `x`, added to it first.
        tiles: the work list of the pack (`revit_fast.packing.work_list`), for kernels that use it.

    Returns:
        y `[T, C]`, or `(y, x + residual)` where a residual is given; zero on padding rows.

    Raises:
        TypeError: for an argument that is not a tensor or has another dtype.
        ValueError: for shapes or devices that do not belong together, or an eps that is negative or not finite.
        RuntimeError: for values of `cu_seqlens` or `length_index` that are out of range (on the CPU).

    Source: TAL-LN of "Make A Long Image Short" (arXiv 2307.02092); statistics as in `torch.nn.functional.layer_norm`.
    """
    _check(x, weight, cu_seqlens, length_index, eps, residual)
    _checks.check_like("bias", bias, "weight", weight, weight.shape)
    return _norm(x, weight, bias, cu_seqlens, length_index, eps, residual, tiles)


def tal_rms_norm(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    tiles: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Token-length-aware RMSNorm: row i of sequence b becomes `x_i / sqrt(mean(x_i^2) + eps) * weight[l]`.

    Here l = length_index[b]. The residual form, the dtype of the statistics and the rounding of the sum are those of
    `tal_layer_norm`.

    Args:
        x: `[T, C]` rows of the pack; rows beyond `cu_seqlens[-1]` are padding.
        weight: `[n_lengths, C]`, in the dtype of `x`, or float32 with bfloat16 and float16 rows.
        cu_seqlens: int32 `[B + 1]`, first row of each sequence, then the end of the last.
        length_index: int32 `[B]`, row of `weight` of each sequence.
        eps: added to the mean square; not negative.
        residual: `[T, C]` in the dtype of `x`, added to it first.
        tiles: the work list of the pack (`revit_fast.packing.work_list`), for kernels that use it.

    Returns:
        y `[T, C]`, or `(y, x + residual)` where a residual is given; zero on padding rows.

    Raises:
        TypeError: for an argument that is not a tensor or has another dtype.
        ValueError: for shapes or devices that do not belong together, or an eps that is negative or not finite.
        RuntimeError: for values of `cu_seqlens` or `length_index` that are out of range (on the CPU).

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), with a weight for every
    length as in TAL-LN; statistics as in `torch.nn.functional.rms_norm`: where a mean square is beyond float32, y is
    zero.
    """
    _check(x, weight, cu_seqlens, length_index, eps, residual)
    return _norm(x, weight, None, cu_seqlens, length_index, eps, residual, tiles)


def _norm(x, weight, bias, cu_seqlens, length_index, eps, residual, tiles) -> Tensor | tuple[Tensor, Tensor]:
    cu_seqlens, length_index = cu_seqlens.contiguous(), length_index.contiguous()
    if residual is None:
        return _library.call("tal_layer_norm", x, weight, bias, cu_seqlens, length_index, eps, tiles)[0]
    y, total, _, _ = _library.call(
        "tal_layer_norm_residual", x, residual, weight, bias, cu_seqlens, length_index, eps, tiles
    )
    return y, total


def _check(x, weight, cu_seqlens, length_index, eps, residual) -> None:
    _checks.check_rows("x", x)
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one channel, got shape {list(x.shape)}")
    _checks.check_rows("weight", weight, "[n_lengths, C]")
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(
            f"weight: expected {x.dtype} like x, or float32 for 16-bit rows, got {weight.dtype}; use weight.to(x.dtype)"
        )
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape [n_lengths, C = {x.shape[1]}], got {list(weight.shape)}")
    _checks.check_device("weight", weight, "x", x)
    _checks.check_cu_seqlens(cu_seqlens, "x", x)
    _checks.check_per_sequence("length_index", length_index, cu_seqlens)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number that is not negative, such as 1e-6, got {eps}")
    if residual is not None:
        _checks.check_like("residual", residual, "x", x, x.shape)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_statistics(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    n_rows, dtype = x.shape[0], _statistics_dtype(x)
    return x.new_empty(0 if bias is None else n_rows, dtype=dtype), x.new_empty(n_rows, dtype=dtype)


@torch.library.register_fake("revit_fast::tal_layer_norm")
def _(x, weight, bias, cu_seqlens, length_index, eps, tiles):
    return x.new_empty(x.shape), *_empty_statistics(x, bias)


@torch.library.register_fake("revit_fast::tal_layer_norm_residual")
def _(x, residual, weight, bias, cu_seqlens, length_index, eps, tiles):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_empty_statistics(x, bias)


@torch.library.register_fake("revit_fast::tal_layer_norm_backward")
def _(grad_y, grad_sum, x, weight, mean, rstd, cu_seqlens, length_index, tiles):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if mean is None else weight.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, cu_seqlens, length_index, _, tiles = inputs
    _, mean, rstd = output
    _save(ctx, x, weight, bias, mean, rstd, cu_seqlens, length_index, tiles)


def _setup_context_residual(ctx, inputs, output):
    _, _, weight, bias, cu_seqlens, length_index, _, tiles = inputs
    _, total, mean, rstd = output
    _save(ctx, total, weight, bias, mean, rstd, cu_seqlens, length_index, tiles)


def _save(ctx, normed, weight, bias, mean, rstd, *pack):
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(normed, weight, mean if ctx.has_bias else None, rstd, *pack)


def _gradients(ctx, grad_y, grad_sum):
    """Gradients of x, weight and bias."""
    grad_x, grad_weight, grad_bias = _library.call_backward(
        "tal_layer_norm_backward", grad_y, grad_sum, *ctx.saved_tensors
    )
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


def _backward(ctx, grad_y, grad_mean, grad_rstd):
    return *_gradients(ctx, grad_y, None), None, None, None, None


def _backward_residual(ctx, grad_y, grad_sum, grad_mean, grad_rstd):
    grad_x, *grads = _gradients(ctx, grad_y, grad_sum)
    return grad_x, grad_x, *grads, None, None, None, None


torch.library.register_autograd("revit_fast::tal_layer_norm", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "revit_fast::tal_layer_norm_residual", _backward_residual, setup_context=_setup_context_residual
)


def _fallback_statistics(total: Tensor, bias: Tensor | None, cu_seqlens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = total.to(_statistics_dtype(total))
    mean = rows.mean(dim=1) if bias is not None else rows.new_empty(0)
    rstd = torch.rsqrt((rows.var(dim=1, correction=0) if bias is not None else rows.square().mean(dim=1)) + eps)
    mean[cu_seqlens[-1] :] = 0
    rstd[cu_seqlens[-1] :] = 0
    return mean, rstd


def _fallback(x, weight, bias, cu_seqlens, length_index, eps, tiles):
    y = reference.tal_layer_norm(x, weight, bias, cu_seqlens, length_index, eps).to(x.dtype)
    return y, *_fallback_statistics(x, bias, cu_seqlens, eps)


def _fallback_residual(x, residual, weight, bias, cu_seqlens, length_index, eps, tiles):
    y, total = reference.tal_layer_norm(x, weight, bias, cu_seqlens, length_index, eps, residual)
    return y.to(x.dtype), total, *_fallback_statistics(total, bias, cu_seqlens, eps)


def _fallback_backward(grad_y, grad_sum, x, weight, mean, rstd, cu_seqlens, length_index, tiles):
    """Evaluates the formula directly: autograd would need the forward pass and its eps, which is not given here."""
    n_rows = int(cu_seqlens[-1])
    sequence_rows = cu_seqlens.diff().long()
    length = length_index.long().repeat_interleave(sequence_rows)
    rows = slice(0, n_rows)
    grad = grad_y[rows].to(rstd.dtype)
    centred = x[rows].to(rstd.dtype) - (0 if mean is None else mean[rows, None])
    xhat = centred * rstd[rows, None]
    h = grad * weight[length].to(rstd.dtype)
    mean_h = 0 if mean is None else h.mean(dim=1, keepdim=True)
    inner = h - mean_h - xhat * (h * xhat).mean(dim=1, keepdim=True)
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_x[rows] = (inner * rstd[rows, None] + (0 if grad_sum is None else grad_sum[rows])).to(x.dtype)
    zeros = torch.zeros_like(weight, dtype=rstd.dtype, memory_format=torch.contiguous_format)
    grad_weight = zeros.index_add(0, length, grad * xhat)
    grad_bias = weight.new_empty(0) if mean is None else zeros.index_add(0, length, grad)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


_library.register_fallback("tal_layer_norm", _fallback)
_library.register_fallback("tal_layer_norm_residual", _fallback_residual)
_library.register_fallback("tal_layer_norm_backward", _fallback_backward)

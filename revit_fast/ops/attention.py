"""Attention over packed sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library

MAX_HEAD_DIM = 256


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    tiles: Tensor | None = None,
    tile_counts: Sequence[int] = (),
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v within every sequence of a pack and every head; differentiable in q, k and v.

    Semantics are those of `flash_attn_varlen_func` (flash-attention 2). A sequence's result is bitwise the same
    whatever else is in the pack. Rows beyond `cu_seqlens[-1]` are padding: their output and gradient are zero. The
    inputs may be strided views, such as the parts of one `[T, 3, H, D]` tensor; a tensor whose last dimension is not
    contiguous is copied. On CUDA tensors `revit_fast.set_attention_backend` selects the kernels that run.

    Args:
        q: `[Tq, Hq, D]`, float32, bfloat16, float16 or float64; D from 1 to 256.
        k: `[Tk, Hkv, D]`, of q's dtype; query head h reads key head `h // (Hq // Hkv)`.
        v: `[Tk, Hkv, D]`, of q's dtype.
        cu_seqlens_q: int32 `[B + 1]`, first row of every sequence in q, then the end of the last.
        cu_seqlens_k: the same for k and v; by default `cu_seqlens_q`.
        max_seqlen_q: a bound on the rows of any sequence in q. On the CPU it is only checked.
        max_seqlen_k: the same for k and v.
        scale: factor on the scores; by default `D ** -0.5`.
        causal: query i of a sequence sees keys up to `i + Lk - Lq` (aligned bottom right).
        return_lse: whether to return the log-sum-exp of the scores too.
        tiles: work list of the pack (`PackedBatch.tiles`); it may save the op from deriving one and never changes the
            result.
        tile_counts: number of tiles of each class (`PackedBatch.tile_counts`), so that no program is launched without
            work.

    Returns:
        out `[Tq, Hq, D]` of q's dtype, zero for queries that see no key or whose scores are all -inf. With `return_lse`
        also lse `[Hq, Tq]`, float32 (float64 for float64), `-inf` for the same queries; its gradient flows back too.
        NaN stays within its sequence.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for shapes, head counts, devices or a scale that do not fit together.
        RuntimeError: on the CPU, if the values of `cu_seqlens` are not offsets into the rows.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    _check_heads(q, k, v)
    _checks.check_cu_seqlens(cu_seqlens_q, "q", q, "cu_seqlens_q")
    _checks.check_cu_seqlens(cu_seqlens_k, "q", q, "cu_seqlens_k")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(
            f"cu_seqlens_k: expected {cu_seqlens_q.shape[0]} offsets like cu_seqlens_q, got {cu_seqlens_k.shape[0]}; "
            "a sequence without keys repeats its offset"
        )
    if tiles is not None:
        _checks.check_device("tiles", tiles, "q", q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    out, lse = _library.call(
        "varlen_attention",
        q,
        k,
        v,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        scale,
        bool(causal),
        tiles,
        tile_counts,
    )
    return (out, lse) if return_lse else out


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.check_rows(name, t, "[T, H, D]")
        _checks.check_like(name, t, "q", q)
        if t.shape[2] != q.shape[2]:
            raise ValueError(f"{name}: expected head_dim {q.shape[2]} like q, got {t.shape[2]}")
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"q: head_dim must be 1 to {MAX_HEAD_DIM}, got {q.shape[2]}; split it over more heads")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v: expected {tuple(k.shape)} like k, got {tuple(v.shape)}")
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q: the number of heads must be a positive multiple of those of k and v, got {q.shape[1]} and {k.shape[1]}"
        )


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("revit_fast::varlen_attention")
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, tiles, counts):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))


@torch.library.register_fake("revit_fast::varlen_attention_backward")
def _(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    causal,
    tiles,
    counts,
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options, tiles, ctx.tile_counts = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, tiles)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, tiles = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is not None:  # lse is constant where no key is seen, but the gradient of its -inf is often NaN
        grad_lse = grad_lse.masked_fill(torch.isneginf(lse), 0.0)
    grads = _library.call_backward(
        "varlen_attention_backward",
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        *ctx.options,
        tiles,
        ctx.tile_counts,
    )
    return (*grads, *[None] * 8)


torch.library.register_autograd("revit_fast::varlen_attention", _backward, setup_context=_setup_context)


def _reference_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, *work):
    out, lse = reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, causal=causal)
    return out.contiguous(), lse.contiguous()


def _reference_backward(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    causal,
    tiles,
    counts,
):
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        outputs = reference.varlen_attention(*inputs, cu_seqlens_q, cu_seqlens_k, scale=scale, causal=causal)
    if grad_lse is None:
        grad_lse = torch.zeros_like(lse)
    grads = torch.autograd.grad(outputs, inputs, (grad_out, grad_lse), allow_unused=True, materialize_grads=True)
    return tuple(grad.contiguous() for grad in grads)


_library.register_fallback("varlen_attention", _reference_forward)
_library.register_fallback("varlen_attention_backward", _reference_backward)

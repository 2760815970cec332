"""Rotary embeddings of packed queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library

ANGLE_DTYPES = (torch.float32, torch.float64)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, half: bool = False, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Turns every pair (a, b) of channels of each head to (a cos - b sin, b cos + a sin), queries and keys in one call.

    Args:
        q: `[T, H, D]` with even D. Rows and heads may be strided, as those of a view of the product `[T, (3, H, D)]`.
        k: `[T, Hkv, D]` of the same dtype; Hkv may be 0.
        cos: float32 or float64 `[T, 1 or H, D / 2]`, cosines of the angles of each pair, for all heads or for each of
            them; then Hkv is H or 0.
        sin: sines of the angles, like `cos`.
        half: a pair is channels j and j + D / 2; otherwise 2 j and 2 j + 1.
        inverse: turns by the negative angles.

    Returns:
        The turned q and k, contiguous, of their dtype. Computed in float32 (float64 for float64 rows).

    Raises:
        TypeError: for an argument that is not a tensor or has another dtype.
        ValueError: for shapes or devices that do not belong together.

    Source: RoFormer (arXiv 2104.09864).
    """
    for name, value in (("q", q), ("k", k)):
        _checks.check_rows(name, value, "[T, H, D]")
    n_rows, n_heads, head_dim = q.shape
    if n_heads < 1 or head_dim < 2 or head_dim % 2:
        raise ValueError(f"q: expected at least one head, of an even number of channels, got {list(q.shape)}")
    _checks.check_like("k", k, "q", q, (n_rows, k.shape[1], head_dim))
    for name, value in (("cos", cos), ("sin", sin)):
        _check_angles(name, value, q, k)
    _checks.check_like("sin", sin, "cos", cos, cos.shape)
    return _library.call("rotary", q, k, cos, sin, bool(half), bool(inverse))


def _check_angles(name: str, value: Tensor, q: Tensor, k: Tensor) -> None:
    _checks.check_rows(name, value, "[T, 1 or H, D / 2]")
    if value.dtype not in ANGLE_DTYPES:
        raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}; use {name}.float()")
    _checks.check_device(name, value, "q", q)
    n_rows, n_heads, head_dim = q.shape
    of_each = value.shape[1] != 1
    if value.shape != (n_rows, n_heads if of_each else 1, head_dim // 2):
        raise ValueError(
            f"{name}: expected shape [{n_rows}, 1, {head_dim // 2}] or [{n_rows}, {n_heads}, {head_dim // 2}] for q of "
            f"shape {list(q.shape)}, got {list(value.shape)}"
        )
    if of_each and k.shape[1] not in (0, n_heads):
        raise ValueError(
            f"k: expected {n_heads} heads (or none), as {name} has an angle for each head of q, got {k.shape[1]}; "
            "turn q and k in two calls, the other one with no heads"
        )


@torch.library.register_fake("revit_fast::rotary")
def _(q, k, cos, sin, half, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    q, k, cos, sin, ctx.half, ctx.inverse = inputs
    ctx.learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(cos, sin, *((q, k) if ctx.learned else ()))


def _backward(ctx, grad_q, grad_k):
    cos, sin, *rows = ctx.saved_tensors
    grads = _library.call_backward("rotary", grad_q, grad_k, cos, sin, ctx.half, not ctx.inverse)
    if not ctx.learned:
        return *grads, None, None, None, None
    pairs = zip(rows, (grad_q, grad_k), strict=True)
    return *grads, *_gradients_of_angles(pairs, cos, ctx.half, ctx.inverse), None, None


def _gradients_of_angles(pairs, cos, half, inverse):
    """Gradients of cos and sin; sums over the heads that share an angle are in float64."""
    grad_cos, grad_sin = torch.zeros_like(cos), torch.zeros_like(cos)
    for x, grad in pairs:
        if not x.shape[1]:
            continue
        wide = torch.promote_types(x.dtype, cos.dtype)
        (a, b), (grad_a, grad_b) = (reference.pairs_of(t.to(wide), half) for t in (x, grad))
        found = grad_a * a + grad_b * b, grad_b * a - grad_a * b
        found = [t.sum(1, keepdim=True, dtype=torch.float64) for t in found] if cos.shape[1] == 1 else found
        grad_cos, grad_sin = grad_cos + found[0], grad_sin + found[1]
    return grad_cos.to(cos.dtype), (-grad_sin if inverse else grad_sin).to(cos.dtype)


torch.library.register_autograd("revit_fast::rotary", _backward, setup_context=_setup_context)


def _reference(q, k, cos, sin, half, inverse):
    return tuple(t.contiguous() for t in reference.rotary(q, k, cos, sin, half, inverse))


_library.register_fallback("rotary", _reference, in_extension=False)

"""Assembly of packed token sequences, and mean pooling over each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library


def assemble_tokens(
    patches: Tensor, prefix: Tensor, pos_table: Tensor, pos_offset: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Every sequence's prefix tokens (class token, registers), then its patches plus their position embeddings.

    Args:
        patches: `[Tp, C]` embedded patches; rows beyond `cu_seqlens[-1]` are padding.
        prefix: `[n_prefix, C]`, the same for every sequence, with their own position embeddings added; n_prefix may
            be 0. A sequence without patches gets them too.
        pos_table: `[R, C]`, position embeddings of several grids, one grid after another.
        pos_offset: int32 `[B]`, row of `pos_table` where the grid of each sequence starts.
        cu_seqlens: int32 `[B + 1]` of `patches`, without prefix tokens.

    Returns:
        `[Tp + B * n_prefix, C]`, zero on the padding rows, which stay at the end.

    Raises:
        TypeError: for an argument that is not a tensor or has another dtype than `patches` (int32 for the indices).
        ValueError: for shapes or devices that do not belong together.
        RuntimeError: for a `pos_offset` that is negative or whose grid exceeds `pos_table` (names the sequence), or
            invalid values of `cu_seqlens` (on the CPU).

    Source: `timm.models.VisionTransformer._pos_embed`, packed.
    """
    _checks.check_rows("patches", patches, "[Tp, C]")
    for name, value, axes in (("prefix", prefix, "[n_prefix, C]"), ("pos_table", pos_table, "[R, C]")):
        _checks.check_like(name, value, "patches", patches)
        if value.dim() != 2 or value.shape[1] != patches.shape[1]:
            raise ValueError(f"{name}: expected shape {axes} with C = {patches.shape[1]}, got {list(value.shape)}")
    _checks.check_cu_seqlens(cu_seqlens, "patches", patches)
    _checks.check_per_sequence("pos_offset", pos_offset, cu_seqlens)
    return _library.call(
        "assemble_tokens", patches, prefix, pos_table, pos_offset.contiguous(), cu_seqlens.contiguous()
    )


def mean_pool(x: Tensor, cu_seqlens: Tensor, skip: int = 0) -> Tensor:
    """Mean over the rows of every sequence, without its first `skip` rows (prefix tokens).

    Args:
        x: `[T, C]` rows of the pack; rows beyond `cu_seqlens[-1]` are padding.
        cu_seqlens: int32 `[B + 1]`.
        skip: leading rows of every sequence to leave out.

    Returns:
        `[B, C]`, zero for a sequence without remaining rows. Sums are in float32 (float64 for float64 rows).

    Raises:
        TypeError: for an argument that is not a tensor or has another dtype, or a `skip` that is not an int.
        ValueError: for shapes or devices that do not belong together, or a negative `skip`.
        RuntimeError: for invalid values of `cu_seqlens` (on the CPU).

    Source: `global_pool="avg"` of `timm.models.VisionTransformer`, packed.
    """
    _checks.check_rows("x", x)
    _checks.check_cu_seqlens(cu_seqlens, "x", x)
    if not isinstance(skip, int | torch.SymInt):
        raise TypeError(f"skip: expected an int, got {type(skip).__name__}")
    if skip < 0:
        raise ValueError(f"skip: expected a number of rows that is not negative, got {skip}")
    return _library.call("mean_pool", x, cu_seqlens.contiguous(), skip)


@torch.library.register_fake("revit_fast::assemble_tokens")
def _(patches, prefix, pos_table, pos_offset, cu_seqlens):
    return patches.new_empty(patches.shape[0] + pos_offset.shape[0] * prefix.shape[0], patches.shape[1])


@torch.library.register_fake("revit_fast::assemble_tokens_backward")
def _(grad_tokens, pos_table, pos_offset, cu_seqlens, n_prefix):
    n_rows, n_channels = grad_tokens.shape
    return (
        grad_tokens.new_empty(n_rows - pos_offset.shape[0] * n_prefix, n_channels),
        grad_tokens.new_empty(n_prefix, n_channels),
        grad_tokens.new_empty(pos_table.shape),
    )


@torch.library.register_fake("revit_fast::mean_pool")
def _(x, cu_seqlens, skip):
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])


@torch.library.register_fake("revit_fast::mean_pool_backward")
def _(grad_out, cu_seqlens, skip, n_rows):
    return grad_out.new_empty(n_rows, grad_out.shape[1])


def _setup_assemble(ctx, inputs, output):
    _, prefix, pos_table, pos_offset, cu_seqlens = inputs
    ctx.n_prefix = prefix.shape[0]
    ctx.save_for_backward(pos_table, pos_offset, cu_seqlens)


def _assemble_backward(ctx, grad):
    return *_library.call_backward("assemble_tokens_backward", grad, *ctx.saved_tensors, ctx.n_prefix), None, None


def _setup_mean_pool(ctx, inputs, output):
    x, cu_seqlens, skip = inputs
    ctx.skip, ctx.n_rows = skip, x.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _mean_pool_backward(ctx, grad):
    return _library.call_backward("mean_pool_backward", grad, *ctx.saved_tensors, ctx.skip, ctx.n_rows), None, None


torch.library.register_autograd("revit_fast::assemble_tokens", _assemble_backward, setup_context=_setup_assemble)
torch.library.register_autograd("revit_fast::mean_pool", _mean_pool_backward, setup_context=_setup_mean_pool)


def _fallback_assemble_backward(grad_tokens, pos_table, pos_offset, cu_seqlens, n_prefix):
    n_patches = grad_tokens.shape[0] - pos_offset.shape[0] * n_prefix
    shapes = (n_patches, n_prefix, pos_table.shape[0])
    with torch.enable_grad():
        inputs = [grad_tokens.new_zeros(n, grad_tokens.shape[1]).requires_grad_() for n in shapes]
        tokens = reference.assemble_tokens(*inputs, pos_offset, cu_seqlens)
        return torch.autograd.grad(tokens, inputs, grad_tokens, allow_unused=True, materialize_grads=True)


def _fallback_mean_pool_backward(grad_out, cu_seqlens, skip, n_rows):
    with torch.enable_grad():
        x = grad_out.new_zeros(n_rows, grad_out.shape[1]).requires_grad_()
        out = reference.mean_pool(x, cu_seqlens, skip)
        return torch.autograd.grad(out, x, grad_out, allow_unused=True, materialize_grads=True)[0]


_library.register_fallback("assemble_tokens", reference.assemble_tokens)
_library.register_fallback("assemble_tokens_backward", _fallback_assemble_backward)
_library.register_fallback("mean_pool", reference.mean_pool)
_library.register_fallback("mean_pool_backward", _fallback_mean_pool_backward)

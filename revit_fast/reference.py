"""The truth of every op in plain PyTorch: any float dtype, any device, differentiable, one sequence at a time.

Written to be read beside the formulas, not to be fast. Tests compare every kernel with these functions in float64.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def segments(cu_seqlens: Tensor) -> list[slice]:
    """The rows of every sequence."""
    offsets = cu_seqlens.tolist()
    return [slice(a, b) for a, b in pairwise(offsets)]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v within every sequence and head.

    Args:
        q: `[Tq, Hq, D]`.
        k: `[Tk, Hkv, D]`; query head h reads key head h // (Hq / Hkv).
        v: `[Tk, Hkv, D]`.
        cu_seqlens_q: `[B + 1]`.
        cu_seqlens_k: `[B + 1]`.
        scale: factor on the scores.
        causal: query i of a sequence sees keys up to i + Lk - Lq (bottom-right alignment, as in flash-attn).

    Returns:
        out `[Tq, Hq, D]`; zero for rows that see no key and for padding rows.
        lse `[Hq, Tq]`, log-sum-exp of the scaled scores, `-inf` for the same rows.
    """
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses = [], []
    for rows, keys in zip(segments(cu_seqlens_q), segments(cu_seqlens_k), strict=True):
        qb = q[rows].transpose(0, 1)
        kb = k[keys].transpose(0, 1).repeat_interleave(group, dim=0)
        vb = v[keys].transpose(0, 1).repeat_interleave(group, dim=0)
        scores = scale * (qb @ kb.transpose(1, 2))
        n_q, n_k = scores.shape[1:]
        if causal:
            visible = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
            scores = scores.masked_fill(~visible, -math.inf)
        lse = torch.logsumexp(scores.to(lse_dtype), dim=-1) if n_k else scores.new_full(scores.shape[:2], -math.inf)
        blind = torch.isneginf(lse)
        p = torch.exp(scores - lse.masked_fill(blind, 0.0).to(scores.dtype).unsqueeze(-1))
        outs.append((p @ vb).transpose(0, 1))
        lses.append(lse.to(lse_dtype))
    n_padding = q.shape[0] - int(cu_seqlens_q[-1])
    outs.append(q.new_zeros(n_padding, *q.shape[1:]))
    lses.append(q.new_full((q.shape[1], n_padding), -math.inf, dtype=lse_dtype))
    return torch.cat(outs), torch.cat(lses, dim=1)


def tal_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension with the affine parameters of each sequence's length.

    Args:
        x: `[T, C]`.
        weight: `[n_lengths, C]`.
        bias: `[n_lengths, C]`.
        cu_seqlens: `[B + 1]`.
        length_index: `[B]`.
        eps: added to the variance.
        residual: `[T, C]` added to x first.

    Returns:
        y `[T, C]`, zero on padding rows; with `residual` also x + residual (of padding rows too: zero).
    """
    total = x if residual is None else x + residual
    ys, sums = [], []
    for rows, index in zip(segments(cu_seqlens), length_index.tolist(), strict=True):
        centred = total[rows] - total[rows].mean(dim=-1, keepdim=True)
        variance = (centred * centred).mean(dim=-1, keepdim=True)
        ys.append(centred * torch.rsqrt(variance + eps) * weight[index] + bias[index])
        sums.append(total[rows])
    padding = x.new_zeros(x.shape[0] - int(cu_seqlens[-1]), x.shape[1])
    y = torch.cat([*ys, padding])
    return y if residual is None else (y, torch.cat([*sums, padding]))


def assemble_tokens(
    patches: Tensor, prefix: Tensor, pos_table: Tensor, pos_offset: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Every sequence's prefix tokens, then its patches plus their position embeddings.

    Args:
        patches: `[Tp, C]` embedded patches.
        prefix: `[n_prefix, C]`, the same tokens for every sequence, their own position embedding included.
        pos_table: `[R, C]`, position embeddings of several grids, one grid after another.
        pos_offset: `[B]`, row of `pos_table` where the grid of each sequence starts.
        cu_seqlens: `[B + 1]` of `patches`.

    Returns:
        `[Tp + B * n_prefix, C]`; zero on padding rows.
    """
    parts = []
    for rows, offset in zip(segments(cu_seqlens), pos_offset.tolist(), strict=True):
        parts += [prefix, patches[rows] + pos_table[offset : offset + rows.stop - rows.start]]
    parts.append(patches.new_zeros(patches.shape[0] - int(cu_seqlens[-1]), patches.shape[1]))
    return torch.cat(parts)


def mean_pool(x: Tensor, cu_seqlens: Tensor, skip: int = 0) -> Tensor:
    """Mean over the rows of every sequence, its first `skip` rows left out; `[B, C]`, zero where no row is left."""
    means = []
    for rows in segments(cu_seqlens):
        kept = x[rows][skip:]
        means.append(kept.sum(dim=0) / max(kept.shape[0], 1))
    return torch.stack(means) if means else x.new_zeros(0, x.shape[1])

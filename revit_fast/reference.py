"""A reference for every op in plain PyTorch: any float dtype, any device, differentiable, one sequence at a time.

The code follows the formulas and is not meant to be fast. Tests compare every kernel with these functions in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    round_factors: Callable[[Tensor], Tensor] = lambda factor: factor,
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
        round_factors: rounding of every factor of a matrix product; none by default.

    Returns:
        out `[Tq, Hq, D]`; zero for rows that see no key and for padding rows.
        lse `[Hq, Tq]`, log-sum-exp of the scaled scores, `-inf` for the same rows.
    """
    q, k, v = map(round_factors, (q, k, v))
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
        p = round_factors(torch.exp(scores - lse.masked_fill(blind, 0.0).to(scores.dtype).unsqueeze(-1)))
        outs.append((p @ vb).transpose(0, 1))
        lses.append(lse.to(lse_dtype))
    n_padding = q.shape[0] - int(cu_seqlens_q[-1])
    outs.append(q.new_zeros(n_padding, *q.shape[1:]))
    lses.append(q.new_full((q.shape[1], n_padding), -math.inf, dtype=lse_dtype))
    return torch.cat(outs), torch.cat(lses, dim=1)


def tal_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    length_index: Tensor,
    eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension with the affine parameters of each sequence's length; without bias, RMSNorm.

    Args:
        x: `[T, C]`.
        weight: `[n_lengths, C]`.
        bias: `[n_lengths, C]`; None for RMSNorm, which subtracts no mean.
        cu_seqlens: `[B + 1]`.
        length_index: `[B]`.
        eps: added to the variance, or to the mean square.
        residual: `[T, C]` added to x first.

    Returns:
        y `[T, C]`, zero on padding rows; with `residual` also x + residual, which is zero there too.
    """
    total = x if residual is None else x + residual
    ys, sums = [], []
    for rows, index in zip(segments(cu_seqlens), length_index.tolist(), strict=True):
        s = total[rows]
        if bias is not None:
            s = s - s.mean(dim=-1, keepdim=True)
        y = s * torch.rsqrt((s * s).mean(dim=-1, keepdim=True) + eps) * weight[index]
        ys.append(y if bias is None else y + bias[index])
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
        prefix: `[n_prefix, C]`, the same tokens for every sequence, with their position embeddings added.
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
    """Mean over the rows of every sequence except its first `skip`: `[B, C]`, zero where no row is left."""
    means = []
    for rows in segments(cu_seqlens):
        kept = x[rows][skip:]
        means.append(kept.sum(dim=0) / max(kept.shape[0], 1))
    return torch.stack(means) if means else x.new_zeros(0, x.shape[1])


def pairs_of(x: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channel of every pair; see `rotary`."""
    return x.chunk(2, dim=-1) if half else (x[..., 0::2], x[..., 1::2])


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, half: bool, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Queries and keys whose pairs of channels are turned by angles.

    Args:
        q: `[..., T, H, D]`.
        k: `[..., T, Hkv, D]`.
        cos: `[T, 1 or H, D / 2]`, cosines of the angles; with H of them, Hkv is H or 0.
        sin: sines, of the same shape.
        half: a pair is channels j and j + D / 2; otherwise 2 j and 2 j + 1.
        inverse: turns by the negative angles.

    Returns:
        As q and k; computed in the wider of the dtypes of rows and angles, and rounded to that of the rows.
    """
    sin = -sin if inverse else sin

    def turned(x: Tensor) -> Tensor:
        c, s = (table[:, : x.shape[-2]] for table in (cos, sin))
        first, second = pairs_of(x, half)
        pair = first * c - second * s, second * c + first * s
        return (torch.cat(pair, dim=-1) if half else torch.stack(pair, dim=-1).flatten(-2)).to(x.dtype)

    return turned(q), turned(k)


def activate(name: str, x: Tensor) -> Tensor:
    """Applies the activation of this name: "none", "gelu", "gelu_tanh", "silu", "relu" or "quick_gelu"."""
    functions = {
        "none": lambda t: t,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    }
    return functions[name](x)


def head_norm(x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    """Each row and head of `[T, H, D]` after a norm that all lengths share."""
    weight, bias, eps = norm
    if not weight.numel():
        return x
    whole = torch.tensor([0, x.shape[0] * x.shape[1]], dtype=torch.int32, device=x.device)
    bias = bias if bias.numel() else None
    return tal_layer_norm(x.flatten(0, 1), weight, bias, whole, torch.zeros_like(whole[:1]), eps).view_as(x)


def token_angles(table: Tensor, n_prefix: int, pos_offset: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Cosines and sines `[T, 1 or H, 2, D / 2]` of all tokens, from those of the grids; prefix tokens do not turn.

    Args:
        table: `[R, 1 or H, 2, D / 2]`, of several grids, one after another.
        n_prefix: number of prefix tokens of every sequence.
        pos_offset: `[B]`, row of `table` where the grid of each sequence starts.
        cu_seqlens: `[B + 1]` of the patches.
    """
    still = torch.zeros_like(table[0])
    still[:, 0] = 1
    of_patches = table.new_zeros(int(cu_seqlens[-1]), still.numel())
    of_prefix = still.flatten().expand(n_prefix, -1)
    return assemble_tokens(of_patches, of_prefix, table.flatten(1), pos_offset, cu_seqlens).unflatten(1, still.shape)


NO_NORM = *(torch.empty(0, dtype=torch.float32, device="cpu") for _ in range(2)), 0.0


class BlockWeights(NamedTuple):
    """A transformer block.

    A linear layer is a pair (weight, bias). A norm is (weight, bias, eps) with weight and bias `[n_lengths, C]`; eps is
    added to the variance. An empty bias stands for RMSNorm, whose eps is added to the mean square.

    Attributes:
        norm1: norm before attention.
        qkv: projection to queries, keys and values, `[3 * H * D, C]`.
        proj: projection of the heads' results, `[C, H * D]`.
        norm2: norm before the MLP.
        fc1: first layer of the MLP, `[hidden, C]`.
        fc2: second layer of the MLP, `[C, hidden]`.
        n_heads: attention heads H.
        activation: activation of the MLP, see `activate`.
        scale: factor on the scores; None for `D ** -0.5`.
        q_norm: norm of each query's head, `[1, D]`; empty tensors for none, here and below.
        k_norm: norm of each key's head.
        out_norm: norm of the heads' results, `[n_lengths, H * D]`.
        mlp_norm: norm of the hidden channels.
        gated_attention: `qkv` is `[4 * H * D, C]`, queries, gates, keys and values; a sigmoid of the gates multiplies
            the heads' results after their norm.
        gated_mlp: `fc1` is `[2 * hidden, C]`; the activation of its first half multiplies the second.
    """

    norm1: tuple[Tensor, Tensor, float]
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor, float]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    n_heads: int
    activation: str
    scale: float | None = None
    q_norm: tuple[Tensor, Tensor, float] = NO_NORM
    k_norm: tuple[Tensor, Tensor, float] = NO_NORM
    out_norm: tuple[Tensor, Tensor, float] = NO_NORM
    mlp_norm: tuple[Tensor, Tensor, float] = NO_NORM
    gated_attention: bool = False
    gated_mlp: bool = False


def vit_forward(
    rows: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    pos_offset: Tensor,
    pos_table: Tensor,
    prefix: Tensor,
    embed: tuple[Tensor, Tensor],
    norm_pre: tuple[Tensor, Tensor, float],
    norm: tuple[Tensor, Tensor, float],
    blocks: Sequence[BlockWeights],
    *,
    n_pooled: int,
    patch_norm: tuple[Tensor, Tensor, float] = NO_NORM,
    rope: Tensor | None = None,
    round_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
    rounds_first_qkv: bool = True,
    round_factors: Callable[[Tensor], Tensor] = lambda factor: factor,
) -> Tensor:
    """Maps patch rows to tokens after the final norm: embedding, pre-norm transformer blocks, norm.

    Args:
        rows: `[Tp, K]` patch rows.
        cu_seqlens: `[B + 1]` of the patches.
        length_index: `[B]`.
        pos_offset: `[B]`, see `assemble_tokens`.
        pos_table: `[R, C]`.
        prefix: `[n_prefix, C]`.
        embed: `[C, K]` and `[C]`.
        norm_pre: (weight, bias, eps) of the norm between embedding and blocks; empty tensors for no norm.
        norm: (weight, bias, eps) of the norm after the blocks; empty tensors for no norm.
        blocks: the blocks; they may differ from one another in everything but C.
        n_pooled: number of leading tokens of every sequence to return; 0 for all.
        patch_norm: norm of the embedded patches; empty tensors for no norm.
        rope: `[1 or n_blocks, R, 1 or H, 2, D / 2]`, cosines and sines for the rows of `pos_table`; None for none.
        round_rows: rounding of the input rows of every linear layer of a block; none by default.
        rounds_first_qkv: whether the rows of the first block's `qkv` are rounded like the others.
        round_factors: rounding of `rows` and of every factor of attention's products; none by default.

    Returns:
        `[B * n_pooled, C]`, or `[Tp + B * n_prefix, C]`.
    """

    def normed(x: Tensor, norm: tuple[Tensor, Tensor, float], offsets: Tensor) -> Tensor:
        weight, bias, eps = norm
        if not weight.numel():
            return x
        return tal_layer_norm(x, weight, bias if bias.numel() else None, offsets, length_index, eps)

    def linear(x: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
        return F.linear(round_rows(x), *layer)

    patches = normed(F.linear(round_factors(rows), *embed), patch_norm, cu_seqlens)
    x = assemble_tokens(patches, prefix, pos_table, pos_offset, cu_seqlens)
    if rope is not None:
        angles = [token_angles(table, prefix.shape[0], pos_offset, cu_seqlens) for table in rope]
        angles = angles * len(blocks) if len(rope) == 1 else angles
    cu_seqlens = cu_seqlens + prefix.shape[0] * torch.arange(
        cu_seqlens.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device
    )
    x = normed(x, norm_pre, cu_seqlens)
    for i, block in enumerate(blocks):
        head_dim = block.proj[0].shape[1] // block.n_heads
        scale = head_dim**-0.5 if block.scale is None else block.scale
        rows = normed(x, block.norm1, cu_seqlens)
        qkv = linear(rows, block.qkv) if rounds_first_qkv or i else F.linear(rows, *block.qkv)
        q, *gates, k, v = qkv.view(-1, 3 + block.gated_attention, block.n_heads, head_dim).unbind(1)
        q, k = (head_norm(t, norm) for t, norm in ((q, block.q_norm), (k, block.k_norm)))
        if rope is not None:
            q, k = rotary(q, k, *angles[i].unbind(2), half=True)
        attended, _ = varlen_attention(q, k, v, cu_seqlens, cu_seqlens, scale=scale, round_factors=round_factors)
        attended = normed(attended.flatten(1), block.out_norm, cu_seqlens)
        for gate in gates:
            attended = attended * gate.flatten(1).sigmoid()
        x = x + linear(attended, block.proj)
        hidden = linear(normed(x, block.norm2, cu_seqlens), block.fc1)
        if block.gated_mlp:
            gate, hidden = hidden.chunk(2, dim=1)
            hidden = activate(block.activation, gate) * hidden
        else:
            hidden = activate(block.activation, hidden)
        x = x + linear(normed(hidden, block.mlp_norm, cu_seqlens), block.fc2)
    x = normed(x, norm, cu_seqlens)
    if n_pooled == 0:
        return x
    pooled = torch.arange(n_pooled, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return x[(cu_seqlens[:-1, None] + pooled).flatten().long()]


RESIZE_WEIGHT_BITS = 22
"""Fraction bits of a resampling weight, as in Pillow: 32 bits minus 8 for the value and 2 of headroom."""


def resize_taps(n_in: int, begin: float, end: float, n_out: int, *, bicubic: bool) -> tuple[Tensor, Tensor]:
    """Inputs and integer weights of every output of a one-dimensional resize, as in Pillow's `precompute_coeffs`.

    Args:
        n_in: pixels of the input.
        begin: left edge of the region to resize; half-pixel centres, so pixel i covers [i, i + 1).
        end: right edge of the region.
        n_out: pixels of the output.
        bicubic: whether the filter is bicubic with a = -0.5; otherwise it is the triangle. Both filters are widened
            where the region shrinks (antialiasing).

    Returns:
        int64 `[n_out]`, the first input of each output, and int64 `[n_out, max_taps]`, the weights of this input and of
        the following ones, zero after the last tap.
    """
    begin, end = (torch.tensor(edge, dtype=torch.float32, device="cpu") for edge in (begin, end))
    scale = float(end - begin) / n_out
    filter_scale = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * filter_scale
    center = float(begin) + (torch.arange(n_out, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    n_taps = (center + support + 0.5).long().clamp(max=n_in) - first
    tap = torch.arange(int(n_taps.max()), dtype=torch.int64, device="cpu")
    x = ((tap + first[:, None] - center[:, None] + 0.5) * (1.0 / filter_scale)).abs()
    if bicubic:
        near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * -0.5
        weight = torch.where(x < 1, near, far.where(x < 2, 0.0))
    else:
        weight = (1 - x).clamp(min=0)
    weight = weight.where(tap < n_taps[:, None], 0.0)
    total = torch.zeros(n_out, dtype=torch.float64, device="cpu")
    for column in weight.unbind(dim=1):  # in this order: a sum in another order differs in its last bit
        total = total + column
    weight = weight / total[:, None] * (1 << RESIZE_WEIGHT_BITS)
    return first, torch.where(weight < 0, weight - 0.5, weight + 0.5).long()


def resample(x: Tensor, dim: int, first: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of `x` (integers in [0, 255]) along `dim`, rounded and clipped to [0, 255]."""
    x = x.transpose(0, dim)
    half = 1 << (RESIZE_WEIGHT_BITS - 1)
    total = torch.full((first.shape[0], *x.shape[1:]), half, dtype=torch.int64, device="cpu")
    for t in range(weight.shape[1]):
        row = (first + t).clamp(max=x.shape[0] - 1)
        total += x[row].long() * weight[:, t].view(-1, *[1] * (x.dim() - 1))
    return (total >> RESIZE_WEIGHT_BITS).clamp(0, 255).transpose(0, dim)


def resize_patchify(
    images: list[Tensor],
    boxes: list[list[float]],
    sizes: list[list[int]],
    patch_size: int,
    table: Tensor | None,
    *,
    bicubic: bool = True,
) -> Tensor:
    """Resizes as Pillow 13 does, looks up every value in its channel's table and cuts the images into patch rows.

    Args:
        images: uint8 `[H, W, 3]` or `[H, W, 1]`.
        boxes: (left, upper, right, lower) per image.
        sizes: (height, width) per image.
        patch_size: P.
        table: `[3, 256]`; None leaves the values as they are.
        bicubic: bicubic or bilinear.

    Returns:
        `[sum(gh * gw), P * P * 3]` of the table's dtype, or uint8.
    """
    rows = []
    for image, (left, upper, right, lower), (height, width) in zip(images, boxes, sizes, strict=True):
        vertical = 0, *resize_taps(image.shape[0], upper, lower, height, bicubic=bicubic)
        horizontal = 1, *resize_taps(image.shape[1], left, right, width, bicubic=bicubic)
        # Pillow 13 starts with the vertical pass if that shrinks the image far more, whatever the box is.
        shrink_y, shrink_x = image.shape[0] - height, image.shape[1] - width
        passes = (vertical, horizontal) if shrink_y > max(0, 2 * shrink_x) else (horizontal, vertical)
        for dim, first, weight in passes:
            image = resample(image, dim, first, weight)
        image = image.expand(height, width, 3)
        values = image.to(torch.uint8) if table is None else table[range(3), image]
        patches = values.reshape(height // patch_size, patch_size, width // patch_size, patch_size, 3)
        rows.append(patches.transpose(1, 2).reshape(-1, patch_size * patch_size * 3))
    return torch.cat(rows)

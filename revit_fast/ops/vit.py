"""The forward pass of a packed ViT in one op, for inference on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library
from revit_fast.ops.linear import ACTIVATIONS, PackedWeight, cpu_panel, pack_weight, round_rows, unpacked

TENSORS_BEFORE_BLOCKS = 6
TENSORS_PER_BLOCK = 12


class TokenNorm(NamedTuple):
    """LayerNorm parameters of every length: float32 `[n_lengths, C]` each."""

    weight: Tensor
    bias: Tensor


NO_NORM = TokenNorm(torch.empty(0, device="cpu"), torch.empty(0, device="cpu"))


class BlockWeights(NamedTuple):
    """Weights of a block, packed in one dtype.

    LayerScale is folded into `proj` and `fc2`, and `qkv` comes from `pack_qkv`.
    """

    norm1: TokenNorm
    qkv: PackedWeight
    proj: PackedWeight
    norm2: TokenNorm
    fc1: PackedWeight
    fc2: PackedWeight


class ViTWeights(NamedTuple):
    """Weights of a packed ViT without its head.

    Attributes:
        embed: patch embedding `[C, P*P*3]`, in float32 or bfloat16.
        norm_pre: norm between embedding and blocks, or `NO_NORM`.
        norm: norm after the blocks, or `NO_NORM`.
        blocks: one entry per block.
        prefix: float32 `[n_prefix, C]`, prefix tokens with their position embeddings added.
        n_heads: attention heads.
        head_dim: channels of a head.
        n_lengths: configured lengths.
        eps: added to the variance in every norm.
        activation: activation of the MLP, one of `ACTIVATIONS`.
    """

    embed: PackedWeight
    norm_pre: TokenNorm
    norm: TokenNorm
    blocks: Sequence[BlockWeights]
    prefix: Tensor
    n_heads: int
    head_dim: int
    n_lengths: int
    eps: float
    activation: str

    def tensors(self) -> list[Tensor]:
        """All packed tensors in the order that the op takes."""
        flat = [self.embed.panels, self.embed.bias, *self.norm_pre, *self.norm]
        for block in self.blocks:
            for part in block:
                flat += part[:2]
        return flat


def pack_qkv(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedWeight:
    """Packs the joint projection `[3 * H * D, C]`: queries, keys and values each begin at a new panel."""
    width = weight.shape[0] // 3
    padding = -width % cpu_panel()
    parts = [torch.nn.functional.pad(part, (0, 0, 0, padding)) for part in weight.view(3, width, -1)]
    if bias is not None:
        bias = torch.nn.functional.pad(bias.view(3, width), (0, padding)).flatten()
    return pack_weight(torch.cat(parts), bias, dtype)


def vit_forward(
    rows: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    pos_offset: Tensor,
    pos_table: Tensor,
    weights: ViTWeights,
    n_pooled: int,
) -> Tensor:
    """Maps patch rows of a pack to tokens after the final norm; an image's tokens are bitwise the same in every pack.

    Args:
        rows: `[Tp, P*P*3]` patch rows, float or uint8, without padding rows, on the CPU.
        cu_seqlens: int32 `[B + 1]` of the patches.
        length_index: int32 `[B]`.
        pos_offset: int32 `[B]`, row of `pos_table` where the grid of each image starts.
        pos_table: float32 `[R, C]`, position embeddings of several grids, one grid after another.
        weights: weights of the model, packed for the instruction set in use.
        n_pooled: number of leading tokens of every sequence that the head reads: only these are returned, and the last
            block computes nothing else. 0 for all tokens.

    Returns:
        float32 `[B * n_pooled, C]`, or `[Tp + B * n_prefix, C]`. No gradient flows through it.

    Raises:
        TypeError, ValueError: for arguments of another dtype or shape.
        RuntimeError: for invalid values of the index tensors, or panels of another instruction set.
    """
    if not isinstance(rows, Tensor) or rows.dim() != 2 or (rows.dtype not in (torch.uint8, *_checks.FLOAT_DTYPES)):
        raise TypeError(f"rows: expected a float or uint8 tensor [Tp, P*P*3], got {_checks.describe(rows)}")
    _checks.check_cu_seqlens(cu_seqlens, "rows", rows)
    _checks.check_per_sequence("length_index", length_index, cu_seqlens)
    _checks.check_per_sequence("pos_offset", pos_offset, cu_seqlens)
    if not 0 <= n_pooled <= weights.prefix.shape[0]:
        raise ValueError(f"n_pooled: expected 0 to {weights.prefix.shape[0]} prefix tokens, got {n_pooled}")
    with torch.no_grad():
        return torch.ops.revit_fast.vit_forward.default(
            rows,
            cu_seqlens.contiguous(),
            length_index.contiguous(),
            pos_offset.contiguous(),
            pos_table,
            weights.prefix,
            weights.tensors(),
            weights.n_heads,
            weights.head_dim,
            weights.blocks[0].fc1.n_out if weights.blocks else 1,
            weights.n_lengths,
            weights.eps,
            ACTIVATIONS.index(weights.activation),
            n_pooled,
        )


@torch.library.register_fake("revit_fast::vit_forward")
def _(rows, cu_seqlens, length_index, pos_offset, pos_table, prefix, weights, *shape):
    n_pooled, batch = shape[-1], length_index.shape[0]
    n_rows = batch * n_pooled if n_pooled else rows.shape[0] + batch * prefix.shape[0]
    return pos_table.new_empty(n_rows, prefix.shape[1])


def _reference(
    rows,
    cu_seqlens,
    length_index,
    pos_offset,
    pos_table,
    prefix,
    weights,
    n_heads,
    head_dim,
    hidden,
    n_lengths,
    eps,
    activation,
    n_pooled,
):
    dtype, width, n_channels = pos_table.dtype, n_heads * head_dim, prefix.shape[1]

    def linear(panels, bias, n_out, depth):
        return unpacked(panels, bias, n_out, depth, dtype)

    def qkv_of(panels, bias):
        weight, bias = linear(panels, bias, bias.shape[-1], n_channels)
        return weight.view(3, -1, n_channels)[:, :width].flatten(0, 1), bias.view(3, -1)[:, :width].flatten()

    blocks, integer = [], False
    for first in range(TENSORS_BEFORE_BLOCKS, len(weights), TENSORS_PER_BLOCK):
        w = weights[first : first + TENSORS_PER_BLOCK]
        integer = w[2].dtype == torch.int8
        blocks.append(
            reference.BlockWeights(
                (w[0], w[1]),
                qkv_of(w[2], w[3]),
                linear(w[4], w[5], n_channels, width),
                (w[6], w[7]),
                linear(w[8], w[9], hidden, n_channels),
                linear(w[10], w[11], n_channels, hidden),
            )
        )
    return reference.vit_forward(
        rows.to(dtype),
        cu_seqlens,
        length_index,
        pos_offset,
        pos_table,
        prefix,
        linear(weights[0], weights[1], n_channels, rows.shape[1]),
        (weights[2], weights[3]),
        (weights[4], weights[5]),
        blocks,
        n_heads=n_heads,
        eps=eps,
        activation=ACTIVATIONS[activation],
        n_pooled=n_pooled,
        round_rows=round_rows if integer else None,
    )


_library.register_fallback("vit_forward", _reference)

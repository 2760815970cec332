"""The forward pass of a packed ViT in one op, for inference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library
from revit_fast.ops.linear import ACTIVATIONS, PackedWeight, cpu_panel, pack_weight, round_rows, unpacked

TENSORS_BEFORE_BLOCKS = 6
TENSORS_PER_BLOCK = 12

DESCRIPTOR_VERSION = 1
"""Version of the layout of `ViTWeights.descriptor`; csrc/vit_descriptor.h has the same."""
NUMBERS_BEFORE_BLOCKS = 5
NUMBERS_PER_BLOCK = 7


class TokenNorm(NamedTuple):
    """A LayerNorm or RMSNorm with parameters of its own for every length.

    Attributes:
        weight: float32 `[n_lengths, C]`.
        bias: float32 `[n_lengths, C]`; `NO_BIAS` for RMSNorm.
        eps: added to the variance, or to the mean square; not negative.
    """

    weight: Tensor
    bias: Tensor
    eps: float


NO_BIAS = torch.empty(0, dtype=torch.float32, device="cpu")
NO_NORM = TokenNorm(NO_BIAS, NO_BIAS, 1e-6)


class BlockWeights(NamedTuple):
    """A block with its weights packed, all blocks in one dtype; `qkv` of the first may have another.

    Blocks may differ from one another in everything else but C. LayerScale is folded into `proj` and `fc2`.

    Attributes:
        norm1: norm before attention.
        qkv: queries, keys and values, from `pack_qkv`.
        proj: projection of the heads' results, `[C, H * D]`.
        norm2: norm before the MLP.
        fc1: first layer of the MLP, `[hidden, C]`.
        fc2: second layer of the MLP, `[C, hidden]`.
        n_heads: attention heads H.
        head_dim: channels D of a head, at most 256.
        activation: activation of the MLP, one of `ACTIVATIONS`.
        scale: factor on the scores; None for `D ** -0.5`.
    """

    norm1: TokenNorm
    qkv: PackedWeight
    proj: PackedWeight
    norm2: TokenNorm
    fc1: PackedWeight
    fc2: PackedWeight
    n_heads: int
    head_dim: int
    activation: str
    scale: float | None = None

    def parts(self) -> tuple[TokenNorm | PackedWeight, ...]:
        """The parts that hold tensors, two each, in the order that the op takes."""
        return self[: TENSORS_PER_BLOCK // 2]

    def scale_of_scores(self) -> float:
        """The scale, or its default."""
        if self.scale is not None:
            return self.scale
        return 1 / math.sqrt(max(self.head_dim, 1))  # the op refuses a head_dim below 1, with its name


@dataclass(frozen=True)
class ViTWeights:
    """Weights of a packed ViT without its head.

    Attributes:
        embed: patch embedding `[C, P*P*3]`, in float32 or bfloat16.
        norm_pre: norm between embedding and blocks, or `NO_NORM`.
        norm: norm after the blocks, or `NO_NORM`.
        blocks: one entry per block.
        prefix: float32 `[n_prefix, C]`, prefix tokens with their position embeddings added.
        n_lengths: number of configured lengths.
        tensors: all packed tensors in the order that the op takes.
        descriptor: the numbers that the op needs beside the tensors, see `_descriptor`.

    Raises:
        ValueError: for an unknown activation. The op checks the numbers.
    """

    embed: PackedWeight
    norm_pre: TokenNorm
    norm: TokenNorm
    blocks: Sequence[BlockWeights]
    prefix: Tensor
    n_lengths: int
    tensors: list[Tensor] = field(init=False, repr=False)
    descriptor: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", self._tensors())
        object.__setattr__(self, "descriptor", self._descriptor())

    def _tensors(self) -> list[Tensor]:
        parts = [self.embed, self.norm_pre, self.norm, *(part for block in self.blocks for part in block.parts())]
        return [tensor for part in parts for tensor in part[:2]]

    def _descriptor(self) -> Tensor:
        """float64 `[5 + 7 * n_blocks]`.

        First come the version, n_lengths, the number of blocks and the eps of `norm_pre` and `norm`. For each block
        follow n_heads, head_dim, hidden, the index of the activation, the eps of `norm1` and `norm2`, and the scale.
        """
        numbers = [DESCRIPTOR_VERSION, self.n_lengths, len(self.blocks), self.norm_pre.eps, self.norm.eps]
        for i, block in enumerate(self.blocks):
            if block.activation not in ACTIVATIONS:
                raise ValueError(
                    f"blocks[{i}].activation: expected one of {', '.join(ACTIVATIONS)}, got {block.activation!r}"
                )
            numbers += [
                block.n_heads,
                block.head_dim,
                block.fc1.n_out,
                ACTIVATIONS.index(block.activation),
                block.norm1.eps,
                block.norm2.eps,
                block.scale_of_scores(),
            ]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def pack_qkv(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: Tensor | None = None) -> PackedWeight:
    """Packs the joint projection `[3 * H * D, C]`: queries, keys and values each begin at a new panel.

    Arguments are those of `pack_weight`.
    """
    width = weight.shape[0] // 3
    padding = -width % cpu_panel()
    parts = [torch.nn.functional.pad(part, (0, 0, 0, padding)) for part in weight.view(3, width, -1)]
    bias, scale = (
        t if t is None else torch.nn.functional.pad(t.view(3, width), (0, padding)).flatten() for t in (bias, scale)
    )
    return pack_weight(torch.cat(parts), bias, dtype, scale)


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
        TypeError, ValueError: for arguments of another dtype or shape, or an unknown activation.
        RuntimeError: for invalid values of the index tensors or of `weights`, or panels of another instruction set.
    """
    if not isinstance(rows, Tensor) or rows.dim() != 2 or (rows.dtype not in (torch.uint8, *_checks.FLOAT_DTYPES)):
        raise TypeError(f"rows: expected a float or uint8 tensor [Tp, P*P*3], got {_checks.describe(rows)}")
    _checks.check_cu_seqlens(cu_seqlens, "rows", rows)
    _checks.check_per_sequence("length_index", length_index, cu_seqlens)
    _checks.check_per_sequence("pos_offset", pos_offset, cu_seqlens)
    if not 0 <= n_pooled <= weights.prefix.shape[0]:
        raise ValueError(f"n_pooled: expected 0 to {weights.prefix.shape[0]} prefix tokens, got {n_pooled}")
    with torch.no_grad():
        return _library.call(
            "vit_forward",
            rows,
            cu_seqlens.contiguous(),
            length_index.contiguous(),
            pos_offset.contiguous(),
            pos_table,
            weights.prefix,
            weights.tensors,
            weights.descriptor,
            n_pooled,
        )


@torch.library.register_fake("revit_fast::vit_forward")
def _(rows, cu_seqlens, length_index, pos_offset, pos_table, prefix, weights, descriptor, n_pooled):
    batch = length_index.shape[0]
    n_rows = batch * n_pooled if n_pooled else rows.shape[0] + batch * prefix.shape[0]
    return pos_table.new_empty(n_rows, prefix.shape[1])


def _reference(rows, cu_seqlens, length_index, pos_offset, pos_table, prefix, weights, descriptor, n_pooled):
    dtype, n_channels = pos_table.dtype, prefix.shape[1]
    version, _, _, norm_pre_eps, norm_eps = descriptor[:NUMBERS_BEFORE_BLOCKS].tolist()
    if version != DESCRIPTOR_VERSION:
        raise RuntimeError(f"descriptor: version must be {DESCRIPTOR_VERSION}, got {version:g}")
    of_blocks = descriptor[NUMBERS_BEFORE_BLOCKS:].view(-1, NUMBERS_PER_BLOCK).tolist()

    def linear(panels, bias, n_out, depth):
        return unpacked(panels, bias, n_out, depth, dtype)

    def qkv_of(panels, bias, width):
        weight, bias = linear(panels, bias, bias.shape[-1], n_channels)
        return weight.view(3, -1, n_channels)[:, :width].flatten(0, 1), bias.view(3, -1)[:, :width].flatten()

    blocks, integer = [], False
    for i, (*whole, norm1_eps, norm2_eps, scale) in enumerate(of_blocks):
        n_heads, head_dim, hidden, activation = map(int, whole)
        width = n_heads * head_dim
        w = weights[TENSORS_BEFORE_BLOCKS + i * TENSORS_PER_BLOCK :]
        integer = w[4].dtype == torch.int8
        blocks.append(
            reference.BlockWeights(
                (w[0], w[1], norm1_eps),
                qkv_of(w[2], w[3], width),
                linear(w[4], w[5], n_channels, width),
                (w[6], w[7], norm2_eps),
                linear(w[8], w[9], hidden, n_channels),
                linear(w[10], w[11], n_channels, hidden),
                n_heads,
                ACTIVATIONS[activation],
                scale,
            )
        )
    if integer:
        first_qkv = weights[TENSORS_BEFORE_BLOCKS + 2]
        rounding = {"round_rows": round_rows, "rounds_first_qkv": first_qkv.dtype == torch.int8}
    else:
        rounding = {}
    return reference.vit_forward(
        rows.to(dtype),
        cu_seqlens,
        length_index,
        pos_offset,
        pos_table,
        prefix,
        linear(weights[0], weights[1], n_channels, rows.shape[1]),
        (weights[2], weights[3], norm_pre_eps),
        (weights[4], weights[5], norm_eps),
        blocks,
        n_pooled=n_pooled,
        **rounding,
    )


_library.register_fallback("vit_forward", _reference)

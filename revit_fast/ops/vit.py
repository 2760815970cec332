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

PARTS = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2", "q_norm", "k_norm", "out_norm", "mlp_norm")
"""Fields of `BlockWeights` that hold tensors, two each, in the order that the op takes."""
NORMS = tuple(name for name in PARTS if "norm" in name)
TENSORS_BEFORE_BLOCKS = 8
TENSORS_PER_BLOCK = 2 * len(PARTS)

DESCRIPTOR_VERSION = 2
"""Version of the layout of `ViTWeights.descriptor`; csrc/vit_descriptor.h has the same."""
NUMBERS_BEFORE_BLOCKS = 6
NUMBERS_PER_BLOCK = 7 + len(NORMS)


class TokenNorm(NamedTuple):
    """A LayerNorm or RMSNorm with parameters of its own for every length.

    Attributes:
        weight: float32 `[n_lengths, C]`; `[1, D]` of a norm of heads, which has the same for all lengths.
        bias: float32 of the same shape; `NO_BIAS` for RMSNorm.
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
        qkv: queries, gates if there are any, keys and values, from `pack_parts`. Keys and values have as many heads as
            queries. For a rotation, channels j and j + D / 2 of a query's or key's head are a pair.
        proj: projection of the heads' results, `[C, H * D]`.
        norm2: norm before the MLP.
        fc1: first layer of the MLP, `[hidden, C]`; of a gated one both halves, from `pack_parts`.
        fc2: second layer of the MLP, `[C, hidden]`.
        n_heads: attention heads H.
        head_dim: channels D of a head, at most 256.
        activation: activation of the MLP, one of `ACTIVATIONS`.
        scale: factor on the scores; None for `D ** -0.5`.
        q_norm: norm of each query's head, or `NO_NORM`.
        k_norm: norm of each key's head, or `NO_NORM`.
        out_norm: norm of the heads' results, or `NO_NORM`.
        mlp_norm: norm of the hidden channels, or `NO_NORM`.
        gated_attention: whether a sigmoid of the gates multiplies the heads' results after their norm.
        gated_mlp: whether the activation of the first half of `fc1` multiplies the second half.
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
    q_norm: TokenNorm = NO_NORM
    k_norm: TokenNorm = NO_NORM
    out_norm: TokenNorm = NO_NORM
    mlp_norm: TokenNorm = NO_NORM
    gated_attention: bool = False
    gated_mlp: bool = False

    def parts(self) -> tuple[TokenNorm | PackedWeight, ...]:
        """The fields that hold tensors, two each, in the order of `PARTS`."""
        return tuple(getattr(self, name) for name in PARTS)

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
        patch_norm: norm of the embedded patches, before position embeddings are added, or `NO_NORM`.
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
    patch_norm: TokenNorm = NO_NORM
    tensors: list[Tensor] = field(init=False, repr=False)
    descriptor: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", self._tensors())
        object.__setattr__(self, "descriptor", self._descriptor())

    def _tensors(self) -> list[Tensor]:
        of_blocks = (part for block in self.blocks for part in block.parts())
        parts = [self.embed, self.norm_pre, self.norm, self.patch_norm, *of_blocks]
        return [tensor for part in parts for tensor in part[:2]]

    def _descriptor(self) -> Tensor:
        """float64 `[NUMBERS_BEFORE_BLOCKS + n_blocks * NUMBERS_PER_BLOCK]`.

        First come the version, n_lengths, the number of blocks and the eps of `norm_pre`, `norm` and `patch_norm`. For
        each block follow n_heads, head_dim, hidden, the index of the activation, whether the MLP and attention are
        gated, the scale, and the eps of its norms.
        """
        outer = (self.norm_pre, self.norm, self.patch_norm)
        numbers = [DESCRIPTOR_VERSION, self.n_lengths, len(self.blocks), *(norm.eps for norm in outer)]
        for i, block in enumerate(self.blocks):
            if block.activation not in ACTIVATIONS:
                raise ValueError(
                    f"blocks[{i}].activation: expected one of {', '.join(ACTIVATIONS)}, got {block.activation!r}"
                )
            numbers += [
                block.n_heads,
                block.head_dim,
                block.fc2.depth,
                ACTIVATIONS.index(block.activation),
                block.gated_mlp,
                block.gated_attention,
                block.scale_of_scores(),
                *(getattr(block, name).eps for name in NORMS),
            ]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def pack_parts(
    n_parts: int, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scale: Tensor | None = None
) -> PackedWeight:
    """Packs a layer of equal parts, `[n_parts * N, C]`: each part begins at a new panel.

    Arguments are those of `pack_weight`.
    """
    padding = -(weight.shape[0] // n_parts) % cpu_panel()
    parts = torch.nn.functional.pad(weight.unflatten(0, (n_parts, -1)), (0, 0, 0, padding))
    bias, scale = (
        t if t is None else torch.nn.functional.pad(t.view(n_parts, -1), (0, padding)).flatten() for t in (bias, scale)
    )
    return pack_weight(parts.flatten(0, 1), bias, dtype, scale)


def vit_forward(
    rows: Tensor,
    cu_seqlens: Tensor,
    length_index: Tensor,
    pos_offset: Tensor,
    pos_table: Tensor,
    weights: ViTWeights,
    n_pooled: int,
    rope: Tensor | None = None,
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
        rope: float32 `[1 or n_blocks, R, 1 or H, 2, D / 2]`, cosines and sines by which queries and keys turn: one
            table for all blocks or one for each, for all heads or for each, with the rows of `pos_table`. Prefix tokens
            do not turn. None for no rotation.

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
            rope,
        )


@torch.library.register_fake("revit_fast::vit_forward")
def _(rows, cu_seqlens, length_index, pos_offset, pos_table, prefix, weights, descriptor, n_pooled, rope=None):
    batch = length_index.shape[0]
    n_rows = batch * n_pooled if n_pooled else rows.shape[0] + batch * prefix.shape[0]
    return pos_table.new_empty(n_rows, prefix.shape[1])


def _reference(rows, cu_seqlens, length_index, pos_offset, pos_table, prefix, weights, descriptor, n_pooled, rope=None):
    dtype, n_channels = pos_table.dtype, prefix.shape[1]
    version, _, _, *outer_eps = descriptor[:NUMBERS_BEFORE_BLOCKS].tolist()
    if version != DESCRIPTOR_VERSION:
        raise RuntimeError(f"descriptor: version must be {DESCRIPTOR_VERSION}, got {version:g}")
    of_blocks = descriptor[NUMBERS_BEFORE_BLOCKS:].view(-1, NUMBERS_PER_BLOCK).tolist()
    outer = [(*weights[i : i + 2], eps) for i, eps in zip((2, 4, 6), outer_eps, strict=True)]

    def linear(layer, n_out, depth, n_parts=1):
        """Weight `[n_parts * n_out, depth]` and bias, without what pads the parts to whole panels."""
        if n_parts == 1:
            return unpacked(*layer, n_out, depth, dtype)
        whole = unpacked(*layer, layer[1].shape[-1], depth, dtype)
        return tuple(t.unflatten(0, (n_parts, -1))[:, :n_out].flatten(0, 1) for t in whole)

    blocks, integer = [], False
    for i, (*whole, scale) in enumerate(numbers[:7] for numbers in of_blocks):
        n_heads, head_dim, hidden, activation, gated_mlp, gated_attention = map(int, whole)
        begin = TENSORS_BEFORE_BLOCKS + i * TENSORS_PER_BLOCK
        w = {name: weights[begin + 2 * j : begin + 2 * j + 2] for j, name in enumerate(PARTS)}
        integer = w["proj"][0].dtype == torch.int8
        w |= {name: (*w[name], eps) for name, eps in zip(NORMS, of_blocks[i][7:], strict=True)}
        w["qkv"] = linear(w["qkv"], n_heads * head_dim, n_channels, 3 + gated_attention)
        w["proj"] = linear(w["proj"], n_channels, n_heads * head_dim)
        w["fc1"] = linear(w["fc1"], hidden, n_channels, 1 + gated_mlp)
        w["fc2"] = linear(w["fc2"], n_channels, hidden)
        w |= {"n_heads": n_heads, "activation": ACTIVATIONS[activation], "scale": scale}
        gates = {"gated_attention": bool(gated_attention), "gated_mlp": bool(gated_mlp)}
        blocks.append(reference.BlockWeights(**w, **gates))
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
        linear(weights[:2], n_channels, rows.shape[1]),
        *outer[:2],
        blocks,
        n_pooled=n_pooled,
        patch_norm=outer[2],
        rope=rope,
        **rounding,
    )


_library.register_fallback("vit_forward", _reference)

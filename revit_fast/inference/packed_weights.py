"""A model's weights as the fused forward pass reads them: norms apart, LayerScale folded in, matrices packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat, zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.inference.calibration import block_inputs
from revit_fast.inference.fusable import check_fusable
from revit_fast.inference.smoothing import LAYERS, BlockParameters, LinearWeights, calibrated
from revit_fast.layers.attention import Attention, AttentionPool
from revit_fast.layers.block import Block, LayerScale, ResidualScale
from revit_fast.layers.comparison import is_plain
from revit_fast.layers.conv_stem import ConvStem, FoldedStem
from revit_fast.layers.derived import kept_tensors
from revit_fast.layers.mlp import activation_name
from revit_fast.layers.norm import TALNorm
from revit_fast.layers.positions import KnownGrids
from revit_fast.layers.rope import Rope
from revit_fast.models.inputs import rows_apart
from revit_fast.models.spec import Block as BlockSpec
from revit_fast.models.vit import ReViT
from revit_fast.ops.linear import PackedWeight, gathered, pack_weight, packed_linear
from revit_fast.ops.vit import NO_BIAS, NO_NORM, PARTS, BlockWeights, TokenNorm, ViTWeights, pack_parts
from revit_fast.packing import Layout, PackedBatch


def placed(blocks: Sequence[BlockWeights], place: Callable[[list[Tensor]], Iterable[Tensor]]) -> list[BlockWeights]:
    """The same weights in other memory.

    Args:
        blocks: the weights.
        place: copies all tensors, given in the order in which they are read.
    """
    moved = iter(place([t for block in blocks for part in block.parts() for t in part[:2]]))

    def copied(block: BlockWeights) -> BlockWeights:
        parts = (type(part)(next(moved), next(moved), *part[2:]) for part in block.parts())
        return block._replace(**dict(zip(PARTS, parts, strict=True)))

    return [copied(block) for block in blocks]


class Packed(NamedTuple):
    """What the fused forward pass derives from a model's parameters.

    Attributes:
        stem: the convolutional stem with its norms folded in, or None.
        weights: the packed weights without stem, pool and head.
        pool: the attention pool, or None.
        fc_norm: norm of the pooled rows.
        heads: a function from rows to logits for each head.
        folded: the weights with a normalisation of uint8 rows folded into the embedding; the last one used is kept.
        turns: the tables of a rotary embedding for known grids; the last one used is kept.
    """

    stem: FoldedStem | None
    weights: ViTWeights
    pool: PackedPool | None
    fc_norm: TokenNorm
    heads: list[Callable[[Tensor], Tensor]]
    folded: dict[tuple[float, ...], ViTWeights]
    turns: dict[KnownGrids, Tensor]

    def weights_for(self, model: ReViT, normalization: Tensor | None) -> ViTWeights:
        """The weights for rows that must still be normalised."""
        if normalization is None or self.stem is not None:
            return self.weights
        key = tuple(normalization.flatten().tolist())
        if key not in self.folded:
            embed = pack_weight(*model.patch_embed.fold(normalization), model.pos_embed.dtype)
            self.folded.clear()
            self.folded[key] = replace(self.weights, embed=embed)
        return self.folded[key]

    def rope_for(self, model: ReViT, known: KnownGrids) -> Tensor | None:
        """The argument `rope` of `ops.vit_forward` for the grids of a position table."""
        if known not in self.turns:
            self.turns.clear()
            with kept_tensors():
                self.turns[known] = rope_tables(model, known.coordinates)
        return self.turns[known]


def rope_tables(model: ReViT, coordinates: Tensor | None) -> Tensor | None:
    """Cosines and sines of the angles at `coordinates` `[R, 2]`, see `ops.vit_forward`; None without rotation."""
    if model.rope is None:
        return None
    with torch.no_grad():
        rotations = model.rope(coordinates, torch.float32, len(model.blocks))
    differ = model.spec.embed.rope.kind == "mixed"
    return torch.stack([torch.stack([r.cos, r.sin], dim=2) for r in (rotations if differ else rotations[:1])])


def _norm(module: nn.Module | None) -> TokenNorm:
    if not isinstance(module, TALNorm):
        return NO_NORM
    weight, *bias = (parameter.detach().float().contiguous() for parameter in module.affine())
    return TokenNorm(weight, bias[0] if bias else NO_BIAS, module.eps)


def _halves(heads: Tensor, rope: Rope | None) -> Tensor:
    """Heads `[H, D, ...]` whose pairs of channels are (j, j + D / 2); queries and keys meet as before."""
    if rope is None or rope.half:
        return heads
    return heads.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _head_norm(module: nn.Module | None, rope: Rope | None) -> TokenNorm:
    """A norm of heads, which all lengths share."""
    if module is None:
        return NO_NORM
    weight, bias = (
        NO_BIAS if p is None else _halves(p.detach().float()[None], rope).contiguous()
        for p in (module.weight, getattr(module, "bias", None))
    )
    return TokenNorm(weight, bias, module.eps)


def _qkv(attn: Attention, rope: Rope | None) -> LinearWeights:
    """The projection to queries, gates if there are any, keys and values, each with as many heads."""
    n_heads, n_kv = attn.num_heads, attn.num_kv_heads

    def parts(joint: Tensor, gates: Tensor | None) -> Tensor:
        q, k, v = joint.unflatten(0, (-1, attn.head_dim)).split([n_heads, n_kv, n_kv])
        k, v = (t.repeat_interleave(n_heads // n_kv, dim=0) for t in (_halves(k, rope), v))
        found = [_halves(q, rope), *([] if gates is None else [gates.unflatten(0, (n_heads, -1))]), k, v]
        return torch.cat([t.flatten(0, 1) for t in found])

    gate, bias = attn.gate, attn.qkv.bias
    if attn.q_bias is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])
    weight = parts(attn.qkv.weight, None if gate is None else gate.weight)
    return LinearWeights(weight, None if bias is None else parts(bias, None if gate is None else gate.bias))


def _linear(linear: nn.Linear, scale: nn.Module | None = None) -> LinearWeights:
    """The layer with the scale of its result folded in."""
    if isinstance(scale, LayerScale):
        gamma = scale.gamma.double()
    elif isinstance(scale, ResidualScale):
        gamma = linear.weight.new_full((linear.out_features,), 1 / scale.divisor, dtype=torch.float64)
    else:
        return LinearWeights(linear.weight, linear.bias)
    bias = None if linear.bias is None else linear.bias.double() * gamma
    return LinearWeights(linear.weight.double() * gamma.unsqueeze(1), bias)


def parameters_of(block: Block, rope: Rope | None) -> BlockParameters:
    """A block's parameters as they are packed, in a model with that rotary embedding."""
    attn, mlp = block.attn, block.mlp
    return BlockParameters(
        _norm(block.norm1),
        _qkv(attn, rope),
        _linear(attn.proj, block.ls1),
        _norm(block.norm2),
        _linear(mlp.fc1),
        _linear(mlp.fc2, block.ls2),
        _head_norm(attn.q_norm, rope),
        _head_norm(attn.k_norm, rope),
        _norm(attn.norm),
        _norm(mlp.norm),
    )


def _packed_block(
    block: BlockParameters, described: BlockSpec, dtype: torch.dtype, qkv_dtype: torch.dtype
) -> BlockWeights:
    attn, mlp = described.attn, described.mlp

    def packed(layer: LinearWeights, n_parts: int = 1, dtype: torch.dtype = dtype) -> PackedWeight:
        return pack_parts(n_parts, layer.weight, layer.bias, dtype, layer.scale)

    return BlockWeights(
        block.norm1,
        packed(block.qkv, 3 + attn.gate, qkv_dtype),
        packed(block.proj),
        block.norm2,
        packed(block.fc1, 1 + mlp.gated),
        packed(block.fc2),
        attn.heads,
        attn.head_dim,
        mlp.act.name,
        attn.scale,
        block.q_norm,
        block.k_norm,
        block.out_norm,
        block.mlp_norm,
        gated_attention=attn.gate,
        gated_mlp=mlp.gated,
    )


def pack_model(
    model: ReViT,
    dtype: torch.dtype | None = None,
    *,
    training: bool = False,
    calibration: Sequence[PackedBatch] = (),
) -> Packed:
    """Packs a model's weights for the instruction set in use; raises a ValueError if they cannot be fused.

    Args:
        model: the model.
        dtype: dtype of the packed weights of the blocks; None for that of the model. Embedding and head are always
            packed in the model's dtype.
        training: whether a module in training mode is refused.
        calibration: batches on which the weights are calibrated, see `smoothing`; none: they are rounded as they are.
    """
    check_fusable(model, training)
    outer = model.pos_embed.dtype
    dtype = dtype or outer
    parameters, first_qkv = (parameters_of(block, model.spec.embed.rope) for block in model.blocks), dtype
    if calibration:
        first_qkv, rounded = outer, chain([LAYERS[1:]], repeat(LAYERS))
        parameters = map(calibrated, parameters, block_inputs(model, calibration), rounded)
    blocks = [
        _packed_block(block, described, dtype, dtype if i else first_qkv)
        for i, (block, described) in enumerate(zip(parameters, model.spec.blocks, strict=True))
    ]
    weights = ViTWeights(
        embed=pack_weight(*model.patch_embed.matrix(), outer),
        norm_pre=_norm(model.norm_pre),
        norm=_norm(model.norm),
        blocks=placed(blocks, gathered),
        prefix=model._prefix().detach().float().contiguous(),
        n_lengths=len(model.lengths),
        patch_norm=_norm(getattr(model.patch_embed, "norm", None)),
    )
    stem = model.patch_embed.folded() if isinstance(model.patch_embed, ConvStem) else None
    heads = [_head(head, outer) for head in (model.head, model.head_dist, model.aux_head) if head is not None]
    return Packed(stem, weights, _pool(model.attn_pool, outer), _norm(model.fc_norm), heads, {}, {})


class PackedPool(NamedTuple):
    """An attention pool on packed weights. A sequence's result is the same bits in every batch.

    Attributes:
        query: float32 `[1, H, D]`, the same for every image.
        kv: projection to keys and values.
        proj: projection of the heads' results.
        norm: norm before the MLP.
        fc1: first layer of the MLP; of a gated one the half with the activation.
        activation: its activation.
        up: the other half of a gated MLP's first layer, or None.
        mlp_norm: norm of the hidden channels.
        fc2: second layer of the MLP.
    """

    query: Tensor
    kv: PackedWeight
    proj: PackedWeight
    norm: TokenNorm
    fc1: PackedWeight
    activation: str
    up: PackedWeight | None
    mlp_norm: TokenNorm
    fc2: PackedWeight

    def __call__(self, rows: Tensor, layout: Layout) -> Tensor:
        """`[B, C]` of rows `[T, C]`, in float32."""
        heads, n_sequences = self.query.shape[1:], layout.length_index.shape[0]
        k, v = packed_linear(rows, self.kv).unflatten(1, (2, *heads)).unbind(1)
        apart = rows_apart(layout.length_index, layout)
        query = self.query.expand(n_sequences, -1, -1).contiguous()
        attended = ops.varlen_attention(query, k, v, apart.cu_seqlens, layout.cu_seqlens)
        pooled = packed_linear(attended.flatten(1), self.proj)
        read = normed(pooled, self.norm, apart)
        hidden = packed_linear(read, self.fc1, self.activation)
        if self.up is not None:
            hidden = hidden * packed_linear(read, self.up)
        return pooled + packed_linear(normed(hidden, self.mlp_norm, apart), self.fc2)


def normed(rows: Tensor, norm: TokenNorm, layout: Layout) -> Tensor:
    """Rows `[T, C]` of that layout after the norm of their lengths, by one op; the rows where there is no norm."""
    if not norm.weight.numel():
        return rows
    affine, op = (norm[:2], ops.tal_layer_norm) if norm.bias.numel() else (norm[:1], ops.tal_rms_norm)
    return op(rows, *affine, layout.cu_seqlens, layout.length_index, norm.eps)


def _pool(pool: AttentionPool | None, dtype: torch.dtype) -> PackedPool | None:
    if pool is None:
        return None
    query = F.linear(pool.latent[0].double(), *(p if p is None else p.double() for p in (pool.q.weight, pool.q.bias)))
    mlp = pool.mlp
    kv, proj, fc2 = (pack_weight(layer.weight, layer.bias, dtype) for layer in (pool.kv, pool.proj, mlp.fc2))
    parts = mlp.fc1.weight.chunk(1 + mlp.gated), (None,) if mlp.fc1.bias is None else mlp.fc1.bias.chunk(1 + mlp.gated)
    fc1, *up = (pack_weight(*part, dtype) for part in zip_longest(*parts))
    query = query.float().unflatten(1, (pool.num_heads, -1))
    hidden = fc1, activation_name(mlp.act), up[0] if up else None, _norm(mlp.norm)
    return PackedPool(query, kv, proj, _norm(pool.norm), *hidden, fc2)


def _head(head: nn.Module, dtype: torch.dtype):
    if is_plain(head, nn.Linear):
        return partial(packed_linear, weight=pack_weight(head.weight, head.bias, dtype))
    return lambda rows: head(rows.to(dtype))

"""Runs a model's forward pass on the CPU in one op, with weights that are packed once.

Blocks run fused (csrc/vit_forward.cpp): norms, projections, the MLP and residual sums of a tile of rows never leave the
cache of the core that computes them. Hooks of submodules would not run, nor would modules that replace a block's own. A
model with such hooks or modules raises an error that names them; `packed_modules` serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, repeat, zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops, reference
from revit_fast.inference.calibration import block_inputs
from revit_fast.inference.smoothing import LAYERS, BlockParameters, LinearWeights, calibrated
from revit_fast.layers.attention import Attention, AttentionPool
from revit_fast.layers.block import Block, LayerScale, ResidualScale
from revit_fast.layers.comparison import difference, is_plain
from revit_fast.layers.conv_stem import ConvStem, FoldedStem
from revit_fast.layers.derived import Derived, kept_tensors
from revit_fast.layers.mlp import ACTIVATIONS, activation_name
from revit_fast.layers.norm import TALNorm
from revit_fast.layers.positions import KnownGrids
from revit_fast.layers.rope import Rope
from revit_fast.layers.segments import rows_without_first, sequence_max
from revit_fast.models.inputs import PatchRows, rows_apart
from revit_fast.models.spec import Block as BlockSpec
from revit_fast.models.spec import ViTSpec
from revit_fast.models.vit import ReViT
from revit_fast.ops import _library
from revit_fast.ops.linear import FLOAT_PACKED_DTYPES, PackedWeight, gathered, pack_weight, packed_linear
from revit_fast.ops.vit import NO_BIAS, NO_NORM, PARTS, BlockWeights, TokenNorm, ViTWeights, pack_parts
from revit_fast.packing import Layout, PackedBatch, PackPlan

CALLED = ("head", "head_dist", "aux_head")
"""Modules that the fused forward pass calls unless they are plain linear layers. They may be anything."""


OTHERWISE = 'run the model itself, or optimize(model, engine="modules"), which calls every module'
"""What to do with a model that the fused forward pass refuses."""

WITHOUT_EFFECT = ("grad_checkpointing", "distilled_training")
"""Attributes of a model that change nothing in evaluation without gradients."""


def check_fusable(model: ReViT, training: bool = False) -> None:
    """Raises a ValueError that names what the fused forward pass would not run as the model does, and what to change.

    Args:
        model: see `check_unaltered`.
        training: see `check_unaltered`.
    """
    check_unaltered(model, "the fused forward pass", training, OTHERWISE)
    mlps = [(f"blocks.{i}", block.mlp) for i, block in enumerate(model.spec.blocks)]
    if model.spec.head.attention is not None:
        mlps.append(("attn_pool", model.spec.head.attention.mlp))
    for name, mlp in mlps:
        if mlp.act.name not in ACTIVATIONS or mlp.act.make is not None:
            raise ValueError(
                f"model: {name}.mlp.act is {mlp.act.name}; the fused forward pass has "
                f"{', '.join(ACTIVATIONS)}; {OTHERWISE}"
            )


def check_unaltered(model: ReViT, runner: str, training: bool = False, otherwise: str = "run the model itself") -> None:
    """Raises a ValueError that names the first module that is not as the model's spec has it.

    Args:
        model: compared with a new model of its spec, module by module.
        runner: what would not run the module, for the message.
        training: whether a module in training mode is refused too.
        otherwise: what to do instead, for the message.
    """
    built = _built(model.spec)
    found = difference(
        model, built, is_called=lambda name: name in CALLED, training=training, ignored=("training", *WITHOUT_EFFECT)
    )
    if found is None:
        empty = (name for name, parameter in model.named_parameters() if parameter.is_meta)
        found = next((f"{name} has no values: they were dropped, or it is on the meta device" for name in empty), None)
    if found:
        raise ValueError(
            f"model: {found}, which {runner} would not run; remove it, or merge it into plain layers first, or "
            f"{otherwise}"
        )


@lru_cache(maxsize=16)
def _built(spec: ViTSpec) -> ReViT:
    with torch.device("meta"):
        return ReViT(spec).eval()


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
        heads: a function from rows to logits for each head.
        folded: the weights with a normalisation of uint8 rows folded into the embedding; the last one used is kept.
        turns: the tables of a rotary embedding for known grids; the last one used is kept.
    """

    stem: FoldedStem | None
    weights: ViTWeights
    pool: PackedPool | None
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
        if model.rope is None:
            return None
        if known not in self.turns:
            self.turns.clear()
            with kept_tensors():
                self.turns[known] = rope_tables(model, known.coordinates)
        return self.turns[known]


def rope_tables(model: ReViT, coordinates: Tensor) -> Tensor:
    """Cosines and sines of the angles at `coordinates` `[R, 2]`, see `ops.vit_forward`."""
    with torch.no_grad():
        rotations = model.rope.rotations(coordinates, torch.float32, len(model.blocks))
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
    return Packed(stem, weights, _pool(model.attn_pool, outer), heads, {}, {})


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
        read = ops.varlen_attention(query, k, v, apart.cu_seqlens, layout.cu_seqlens)
        pooled = packed_linear(read.flatten(1), self.proj)
        normed = _normed(pooled, self.norm, apart)
        hidden = packed_linear(normed, self.fc1, self.activation)
        if self.up is not None:
            hidden = hidden * packed_linear(normed, self.up)
        return pooled + packed_linear(_normed(hidden, self.mlp_norm, apart), self.fc2)


def _normed(rows: Tensor, norm: TokenNorm, layout: Layout) -> Tensor:
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


def serves(model: ReViT) -> bool:
    """Whether a model's dtype and device are those of the fused forward pass."""
    return (
        _library.HAS_EXTENSION and model.pos_embed.device.type == "cpu" and model.pos_embed.dtype in FLOAT_PACKED_DTYPES
    )


def n_pooled(model: ReViT) -> int:
    """Number of leading tokens of every sequence that the head reads; 0 for all tokens."""
    if model.global_pool != "token" or model.aux_head is not None:
        return 0
    return 2 if model.distilled else 1


def pooled_of(model: ReViT, packed: Packed, tokens: Tensor, layout: Layout) -> Tensor:
    """The rows that the heads read: float32, one per sequence, two for a distilled model, all tokens without pooling.

    Args:
        model: the model.
        packed: its packed weights.
        tokens: with "token" pooling the tokens that it reads after the final norm; otherwise all tokens.
        layout: layout of all tokens.
    """
    if packed.pool is not None:
        n_skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
        tokens = packed.pool(*rows_without_first(tokens, layout, n_skipped))
    elif model.global_pool != "token":
        tokens = model.pool(tokens, layout)
    if isinstance(model.fc_norm, TALNorm):
        own = rows_apart(tokens, layout) if model.global_pool else layout
        affine = (parameter.detach().float() for parameter in model.fc_norm.affine())
        tokens = model.fc_norm.op(tokens, *affine, own.cu_seqlens, own.length_index, model.fc_norm.eps)
    return tokens


def logits_of(model: ReViT, packed: Packed, tokens: Tensor, layout: Layout) -> Tensor:
    """Logits in the model's dtype.

    Args:
        model: the model.
        packed: its packed weights.
        tokens: the first `n_pooled` tokens of every sequence after the final norm, or all tokens.
        layout: layout of all tokens.
    """
    token_labels = 0.0
    if model.aux_head is not None:
        token_labels = 0.5 * sequence_max(packed.heads[1](tokens), layout.cu_seqlens, model.num_prefix_tokens)
        tokens = tokens.index_select(0, layout.cu_seqlens[:-1])
    rows = pooled_of(model, packed, tokens, layout)
    if model.distilled:
        logits = [head(r) for head, r in zip(packed.heads, both_tokens(rows), strict=True)]
        return ((logits[0] + logits[1]) / 2).to(model.pos_embed.dtype)
    return (packed.heads[0](rows) + token_labels).to(model.pos_embed.dtype)


def both_tokens(rows: Tensor) -> tuple[Tensor, ...]:
    """The class tokens and the distillation tokens `[B, C]` of the rows `[2 B, C]` of a distilled model."""
    return rows.view(-1, 2, rows.shape[1]).unbind(1)


def fused_logits(model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows) -> Tensor:
    """Logits of a batch, in the model's dtype.

    Args:
        model: the model.
        derived: what `pack_model` makes of it.
        images: the batch.
    """
    packed, tokens = _tokens(model, derived, images, n_pooled(model))
    index = images.plan.for_lengths(model.lengths).tokens(model.num_prefix_tokens).index(tokens.device)
    return logits_of(model, packed, tokens, Layout(*index, None))


def fused_embeddings(
    model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows, all_tokens: bool
) -> tuple[Tensor, Tensor]:
    """The embeddings of a batch, and the tokens after the final norm that were computed, both in the model's dtype.

    Args:
        model: the model.
        derived: what `pack_model` makes of it.
        images: the batch.
        all_tokens: compute every token; otherwise only those that the pooling reads.
    """
    n_read = 0 if all_tokens else n_pooled(model)
    packed, tokens = _tokens(model, derived, images, n_read)
    index = images.plan.for_lengths(model.lengths).tokens(model.num_prefix_tokens).index(tokens.device)
    layout, rows = Layout(*index, None), tokens
    if model.global_pool == "token" and n_read == 0:
        rows = tokens.index_select(0, model._pooled_tokens(layout).rows)
    rows = pooled_of(model, packed, rows, layout)
    if model.distilled:
        x, x_dist = both_tokens(rows)
        rows = (x + x_dist) / 2
    return rows.to(model.pos_embed.dtype), tokens.to(model.pos_embed.dtype)


def fused_tokens(model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows) -> Tensor:
    """All tokens after the final norm, `[T, C]` in the model's dtype; see `fused_logits`."""
    return _tokens(model, derived, images, 0)[1].to(model.pos_embed.dtype)


def fused_queries_and_keys(
    model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows, block: int
) -> tuple[Tensor, Tensor]:
    """Float32 queries and keys `[T, H, D]` of a block by the packed weights: the blocks before it run fused."""
    packed, rows = _tokens(model, derived, images, 0, end=block)
    weights = packed.weights.blocks[block]
    heads = weights.n_heads, weights.head_dim
    qkv = packed_linear(rows, weights.qkv).unflatten(1, (3 + weights.gated_attention, -1))  # parts end with a panel
    q, k = (qkv[:, part, : heads[0] * heads[1]].unflatten(1, heads) for part in (0, -2))
    q, k = reference.head_norm(q, weights.q_norm), reference.head_norm(k, weights.k_norm)
    plan = images.plan.for_lengths(model.lengths)
    with derived.of(model) as packed:
        rope, pos_offset = _positions(model, packed, plan)[1:]
    if rope is not None:
        table = rope[block if len(rope) > 1 else 0]
        angles = reference.token_angles(table, model.num_prefix_tokens, pos_offset, plan.index(rows.device)[0])
        q, k = reference.turned(q, angles), reference.turned(k, angles)
    return q, k


def _tokens(
    model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows, n_pooled: int, end: int | None = None
) -> tuple[Packed, Tensor]:
    """The packed weights, and the tokens after the final norm; with `end`, after the first norm of that block."""
    plan = images.plan.for_lengths(model.lengths)
    with derived.of(model) as packed:  # the forward pass itself needs no lock
        weights = packed.weights_for(model, images.normalization)
        table, rope, pos_offset = _positions(model, packed, plan)
    if end is not None:
        weights = replace(weights, norm=weights.blocks[end].norm1, blocks=weights.blocks[:end])
        rope = rope if rope is None or len(rope) == 1 else rope[:end]
    rows = (
        images.rows if packed.stem is None else packed.stem.feature_rows(images.rows, plan.grids, images.normalization)
    )
    return packed, ops.vit_forward(rows, *plan.index(rows.device), pos_offset, table, weights, n_pooled, rope)


def _positions(model: ReViT, packed: Packed, plan: PackPlan) -> tuple[Tensor, Tensor | None, Tensor]:
    """The arguments `pos_table`, `rope` and `pos_offset` of `ops.vit_forward`."""
    known = model._positions.learn(plan.grids)
    table = model._positions.table(known, model.pos_embed, model._n_prefix_embedded, torch.float32)
    pos_offset = torch.tensor(known.first_rows(plan.grids), dtype=torch.int32, device="cpu")
    return table, packed.rope_for(model, known), pos_offset

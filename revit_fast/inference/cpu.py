"""Runs a model's forward pass on the CPU in one op, with weights that are packed once.

Blocks run fused (csrc/vit_forward.cpp): norms, projections, the MLP and residual sums of a tile of rows never leave the
cache of the core that computes them. Hooks of submodules would not run, nor would modules that replace a block's own. A
model with such hooks or modules raises an error that names them; `packed_modules` serve it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from revit_fast import ops, reference
from revit_fast.inference.packed_weights import Packed
from revit_fast.layers.derived import Derived
from revit_fast.layers.norm import TALNorm
from revit_fast.layers.segments import rows_without_first, sequence_max
from revit_fast.models.inputs import PatchRows, rows_apart
from revit_fast.models.vit import ReViT
from revit_fast.ops.linear import packed_linear
from revit_fast.packing import Layout, PackPlan


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
        q, k = reference.rotary(q, k, *angles.unbind(2), half=True)
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

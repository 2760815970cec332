"""Runs a model's forward pass on the CPU in one op, with weights that are packed once.

Blocks run fused (csrc/vit_forward.cpp): norms, projections, the MLP and residual sums of a tile of rows never leave the
cache of the core that computes them. Hooks of submodules would not run, nor would modules that replace a block's own. A
model with such hooks or modules raises an error that names them; `packed_modules` serve it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast import ops, reference
from revit_fast.inference.packed_weights import Packed, normed
from revit_fast.layers.derived import Derived
from revit_fast.layers.segments import rows_without_first, sequence_max
from revit_fast.models.inputs import PatchRows, rows_apart
from revit_fast.models.vit import ReViT
from revit_fast.ops.linear import packed_linear
from revit_fast.ops.vit import ViTWeights
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
    return normed(tokens, packed.fc_norm, rows_apart(tokens, layout) if model.global_pool else layout)


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
    ready = _prepare(model, derived, images)
    return logits_of(model, ready.packed, ready.tokens(n_pooled(model)), ready.layout(model.num_prefix_tokens))


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
    ready = _prepare(model, derived, images)
    rows = tokens = ready.tokens(n_read)
    layout = ready.layout(model.num_prefix_tokens)
    if model.global_pool == "token" and n_read == 0:
        rows = tokens.index_select(0, model._pooled_tokens(layout).rows)
    rows = pooled_of(model, ready.packed, rows, layout)
    if model.distilled:
        x, x_dist = both_tokens(rows)
        rows = (x + x_dist) / 2
    return rows.to(model.pos_embed.dtype), tokens.to(model.pos_embed.dtype)


def fused_tokens(model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows) -> Tensor:
    """All tokens after the final norm, `[T, C]` in the model's dtype; see `fused_logits`."""
    return _prepare(model, derived, images).tokens().to(model.pos_embed.dtype)


def fused_queries_and_keys(
    model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows, block: int
) -> tuple[Tensor, Tensor]:
    """Float32 queries and keys `[T, H, D]` of a block by the packed weights: the blocks before it run fused."""
    ready = _prepare(model, derived, images)
    weights, rope = ready.weights.blocks[block], ready.rope
    rows = ready.tokens(end=block)
    heads = weights.n_heads, weights.head_dim
    qkv = packed_linear(rows, weights.qkv).unflatten(1, (3 + weights.gated_attention, -1))  # parts end with a panel
    q, k = (qkv[:, part, : heads[0] * heads[1]].unflatten(1, heads) for part in (0, -2))
    q, k = reference.head_norm(q, weights.q_norm), reference.head_norm(k, weights.k_norm)
    if rope is not None:
        table, first_cu = rope[block if len(rope) > 1 else 0], ready.plan.index(rows.device)[0]
        angles = reference.token_angles(table, model.num_prefix_tokens, ready.pos_offset, first_cu)
        q, k = reference.rotary(q, k, *angles.unbind(2), half=True)
    return q, k


class _Ready(NamedTuple):
    """The arguments of `ops.vit_forward` for a batch.

    Attributes:
        packed: what `pack_model` makes of the model.
        weights: its weights, a normalisation folded in.
        rows: rows of patches or, with a stem, of features.
        plan: the batch.
        pos_table: position embeddings of its grids.
        rope: angles of its grids, or None.
        pos_offset: first row of every sequence in these tables.
    """

    packed: Packed
    weights: ViTWeights
    rows: Tensor
    plan: PackPlan
    pos_table: Tensor
    rope: Tensor | None
    pos_offset: Tensor

    def tokens(self, n_pooled: int = 0, end: int | None = None) -> Tensor:
        """The first tokens of every sequence, 0 for all, after the final norm; or those that block `end` projects."""
        weights, rope = self.weights, self.rope
        if end is not None:
            weights = replace(weights, norm=weights.blocks[end].norm1, blocks=weights.blocks[:end])
            rope = rope if rope is None or len(rope) == 1 else rope[:end]
        index = self.plan.index(self.rows.device)
        return ops.vit_forward(self.rows, *index, self.pos_offset, self.pos_table, weights, n_pooled, rope)

    def layout(self, n_prefix: int) -> Layout:
        """Layout of all tokens."""
        return Layout(*self.plan.tokens(n_prefix).index(self.rows.device), None)


def _prepare(model: ReViT, derived: Derived[ReViT, Packed], images: PatchRows) -> _Ready:
    plan = images.plan.for_lengths(model.lengths)
    known = model._positions.learn(plan.grids)
    with derived.of(model) as packed:  # the forward pass itself needs no lock
        weights, rope = packed.weights_for(model, images.normalization), packed.rope_for(model, known)
        table = model._positions.table(known, model.pos_embed, model._n_prefix_embedded, torch.float32)
    pos_offset = torch.tensor(known.first_rows(plan.grids), dtype=torch.int32, device="cpu")
    rows = (
        images.rows if packed.stem is None else packed.stem.feature_rows(images.rows, plan.grids, images.normalization)
    )
    return _Ready(packed, weights, rows, plan, table, rope, pos_offset)

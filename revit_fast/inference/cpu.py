"""Runs a model's forward pass on the CPU in one op, with weights that are packed once.

Blocks run fused (csrc/vit_forward.cpp): norms, projections, the MLP and residual sums of a tile of rows never leave the
cache of the core that computes them. Hooks of submodules would not run, nor would modules that replace a block's own. A
model with such hooks or modules raises an error that names them.
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.grids import nearest_lengths
from revit_fast.inference.snapshot import Snapshot
from revit_fast.layers.block import LayerScale, ResidualScale
from revit_fast.layers.comparison import difference, is_plain
from revit_fast.layers.conv_stem import ConvStem, FoldedStem
from revit_fast.layers.mlp import ACTIVATIONS
from revit_fast.layers.norm import TALNorm
from revit_fast.layers.patch_embed import FoldedEmbedding
from revit_fast.layers.segments import sequence_max
from revit_fast.models.inputs import PatchRows, rows_apart
from revit_fast.models.spec import ViTSpec
from revit_fast.models.vit import ReViT
from revit_fast.ops import _library
from revit_fast.ops.linear import FLOAT_PACKED_DTYPES, PackedWeight, gathered, pack_weight, packed_linear
from revit_fast.ops.vit import NO_BIAS, NO_NORM, BlockWeights, TokenNorm, ViTWeights, pack_qkv
from revit_fast.packing import Layout, cumulative

CALLED = ("head", "head_dist", "aux_head")
"""Modules that the fused forward pass calls unless they are plain linear layers. They may be anything."""


WITHOUT_EFFECT = ("grad_checkpointing", "distilled_training")
"""Attributes of a model that change nothing in evaluation without gradients."""


def check_fusable(model: ReViT, training: bool = False) -> None:
    """Raises a ValueError that names what the fused forward pass would not run as the model does, and what to change.

    Args:
        model: see `check_unaltered`.
        training: see `check_unaltered`.
    """
    check_unaltered(model, "the fused forward pass", training)
    for i, block in enumerate(model.spec.blocks):
        if block.mlp.act.name not in ACTIVATIONS or block.mlp.act.make is not None:
            raise ValueError(
                f"model: blocks.{i}.mlp.act is {block.mlp.act.name}; the fused forward pass has "
                f"{', '.join(ACTIVATIONS)}; run the model itself, which is not optimised"
            )


def check_unaltered(model: ReViT, runner: str, training: bool = False) -> None:
    """Raises a ValueError that names the first module that is not as the model's spec has it.

    Args:
        model: compared with a new model of its spec, module by module.
        runner: what would not run the module, for the message.
        training: whether a module in training mode is refused too.
    """
    built = _built(model.spec)
    found = difference(
        model, built, is_called=lambda name: name in CALLED, training=training, ignored=("training", *WITHOUT_EFFECT)
    )
    if found:
        raise ValueError(
            f"model: {found}, which {runner} would not run; remove it, or merge it into plain layers first, or run the "
            "model itself, which is not optimised"
        )


@lru_cache(maxsize=16)
def _built(spec: ViTSpec) -> ReViT:
    with torch.device("meta"):
        return ReViT(spec).eval()


def _gathered(weights: ViTWeights) -> ViTWeights:
    """The same weights in one piece of memory, in the order in which they are read."""
    moved = iter(gathered([t for block in weights.blocks for part in block.parts() for t in part[:2]]))

    def placed(block: BlockWeights) -> BlockWeights:
        parts = block.parts()
        return BlockWeights(*(type(part)(next(moved), next(moved), *part[2:]) for part in parts), *block[len(parts) :])

    return weights._replace(blocks=[placed(block) for block in weights.blocks])


class Packed(NamedTuple):
    """Data derived from a model's parameters.

    Attributes:
        isa: instruction set that the weights are packed for.
        snapshot: tells whether the parameters are still the same.
        stem: the convolutional stem with its norms folded in, or None.
        weights: the packed weights without stem and head.
        heads: a function from rows to logits for each head.
    """

    isa: str
    snapshot: Snapshot
    stem: FoldedStem | None
    weights: ViTWeights
    heads: list


def _norm(module: nn.Module) -> TokenNorm:
    if not isinstance(module, TALNorm):
        return NO_NORM
    weight, *bias = (parameter.detach().float().contiguous() for parameter in module.affine())
    return TokenNorm(weight, bias[0] if bias else NO_BIAS, module.eps)


def _scaled(linear: nn.Linear, scale: nn.Module, dtype: torch.dtype) -> PackedWeight:
    """The packed layer with the scale of its result folded in."""
    if isinstance(scale, LayerScale):
        gamma = scale.gamma.double()
    elif isinstance(scale, ResidualScale):
        gamma = linear.weight.new_full((linear.out_features,), 1 / scale.divisor, dtype=torch.float64)
    else:
        return pack_weight(linear.weight, linear.bias, dtype)
    bias = None if linear.bias is None else linear.bias.double() * gamma
    return pack_weight(linear.weight.double() * gamma.unsqueeze(1), bias, dtype)


def pack_model(model: ReViT, dtype: torch.dtype | None = None, *, training: bool = False) -> Packed:
    """Packs a model's weights for the instruction set in use; raises a ValueError if they cannot be fused.

    Args:
        model: the model.
        dtype: dtype of the packed weights of the blocks; None for that of the model. Embedding and head are always
            packed in the model's dtype.
        training: whether a module in training mode is refused.
    """
    check_fusable(model, training)
    outer = model.pos_embed.dtype
    dtype = dtype or outer
    blocks = [
        BlockWeights(
            _norm(block.norm1),
            pack_qkv(block.attn.qkv.weight, block.attn.qkv.bias, dtype),
            _scaled(block.attn.proj, block.ls1, dtype),
            _norm(block.norm2),
            pack_weight(block.mlp.fc1.weight, block.mlp.fc1.bias, dtype),
            _scaled(block.mlp.fc2, block.ls2, dtype),
            n_heads=described.attn.heads,
            head_dim=described.attn.head_dim,
            activation=described.mlp.act.name,
            scale=described.attn.scale,
        )
        for block, described in zip(model.blocks, model.spec.blocks, strict=True)
    ]
    weights = ViTWeights(
        embed=pack_weight(*model.patch_embed.matrix(), outer),
        norm_pre=_norm(model.norm_pre),
        norm=_norm(model.norm),
        blocks=blocks,
        prefix=model._prefix().detach().float().contiguous(),
        n_lengths=len(model.lengths),
    )
    stem = model.patch_embed.folded() if isinstance(model.patch_embed, ConvStem) else None
    heads = [_head(head, outer) for head in (model.head, model.head_dist, model.aux_head) if head is not None]
    return Packed(_library.cpu_isa(), Snapshot(model), stem, weights, heads)


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
    if model.global_pool != "token":
        tokens = model.pool(tokens, layout.cu_seqlens)
    if isinstance(model.fc_norm, TALNorm):
        own = rows_apart(tokens, layout) if model.global_pool else layout
        affine = (parameter.detach().float() for parameter in model.fc_norm.affine())
        tokens = model.fc_norm.op(tokens, *affine, own.cu_seqlens, own.length_index, model.fc_norm.eps)
    if model.distilled:
        rows = tokens.view(-1, 2, tokens.shape[1]).unbind(1)
        logits = [head(r) for head, r in zip(packed.heads, rows, strict=True)]
        return ((logits[0] + logits[1]) / 2).to(model.pos_embed.dtype)
    return (packed.heads[0](tokens) + token_labels).to(model.pos_embed.dtype)


class FusedForward:
    """The forward pass of a model on the CPU; several threads may call it concurrently.

    Args:
        model: the model; if its parameters change, they are packed again.
        dtype: dtype of the packed weights of the blocks, see `pack_model`.
    """

    def __init__(self, model: ReViT, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype
        self._lock = threading.Lock()
        self._packed: Packed | None = None
        self._table: tuple[Tensor | None, Tensor | None] = (None, None)
        self._folded: dict[tuple[float, ...], PackedWeight] = {}

    def logits(self, images: PatchRows) -> Tensor:
        """Logits of a batch, in the model's dtype."""
        model = self._model
        packed, tokens, length_index = self._tokens(images, n_pooled(model))
        seqlens = [h * w + model.num_prefix_tokens for h, w in images.grids]
        return logits_of(model, packed, tokens, Layout(cumulative(seqlens), length_index, None))

    def tokens(self, images: PatchRows) -> Tensor:
        """All tokens after the final norm, `[T, C]` in the model's dtype."""
        return self._tokens(images, 0)[1].to(self._model.pos_embed.dtype)

    def _tokens(self, images: PatchRows, n_pooled: int) -> tuple[Packed, Tensor, Tensor]:
        model = self._model
        seqlens = [h * w for h, w in images.grids]
        with self._lock:  # guards only the derived data; the forward pass needs no lock
            packed = self._current()
            weights = packed.weights
            if images.normalization is not None and packed.stem is None:
                weights = weights._replace(embed=self._folded_embedding(images.normalization))
            model._positions.learn(images.grids)
            offsets = model._positions.first_rows(images.grids)
            table = self._current_table()
        length_index = torch.tensor(nearest_lengths(seqlens, model.lengths), dtype=torch.int32, device="cpu")
        pos_offset = torch.tensor(offsets, dtype=torch.int32, device="cpu")
        rows = images.rows if packed.stem is None else packed.stem.feature_rows(*images)
        tokens = ops.vit_forward(rows, cumulative(seqlens), length_index, pos_offset, table, weights, n_pooled)
        return packed, tokens, length_index

    def _current(self) -> Packed:
        packed = self._packed
        if packed is None or packed.isa != _library.cpu_isa() or not packed.snapshot.holds():
            self._folded.clear()
            packed = pack_model(self._model, self._dtype, training=True)
            packed = self._packed = packed._replace(weights=_gathered(packed.weights))
        return packed

    def _current_table(self) -> Tensor:
        """Position embeddings of all known grids in float32."""
        table = self._model._positions.table(self._model.pos_embed, self._model._n_prefix_embedded)
        if table is not self._table[0]:
            self._table = (table, table.float().contiguous())
        return self._table[1]

    def _folded_embedding(self, normalization: Tensor) -> PackedWeight:
        key = tuple(normalization.flatten().tolist())
        if key not in self._folded:
            folded: FoldedEmbedding = self._model.patch_embed.fold(normalization)
            self._folded = {key: pack_weight(folded.weight, folded.bias, self._model.pos_embed.dtype)}
        return self._folded[key]

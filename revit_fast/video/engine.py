"""`optimize`: an inference copy of a TimeSformer that runs on weights packed once for the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.inference.inference_copy import InferenceCopy
from revit_fast.layers.comparison import difference
from revit_fast.layers.derived import Snapshot
from revit_fast.layers.mlp import activation_name
from revit_fast.ops import _library
from revit_fast.ops.attention import varlen_attention
from revit_fast.ops.linear import PackedWeight, gathered, pack_weight, packed_linear
from revit_fast.ops.tokens import mean_pool
from revit_fast.packing import Layout
from revit_fast.video.clips import ClipLayout, PackedClips
from revit_fast.video.model import SpaceTimeBlock, TimeSformer, add_and_norm

PAGE, PADDING = 1024, 32
"""In float32 values. Rows whose distance is a multiple of `PAGE` (4 KiB) share sets of the L1 cache. The MLP's hidden
rows often have such a distance; they then get `PADDING` zeros more."""


class PackedBlock(NamedTuple):
    """The linear layers of a block.

    Attributes:
        temporal_qkv: queries, keys and values of temporal attention; None in joint attention.
        temporal_out: temporal attention's projection merged with the linear layer that follows it directly; None in
            joint attention.
        qkv: queries, keys and values of spatial attention.
        proj: output projection of spatial attention.
        fc1: first layer of the MLP.
        fc2: second layer of the MLP.
        activation: activation of the MLP.
    """

    temporal_qkv: PackedWeight | None
    temporal_out: PackedWeight | None
    qkv: PackedWeight
    proj: PackedWeight
    fc1: PackedWeight
    fc2: PackedWeight
    activation: str


class Packed(NamedTuple):
    """Packed weights that are derived from a model's parameters.

    Attributes:
        isa: instruction set that the weights are packed for.
        snapshot: tells whether the parameters are still the same.
        embed: the patch embedding.
        blocks: one entry per block.
        last_q: queries of the last block's spatial attention, computed for class tokens only; None without blocks.
        last_kv: keys and values of the last block's spatial attention; None without blocks.
        head: the head; None for a model without one.
    """

    isa: str
    snapshot: Snapshot
    embed: PackedWeight
    blocks: Sequence[PackedBlock]
    last_q: PackedWeight | None
    last_kv: PackedWeight | None
    head: PackedWeight | None


def _packed_block(block: SpaceTimeBlock) -> PackedBlock:
    def packed(linear: nn.Linear) -> PackedWeight:
        return pack_weight(linear.weight, linear.bias)

    temporal_qkv = temporal_out = None
    if block.divided:
        proj, fc = block.temporal_attn.proj, block.temporal_fc
        weight = fc.weight.double()
        temporal_qkv = packed(block.temporal_attn.qkv)
        temporal_out = pack_weight(weight @ proj.weight.double(), weight @ proj.bias.double() + fc.bias.double())
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    padding = PADDING if fc1.out_features % PAGE == 0 else 0  # every activation maps 0 to 0
    return PackedBlock(
        temporal_qkv,
        temporal_out,
        packed(block.attn.qkv),
        packed(block.attn.proj),
        pack_weight(F.pad(fc1.weight, (0, 0, 0, padding)), F.pad(fc1.bias, (0, padding))),
        pack_weight(F.pad(fc2.weight, (0, padding)), fc2.bias),
        activation_name(block.mlp.act),
    )


def _gathered(blocks: Sequence[PackedBlock]) -> list[PackedBlock]:
    """The same weights in one piece of memory, in the order in which they are read."""
    weights = [[part for part in block if isinstance(part, PackedWeight)] for block in blocks]
    moved = iter(gathered([t for block in weights for part in block for t in part[:2]]))

    def placed(part):
        return part._replace(panels=next(moved), bias=next(moved)) if isinstance(part, PackedWeight) else part

    return [PackedBlock(*map(placed, block)) for block in blocks]


def check_packable(model: TimeSformer, training: bool = False) -> None:
    """Raises a ValueError that names what packed code would not run as the model does, and what to change.

    Args:
        model: compared with a new model of its constructor's arguments, module by module.
        training: whether a module in training mode is refused too.
    """
    with torch.device("meta"):
        built = TimeSformer(**model._arguments).eval()
    found = difference(model, built, training=training, ignored=("training",))
    if found is None:
        acts = {type(block.mlp.act).__name__: activation_name(block.mlp.act) for block in model.blocks}
        found = next((f"the activation {kind} has no kernel" for kind, name in acts.items() if name is None), None)
    if found:
        raise ValueError(f"model: {found}, which packed code would not run; remove it, or run the model itself")


def pack_model(model: TimeSformer) -> Packed:
    """Packs a model's weights for the instruction set in use; raises a ValueError if packed code cannot run them."""
    check_packable(model, training=True)
    last_q = last_kv = None
    if len(model.blocks):
        weight, bias = model.blocks[-1].attn.qkv.weight, model.blocks[-1].attn.qkv.bias
        c = model.embed_dim
        last_q = pack_weight(weight[:c], None if bias is None else bias[:c])
        last_kv = pack_weight(weight[c:], None if bias is None else bias[c:])
    return Packed(
        _library.cpu_isa(),
        Snapshot(model),
        pack_weight(*model.patch_embed.matrix()),
        _gathered([_packed_block(block) for block in model.blocks]),
        last_q,
        last_kv,
        pack_weight(model.head.weight, model.head.bias) if isinstance(model.head, nn.Linear) else None,
    )


class OptimizedTimeSformer(InferenceCopy, TimeSformer):
    """An inference copy of a `TimeSformer`; make one with `optimize`."""

    DERIVED = ("_packed", "_folded", "_lock")

    def __init__(self, model: TimeSformer) -> None:
        self._take(model)
        self._forget()

    def _forget(self) -> None:
        self._packed: Packed | None = None
        self._folded: tuple[tuple[float, ...], PackedWeight] | None = None
        self._lock = threading.Lock()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def forward(self, x: Tensor | Sequence[Tensor] | PackedClips) -> Tensor:
        """The logits of `TimeSformer.forward`, without autograd."""
        with torch.inference_mode(False), torch.no_grad():
            return super().forward(x)

    def forward_features(self, x: Tensor | Sequence[Tensor] | PackedClips) -> Tensor | list[Tensor]:
        """The tokens of `TimeSformer.forward_features`, without autograd."""
        with torch.inference_mode(False), torch.no_grad():
            return super().forward_features(x)

    def _runs_packed(self) -> bool:
        place = self.pos_embed
        return _library.HAS_EXTENSION and place.device.type == "cpu" and place.dtype == torch.float32

    def _current(self) -> Packed:
        with self._lock:
            packed = self._packed
            if packed is None or packed.isa != _library.cpu_isa() or not packed.snapshot.holds():
                packed, self._folded = pack_model(self), None
                self._packed = packed
            return packed

    def _position_table(self, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        with self._lock:  # learning grids moves rows of the table
            return super()._position_table(grids)

    def _embed_rows(self, rows: Tensor, normalization: Tensor | None) -> Tensor:
        if not self._runs_packed():
            return super()._embed_rows(rows, normalization)
        embed = self._current().embed if normalization is None else self._folded_embedding(normalization)
        return packed_linear(rows.float(), embed)

    def _folded_embedding(self, normalization: Tensor) -> PackedWeight:
        self._current()  # drops the folded weights if parameters have changed
        key = tuple(normalization.flatten().tolist())
        with self._lock:
            if self._folded is None or self._folded[0] != key:
                self._folded = (key, pack_weight(*self.patch_embed.fold(normalization)))
            return self._folded[1]

    def _logits(self, classes: Tensor) -> Tensor:
        head = self._current().head if self._runs_packed() else None
        return super()._logits(classes) if head is None else packed_linear(classes, head)

    def _class_tokens(self, x: Tensor, layout: ClipLayout) -> Tensor:
        if not self._runs_packed() or not len(self.blocks):
            return super()._class_tokens(x, layout)
        packed, delta = self._current(), None
        for block, weights in zip(self.blocks[:-1], packed.blocks, strict=False):
            x, delta = self._run_block(block, weights, x, delta, layout)
        x, delta = self._run_pooled_block(packed, x, delta, layout)
        return add_and_norm(self.norm, x, delta, layout.classes)[0]

    def _tokens(self, x: Tensor, layout: ClipLayout) -> Tensor:
        if not self._runs_packed():
            return super()._tokens(x, layout)
        delta = None
        for block, weights in zip(self.blocks, self._current().blocks, strict=True):
            x, delta = self._run_block(block, weights, x, delta, layout)
        return add_and_norm(self.norm, x, delta, layout.stream)[0]

    def _run_block(
        self, block: SpaceTimeBlock, weights: PackedBlock, x: Tensor, delta: Tensor | None, layout: ClipLayout
    ) -> tuple[Tensor, Tensor]:
        """`SpaceTimeBlock.forward` on packed weights."""
        h, x = self._spatial_rows(block, weights, x, delta, layout)
        q, k, v = self._heads(packed_linear(h, weights.qkv), 3)
        attended = _attention(q, k, v, layout.spatial)
        rows = attended.index_select(0, layout.to_stream)
        # Averaging before the projection is enough: the projection of a mean is the mean of the projections.
        rows[layout.n_patch_rows :] = mean_pool(attended.index_select(0, layout.class_rows), layout.copies)
        return self._mlp(block, weights, x, packed_linear(rows, weights.proj), layout.stream)

    def _run_pooled_block(
        self, packed: Packed, x: Tensor, delta: Tensor | None, layout: ClipLayout
    ) -> tuple[Tensor, Tensor]:
        """The last block, for the class tokens alone."""
        block, weights = self.blocks[-1], packed.blocks[-1]
        h, x = self._spatial_rows(block, weights, x, delta, layout)
        (q,) = self._heads(packed_linear(h.index_select(0, layout.class_rows), packed.last_q), 1)
        k, v = self._heads(packed_linear(h, packed.last_kv), 2)
        attended = mean_pool(_attention(q, k, v, layout.class_queries, layout.spatial), layout.copies)
        x, delta = x[layout.n_patch_rows :], packed_linear(attended, weights.proj)
        return self._mlp(block, weights, x, delta, layout.classes)

    def _spatial_rows(
        self, block: SpaceTimeBlock, weights: PackedBlock, x: Tensor, delta: Tensor | None, layout: ClipLayout
    ) -> tuple[Tensor, Tensor]:
        """The rows that spatial attention reads, in space order, and the stream after temporal attention."""
        if weights.temporal_qkv is not None:
            h, x = add_and_norm(block.temporal_norm1, x, delta, layout.stream)
            q, k, v = self._heads(packed_linear(h, weights.temporal_qkv), 3)
            delta = packed_linear(_attention(q, k, v, layout.temporal), weights.temporal_out)
            delta[layout.n_patch_rows :] = 0
        h, x = add_and_norm(block.norm1, x, delta, layout.stream)
        return h.index_select(0, layout.to_space), x

    def _heads(self, rows: Tensor, n_parts: int) -> tuple[Tensor, ...]:
        return rows.view(-1, n_parts, self.num_heads, self.embed_dim // self.num_heads).unbind(1)

    @staticmethod
    def _mlp(
        block: SpaceTimeBlock, weights: PackedBlock, x: Tensor, delta: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        h, x = block.norm2(delta, layout, residual=x)
        return x, packed_linear(packed_linear(h, weights.fc1, weights.activation), weights.fc2)


def _attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: Layout | None = None) -> Tensor:
    """Attention output as rows `[Tq, C]`; `keys` is the layout of k and v if it differs from that of q."""
    cu_seqlens_k = None if keys is None else keys.cu_seqlens
    work = {"tiles": layout.tiles, "tile_counts": layout.tile_counts}
    return varlen_attention(q, k, v, layout.cu_seqlens, cu_seqlens_k, **work).flatten(1)


def optimize(model: TimeSformer) -> OptimizedTimeSformer:
    """An inference copy of `model`: same calls, same results within rounding; `model` itself is unchanged.

    On a CPU in float32 every linear layer runs on weights packed once, and temporal attention's projection is merged
    with the layer after it. A clip's result is then bitwise the same whatever else is in its pack. Elsewhere, and
    without the C++ extension, the copy runs the model's own code. The copy notices changed parameters. Several threads
    may call it concurrently. The process keeps freed memory from the first copy on, see
    `revit_fast.io.memory.keep_freed_pages`.

    Raises:
        TypeError: if `model` is not a `TimeSformer`.
        ValueError: if the model has hooks or replaced modules, which packed code would not run.
    """
    if type(model) not in (TimeSformer, OptimizedTimeSformer):  # a subclass may compute something else
        raise TypeError(f"model: expected a revit_fast.video.TimeSformer, got {type(model).__name__}")
    check_packable(model)
    return OptimizedTimeSformer(model)

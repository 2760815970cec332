"""`optimize`: an inference copy of a TimeSformer whose modules run on weights packed once for the CPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from revit_fast.inference.inference_copy import InferenceCopy, in_turn
from revit_fast.inference.packed_modules import PACKED_KINDS, is_packable, packed, prepack, run_packed, takes
from revit_fast.layers.attention import Attention
from revit_fast.layers.comparison import is_plain
from revit_fast.layers.derived import Derived, TensorWatch
from revit_fast.ops.linear import PackedWeight
from revit_fast.packing import Layout
from revit_fast.video.model import SpaceTimeBlock, TimeSformer


class PackedSpaceTimeBlock(SpaceTimeBlock):
    """A block with temporal attention's projection and the linear layer after it merged into one packed layer."""

    stands_for = SpaceTimeBlock
    _packed: Derived[PackedSpaceTimeBlock, PackedWeight]

    def _over_time(self, h: Tensor, layout: Layout) -> Tensor:
        attn, fc = self.temporal_attn, self.temporal_fc
        if not (is_plain(attn, Attention) and is_plain(attn.proj_drop, nn.Dropout) and not attn.proj_drop.training):
            return super()._over_time(h, layout)
        rows = attn.attend(h, layout)
        linear = is_plain(attn.proj, nn.Linear) and is_plain(fc, nn.Linear)
        if linear and takes(attn.proj, rows) and is_packable(fc):
            return run_packed(rows, (self._packed.get(self), "none"))
        return fc(attn.proj(rows))

    @staticmethod
    def derived() -> Derived:
        """What `prepack` gives to such a module."""
        return Derived(_merge, partial(TensorWatch, _parameters))


def _parameters(block: SpaceTimeBlock) -> tuple[Tensor | None, ...]:
    proj, fc = block.temporal_attn.proj, block.temporal_fc
    return proj.weight, proj.bias, fc.weight, fc.bias


def _merge(block: SpaceTimeBlock) -> PackedWeight:
    weight, bias, fc_weight, fc_bias = (None if t is None else t.double() for t in _parameters(block))
    merged = fc_bias if bias is None else fc_weight @ bias + (0 if fc_bias is None else fc_bias)
    return packed(fc_weight @ weight, merged)


KINDS = {**PACKED_KINDS, SpaceTimeBlock: PackedSpaceTimeBlock}


class OptimizedTimeSformer(InferenceCopy, TimeSformer):
    """An inference copy of a `TimeSformer`; make one with `optimize`."""

    def __init__(self, model: TimeSformer) -> None:
        self._take(model)
        prepack(self, KINDS)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        prepack(self, KINDS)  # of a copy that was pickled before there were packed modules

    forward = in_turn(torch.no_grad()(TimeSformer.forward))
    forward_features = in_turn(torch.no_grad()(TimeSformer.forward_features))


def optimize(model: TimeSformer) -> OptimizedTimeSformer:
    """An inference copy of `model`: same calls, same results within rounding; `model` itself is unchanged.

    On a CPU in float32 every plain linear layer runs on weights packed once, and temporal attention's projection is
    merged with the layer after it. A clip's result is then bitwise the same whatever else is in its pack. Everything
    else, such as a layer with an adapter, is called as it is. Elsewhere, and without the C++ extension, the copy runs
    the model's own code. The copy notices changed parameters. Several threads may call it concurrently. The process
    keeps freed memory from the first copy on, see `revit_fast.io.memory.keep_freed_pages`.

    Raises:
        TypeError: if `model` is not a `TimeSformer`; a subclass may compute something else.
    """
    if type(model) not in (TimeSformer, OptimizedTimeSformer):
        raise TypeError(f"model: expected a revit_fast.video.TimeSformer, got {type(model).__name__}")
    return OptimizedTimeSformer(model)

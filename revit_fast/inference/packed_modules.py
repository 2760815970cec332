"""Modules that run on weights packed once for the CPU, and `prepack`, which puts them in the place of plain ones.

A packed module is the plain module with another forward pass. It has the same parameters under the same names, and is
called as a module: hooks run. It computes what the plain module does whenever packed kernels do not serve: on another
device, in another dtype, in compiled code, under autograd or autocast, with parametrised weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.layers.comparison import is_plain
from revit_fast.layers.derived import Derived, TensorWatch, kept_tensors
from revit_fast.layers.mlp import Mlp, activation_name
from revit_fast.layers.patch_embed import FoldedEmbedding, PatchEmbed
from revit_fast.ops import _library
from revit_fast.ops.linear import PackedWeight, gathered, pack_weight, packed_linear
from revit_fast.packing import Layout

PAGE, PADDING = 1024, 32
"""In float32 values. Rows whose distance is a multiple of `PAGE` (4 KiB) share sets of the L1 cache. The MLP's hidden
rows often have such a distance; they then get `PADDING` zeros more."""

LARGE = 4 << 20
"""Bytes from which on a packed weight gets pages of 2 MiB. Smaller ones would leave much of their pages empty: those of
DeiT-S would take 196 MB instead of 93, for 4 % of the time of a single small image."""


def is_packable(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether packed kernels can stand in for a layer with its present parameters, here and now."""
    weight, bias = layer.weight, layer.bias
    return (
        _library.HAS_EXTENSION
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(weight) is nn.Parameter  # neither computed by a parametrisation nor of a type with its own arithmetic
        and (bias is None or type(bias) is nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32  # PyTorch multiplies bfloat16 in bfloat16, which is faster than widening it
        and weight.layout == torch.strided
        and weight.numel() > 0
        and not any(p.is_inference() or (p.requires_grad and torch.is_grad_enabled()) for p in layer.parameters())
    )


def takes(layer: nn.Linear, x: Tensor) -> bool:
    """Whether packed kernels can compute a linear layer on `x`."""
    weight = layer.weight
    return (
        is_packable(layer)
        and x.dtype == weight.dtype
        and x.device.type == "cpu"
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def run_packed(x: Tensor, *layers: tuple[PackedWeight, str]) -> Tensor:
    """Packed layers with their activations, one after another, on `x` `[..., K]`."""
    rows = x.reshape(-1, x.shape[-1])
    for weight, activation in layers:
        rows = packed_linear(rows, weight, activation)
    return rows.view(*x.shape[:-1], rows.shape[1])


def packed(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """A packed weight; a large one is on pages of 2 MiB."""
    made = pack_weight(weight, bias)
    return made if made.panels.nbytes < LARGE else PackedWeight(*gathered(made[:2]), *made[2:])


class PackedLinear(nn.Linear):
    """A linear layer on a packed weight. A row's result is the same bits in every batch."""

    stands_for = nn.Linear
    _packed: Derived[PackedLinear, dict[tuple, PackedWeight]]

    def forward(self, x: Tensor) -> Tensor:
        if not takes(self, x):
            return super().forward(x)
        return run_packed(x, (self._part(slice(None)), "none"))

    def outputs(self, x: Tensor, part: slice) -> Tensor:
        """A part of the outputs alone, see `layers.attention.outputs_of`; each part has a packed weight of its own."""
        if not takes(self, x):
            return F.linear(x, self.weight[part], None if self.bias is None else self.bias[part])
        return run_packed(x, (self._part(part), "none"))

    def _part(self, part: slice) -> PackedWeight:
        key = (part.start, part.stop)
        with self._packed.of(self) as parts:
            if key not in parts:
                with kept_tensors():
                    bias = None if self.bias is None else self.bias[part]
                    parts[key] = packed(self.weight[part], bias)
            return parts[key]

    @staticmethod
    def derived() -> Derived:
        """What `prepack` gives to such a module."""
        return Derived(_no_parts, partial(TensorWatch, _parameters))


class PackedMlp(Mlp):
    """An MLP on packed weights, with the activation fused into the first layer; or its parts, called one by one.

    The parts are called if they do more than plain ones (hooks, adapters, dropout in training), if the MLP is gated or
    has a norm, or if there is no kernel for the activation.
    """

    stands_for = Mlp
    _packed: Derived[PackedMlp, tuple[PackedWeight, PackedWeight]]

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        activation = self._fused_activation()
        if activation is None or not (takes(self.fc1, x) and is_packable(self.fc2)):
            return super().forward(x, layout)
        fc1, fc2 = self._packed.get(self)
        return run_packed(x, (fc1, activation), (fc2, "none"))

    def _fused_activation(self) -> str | None:
        """The kernels' name of the activation; None if the parts must be called."""
        if self.gated or self.norm is not None:
            return None
        linear = is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)
        drops = not is_plain(self.drop, nn.Dropout) or self.drop.training
        return activation_name(self.act) if linear and not drops and is_plain(self.act, type(self.act)) else None

    @staticmethod
    def derived() -> Derived:
        """What `prepack` gives to such a module."""
        return Derived(_pack_mlp, partial(TensorWatch, _mlp_parameters))


class PackedPatchEmbed(PatchEmbed):
    """A patch embedding on a packed weight. The normalisation of raw pixels is folded in; the last one used is kept."""

    stands_for = PatchEmbed
    _packed: Derived[PackedPatchEmbed, dict[tuple | None, PackedWeight]]

    def forward(self, rows: Tensor, normalization: Tensor | FoldedEmbedding | None = None) -> Tensor:
        if (
            isinstance(normalization, FoldedEmbedding)
            or not is_plain(self.proj, nn.Conv2d)
            or not is_packable(self.proj)
            or rows.device.type != "cpu"
            or (rows.requires_grad and torch.is_grad_enabled())
        ):
            return super().forward(rows, normalization)
        return packed_linear(rows.float(), self._weight_for(normalization))

    def _weight_for(self, normalization: Tensor | None) -> PackedWeight:
        key = None if normalization is None else tuple(normalization.flatten().tolist())
        with self._packed.of(self) as kept:
            if key not in kept:
                with kept_tensors():
                    layer = self.matrix() if normalization is None else self.fold(normalization)
                    for old in kept.keys() - {None}:
                        del kept[old]
                    kept[key] = packed(*layer)
            return kept[key]

    @staticmethod
    def derived() -> Derived:
        """What `prepack` gives to such a module."""
        return Derived(_no_parts, partial(TensorWatch, _projection))


def _no_parts(module: nn.Module) -> dict:
    """The packed parts of a layer, before any is used."""
    return {}


def _parameters(layer: nn.Module) -> tuple[Tensor | None, ...]:
    return layer.weight, layer.bias


def _projection(embed: PatchEmbed) -> tuple[Tensor | None, ...]:
    return _parameters(embed.proj)


def _mlp_parameters(mlp: Mlp) -> tuple[Tensor | None, ...]:
    return *_parameters(mlp.fc1), *_parameters(mlp.fc2)


def _pack_mlp(mlp: Mlp) -> tuple[PackedWeight, PackedWeight]:
    fc1, fc2 = mlp.fc1, mlp.fc2
    padding = PADDING if fc1.weight.shape[0] % PAGE == 0 else 0  # every activation maps 0 to 0
    bias = None if fc1.bias is None else F.pad(fc1.bias, (0, padding))
    return (
        packed(F.pad(fc1.weight, (0, 0, 0, padding)), bias),
        packed(F.pad(fc2.weight, (0, padding)), fc2.bias),
    )


PACKED_KINDS: Mapping[type[nn.Module], Any] = {
    kind.stands_for: kind for kind in (PackedLinear, PackedMlp, PackedPatchEmbed)
}
"""The packed class of every plain one."""


def prepack(model: nn.Module, kinds: Mapping[type[nn.Module], Any] = PACKED_KINDS) -> None:
    """Replaces the plain modules of an inference copy by packed ones, in place. Each packs its weights when it is used.

    A module with hooks, a forward pass of its own or another type (a parametrised one has another type) stays as it is.

    Args:
        model: the copy.
        kinds: the packed class of every plain one. It has a static method `derived` that makes its attribute `_packed`.
    """
    for module in model.modules():
        kind = kinds.get(type(module))
        if kind is not None and is_plain(module, type(module)):
            module.__class__ = kind
            module._packed = kind.derived()

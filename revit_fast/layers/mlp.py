"""The MLP of a block, and its activations as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revit_fast.packing import Layout


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415), as in CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "quick_gelu": QuickGELU,
}
"""Activations by the names that files and kernels use for them."""

OF_TIMM = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "Swish": "silu"}
"""timm's own classes without arguments, by their names."""


@dataclass(frozen=True)
class Activation:
    """An activation as data.

    Attributes:
        name: a name in `ACTIVATIONS`, or that of a class of `torch.nn` without parameters, or that of `make`'s module.
        arguments: (name, value) of every argument of the class, in its order.
        make: constructor of a module that `torch.nn` does not have; no file can hold it.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    make: Callable[[], nn.Module] | None = None

    def build(self) -> nn.Module:
        """A new module."""
        if self.make is not None:
            return self.make()
        return ACTIVATIONS[self.name]() if self.name in ACTIVATIONS else getattr(nn, self.name)(**dict(self.arguments))

    def as_json(self) -> Any:
        """The name, or a list of name and arguments.

        Raises:
            ValueError: for a module that only its constructor can make.
        """
        if self.make is not None:
            raise ValueError(
                f"act_layer: {self.name} has no name that a file could keep; use {', '.join(ACTIVATIONS)}, or a class "
                "of torch.nn without parameters"
            )
        return [self.name, dict(self.arguments)] if self.arguments else self.name


def activation_of(act: nn.Module) -> Activation | None:
    """The activation that a module is; None for a module with parameters, a subclass, or another library's."""
    kind = type(act)
    if kind is nn.GELU:
        return Activation("gelu_tanh" if act.approximate == "tanh" else "gelu")
    for name, known in (("silu", nn.SiLU), ("relu", nn.ReLU), ("quick_gelu", QuickGELU)):
        if kind is known:
            return Activation(name)
    if kind.__module__.startswith("timm.layers.") and kind.__name__ in OF_TIMM:
        return Activation(OF_TIMM[kind.__name__])
    elementwise = kind.__module__ == nn.GELU.__module__ and kind not in (nn.GLU, nn.MultiheadAttention)
    if not elementwise or any(True for _ in act.parameters()) or getattr(nn, kind.__name__, None) is not kind:
        return None
    names = [name for name in getattr(act, "__constants__", ()) if name != "inplace"]
    return Activation(kind.__name__, tuple((name, getattr(act, name)) for name in names))


def as_activation(activation: str | Callable[[], nn.Module] | Activation | Sequence) -> Activation:
    """An activation from its name in `ACTIVATIONS`, its constructor, or (name of a class of torch.nn, arguments).

    Raises:
        ValueError: for an unknown name, or an activation that has parameters.
    """
    if isinstance(activation, Activation):
        return activation
    name, arguments = (activation, {}) if isinstance(activation, str) else (None, {})
    if isinstance(activation, (list, tuple)) and len(activation) == 2:
        name, arguments = activation
    if name in ACTIVATIONS:
        return Activation(name)
    known = isinstance(name, str) and getattr(getattr(nn, name, None), "__module__", "") == nn.GELU.__module__
    if not known and not callable(activation):
        raise ValueError(f"act_layer: expected a module or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    act = getattr(nn, name)(**arguments) if known else activation()
    if any(True for _ in act.parameters()):
        raise ValueError(f"act_layer: {type(act).__name__} has parameters, which a block's activation cannot have")
    return activation_of(act) or Activation(type(act).__name__, make=activation)


def activation_name(act: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`; None if it has none there."""
    found = activation_of(act)
    return found.name if found is not None and found.name in ACTIVATIONS else None


def make_activation(activation: str | Callable[[], nn.Module] | Activation | Sequence) -> nn.Module:
    """A new module of an activation, see `as_activation`."""
    return as_activation(activation).build()


class Mlp(nn.Module):
    """Two linear layers with an activation between them; parameters as in timm.

    Args:
        dim: channels C.
        hidden: channels between the layers.
        act: the activation.
        bias: whether the layers have a bias.
        drop: dropout after each layer.
        gated: the first layer has twice as many channels; the activation of the first half multiplies the second half.
        norm: norm of the hidden channels; None for none.
    """

    gated: bool = False  # of models pickled before there was a choice

    def __init__(
        self,
        dim: int,
        hidden: int,
        act: nn.Module,
        bias: bool = True,
        drop: float = 0.0,
        *,
        gated: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(dim, (1 + gated) * hidden, bias=bias)
        self.act = act
        self.drop = nn.Dropout(drop)
        self.norm = norm
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not hasattr(self, "norm"):  # pickled before there was a choice
            self.norm = None

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """`[T, C]`; a norm of the hidden channels needs the layout of the rows."""
        x = self.drop(self.hidden(x))
        return self.drop(self.fc2(x if self.norm is None else self.norm(x, layout)))

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden channels before their norm."""
        x = self.fc1(x)
        if not self.gated:
            return self.act(x)
        gate, x = x.chunk(2, dim=-1)
        return self.act(gate) * x

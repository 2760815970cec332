"""The MLP of a block, and its activations by name."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU in CLIP (arXiv 2103.00020)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "quick_gelu": QuickGELU,
}
"""Activations by the names that files and kernels use for them."""


def make_activation(activation: str | type[nn.Module] | partial) -> nn.Module:
    """Makes the module from its constructor or its name in `ACTIVATIONS`."""
    if not isinstance(activation, str):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(f"act_layer: expected a module or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]()


def activation_name(act: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`; None if it has none there.

    timm's own classes `GELUTanh` and `QuickGELU` are known by their class names.
    """
    if type(act).__name__ == "GELUTanh" or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_tanh"
    if type(act).__name__ == "QuickGELU":
        return "quick_gelu"
    names = {nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu"}
    return next((name for kind, name in names.items() if isinstance(act, kind)), None)


class Mlp(nn.Module):
    """Two linear layers with an activation between them; parameters as in timm."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

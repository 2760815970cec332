"""For comparison with TAL-LN: a model whose norms have one weight and bias for all lengths."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from revit_fast.layers.norm import TALLayerNorm
from revit_fast.model import ReViT


class SharedNorm(TALLayerNorm):
    """A TAL-LN whose lengths share weight and bias `[C]`, those of the longest in the one it is made of."""

    def __init__(self, norm: TALLayerNorm) -> None:
        nn.Module.__init__(self)
        self.n_lengths, self.eps = norm.weight.shape[0], norm.eps
        self.weight = nn.Parameter(norm.weight[0].detach().clone())
        self.bias = nn.Parameter(norm.bias[0].detach().clone())

    def affine(self) -> tuple[Tensor, Tensor]:
        """Both, repeated for every length: gradients are sums over lengths."""
        return self.weight.expand(self.n_lengths, -1), self.bias.expand(self.n_lengths, -1)

    def extra_repr(self) -> str:
        return f"n_lengths={self.n_lengths}, dim={self.weight.shape[0]}, eps={self.eps}, shared"


def share(model: ReViT) -> None:
    """Makes every norm of the model shared, in place."""
    _replace(model, TALLayerNorm, SharedNorm)


def plain_copy(model: ReViT) -> ReViT:
    """A copy whose norms have parameters for every length again, equal where they were shared."""
    plain = copy.deepcopy(model)
    _replace(plain, SharedNorm, _unshared)
    return plain


@torch.no_grad()
def _unshared(norm: SharedNorm) -> TALLayerNorm:
    plain = TALLayerNorm(norm.n_lengths, norm.weight.shape[0], norm.eps).to(norm.weight)
    for own, repeated in zip((plain.weight, plain.bias), norm.affine(), strict=True):
        own.copy_(repeated)
    return plain


def _replace(model: nn.Module, kind: type, make) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child).train(child.training))

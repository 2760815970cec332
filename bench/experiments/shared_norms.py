"""For comparison with TAL-LN: a model whose norms have one weight and bias for all lengths, and its training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_fast.layers.norm import TALLayerNorm
from revit_fast.models.vit import ReViT
from revit_fast.train.trainer import Trainer


class SharedNorm(TALLayerNorm):
    """A TAL-LN whose lengths share one weight and bias `[C]`.

    Args:
        norm: the norm that is replaced; its weight and bias of the longest length are the initial values.
    """

    def __init__(self, norm: TALLayerNorm) -> None:
        nn.Module.__init__(self)
        self.n_lengths, self.eps = norm.weight.shape[0], norm.eps
        self.weight = nn.Parameter(norm.weight[0].detach().clone())
        self.bias = nn.Parameter(norm.bias[0].detach().clone())

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, each `[n_lengths, C]`, repeated for every length: gradients are sums over lengths."""
        return self.weight.expand(self.n_lengths, -1), self.bias.expand(self.n_lengths, -1)

    def extra_repr(self) -> str:
        return f"n_lengths={self.n_lengths}, dim={self.weight.shape[0]}, eps={self.eps}, shared"


def share(model: ReViT) -> None:
    """Makes every norm of the model shared, in place."""
    _replace(model, TALLayerNorm, SharedNorm)


def unshare(model: ReViT) -> None:
    """Turns every shared norm of the model into a TAL-LN with equal parameters for all lengths, in place."""
    _replace(model, SharedNorm, _unshared)


class SharedNormsTrainer(Trainer):
    """Trains a model whose norms are shared; it evaluates and writes a plain model."""

    def plain(self) -> ReViT:
        """A copy of the model for deployment, see `Trainer.plain`; its norms have parameters for every length."""
        model = super().plain()
        unshare(model)
        return model


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

"""For comparison with TAL-LN: a model whose norms have one weight and bias for all lengths."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils import parametrize

from revit_fast.layers import TALLayerNorm
from revit_fast.model import ReViT


class Repeated(nn.Module):
    """One row `[C]` as the parameter `[n_lengths, C]` of a TAL-LN; its gradient is the sum over lengths."""

    def __init__(self, n_lengths: int) -> None:
        super().__init__()
        self.n_lengths = n_lengths

    def forward(self, row: Tensor) -> Tensor:
        return row.expand(self.n_lengths, -1).contiguous()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value[0].clone()


def share(model: ReViT) -> None:
    """Makes every norm of the model shared, in place, starting from that of the longest length."""
    for norm in _norms(model):
        for name in ("weight", "bias"):
            parametrize.register_parametrization(norm, name, Repeated(norm.weight.shape[0]))


def plain_copy(model: ReViT) -> ReViT:
    """A copy whose norms have a parameter for every length again, equal where they were shared."""
    plain = copy.deepcopy(model)
    for norm in _norms(plain):
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(norm, name):
                parametrize.remove_parametrizations(norm, name)
    return plain


def _norms(model: ReViT) -> list[TALLayerNorm]:
    return [module for module in model.modules() if isinstance(module, TALLayerNorm)]

"""Norms with separate parameters for every token length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.packing import Layout


class TALNorm(nn.Module):
    """What the norms share; their affine parameters are `[n_lengths, C]`.

    Args:
        n_lengths: number of configured lengths.
        dim: channels C.
        eps: added to the variance, or to the mean square.
    """

    def __init__(self, n_lengths: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_lengths, dim))

    def forward(self, x: Tensor, layout: Layout, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised rows `[T, C]`; with `residual` also x + residual, and both have the dtype of `residual`."""
        if residual is not None:
            x = x.to(residual.dtype)
        return self.op(
            x,
            *self.affine(),
            layout.cu_seqlens,
            layout.length_index,
            self.eps,
            residual=residual,
            tiles=layout.tiles,
        )

    def extra_repr(self) -> str:
        return f"n_lengths={self.weight.shape[0]}, dim={self.weight.shape[1]}, eps={self.eps}"


class TALLayerNorm(TALNorm):
    """Token-length-aware LayerNorm (ReViT, arXiv 2307.02092): separate affine parameters for every length.

    Args:
        n_lengths: number of configured lengths.
        dim: channels C.
        eps: added to the variance.
    """

    op = staticmethod(ops.tal_layer_norm)

    def __init__(self, n_lengths: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__(n_lengths, dim, eps)
        self.bias = nn.Parameter(torch.zeros(n_lengths, dim))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, `[n_lengths, C]` each."""
        return self.weight, self.bias


class TALRMSNorm(TALNorm):
    """Token-length-aware RMSNorm: Zhang and Sennrich's (arXiv 1910.07467) with a separate weight for every length.

    Args:
        n_lengths: number of configured lengths.
        dim: channels C.
        eps: added to the mean square.
    """

    op = staticmethod(ops.tal_rms_norm)

    def affine(self) -> tuple[Tensor]:
        """The weight, `[n_lengths, C]`."""
        return (self.weight,)


def add_and_norm(norm: TALNorm, x: Tensor, delta: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """norm(x + delta) and x + delta; a delta of None means zero."""
    return (norm(x, layout), x) if delta is None else norm(delta, layout, residual=x)


NORMS = {"layer": TALLayerNorm, "rms": TALRMSNorm}
"""Norms by their kind."""

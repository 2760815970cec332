"""The transformer block, and the modules that scale or drop its branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_fast.layers.attention import Attention, Queries
from revit_fast.layers.mlp import Mlp
from revit_fast.layers.norm import add_and_norm
from revit_fast.layers.rope import Rotation
from revit_fast.layers.segments import sequences_of_rows
from revit_fast.packing import Layout


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init_value: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ResidualScale(nn.Module):
    """Divides the output that a branch adds to the residual stream (LV-ViT, arXiv 2104.10858: `skip_lam`)."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor}"


class DropPath(nn.Module):
    """Stochastic depth per sequence (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        factor = x.new_empty(layout.length_index.shape[0] + 1).bernoulli_(keep).div_(keep)  # the last: padding rows
        return x * factor[sequences_of_rows(x, layout.cu_seqlens)].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class Block(nn.Module):
    """Pre-norm transformer block over packed rows.

    The residual stream is passed as a pair (x, delta) and is their sum. This way every addition is fused into the norm
    that follows it.

    Args:
        norm1: norm before attention.
        attn: attention.
        norm2: norm before the MLP.
        mlp: the MLP.
        scales: modules that scale the results of attention and of the MLP.
        drop_path: stochastic depth of both branches.
    """

    def __init__(
        self,
        norm1: nn.Module,
        attn: Attention,
        norm2: nn.Module,
        mlp: Mlp,
        scales: tuple[nn.Module, nn.Module],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.ls1 = scales[0]
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm2
        self.mlp = mlp
        self.ls2 = scales[1]
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        layout: Layout,
        queries: Queries | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Maps the stream x + delta (or x alone if delta is None) to the next such pair.

        Args:
            x: `[T, C]`; or `[B, N, C]` alone, for sequences of one length. The next stream is then returned in this
                shape (for code that reads a block's features, such as torch.fx).
            delta: `[T, C]` not yet added to x.
            layout: layout of x.
            queries: rows to compute the result for; the returned pair then has only these rows.
            rotation: how queries and keys turn; None: they do not.
        """
        if x.dim() == 3:
            rows, delta = self.forward(x.flatten(0, 1), None, layout, None, rotation)
            return (rows + delta).view_as(x)
        h, x = add_and_norm(self.norm1, x, delta, layout)
        h = self.attn(h, layout, queries, rotation)
        if queries is not None:
            x, layout = x.index_select(0, queries.rows), queries.layout
        delta = self.drop_path1(self.ls1(h), layout)
        h, x = self.norm2(delta, layout, residual=x)
        return x, self.drop_path2(self.ls2(self.mlp(h, layout)), layout)

    def queries_and_keys(
        self, x: Tensor, delta: Tensor | None, layout: Layout, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """Queries `[T, H, D]` and keys `[T, Hkv, D]` of the stream x + delta `[T, C]`, as they meet each other."""
        h, _ = add_and_norm(self.norm1, x, delta, layout)
        q, k, _ = self.attn.project(h)
        return (q, k) if rotation is None else rotation.turn(q, k)

"""The transformer block, and the modules that scale or drop its branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_fast.layers.attention import Attention, Queries
from revit_fast.layers.mlp import Mlp
from revit_fast.layers.norm import NORMS, add_and_norm
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


def _branch_scale(dim: int, init_values: float | None, divisor: float) -> nn.Module:
    if init_values:
        return LayerScale(dim, init_values)
    return nn.Identity() if divisor == 1 else ResidualScale(divisor)


class Block(nn.Module):
    """Pre-norm transformer block over packed rows.

    The residual stream is passed as a pair (x, delta) and is their sum. This way every addition is fused into the norm
    that follows it.

    Args:
        dim: channels C.
        num_heads, head_dim, qkv_bias, proj_bias, scale: of the attention, see `Attention`.
        hidden, act, mlp_bias: of the MLP, see `Mlp`.
        n_lengths: configured lengths.
        eps: of the norm before attention and of that before the MLP.
        norms: kinds of the two, keys of `layers.norm.NORMS`.
        init_values: initial LayerScale of both branches; None for none.
        residual_scale: divisor of both branches.
        proj_drop: dropout after the projection and in the MLP.
        drop_path: stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        hidden: int,
        n_lengths: int,
        act: nn.Module,
        *,
        eps: tuple[float, float] = (1e-6, 1e-6),
        norms: tuple[str, str] = ("layer", "layer"),
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        init_values: float | None = None,
        residual_scale: float = 1.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[norms[0]](n_lengths, dim, eps[0])
        self.attn = Attention(dim, num_heads, head_dim, qkv_bias, proj_bias, proj_drop, scale)
        self.ls1 = _branch_scale(dim, init_values, residual_scale)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = NORMS[norms[1]](n_lengths, dim, eps[1])
        self.mlp = Mlp(dim, hidden, act, mlp_bias, proj_drop)
        self.ls2 = _branch_scale(dim, init_values, residual_scale)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Tensor, delta: Tensor | None, layout: Layout, queries: Queries | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Maps the stream x + delta (or x alone if delta is None) to the next such pair.

        Args:
            x: `[T, C]`; or `[B, N, C]` alone, for sequences of one length. The next stream is then returned in this
                shape (for code that reads a block's features, such as torch.fx).
            delta: `[T, C]` not yet added to x.
            layout: layout of x.
            queries: rows to compute the result for; the returned pair then has only these rows.
        """
        if x.dim() == 3:
            rows, delta = self.forward(x.flatten(0, 1), None, layout)
            return (rows + delta).view_as(x)
        h, x = add_and_norm(self.norm1, x, delta, layout)
        h = self.attn(h, layout, queries)
        if queries is not None:
            x, layout = x.index_select(0, queries.rows), queries.layout
        delta = self.drop_path1(self.ls1(h), layout)
        h, x = self.norm2(delta, layout, residual=x)
        return x, self.drop_path2(self.ls2(self.mlp(h)), layout)

    def queries_and_keys(self, x: Tensor, delta: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """Queries and keys `[T, H, D]` of the stream x + delta `[T, C]`."""
        h, _ = add_and_norm(self.norm1, x, delta, layout)
        return self.attn.project(h)[:2]

"""Layers of a packed ViT. They work on rows `[T, C]` and the `Layout` that says whose rows they are."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.packing import Layout

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "silu": nn.SiLU, "relu": nn.ReLU}
"""Activations by the names that files and kernels have for them."""


def make_activation(activation: str | type[nn.Module] | partial) -> nn.Module:
    """The module that a constructor, or a name in `ACTIVATIONS`, stands for."""
    if not isinstance(activation, str):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(f"act_layer: expected a module or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]()


def activation_name(act: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`; None for another."""
    if type(act).__name__ == "GELUTanh" or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        return "gelu_tanh"
    names = {nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu"}
    return next((name for kind, name in names.items() if isinstance(act, kind)), None)


class TALLayerNorm(nn.Module):
    """Token-length-aware LayerNorm (ReViT, arXiv 2307.02092): affine parameters of its own for every length.

    Args:
        n_lengths: number of configured lengths.
        dim: channels C.
        eps: added to the variance.
    """

    def __init__(self, n_lengths: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_lengths, dim))
        self.bias = nn.Parameter(torch.zeros(n_lengths, dim))

    def forward(self, x: Tensor, layout: Layout, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised rows `[T, C]`, with `residual` also x + residual, both in its dtype."""
        if residual is not None:
            x = x.to(residual.dtype)
        return ops.tal_layer_norm(
            x,
            *self.affine(),
            layout.cu_seqlens,
            layout.length_index,
            self.eps,
            residual=residual,
            tiles=layout.tiles,
        )

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, `[n_lengths, C]` each."""
        return self.weight, self.bias

    def extra_repr(self) -> str:
        return f"n_lengths={self.weight.shape[0]}, dim={self.weight.shape[1]}, eps={self.eps}"


class FoldedEmbedding(NamedTuple):
    """A patch embedding that takes raw pixels, their normalisation folded in.

    Attributes:
        weight: `[C, P*P*3]`.
        bias: `[C]`.
    """

    weight: Tensor
    bias: Tensor


class PatchEmbed(nn.Module):
    """Linear embedding of patch rows `[T, P*P*3]`.

    Parameters have the names and shapes of timm's convolution; `proj.weight` `[C, 3, P, P]` lies in channels-last
    memory, where it is the matrix `[C, P*P*3]` that the rows need, without a copy.

    Attributes:
        patch_size: (P, P).
        grid_size: (rows, columns) of the grid that position embeddings are stored for, under timm's name.
        num_patches: patches of that grid.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, grid_size: tuple[int, int], bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = grid_size
        self.num_patches = grid_size[0] * grid_size[1]
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.proj.weight.data = self.proj.weight.data.contiguous(memory_format=torch.channels_last)

    def fold(self, normalization: Tensor) -> FoldedEmbedding:
        """The embedding of raw uint8 rows that await this (mean, std) `[2, 3]` of pixels in [0, 1]."""
        weight, bias = self.proj.weight, self.proj.bias
        mean, std = normalization.to(weight.dtype).view(2, 1, -1, 1, 1)
        shift = -(weight * (mean / std)).sum(dim=(1, 2, 3))
        return FoldedEmbedding(self._matrix(weight / (255 * std)), shift if bias is None else bias + shift)

    def forward(self, rows: Tensor, normalization: Tensor | FoldedEmbedding | None = None) -> Tensor:
        """Embeds normalised rows, or raw uint8 rows whose normalization is folded into the weights, here or before."""
        if isinstance(normalization, Tensor):
            normalization = self.fold(normalization)
        weight, bias = self.matrix() if normalization is None else normalization
        return F.linear(rows.to(weight.dtype), weight, bias)

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[C, P*P*3]` in the order of the rows, and bias."""
        return self._matrix(self.proj.weight), self.proj.bias

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


class Queries(NamedTuple):
    """The rows that a layer's result is wanted for, where that is not all of them.

    Attributes:
        rows: int `[Tq]`, indices of the rows, sequence after sequence.
        layout: their own layout.
    """

    rows: Tensor
    layout: Layout


class Attention(nn.Module):
    """Multi-head self-attention within every sequence of a pack; parameters as in timm.

    Args:
        dim: channels C.
        num_heads: heads.
        head_dim: channels of a head.
        qkv_bias: whether query, key and value have a bias.
        proj_bias: whether the output projection has one.
        proj_drop: dropout after the projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, layout: Layout, queries: Queries | None = None) -> Tensor:
        """`[T, C]`, or `[Tq, C]` for the rows of `queries` only, which still attend to all rows of their sequence."""
        if queries is None:
            q, k, v = self.qkv(x).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
            out = ops.varlen_attention(q, k, v, layout.cu_seqlens, tiles=layout.tiles, tile_counts=layout.tile_counts)
        else:
            width = self.num_heads * self.head_dim
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x.index_select(0, queries.rows), weight[:width], None if bias is None else bias[:width])
            kv = F.linear(x, weight[width:], None if bias is None else bias[width:])
            k, v = kv.view(-1, 2, self.num_heads, self.head_dim).unbind(1)
            q = q.view(-1, self.num_heads, self.head_dim)
            out = ops.varlen_attention(
                q,
                k,
                v,
                queries.layout.cu_seqlens,
                layout.cu_seqlens,
                tiles=queries.layout.tiles,
                tile_counts=queries.layout.tile_counts,
            )
        return self.proj_drop(self.proj(out.flatten(1)))


class Mlp(nn.Module):
    """Two linear layers with an activation between; parameters as in timm."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, bias: bool = True, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, init_value: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ResidualScale(nn.Module):
    """Divides what a branch adds to the residual stream (LV-ViT, arXiv 2104.10858: `skip_lam`)."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor

    def extra_repr(self) -> str:
        return f"divisor={self.divisor}"


def sequences_of_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Index of the sequence that each row of `x` belongs to, int64 `[T]`; the number of sequences for padding."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def sequence_max(x: Tensor, cu_seqlens: Tensor, skip: int) -> Tensor:
    """Largest value of every channel within each sequence, but for its first `skip` rows.

    Args:
        x: `[T, C]`.
        cu_seqlens: int32 `[B + 1]`.
        skip: leading rows of every sequence to leave out.

    Returns:
        `[B, C]`, zero for a sequence of which no row is left.
    """
    n_sequences = cu_seqlens.shape[0] - 1
    sequence = sequences_of_rows(x, cu_seqlens)
    rows = torch.arange(x.shape[0], device=x.device)
    sequence = torch.where(rows < cu_seqlens[sequence] + skip, n_sequences, sequence)  # one more: rows left out
    out = x.new_zeros(n_sequences + 1, x.shape[1])
    return out.scatter_reduce(0, sequence.unsqueeze(1).expand_as(x), x, "amax", include_self=False)[:-1]


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

    The residual stream travels as the pair (x, delta) whose sum it is, so that every addition is fused into the norm
    that follows it.
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
        eps: float = 1e-6,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        init_values: float | None = None,
        residual_scale: float = 1.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = TALLayerNorm(n_lengths, dim, eps)
        self.attn = Attention(dim, num_heads, head_dim, qkv_bias, proj_bias, proj_drop)
        self.ls1 = _branch_scale(dim, init_values, residual_scale)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = TALLayerNorm(n_lengths, dim, eps)
        self.mlp = Mlp(dim, hidden, act, mlp_bias, proj_drop)
        self.ls2 = _branch_scale(dim, init_values, residual_scale)
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self, x: Tensor, delta: Tensor | None, layout: Layout, queries: Queries | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Maps the stream x + delta (delta None: x alone) to the next such pair.

        Args:
            x: `[T, C]`; or `[B, N, C]` alone, for sequences of one length, and then the next stream is returned so
                (for code that wants a block's features, as torch.fx does).
            delta: `[T, C]` not yet added to x.
            layout: of x.
            queries: rows that the result is wanted for; the pair returned then has these rows only.
        """
        if x.dim() == 3:
            rows, delta = self.forward(x.flatten(0, 1), None, layout)
            return (rows + delta).view_as(x)
        if delta is None:
            h = self.norm1(x, layout)
        else:
            h, x = self.norm1(delta, layout, residual=x)
        h = self.attn(h, layout, queries)
        if queries is not None:
            x, layout = x.index_select(0, queries.rows), queries.layout
        delta = self.drop_path1(self.ls1(h), layout)
        h, x = self.norm2(delta, layout, residual=x)
        return x, self.drop_path2(self.ls2(self.mlp(h)), layout)

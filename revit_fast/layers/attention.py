"""Self-attention within every sequence of a pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.layers.comparison import is_plain
from revit_fast.packing import Layout


class Queries(NamedTuple):
    """The rows for which a layer computes its result, if these are not all rows.

    Attributes:
        rows: int `[Tq]`, indices of the rows, sequence after sequence.
        layout: layout of these rows.
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
        proj_bias: whether the output projection has a bias.
        proj_drop: dropout after the projection.
        scale: factor of the scores; default head_dim ** -0.5.
    """

    scale: float | None = None  # of models pickled before there was a choice

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, layout: Layout, queries: Queries | None = None) -> Tensor:
        """`[T, C]`, or `[Tq, C]` for the rows of `queries` only; they still attend to all rows of their sequence."""
        return self.proj_drop(self.proj(self.attend(x, layout, queries)))

    def attend(self, x: Tensor, layout: Layout, queries: Queries | None = None) -> Tensor:
        """The heads' outputs side by side, `[T, H * D]` or `[Tq, H * D]`: what the output projection reads."""
        of_queries = layout if queries is None else queries.layout
        out = ops.varlen_attention(
            *self.project(x, queries),
            of_queries.cu_seqlens,
            layout.cu_seqlens,
            scale=self.scale,
            tiles=of_queries.tiles,
            tile_counts=of_queries.tile_counts,
        )
        return out.flatten(1)

    def project(self, x: Tensor, queries: Queries | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[Tq, H, D]`, keys and values `[T, H, D]`."""
        heads, width = (self.num_heads, self.head_dim), self.num_heads * self.head_dim
        some_outputs = None if queries is None else outputs_of(self.qkv)
        if some_outputs is None:
            q, k, v = self.qkv(x).view(-1, 3, *heads).unbind(1)
            return (q if queries is None else q.index_select(0, queries.rows)), k, v
        q = some_outputs(x.index_select(0, queries.rows), slice(0, width))
        kv = some_outputs(x, slice(width, None))
        return q.view(-1, *heads), *kv.view(-1, 2, *heads).unbind(1)


def outputs_of(linear: nn.Module) -> Callable[[Tensor, slice], Tensor] | None:
    """A function of rows that computes a part of a linear layer's outputs; None if the layer must be called.

    A class that stands for `nn.Linear` may have a method `outputs` that does this.
    """
    if not is_plain(linear, nn.Linear):
        return None
    return partial(getattr(type(linear), "outputs", _outputs), linear)


def _outputs(linear: nn.Linear, x: Tensor, part: slice) -> Tensor:
    return F.linear(x, linear.weight[part], None if linear.bias is None else linear.bias[part])

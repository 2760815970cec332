"""Self-attention within every sequence of a pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.layers.comparison import is_plain
from revit_fast.layers.rope import Rotation
from revit_fast.packing import Layout, device_cu_seqlens


class Queries(NamedTuple):
    """The rows for which a layer computes its result, if these are not all rows.

    Attributes:
        rows: int `[Tq]`, indices of the rows, sequence after sequence.
        layout: layout of these rows.
        still: whether no rotation turns these rows, as none turns prefix tokens.
    """

    rows: Tensor
    layout: Layout
    still: bool = False


class Attention(nn.Module):
    """Multi-head self-attention within every sequence of a pack; parameters as in timm.

    Args:
        dim: channels C.
        num_heads: heads.
        head_dim: channels of a head.
        qkv_bias: whether query, key and value have a bias; "qv": queries and values alone.
        proj_bias: whether the output projection has a bias.
        proj_drop: dropout after the projection.
        scale: factor of the scores; default head_dim ** -0.5.
        num_kv_heads: heads of keys and values; default num_heads.
        qk_norm: makes the norm of queries, and that of keys, over a head's channels; None for none.
        norm: norm before the output projection, over all heads' channels; None for none.
        gate: whether a sigmoid of a linear layer multiplies the heads' outputs.
    """

    scale: float | None = None  # of models pickled before there was a choice

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        qkv_bias: bool | str = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        scale: float | None = None,
        *,
        num_kv_heads: int | None = None,
        qk_norm: Callable[[], nn.Module] | None = None,
        norm: nn.Module | None = None,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads or num_heads
        width, kv_width = num_heads * head_dim, self.num_kv_heads * head_dim
        self.qkv = nn.Linear(dim, width + 2 * kv_width, bias=qkv_bias is True)
        apart = qkv_bias == "qv"
        self.q_bias = nn.Parameter(torch.zeros(width)) if apart else None
        self.v_bias = nn.Parameter(torch.zeros(kv_width)) if apart else None
        self.q_norm, self.k_norm = (None, None) if qk_norm is None else (qk_norm(), qk_norm())
        self.norm = norm
        self.gate = nn.Linear(dim, width, bias=bool(qkv_bias)) if gate else None
        self.proj = nn.Linear(width, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not hasattr(self, "num_kv_heads"):
            self.num_kv_heads = self.num_heads
        for name in ("q_bias", "v_bias", "q_norm", "k_norm", "norm", "gate"):
            if not hasattr(self, name):  # pickled before there was a choice
                setattr(self, name, None)

    def forward(
        self, x: Tensor, layout: Layout, queries: Queries | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """`[T, C]`, or `[Tq, C]` for the rows of `queries` only; they still attend to all rows of their sequence.

        Args:
            x: `[T, C]`.
            layout: layout of x.
            queries: rows to compute the result for.
            rotation: how the queries and keys of x turn; None: they do not.
        """
        return self.proj_drop(self.proj(self.attend(x, layout, queries, rotation)))

    def attend(
        self, x: Tensor, layout: Layout, queries: Queries | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """What the output projection reads, `[T, H * D]` or `[Tq, H * D]`."""
        of_queries = layout if queries is None else queries.layout
        q, k, v = self.project(x, queries)
        if rotation is not None and queries is None:
            q, k = rotation.turn(q, k)
        elif rotation is not None:
            q = q if queries.still else rotation.of_rows(queries.rows).turn_alone(q)
            k = rotation.turn_alone(k)
        out = ops.varlen_attention(
            *(q, k, v),
            of_queries.cu_seqlens,
            layout.cu_seqlens,
            scale=self.scale,
            tiles=of_queries.tiles,
            tile_counts=of_queries.tile_counts,
        )
        out = out.flatten(1)
        out = out if self.norm is None else self.norm(out, of_queries)
        if self.gate is None:
            return out
        return out * self.gate(x if queries is None else x.index_select(0, queries.rows)).sigmoid()

    def project(self, x: Tensor, queries: Queries | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[Tq, H, D]`, keys and values `[T, Hkv, D]`, after their norms and before their rotation."""
        width = self.num_heads * self.head_dim
        some_outputs = None if queries is None else outputs_of(self.qkv)
        if some_outputs is None:
            qkv = self.qkv(x)
            q, kv = qkv[:, :width], qkv[:, width:]
            q = q if queries is None else q.index_select(0, queries.rows)
        else:
            q = some_outputs(x.index_select(0, queries.rows), slice(0, width))
            kv = some_outputs(x, slice(width, None))
        if self.q_bias is not None:  # keys have none
            q = q + self.q_bias
            kv = kv + torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        q = q.unflatten(1, (self.num_heads, self.head_dim))
        k, v = kv.unflatten(1, (2, self.num_kv_heads, self.head_dim)).unbind(1)
        q, k = (t if norm is None else norm(t) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v


class AttentionPool(nn.Module):
    """Pools every sequence by attention: a learned query reads its rows; parameters as in timm's `AttentionPoolLatent`.

    Args:
        dim: channels C.
        num_heads: heads, which divide C.
        mlp: makes what is added after a norm.
        norm: the norm before it; None for none.
        bias: whether queries, keys and values have a bias.
    """

    def __init__(self, dim: int, num_heads: int, mlp: nn.Module, norm: nn.Module | None, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.Identity() if norm is None else norm
        self.mlp = mlp

    def forward(self, rows: Tensor, layout: Layout) -> Tensor:
        """`[B, C]`.

        Args:
            rows: `[T, C]`.
            layout: layout of the rows.
        """
        n_sequences = layout.length_index.shape[0]
        q = self.q(self.latent[0]).expand(n_sequences, -1)
        heads = (self.num_heads, -1)
        k, v = self.kv(rows).unflatten(1, (2, *heads)).unbind(1)
        apart = Layout(device_cu_seqlens(1, n_sequences, rows.device), layout.length_index, None)
        out = ops.varlen_attention(q.unflatten(1, heads), k, v, apart.cu_seqlens, layout.cu_seqlens)
        x = self.proj(out.flatten(1))
        y = self.norm(x) if type(self.norm) is nn.Identity else self.norm(x, apart)
        return x + self.mlp(y, apart)


def outputs_of(linear: nn.Module) -> Callable[[Tensor, slice], Tensor] | None:
    """A function of rows that computes a part of a linear layer's outputs; None if the layer must be called.

    A class that stands for `nn.Linear` may have a method `outputs` that does this.
    """
    if not is_plain(linear, nn.Linear):
        return None
    return partial(getattr(type(linear), "outputs", _outputs), linear)


def _outputs(linear: nn.Linear, x: Tensor, part: slice) -> Tensor:
    return F.linear(x, linear.weight[part], None if linear.bias is None else linear.bias[part])

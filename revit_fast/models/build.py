"""Makes the modules that a spec describes."""

from __future__ import annotations

from functools import partial

from torch import nn

from revit_fast.layers.attention import Attention, AttentionPool
from revit_fast.layers.block import Block, LayerScale, ResidualScale
from revit_fast.layers.mlp import Mlp
from revit_fast.layers.norm import NORMS
from revit_fast.layers.rope import RotaryEmbedding
from revit_fast.models import spec as specs
from revit_fast.models.spec import ViTSpec

HEAD_NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
"""Norms of single heads, which all lengths share."""


def norm_of(norm: specs.Norm, dim: int, n_lengths: int) -> nn.Module:
    """A norm of `dim` channels with parameters for every length."""
    return NORMS[norm.kind](n_lengths, dim, norm.eps)


def block_of(block: specs.Block, dim: int, n_lengths: int) -> Block:
    """A block of `dim` channels."""
    attn = block.attn
    norm = partial(norm_of, n_lengths=n_lengths)
    return Block(
        norm(block.norm1, dim),
        Attention(
            *(dim, attn.heads, attn.head_dim, attn.qkv_bias, attn.out_bias, block.drop, attn.scale),
            num_kv_heads=attn.kv_heads,
            qk_norm=attn.qk_norm and partial(HEAD_NORMS[attn.qk_norm.kind], attn.head_dim, eps=attn.qk_norm.eps),
            norm=attn.out_norm and norm(attn.out_norm, attn.heads * attn.head_dim),
            gate=attn.gate,
        ),
        norm(block.norm2, dim),
        mlp_of(block.mlp, dim, n_lengths, block.drop),
        (_scale(block.scale, dim), _scale(block.scale if block.scales_mlp else None, dim)),
        block.drop_path,
    )


def mlp_of(mlp: specs.Mlp, dim: int, n_lengths: int, drop: float = 0.0) -> Mlp:
    """An MLP on `dim` channels."""
    norm = mlp.norm and norm_of(mlp.norm, mlp.hidden, n_lengths)
    return Mlp(dim, mlp.hidden, mlp.act.build(), mlp.bias, drop, gated=mlp.gated, norm=norm)


def pool_of(pool: specs.AttentionPool | None, dim: int, n_lengths: int) -> AttentionPool | None:
    """An attention pool of `dim` channels."""
    if pool is None:
        return None
    norm = pool.norm and norm_of(pool.norm, dim, n_lengths)
    return AttentionPool(dim, pool.heads, mlp_of(pool.mlp, dim, n_lengths), norm, pool.bias)


def rope_of(spec: ViTSpec) -> RotaryEmbedding | None:
    """The rotary embedding of all blocks; None if there is none."""
    if spec.embed.rope is None or not spec.blocks:
        return None
    attn = spec.blocks[0].attn  # `ViTSpec` has checked that heads of all blocks fit
    return RotaryEmbedding(spec.embed.rope, len(spec.blocks), attn.heads, attn.head_dim)


def _scale(scale: specs.LayerScale | specs.Divide | None, dim: int) -> nn.Module:
    if isinstance(scale, specs.LayerScale):
        return LayerScale(dim, scale.init)
    return nn.Identity() if scale is None else ResidualScale(scale.by)

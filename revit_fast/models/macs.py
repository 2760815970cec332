"""Multiply-adds of a model's forward pass for an image of a given number of tokens."""

from __future__ import annotations

from torch import nn

from revit_fast.models.spec import ViTSpec


def forward_macs(model: nn.Module, n_patches: int) -> int:
    """Multiply-adds of a forward pass over one image, see `spec_macs`.

    Args:
        model: a `ReViT`.
        n_patches: patch tokens of the image; prefix tokens are added here.
    """
    return spec_macs(model.spec, n_patches)


def spec_macs(spec: ViTSpec, n_patches: int) -> int:
    """Multiply-adds of a forward pass over one image: linear layers, convolutions and the products of attention.

    Every block counts in full, though with class-token pooling the last one computes less.

    Args:
        spec: the architecture.
        n_patches: patch tokens of the image; prefix tokens are added here.
    """
    dim, embed, head = spec.dim, spec.embed, spec.head
    n_tokens = n_patches + embed.prefix.count
    p = embed.patch_size
    of_a_patch = dim * embed.in_chans * p**2
    if embed.stem is not None:  # three convolutions at half the resolution, then patches of their features
        half = (p // 2) ** 2
        of_a_patch = half * embed.stem * (49 * embed.in_chans + 2 * 9 * embed.stem) + dim * embed.stem * half
    linear = scores = 0
    for block in spec.blocks:
        attn, mlp = block.attn, block.mlp
        width, kv_width = attn.heads * attn.head_dim, attn.n_kv * attn.head_dim
        linear += dim * ((2 + attn.gate) * width + 2 * kv_width + (2 + mlp.gated) * mlp.hidden)
        scores += 2 * width
    pooled = 0
    if head.attention is not None:
        n_read = n_tokens if head.pool_prefix else n_patches
        mlp = head.attention.mlp
        pooled = n_read * (2 * dim + 2) * dim + 2 * dim * dim + (2 + mlp.gated) * dim * mlp.hidden
    classify = dim * (2 if head.pool == "token_avg" else 1) * head.classes
    if head.token_labels:
        of_a_patch += classify
    n_heads = 2 if embed.prefix.dist else 1
    of_every_token = n_tokens if not head.pool else 1
    heads = pooled + n_heads * of_every_token * classify
    return n_patches * of_a_patch + n_tokens * linear + n_tokens**2 * scores + heads

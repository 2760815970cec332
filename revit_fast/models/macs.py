"""Multiply-adds of a model's forward pass for an image of a given number of tokens."""

from __future__ import annotations

from torch import nn

from revit_fast.layers.conv_stem import ConvStem


def forward_macs(model: nn.Module, n_patches: int) -> int:
    """Multiply-adds of a forward pass over one image: linear layers, convolutions and the products of attention.

    Args:
        model: a `ReViT`.
        n_patches: patch tokens of the image; prefix tokens are added here.
    """
    n_tokens = n_patches + model.num_prefix_tokens
    linear = sum(p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2 and "norm" not in name)
    width = sum(block.attn.num_heads * block.attn.head_dim for block in model.blocks)
    head = sum(p.numel() for module in (model.head, model.head_dist) if module for p in module.parameters())
    of_a_patch = model.patch_embed.proj.weight.numel()
    if isinstance(model.patch_embed, ConvStem):
        of_a_patch += model.patch_embed.macs_per_patch
    if model.aux_head is not None:
        of_a_patch += model.aux_head.weight.numel()
    return n_patches * of_a_patch + n_tokens * linear + 2 * n_tokens**2 * width + head

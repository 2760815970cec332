"""Reads the configuration of a timm `VisionTransformer`, and refuses by name what ReViT does not have."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


def require(condition: bool, feature: str) -> None:
    """Refuses a model that has `feature` where `condition` does not hold."""
    if not condition:
        raise ValueError(f"vit: {feature} is not supported by ReViT")


def config_from_timm(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` that give the architecture of `vit`."""
    try:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import Block, VisionTransformer
    except ImportError:
        raise ImportError('vit: from_timm needs timm: pip install "revit-fast[timm]"') from None
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"vit: expected a timm VisionTransformer, got {type(vit).__name__}")
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled):
        raise ValueError(f"vit: subclass {type(vit).__name__} of VisionTransformer is not supported")
    require(len(vit.blocks) > 0, "a model without blocks")
    require(all(type(block) is Block for block in vit.blocks), f"blocks of type {type(vit.blocks[0]).__name__}")
    block = vit.blocks[0]
    _check_block(block)
    require(vit.pos_embed is not None, "a model without position embedding (pos_embed='none')")
    require(vit.global_pool in ("token", "avg", ""), f"global_pool={vit.global_pool!r}")
    require(vit.attn_pool is None, "attention pooling")
    require(isinstance(vit.patch_drop, nn.Identity), "patch dropout (patch_drop_rate)")
    embed = vit.patch_embed
    require(isinstance(getattr(embed, "proj", None), nn.Conv2d), "a patch embedding other than one convolution")
    require(isinstance(embed.norm, nn.Identity), "a norm in the patch embedding")
    require(embed.patch_size[0] == embed.patch_size[1], f"non-square patches {tuple(embed.patch_size)}")
    require(embed.proj.stride == embed.proj.kernel_size, "overlapping patches")
    norms = [module for name, module in vit.named_modules() if name.rpartition(".")[2] in NORMS]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    require(all(isinstance(norm, nn.LayerNorm) for norm in norms), "a norm other than LayerNorm")
    require(
        all(norm.weight is not None and norm.bias is not None for norm in norms), "LayerNorm without weight or bias"
    )
    require(len({norm.eps for norm in norms}) == 1, "norms of different eps")
    return {
        "base_grid": tuple(embed.grid_size),
        "patch_size": embed.patch_size[0],
        "in_chans": embed.proj.in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "head_dim": block.attn.head_dim,
        "hidden_dim": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "proj_bias": block.attn.proj.bias is not None,
        "mlp_bias": block.mlp.fc1.bias is not None,
        "patch_bias": embed.proj.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else float(block.ls1.init_values),
        "class_token": vit.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "distilled": isinstance(vit, VisionTransformerDistilled),
        "no_embed_class": vit.no_embed_class,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "act_layer": _activation(block.mlp.act),
        "eps": norms[0].eps if norms else 1e-6,
        "drop_rate": vit.head_drop.p,
        "pos_drop_rate": vit.pos_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "drop_path_rate": float(getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0)),
    }


NORMS = ("norm_pre", "norm1", "norm2", "norm", "fc_norm")


def _check_block(block: nn.Module) -> None:
    attn, mlp = block.attn, block.mlp
    require(
        isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity), "query and key norms (qk_norm)"
    )
    require(isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity), "an attention output norm (scale_attn_norm)")
    require(getattr(attn, "gate", None) is None, "gated attention")
    require(attn.attn_drop.p == 0, f"attention dropout (attn_drop_rate={attn.attn_drop.p}); set it to 0")
    plain = isinstance(getattr(mlp, "fc1", None), nn.Linear) and isinstance(getattr(mlp, "fc2", None), nn.Linear)
    require(plain and hasattr(mlp, "act"), f"an MLP of type {type(mlp).__name__}")
    require(mlp.fc1.out_features == mlp.fc2.in_features, f"a gated MLP ({type(mlp).__name__})")
    require(isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity), "a norm in the MLP (scale_mlp_norm)")


def _activation(act: nn.Module) -> Any:
    """The activation's constructor; timm's own GELU classes are exact GELU."""
    if isinstance(act, nn.GELU):
        return partial(nn.GELU, approximate=act.approximate)
    require(not any(True for _ in act.parameters()), f"an activation with parameters ({type(act).__name__})")
    return type(act)

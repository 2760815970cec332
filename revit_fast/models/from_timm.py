"""Reads a timm `VisionTransformer` or `NaFlexVit`. Features that ReViT does not have raise an error that names them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def require(condition: bool, feature: str) -> None:
    """Raises an error that `feature` is not supported unless `condition` holds."""
    if not condition:
        raise ValueError(f"vit: {feature} is not supported by ReViT")


def config_from_timm(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` that give the architecture of `vit`."""
    try:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.naflexvit import NaFlexVit
        from timm.models.vision_transformer import Block, VisionTransformer
    except ImportError:
        raise ImportError('vit: from_timm needs timm: pip install "revit-fast[timm]"') from None
    if not isinstance(vit, (VisionTransformer, NaFlexVit)):
        raise TypeError(f"vit: expected a timm VisionTransformer or NaFlexVit, got {type(vit).__name__}")
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled, NaFlexVit):
        base = NaFlexVit if isinstance(vit, NaFlexVit) else VisionTransformer
        raise ValueError(f"vit: subclass {type(vit).__name__} of {base.__name__} is not supported")
    require(len(vit.blocks) > 0, "a model without blocks")
    require(all(type(block) is Block for block in vit.blocks), f"blocks of type {type(vit.blocks[0]).__name__}")
    block = vit.blocks[0]
    _check_block(block)
    require(vit.global_pool in ("token", "avg", ""), f"global_pool={vit.global_pool!r}")
    require(vit.attn_pool is None, "attention pooling")
    require(isinstance(vit.patch_drop, (nn.Identity, type(None))), "patch dropout (patch_drop_rate)")
    embedding = _naflex_embedding(vit) if isinstance(vit, NaFlexVit) else _embedding(vit)
    norms = [module for name, module in vit.named_modules() if name.rpartition(".")[2] in NORMS]
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    require(all(isinstance(norm, nn.LayerNorm) for norm in norms), "a norm other than LayerNorm")
    require(
        all(norm.weight is not None and norm.bias is not None for norm in norms), "LayerNorm without weight or bias"
    )
    require(len({norm.eps for norm in norms}) == 1, "norms of different eps")
    return embedding | {
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
        "init_values": None if isinstance(block.ls1, nn.Identity) else float(block.ls1.init_values),
        "class_token": vit.has_class_token,
        "reg_tokens": vit.num_reg_tokens,
        "distilled": isinstance(vit, VisionTransformerDistilled),
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "pool_include_prefix": vit.pool_include_prefix,
        "act_layer": _activation(block.mlp.act),
        "eps": norms[0].eps if norms else 1e-6,
        "drop_rate": vit.head_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "drop_path_rate": float(getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0)),
    }


def weights_from_timm(vit: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model that `config_from_timm` accepts, with the names of a `VisionTransformer`."""
    weights = vit.state_dict()
    if not hasattr(vit, "embeds"):
        return weights
    embeds = {name.removeprefix("embeds."): weights.pop(name) for name in list(weights) if name.startswith("embeds.")}
    if "pos_embed" in embeds:
        weights["pos_embed"] = embeds.pop("pos_embed").flatten(1, 2)
    else:
        weights["pos_embed"] = torch.cat([embeds.pop("pos_embed_y"), embeds.pop("pos_embed_x")], dim=1)
    kernel = embeds.pop("proj.weight")
    if kernel.dim() == 2:
        p, channels = vit.embeds.patch_size[0], vit.in_chans
        last = getattr(vit.embeds, "channels_last", True)
        kernel = kernel.unflatten(1, (p, p, channels) if last else (channels, p, p))
        kernel = kernel.permute(0, 3, 1, 2) if last else kernel
    weights["patch_embed.proj.weight"] = kernel
    if "proj.bias" in embeds:
        weights["patch_embed.proj.bias"] = embeds.pop("proj.bias")
    return weights | embeds


NORMS = ("norm_pre", "norm1", "norm2", "norm", "fc_norm")


def _embedding(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` for the part of a `VisionTransformer` before its blocks."""
    require(vit.pos_embed is not None, "a model without position embedding (pos_embed='none')")
    embed = vit.patch_embed
    require(isinstance(getattr(embed, "proj", None), nn.Conv2d), "a patch embedding other than one convolution")
    require(embed.proj.stride == embed.proj.kernel_size, "overlapping patches")
    return {
        "base_grid": tuple(embed.grid_size),
        "in_chans": embed.proj.in_channels,
        "no_embed_class": vit.no_embed_class,
        "pos_drop_rate": vit.pos_drop.p,
        **_patches(embed),
    }


def _naflex_embedding(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` for the part of a `NaFlexVit` before its blocks."""
    embeds = vit.embeds
    require(vit.rope is None, "rotary position embedding (rope_type)")
    require(embeds.pos_embed_type != "none", "a model without position embedding (pos_embed='none')")
    require(not embeds.pos_embed_use_grid_sample, "sampling of position embeddings (pos_embed_use_grid_sample)")
    require(embeds.norm_input is None, "a norm of the patches (input_norm_layer)")
    factorized = embeds.pos_embed_type == "factorized"
    if not factorized:  # factorized embeddings are always resampled linearly
        mode = embeds.pos_embed_interp_mode
        require(mode == "bicubic", f"pos_embed_interp_mode={mode!r}")
        require(getattr(embeds, "pos_embed_antialias", True), "pos_embed_antialias=False")
        require(not getattr(embeds, "pos_embed_align_corners", False), "pos_embed_align_corners=True")
    return {
        "base_grid": tuple(embeds.pos_embed_grid_size),
        "in_chans": embeds.in_chans,
        "no_embed_class": True,
        "pos_factorized": factorized,
        "pos_keep_aspect": embeds.pos_embed_ar_preserving,
        "pos_drop_rate": embeds.pos_drop.p,
        **_patches(embeds),
    }


def _patches(embed: nn.Module) -> dict[str, Any]:
    require(isinstance(embed.norm, nn.Identity), "a norm in the patch embedding")
    require(embed.patch_size[0] == embed.patch_size[1], f"non-square patches {tuple(embed.patch_size)}")
    return {"patch_size": embed.patch_size[0], "patch_bias": embed.proj.bias is not None}


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

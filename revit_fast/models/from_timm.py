"""Reads a timm `VisionTransformer`, `Eva` or `NaFlexVit`. What ReViT does not have raises an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from revit_fast.layers.comparison import alteration
from revit_fast.models.timm_blocks import block_keywords, norm_of, parts_of, pool_of, require, rope_of

M = TypeVar("M", bound=nn.Module)


def model_from_timm(kind: type[M], vit: nn.Module, grids: Sequence[int]) -> M:
    """See `ReViT.from_timm`; `kind` is the class."""
    config = config_from_timm(vit)
    parameter = next(vit.parameters())
    with torch.device(parameter.device):  # where the weights are, whatever the default device is
        model = kind(grids=grids, **config)
    # The dtype is set before the weights are loaded: float32 would round those of a float64 model.
    model = model.to(dtype=parameter.dtype)
    model.load_state_dict(model.convert_state_dict(weights_from_timm(vit)))
    trained = {OF_NAFLEX.get(name, name): p.requires_grad for name, p in vit.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(trained[part] for part in parts_of(name, trained)))
    model.pretrained_cfg = dict(getattr(vit, "pretrained_cfg", None) or {})
    return model.train(vit.training)


def config_from_timm(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` that give the architecture of `vit`.

    Raises:
        ImportError: if timm is not installed.
        TypeError: if `vit` is not a `VisionTransformer`, `Eva` or `NaFlexVit`.
        ValueError: if a module of it is not what timm builds, or does what ReViT does not have; the message names it.
    """
    try:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.eva import Eva
        from timm.models.naflexvit import NaFlexVit
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise ImportError('vit: from_timm needs timm: pip install "revit-fast[timm]"') from None
    base = next((kind for kind in (VisionTransformer, Eva, NaFlexVit) if isinstance(vit, kind)), None)
    if base is None:
        raise TypeError(f"vit: expected a timm VisionTransformer, Eva or NaFlexVit, got {type(vit).__name__}")
    if type(vit) not in (base, VisionTransformerDistilled):
        raise ValueError(f"vit: subclass {type(vit).__name__} of {base.__name__} is not supported")
    check_untouched(vit)
    require(len(vit.blocks) > 0, "a model without blocks")
    require(vit.global_pool in ("token", "avg", "map", ""), f"global_pool={vit.global_pool!r}")
    require(isinstance(vit.patch_drop, (nn.Identity, type(None))), "patch dropout (patch_drop_rate)")
    embedding = _naflex_embedding(vit) if base is NaFlexVit else _embedding(vit)
    blocks = [block_keywords(f"blocks.{i}", block) for i, block in enumerate(vit.blocks)]
    rope, pool = rope_of(getattr(vit, "rope", None), vit.blocks), pool_of(vit.attn_pool)
    _check_types(vit)
    pre, norm, fc_norm = (norm_of(n, getattr(vit, n)) for n in ("norm_pre", "norm", "fc_norm"))
    require(norm is None or fc_norm is None, "a norm before and one after pooling")
    final = norm or fc_norm
    registers = getattr(vit, "reg_token", None)
    return embedding | {
        "num_classes": vit.head.out_features if isinstance(vit.head, nn.Linear) else 0,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        **{name: value for name, value in blocks[0].items() if not name.startswith("norm")},
        "eps": blocks[0]["norm1_eps"],
        "norm_layer": blocks[0]["norm1_layer"],
        "blocks": blocks,
        "rope": rope,
        "class_token": getattr(vit, "cls_token", None) is not None if base is Eva else vit.has_class_token,
        "reg_tokens": (0 if registers is None else registers.shape[1]) if base is Eva else vit.num_reg_tokens,
        "distilled": type(vit) is VisionTransformerDistilled,
        "pre_norm": pre is not None,
        "final_norm": final is not None,
        "fc_norm": fc_norm is not None,
        "norm_pre_eps": pre and pre.eps,
        "norm_pre_layer": pre and pre.kind,
        "norm_eps": final and final.eps,
        "final_norm_layer": final and final.kind,
        "pool_include_prefix": vit.attn_pool is not None if base is Eva else vit.pool_include_prefix,
        "attn_pool": pool,
        "drop_rate": vit.head_drop.p,
    }


def check_untouched(vit: nn.Module) -> None:
    """Refuses hooks, parametrisations and methods set on an instance, by the name of their module."""
    for name, module in vit.named_modules():
        altered = "is parametrised" if parametrize.is_parametrized(module) else alteration(module)
        if altered:
            raise ValueError(
                f"vit: {name or type(vit).__name__} {altered}, which would be left out; remove it, or merge it into "
                "the weights first"
            )


def weights_from_timm(vit: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model that `config_from_timm` reads; a `NaFlexVit`'s has a `VisionTransformer`'s names."""
    weights = vit.state_dict()
    if not hasattr(vit, "embeds"):
        return weights
    embeds = {name.removeprefix("embeds."): weights.pop(name) for name in list(weights) if name.startswith("embeds.")}
    if "pos_embed" in embeds:
        weights["pos_embed"] = embeds.pop("pos_embed").flatten(1, 2)
    elif "pos_embed_y" in embeds:
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


OF_NAFLEX = {
    "embeds.pos_embed": "pos_embed",
    "embeds.pos_embed_y": "pos_embed",
    "embeds.pos_embed_x": "pos_embed",
    "embeds.cls_token": "cls_token",
    "embeds.reg_token": "reg_token",
    "embeds.proj.weight": "patch_embed.proj.weight",
    "embeds.proj.bias": "patch_embed.proj.bias",
}
"""Parameters of `NaFlexEmbeds` by their names in a `VisionTransformer`."""


def _embedding(vit: nn.Module) -> dict[str, Any]:
    """Arguments for what a `VisionTransformer` or an `Eva` does before its blocks."""
    embed = vit.patch_embed
    require(type(embed).__name__ == "PatchEmbed", f"a patch embedding of type {type(embed).__name__}")
    require(isinstance(getattr(embed, "proj", None), nn.Conv2d), "a patch embedding other than one convolution")
    require(embed.proj.stride == embed.proj.kernel_size, "overlapping patches")
    plain = (embed.proj.padding, embed.proj.dilation, embed.proj.groups) == ((0, 0), (1, 1), 1)
    require(plain, "a patch embedding with padding, dilation or groups")
    return {
        "base_grid": tuple(embed.grid_size),
        "in_chans": embed.proj.in_channels,
        "no_embed_class": vit.no_embed_class or vit.pos_embed is None,
        "abs_pos_embed": vit.pos_embed is not None,
        "pos_drop_rate": vit.pos_drop.p,
        **_patches(embed),
    }


def _naflex_embedding(vit: nn.Module) -> dict[str, Any]:
    """Arguments for what a `NaFlexVit` does before its blocks."""
    embeds = vit.embeds
    require(not embeds.pos_embed_use_grid_sample, "sampling of position embeddings (pos_embed_use_grid_sample)")
    require(embeds.norm_input is None, "a norm of the patches (input_norm_layer)")
    factorized = embeds.pos_embed_type == "factorized"
    learned = embeds.pos_embed_type == "learned"
    interpolation = {  # a factorized one is always resampled linearly
        "pos_interpolation": embeds.pos_embed_interp_mode,
        "pos_antialias": getattr(embeds, "pos_embed_antialias", True),
        "pos_align_corners": getattr(embeds, "pos_embed_align_corners", False),
    }
    return {
        **(interpolation if learned else {}),
        "abs_pos_embed": embeds.pos_embed_type != "none",
        "base_grid": tuple(embeds.pos_embed_grid_size or (16, 16)),
        "in_chans": embeds.in_chans,
        "no_embed_class": True,
        "pos_factorized": factorized,
        "pos_keep_aspect": embeds.pos_embed_ar_preserving,
        "pos_drop_rate": embeds.pos_drop.p,
        **_patches(embeds),
    }


def _patches(embed: nn.Module) -> dict[str, Any]:
    norm = norm_of("patch_embed.norm", embed.norm)
    require(embed.patch_size[0] == embed.patch_size[1], f"non-square patches {tuple(embed.patch_size)}")
    return {"patch_size": embed.patch_size[0], "patch_bias": embed.proj.bias is not None, "patch_norm": norm}


def _check_types(vit: nn.Module) -> None:
    """Refuses every module that is not exactly one that timm builds in its place."""
    from timm.layers import AttentionPoolLatent, DropPath, GluMlp, LayerScale, Mlp, PatchEmbed, SwiGLU
    from timm.layers.attention import Attention, AttentionRope
    from timm.models.eva import EvaAttention
    from timm.models.naflexvit import NaFlexEmbeds

    linear, identity, dropout = (nn.Linear,), (nn.Identity,), (nn.Dropout, nn.Identity)
    projections = ("qkv", "q_proj", "k_proj", "v_proj", "q", "kv", "gate", "fc1", "fc1_g", "fc1_x", "fc2")
    norms = ("norm1", "norm2", "norm_pre", "norm", "fc_norm", "q_norm", "k_norm")
    expected = {
        **dict.fromkeys(projections, linear),
        "proj": (nn.Linear, nn.Conv2d),
        **dict.fromkeys(("head", "head_dist"), linear + identity),
        **dict.fromkeys(("attn_drop", "proj_drop", "drop1", "drop2", "pos_drop", "head_drop"), dropout),
        **dict.fromkeys(("ls1", "ls2"), (LayerScale, nn.Identity)),
        **dict.fromkeys(("drop_path1", "drop_path2"), (DropPath, nn.Identity)),
        **{"attn": (Attention, EvaAttention, AttentionRope), "mlp": (Mlp, GluMlp, SwiGLU)},
        **{"patch_embed": (PatchEmbed,), "embeds": (NaFlexEmbeds,), "attn_pool": (AttentionPoolLatent,)},
    }
    for name, module in vit.named_modules():
        role = name.rpartition(".")[2]
        if role in norms:
            norm_of(name, module)
        elif type(module) not in expected.get(role, (type(module),)):
            raise ValueError(
                f"vit: {name} is {type(module).__name__} instead of {expected[role][0].__name__}, which is not "
                "supported by ReViT; merge it into a plain layer first"
            )
    for name in ("head", "head_dist"):
        head = getattr(vit, name, None)
        fits = not isinstance(head, nn.Linear) or (head.in_features, head.bias is not None) == (vit.embed_dim, True)
        require(fits, f"a {name} of other channels or without bias")

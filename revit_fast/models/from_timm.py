"""Reads a timm `VisionTransformer` or `NaFlexVit`. Features that ReViT does not have raise an error that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from revit_fast.layers.comparison import alteration
from revit_fast.layers.mlp import activation_of

M = TypeVar("M", bound=nn.Module)


def require(condition: bool, feature: str) -> None:
    """Raises an error that `feature` is not supported unless `condition` holds."""
    if not condition:
        raise ValueError(f"vit: {feature} is not supported by ReViT")


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
        parameter.requires_grad_(trained[name])
    model.pretrained_cfg = dict(getattr(vit, "pretrained_cfg", None) or {})
    return model.train(vit.training)


def config_from_timm(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` that give the architecture of `vit`.

    Raises:
        ImportError: if timm is not installed.
        TypeError: if `vit` is neither a `VisionTransformer` nor a `NaFlexVit`.
        ValueError: if a module of it is not what timm builds, or does what ReViT does not have; the message names it.
    """
    try:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.naflexvit import NaFlexVit
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        raise ImportError('vit: from_timm needs timm: pip install "revit-fast[timm]"') from None
    if not isinstance(vit, (VisionTransformer, NaFlexVit)):
        raise TypeError(f"vit: expected a timm VisionTransformer or NaFlexVit, got {type(vit).__name__}")
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled, NaFlexVit):
        base = NaFlexVit if isinstance(vit, NaFlexVit) else VisionTransformer
        raise ValueError(f"vit: subclass {type(vit).__name__} of {base.__name__} is not supported")
    check_untouched(vit)
    require(len(vit.blocks) > 0, "a model without blocks")
    require(vit.global_pool in ("token", "avg", ""), f"global_pool={vit.global_pool!r}")
    require(vit.attn_pool is None, "attention pooling")
    require(isinstance(vit.patch_drop, (nn.Identity, type(None))), "patch dropout (patch_drop_rate)")
    embedding = _naflex_embedding(vit) if isinstance(vit, NaFlexVit) else _embedding(vit)
    blocks = [_block(f"blocks.{i}", block) for i, block in enumerate(vit.blocks)]
    _check_types(vit)
    norms = {n: getattr(vit, n) for n in ("norm_pre", "norm", "fc_norm")}
    norms = {n: (_eps(norm), _norm_kind(norm)) for n, norm in norms.items() if _norm_kind(norm)}
    final = norms.get("norm", norms.get("fc_norm", (None, None)))
    return embedding | {
        "num_classes": vit.head.out_features if isinstance(vit.head, nn.Linear) else 0,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        **{name: value for name, value in blocks[0].items() if not name.startswith("norm")},
        "eps": blocks[0]["norm1_eps"],
        "norm_layer": blocks[0]["norm1_layer"],
        "blocks": blocks,
        "class_token": vit.has_class_token,
        "reg_tokens": vit.num_reg_tokens,
        "distilled": isinstance(vit, VisionTransformerDistilled),
        "pre_norm": "norm_pre" in norms,
        "final_norm": "norm" in norms or "fc_norm" in norms,
        "fc_norm": "fc_norm" in norms,
        "norm_pre_eps": norms.get("norm_pre", (None, None))[0],
        "norm_pre_layer": norms.get("norm_pre", (None, None))[1],
        "norm_eps": final[0],
        "final_norm_layer": final[1],
        "pool_include_prefix": vit.pool_include_prefix,
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
    """The state dict of a model that `config_from_timm` reads, with the names of a `VisionTransformer`."""
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
    """Arguments for what a `VisionTransformer` does before its blocks."""
    require(vit.pos_embed is not None, "a model without position embedding (pos_embed='none')")
    embed = vit.patch_embed
    require(type(embed).__name__ == "PatchEmbed", f"a patch embedding of type {type(embed).__name__}")
    require(isinstance(getattr(embed, "proj", None), nn.Conv2d), "a patch embedding other than one convolution")
    require(embed.proj.stride == embed.proj.kernel_size, "overlapping patches")
    plain = (embed.proj.padding, embed.proj.dilation, embed.proj.groups) == ((0, 0), (1, 1), 1)
    require(plain, "a patch embedding with padding, dilation or groups")
    return {
        "base_grid": tuple(embed.grid_size),
        "in_chans": embed.proj.in_channels,
        "no_embed_class": vit.no_embed_class,
        "pos_drop_rate": vit.pos_drop.p,
        **_patches(embed),
    }


def _naflex_embedding(vit: nn.Module) -> dict[str, Any]:
    """Arguments for what a `NaFlexVit` does before its blocks."""
    embeds = vit.embeds
    require(vit.rope is None, "rotary position embedding (rope_type)")
    require(embeds.pos_embed_type != "none", "a model without position embedding (pos_embed='none')")
    require(not embeds.pos_embed_use_grid_sample, "sampling of position embeddings (pos_embed_use_grid_sample)")
    require(embeds.norm_input is None, "a norm of the patches (input_norm_layer)")
    factorized = embeds.pos_embed_type == "factorized"
    if not factorized:  # the other is always resampled linearly
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


def _block(name: str, block: nn.Module) -> dict[str, Any]:
    """Keywords of a block, see `keywords.BLOCK_KEYWORDS`."""
    from timm.models.vision_transformer import Block

    require(type(block) is Block, f"blocks of type {type(block).__name__} ({name})")
    attn, mlp = block.attn, block.mlp
    for part, layer in (("qkv", attn.qkv), ("proj", attn.proj)):
        kind = type(layer).__name__
        require(type(layer) is nn.Linear, f"{name}.attn.{part} is {kind} instead of Linear, which")
    plain = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    require(plain, f"query and key norms (qk_norm, {name}.attn)")
    output_norm = getattr(attn, "norm", nn.Identity())
    require(isinstance(output_norm, nn.Identity), f"an attention output norm (scale_attn_norm, {name}.attn)")
    require(getattr(attn, "gate", None) is None, f"gated attention ({name}.attn)")
    require(attn.attn_drop.p == 0, f"attention dropout (attn_drop_rate={attn.attn_drop.p}); set it to 0")
    default = abs(attn.scale * attn.head_dim**0.5 - 1) < 1e-6
    require(default, f"a scale of {attn.scale} for a head dimension of {attn.head_dim} ({name}.attn)")
    plain = isinstance(getattr(mlp, "fc1", None), nn.Linear) and isinstance(getattr(mlp, "fc2", None), nn.Linear)
    require(plain and hasattr(mlp, "act"), f"an MLP of type {type(mlp).__name__} ({name}.mlp)")
    require(mlp.fc1.out_features == mlp.fc2.in_features, f"a gated MLP ({type(mlp).__name__}, {name}.mlp)")
    require(
        isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity), f"a norm in the MLP (scale_mlp_norm, {name}.mlp)"
    )
    act = activation_of(mlp.act)
    require(act is not None, f"the activation {type(mlp.act).__name__} ({name}.mlp.act)")
    biases = (mlp.fc1.bias is None, mlp.fc2.bias is None)
    require(len(set(biases)) == 1, f"a bias in one layer of the MLP alone ({name}.mlp)")
    norms = (block.norm1, block.norm2)
    require(all(map(_norm_kind, norms)), f"a norm other than LayerNorm and RMSNorm ({name})")
    drops = {attn.proj_drop.p, mlp.drop1.p, mlp.drop2.p}
    require(len(drops) == 1, f"dropout of different rates in a block ({name})")
    paths = {float(getattr(path, "drop_prob", 0.0) or 0.0) for path in (block.drop_path1, block.drop_path2)}
    require(len(paths) == 1, f"stochastic depth of different rates in a block ({name})")
    scales = {isinstance(scale, nn.Identity) for scale in (block.ls1, block.ls2)}
    require(len(scales) == 1, f"LayerScale in one branch alone ({name})")
    return {
        "num_heads": attn.num_heads,
        "head_dim": attn.head_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "proj_bias": attn.proj.bias is not None,
        "hidden_dim": mlp.fc1.out_features,
        "act_layer": act,
        "mlp_bias": not biases[0],
        "norm1_eps": _eps(block.norm1),
        "norm2_eps": _eps(block.norm2),
        "norm1_layer": _norm_kind(block.norm1),
        "norm2_layer": _norm_kind(block.norm2),
        "init_values": None if scales == {True} else float(block.ls1.init_values),
        "proj_drop_rate": drops.pop(),
        "drop_path_rate": paths.pop(),
    }


def _norm_kind(module: nn.Module) -> str | None:
    """Kind of a norm, see `models.spec.Norm`; None for others. timm has norms of its own that compute the same."""
    of_timm = type(module).__module__.startswith("timm.layers.")
    if type(module) is nn.LayerNorm or (of_timm and isinstance(module, nn.LayerNorm)):
        return "layer"
    is_rms = type(module) is nn.RMSNorm or (of_timm and type(module).__name__ in ("RmsNorm", "RmsNormFp32"))
    return "rms" if is_rms else None


def _eps(norm: nn.Module) -> float:
    if norm.eps is not None:
        return norm.eps
    require(norm.weight is not None, "a norm without weight")
    return torch.finfo(norm.weight.dtype).eps  # as in torch.nn.functional.rms_norm


def _check_types(vit: nn.Module) -> None:
    """Refuses every module that is not exactly one that timm builds in its place."""
    from timm.layers import DropPath, LayerScale, Mlp, PatchEmbed
    from timm.layers.attention import Attention
    from timm.models.naflexvit import NaFlexEmbeds

    linear, identity, dropout = (nn.Linear,), (nn.Identity,), (nn.Dropout, nn.Identity)
    norms = dict.fromkeys(("norm1", "norm2", "norm_pre", "norm", "fc_norm"), ())
    expected = {
        **dict.fromkeys(("qkv", "fc1", "fc2"), linear),
        "proj": (nn.Linear, nn.Conv2d),
        **dict.fromkeys(("head", "head_dist"), linear + identity),
        **dict.fromkeys(("attn_drop", "proj_drop", "drop1", "drop2", "pos_drop", "head_drop"), dropout),
        **dict.fromkeys(("ls1", "ls2"), (LayerScale, nn.Identity)),
        **dict.fromkeys(("drop_path1", "drop_path2"), (DropPath, nn.Identity)),
        **{"attn": (Attention,), "mlp": (Mlp,), "patch_embed": (PatchEmbed,), "embeds": (NaFlexEmbeds,)},
    }
    for name, module in vit.named_modules():
        role = name.rpartition(".")[2]
        if role in norms:
            kind = "none" if type(module) is nn.Identity else _norm_kind(module)
            require(kind is not None, f"a norm other than LayerNorm and RMSNorm ({name} is {type(module).__name__})")
            wanted = {"none": (), "layer": ("weight", "bias"), "rms": ("weight",)}[kind]
            require(
                all(getattr(module, n) is not None for n in wanted), f"a norm without {' or '.join(wanted)} ({name})"
            )
        elif type(module) not in expected.get(role, (type(module),)):
            raise ValueError(
                f"vit: {name} is {type(module).__name__} instead of {expected[role][0].__name__}, which is not "
                "supported by ReViT; merge it into a plain layer first"
            )
    for name in ("head", "head_dist"):
        head = getattr(vit, name, None)
        fits = not isinstance(head, nn.Linear) or (head.in_features, head.bias is not None) == (vit.embed_dim, True)
        require(fits, f"a {name} of other channels or without bias")

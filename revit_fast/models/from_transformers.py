"""Reads transformers' ViT, DeiT and DINOv2 models. Features that ReViT does not have raise an error that names them.

A model's configuration gives its architecture; its state dict is renamed to timm's names. The modules of a ViT have one
set of names in version 4 of transformers (`encoder.layer.0.attention.attention.query`) and another in version 5
(`layers.0.attention.q_proj`); both are supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revit_fast.layers.comparison import difference, is_plain
from revit_fast.models.from_timm import check_untouched, require
from revit_fast.models.weights import names_by_id

M = TypeVar("M", bound=nn.Module)

KINDS = {
    "ViTModel": {},
    "ViTForImageClassification": {},
    "DeiTForImageClassification": {"reg_tokens": 1},  # its head reads the class token alone
    "DeiTForImageClassificationWithTeacher": {"distilled": True},
    "Dinov2Model": {},
    "Dinov2ForImageClassification": {"global_pool": "token_avg"},
    "Dinov2WithRegistersModel": {},
    "Dinov2WithRegistersForImageClassification": {"global_pool": "token_avg"},
}
"""Supported classes, and the arguments of `ReViT` that each needs besides those from its configuration."""

ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"},
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}
"""Activations that ReViT has: transformers' names and ReViT's own."""

LEFT_OUT = re.compile(r"embeddings\.mask_token$|pooler\.")
"""Weights that do not affect features and logits."""

NAMES = [
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]
"""Patterns of transformers' names and their replacements by timm's names, applied in this order."""


def model_from_transformers(kind: type[M], vit: nn.Module, grids: Sequence[int], processor: Any) -> M:
    """See `ReViT.from_transformers`; `kind` is the class."""
    config = config_from_transformers(vit)
    settings = {} if processor is None else settings_from_processor(processor)
    with torch.device(vit.device):  # where the weights are, whatever the default device is
        model = kind(grids=grids, **config).to(dtype=vit.dtype)
    model.load_weights(state_dict_from_transformers(vit.state_dict(), config), type(vit).__name__)
    _keep_requires_grad(vit, model)
    model.pretrained_cfg = settings | {"label_names": class_names(vit) if model.num_classes else None}
    return model.train(vit.training)


def _keep_requires_grad(vit: nn.Module, model: nn.Module) -> None:
    """Parameters that are not trained in `vit` are not trained in the model; of merged ones all must be frozen."""
    trained: dict[str, bool] = {}
    for name, parameter in vit.named_parameters():
        if not LEFT_OUT.search(name):
            renamed = re.sub(r"\.attn\.[qkv]\.", ".attn.qkv.", _renamed(name))
            trained[renamed] = trained.get(renamed, False) or parameter.requires_grad
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))


def config_from_transformers(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` that give the architecture of `vit`."""
    try:
        import transformers
    except ImportError:
        raise ImportError('vit: from_transformers needs transformers: pip install "revit-fast[transformers]"') from None
    kind = type(vit).__name__
    if not isinstance(vit, transformers.PreTrainedModel):
        raise TypeError(f"vit: expected a model of transformers, one of {', '.join(KINDS)}, got {kind}")
    is_known = kind in KINDS and type(vit) is getattr(transformers, kind)
    require(is_known, f"the class {type(vit).__module__}.{kind} (supported: {', '.join(KINDS)})")
    require(not getattr(vit, "is_quantized", False), "a quantised model")
    config = vit.config
    _check_config(config)
    check_untouched(vit)
    with torch.device("meta"):
        built = type(vit)(config)
    found = difference(
        vit, built, is_called=lambda name: name in HEADS and is_plain(getattr(vit, name, None), nn.Linear)
    )
    require(found is None, f"a model that is not what its config says: {found}")
    patch_size, width = _square_patch(config), config.hidden_size
    is_dino = hasattr(config, "layerscale_value")
    return {
        "base_grid": _base_grid(config, patch_size),
        "patch_size": patch_size,
        "in_chans": config.num_channels,
        "num_classes": _n_classes(vit) if "Classification" in kind else 0,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", width // config.num_attention_heads),
        "hidden_dim": int(width * config.mlp_ratio) if is_dino else config.intermediate_size,
        "qkv_bias": config.qkv_bias,
        # The weights of the scales are loaded; their initial value matters only for new models.
        "init_values": (float(config.layerscale_value) or 1.0) if is_dino else None,
        "reg_tokens": getattr(config, "num_register_tokens", 0),
        "no_embed_class": hasattr(config, "num_register_tokens"),
        "act_layer": ACTIVATIONS[config.hidden_act],
        "eps": config.layer_norm_eps,
    } | KINDS[kind]


HEADS = ("classifier", "cls_classifier", "distillation_classifier")
"""Heads, which may be replaced by a linear layer of another size."""


def _n_classes(vit: nn.Module) -> int:
    sizes = {h.out_features for name in HEADS if isinstance(h := getattr(vit, name, None), nn.Linear)}
    require(len(sizes) < 2, "two heads of different sizes")
    return sizes.pop() if sizes else 0


def state_dict_from_transformers(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a plain ViT under timm's names.

    Args:
        state_dict: state dict of a model of transformers.
        config: result of `config_from_transformers` for the model.
    """
    renamed = {_renamed(name): value for name, value in state_dict.items() if not LEFT_OUT.search(name)}
    token = renamed.pop("embeddings.distillation_token", None)
    if token is not None:
        renamed["dist_token" if config.get("distilled") else "reg_token"] = token
    # Registers are inserted after positions are added, so the class token's position becomes part of the token.
    if config["no_embed_class"]:
        positions = renamed["pos_embed"]
        renamed |= {"cls_token": renamed["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return renamed


def settings_from_processor(processor: Any) -> dict[str, Any]:
    """mean, std, crop_pct and interpolation, under timm's names, of an image processor of transformers.

    Args:
        processor: the processor, or the content of its `preprocessor_config.json`.

    Raises:
        TypeError: if `processor` is neither.
        ValueError: for a setting that revit-fast's preprocessing does not have; the message names it.
    """
    if not isinstance(processor, Mapping):
        if not callable(getattr(processor, "to_dict", None)):
            got = type(processor).__name__
            raise TypeError(f"processor: expected an image processor of transformers or its settings, got {got}")
        processor = processor.to_dict()
    for step in ("do_resize", "do_rescale"):
        _require_setting(processor.get(step, True), f"{step}=False")
    factor = processor.get("rescale_factor", 1 / 255)
    _require_setting(abs(255 * factor - 1) < 1e-6, f"rescale_factor={factor!r}; expected 1/255")
    resample = processor.get("resample", 2)
    _require_setting(resample in INTERPOLATIONS, f"resample={resample!r}; expected 2 (bilinear) or 3 (bicubic)")
    n_channels = 3
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * n_channels, [1.0] * n_channels
    for name, values in (("image_mean", mean), ("image_std", std)):
        known = isinstance(values, Sequence) and len(values) == n_channels
        _require_setting(known, f"{name}={values!r}; expected {n_channels} numbers")
    scaled_px = _side(processor, "size")
    seen_px = _side(processor, "crop_size") if processor.get("do_center_crop", False) else scaled_px
    _require_setting(seen_px <= scaled_px, f"a crop_size of {seen_px} px beyond the size of {scaled_px} px")
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": seen_px / scaled_px,
        "interpolation": INTERPOLATIONS[resample],
    }


INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Names of the interpolations that revit-fast has, by Pillow's numbers."""


def class_names(vit: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes in the order of the logits; None for the placeholders LABEL_0, LABEL_1, ..."""
    return names_by_id(vit.config.id2label, _n_classes(vit))


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_config(config: Any) -> None:
    require(not getattr(config, "use_swiglu_ffn", False), "SwiGLU (use_swiglu_ffn=True)")
    require(config.hidden_act in ACTIVATIONS, f"hidden_act={config.hidden_act!r} (supported: {', '.join(ACTIVATIONS)})")
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        value = getattr(config, rate, 0.0)
        require(value == 0, f"{rate}={value} (load the model with {rate}=0; in evaluation it is the same)")
    require(not getattr(config, "pruned_heads", None), "a model with pruned heads (pruned_heads)")


def _square_patch(config: Any) -> int:
    patch = _pair(config.patch_size)
    require(patch[0] == patch[1], f"non-square patches (patch_size={patch})")
    return patch[0]


def _base_grid(config: Any, patch_size: int) -> tuple[int, int]:
    height, width = _pair(config.image_size)
    fits = height % patch_size == 0 and width % patch_size == 0
    require(fits, f"image_size={height}x{width} (no multiple of patch_size={patch_size})")
    return height // patch_size, width // patch_size


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _side(processor: Mapping[str, Any], name: str) -> int:
    """The shorter side in pixels that `size` or `crop_size` describes."""
    size = processor.get(name)
    if isinstance(size, int):
        return size
    size = {key: value for key, value in dict(size or {}).items() if value is not None}
    sides = set(size.values()) if set(size) in ({"height", "width"}, {"shortest_edge"}) else set()
    _require_setting(len(sides) == 1, f"{name}={size}; expected equal height and width, or shortest_edge")
    return sides.pop()


def _require_setting(condition: bool, setting: str) -> None:
    if not condition:
        raise ValueError(f"processor: {setting} is not supported")

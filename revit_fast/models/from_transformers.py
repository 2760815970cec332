"""Reads transformers' ViTs. Features that ReViT does not have raise an error that names them.

A model's configuration gives its architecture; its state dict is renamed to timm's names. The modules of a ViT have one
set of names in version 4 of transformers (`encoder.layer.0.attention.attention.query`) and another in version 5
(`layers.0.attention.q_proj`); both are supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from revit_fast.io.atomic import read_json
from revit_fast.layers.comparison import difference, is_plain
from revit_fast.layers.mlp import as_activation
from revit_fast.layers.rope import Rope
from revit_fast.models.from_timm import check_untouched, require
from revit_fast.models.spec import AttentionPool, Mlp, Norm
from revit_fast.models.transformers_processor import settings_from_processor
from revit_fast.models.transformers_weights import state_dict_from_transformers
from revit_fast.models.weights import names_by_id

M = TypeVar("M", bound=nn.Module)

POOLED = {"fc_norm": True}  # the norm after the blocks is of the class token alone

KINDS = {
    "ViTModel": {},
    "ViTForImageClassification": {},
    "DeiTForImageClassification": {"reg_tokens": 1},  # its head reads the class token alone
    "DeiTForImageClassificationWithTeacher": {"distilled": True},
    "Dinov2Model": {},
    "Dinov2ForImageClassification": {"global_pool": "token_avg"},
    "Dinov2WithRegistersModel": {},
    "Dinov2WithRegistersForImageClassification": {"global_pool": "token_avg"},
    "DINOv3ViTModel": {},
    "SiglipVisionModel": {},
    "SiglipModel": {},
    "SiglipForImageClassification": {"global_pool": "avg", "fc_norm": False, "attn_pool": None},
    "Siglip2VisionModel": {},
    "Siglip2Model": {},
    "Siglip2ForImageClassification": {"global_pool": "avg", "fc_norm": False, "attn_pool": None},
    "CLIPVisionModel": POOLED,
    "CLIPVisionModelWithProjection": POOLED,
    "CLIPModel": POOLED,
    "CLIPForImageClassification": {"global_pool": "avg", "final_norm": False},
}
"""Supported classes, and the arguments of `ReViT` that each needs besides those from its configuration.

Of a model of images and texts, the part for images is taken.
"""

ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"},
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}
"""Activations that ReViT has: transformers' names and ReViT's own."""

BIASES = {(True, True, True): True, (False, False, False): False, (True, False, True): "qv"}
"""Which of queries, keys and values may have a bias, and the `qkv_bias` that says so."""

HEADS = ("classifier", "cls_classifier", "distillation_classifier", "visual_projection")
"""Heads, which may be replaced by a linear layer of another size."""

OF_TEXTS = ("text_model", "text_projection")
"""Modules that images do not pass through."""


def model_from_transformers(
    kind: type[M], vit: nn.Module | str | Path, grids: Sequence[int], processor: Any = None
) -> M:
    """See `ReViT.from_transformers`; `kind` is the class."""
    if isinstance(vit, (str, Path)):
        path = Path(vit)
        vit = model_in_folder(path)
        saved = path / "preprocessor_config.json"
        processor = read_json(saved) if processor is None and saved.is_file() else processor
    config = config_from_transformers(vit)
    settings = {} if processor is None else settings_from_processor(processor)
    with torch.device(vit.device):  # where the weights are, whatever the default device is
        model = kind(grids=grids, **config).to(dtype=vit.dtype)
    model.load_weights(state_dict_from_transformers(vit.state_dict(), config), type(vit).__name__)
    _keep_requires_grad(vit, config, model)
    model.pretrained_cfg = settings | {"label_names": class_names(vit) if model.num_classes else None}
    return model.train(vit.training)


def model_in_folder(folder: Path) -> nn.Module:
    """The model that transformers' `save_pretrained` wrote, in the dtype of its file and in evaluation mode.

    Only safetensors are read; nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds no model of transformers, one of another class, or not all of its weights.
    """
    transformers = _transformers()
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"vit: there is no {path}; give a folder that transformers' save_pretrained wrote, or a model "
            "(transformers.AutoModel.from_pretrained loads one from the Hub)"
        )
    config = read_json(path)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not names:
        raise ValueError(
            f"vit: {path} names no class of transformers (architectures); load the folder with its own class and give "
            "the model, or ReViT.from_pretrained if revit-fast wrote it"
        )
    require(names[0] in KINDS, f"the class {names[0]} in {path} (supported: {', '.join(KINDS)})")
    known = getattr(transformers, names[0], None)
    require(known is not None, f"the class {names[0]} without a newer transformers (it is {transformers.__version__})")
    model, found = known.from_pretrained(
        folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = [name for name in sorted(found["missing_keys"]) if not name.startswith(OF_TEXTS)]
    if missing:
        raise ValueError(f"vit: {folder} lacks {len(missing)} weights of {names[0]}: {missing[0]}, ...; save it again")
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError('vit: from_transformers needs transformers: pip install "revit-fast[transformers]"') from None
    return transformers


def _keep_requires_grad(vit: nn.Module, config: dict[str, Any], model: nn.Module) -> None:
    """Parameters that are not trained in `vit` are not trained in the model; of merged ones all must be frozen."""
    trained = {
        name: torch.full((), p.requires_grad, dtype=torch.bool, device="cpu").expand(p.shape)
        for name, p in vit.named_parameters()
    }
    trained = model.convert_state_dict(state_dict_from_transformers(trained, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(trained[name].any()))


def config_from_transformers(vit: nn.Module) -> dict[str, Any]:
    """Arguments of `ReViT` that give the architecture of `vit`."""
    transformers = _transformers()
    kind = type(vit).__name__
    if not isinstance(vit, transformers.PreTrainedModel):
        raise TypeError(f"vit: expected a model of transformers, one of {', '.join(KINDS)}, got {kind}")
    is_known = kind in KINDS and type(vit) is getattr(transformers, kind)
    require(is_known, f"the class {type(vit).__module__}.{kind} (supported: {', '.join(KINDS)})")
    require(not getattr(vit, "is_quantized", False), "a quantised model")
    config = getattr(vit.config, "vision_config", vit.config)
    _check_config(config)
    check_untouched(vit)
    with torch.device("meta"):
        built = type(vit)(vit.config)

    def is_called(name: str) -> bool:
        is_head = name in HEADS and hasattr(built, name) and is_plain(getattr(vit, name, None), nn.Linear)
        return is_head or name in OF_TEXTS

    found = difference(vit, built, is_called=is_called)
    require(found is None, f"a model that is not what its config says: {found}")
    read = next((reader for start, reader in READERS.items() if kind.startswith(start)), _plain)
    width, heads = config.hidden_size, config.num_attention_heads
    return {
        "patch_size": _square_patch(config),
        "in_chans": config.num_channels,
        "num_classes": _n_classes(vit),
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": heads,
        "head_dim": getattr(config, "head_dim", width // heads),
        "reg_tokens": getattr(config, "num_register_tokens", 0),
        "no_embed_class": hasattr(config, "num_register_tokens"),
        "act_layer": ACTIVATIONS[config.hidden_act],
        "eps": config.layer_norm_eps,
        **read(config),
        **KINDS[kind],
    }


def _plain(config: Any) -> dict[str, Any]:
    """Of ViT, DeiT and DINOv2."""
    is_dino, gated = hasattr(config, "layerscale_value"), getattr(config, "use_swiglu_ffn", False)
    hidden = int(config.hidden_size * config.mlp_ratio) if is_dino else config.intermediate_size
    return {
        "base_grid": _base_grid(config),
        "pos_antialias": hasattr(config, "num_register_tokens"),
        "hidden_dim": (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        "gated_mlp": gated,
        **({"act_layer": "silu"} if gated else {}),
        "qkv_bias": config.qkv_bias,
        "init_values": _scale(config) if is_dino else None,
    }


def _dinov3(config: Any) -> dict[str, Any]:
    biases = config.query_bias, config.key_bias, config.value_bias
    require(
        biases in BIASES,
        "a bias of other projections than all, none, or queries and values (query_bias={}, "
        "key_bias={}, value_bias={})".format(*biases),
    )
    augmented = {name: getattr(config, f"pos_embed_{name}") for name in ("shift", "jitter", "rescale")}
    return {
        "hidden_dim": config.intermediate_size,
        "qkv_bias": BIASES[biases],
        "proj_bias": config.proj_bias,
        "mlp_bias": config.mlp_bias,
        "gated_mlp": config.use_gated_mlp,
        "init_values": _scale(config),
        "abs_pos_embed": False,
        "rope": Rope(temperature=float(config.rope_theta), coords="centered", half=True, **augmented),
    }


def _siglip(config: Any) -> dict[str, Any]:
    pool = None
    if getattr(config, "vision_use_head", True):  # version 4 of transformers does not say it
        mlp = Mlp(config.intermediate_size, as_activation(ACTIVATIONS[config.hidden_act]))
        pool = AttentionPool(config.num_attention_heads, mlp, Norm(config.layer_norm_eps))
    return {
        "base_grid": _base_grid(config),
        "pos_antialias": False,
        "hidden_dim": config.intermediate_size,
        "class_token": False,
        "global_pool": "" if pool is None else "map",
        "attn_pool": pool,
    }


def _siglip2(config: Any) -> dict[str, Any]:
    return _siglip(config) | {"pos_interpolation": "bilinear", "pos_antialias": True}


def _clip(config: Any) -> dict[str, Any]:
    return {
        "base_grid": _base_grid(config),
        "pos_antialias": False,
        "hidden_dim": config.intermediate_size,
        "patch_bias": False,
        "pre_norm": True,
    }


READERS = {"DINOv3": _dinov3, "Siglip2": _siglip2, "Siglip": _siglip, "CLIP": _clip}
"""What reads a configuration's own fields, by the beginning of the class's name; for others `_plain`."""


def _n_classes(vit: nn.Module) -> int:
    sizes = {h.out_features for name in HEADS if isinstance(h := getattr(vit, name, None), nn.Linear)}
    require(len(sizes) < 2, "two heads of different sizes")
    return sizes.pop() if sizes else 0


def class_names(vit: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes in the order of the logits; None for the placeholders LABEL_0, LABEL_1, ..."""
    return names_by_id(vit.config.id2label, _n_classes(vit))


def _check_config(config: Any) -> None:
    require(config.hidden_act in ACTIVATIONS, f"hidden_act={config.hidden_act!r} (supported: {', '.join(ACTIVATIONS)})")
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"):
        value = getattr(config, rate, 0.0)
        require(value == 0, f"{rate}={value} (load the model with {rate}=0; in evaluation it is the same)")
    require(not getattr(config, "pruned_heads", None), "a model with pruned heads (pruned_heads)")


def _scale(config: Any) -> float:
    """The initial value of LayerScale; weights are loaded, so it matters only for new models."""
    return float(config.layerscale_value) or 1.0


def _square_patch(config: Any) -> int:
    patch = _pair(config.patch_size)
    require(patch[0] == patch[1], f"non-square patches (patch_size={patch})")
    return patch[0]


def _base_grid(config: Any) -> tuple[int, int]:
    if hasattr(config, "num_patches"):
        side = int(config.num_patches**0.5)
        require(side * side == config.num_patches, f"num_patches={config.num_patches} (no square)")
        return side, side
    (height, width), patch_size = _pair(config.image_size), _square_patch(config)
    fits = height % patch_size == 0 and width % patch_size == 0
    require(fits, f"image_size={height}x{width} (no multiple of patch_size={patch_size})")
    return height // patch_size, width // patch_size


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)

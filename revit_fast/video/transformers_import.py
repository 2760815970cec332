"""Translates configurations and weight names of Hugging Face's TimeSformer; refuses unsupported features by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from revit_fast.layers.mlp import activation_name

DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "num_frames": 8,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "attention_type": "divided_space_time",
    "drop_path_rate": 0,
}
"""Defaults of `TimesformerConfig`; `config.json` leaves out values that equal them."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Hugging Face's names of activations, and ours (`layers.ACTIVATIONS`)."""

NAMES = (
    (r"^timesformer\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.time_embeddings$", "time_embed"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.temporal_layernorm\.", ".temporal_norm1."),
    (r"\.temporal_dense\.", ".temporal_fc."),
    (r"(\.temporal_|\.)attention\.attention\.qkv\.", r"\1attn.qkv."),
    (r"(\.temporal_|\.)attention\.output\.dense\.", r"\1attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
"""Patterns in Hugging Face's parameter names and our replacements, applied in this order."""


def names_from_transformers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under our names; names that are ours already stay."""
    converted = {}
    for name, value in state_dict.items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = value
    return converted


def config_from_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TimeSformer` for the architecture of a `TimesformerConfig`, except the number of classes.

    Raises:
        ValueError: if the model is of another kind, or a feature is not supported; the message names it.
    """
    kind = config.get("model_type", "timesformer")
    _require(kind == "timesformer", f"model_type={kind!r}")
    config = DEFAULTS | {name: config[name] for name in DEFAULTS if name in config}
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        _require(not config[name], f"{name}={config[name]}; set it to 0")
    act = config["hidden_act"]
    _require(act in ACTIVATIONS, f"hidden_act={act!r}")
    patch, image = _side(config, "patch_size"), _side(config, "image_size")
    _require(image >= patch, f"image_size={image} below patch_size={patch}")
    return {
        "base_grid": (image // patch, image // patch),
        "num_frames": config["num_frames"],
        "patch_size": patch,
        "in_chans": config["num_channels"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_dim": config["intermediate_size"],
        "qkv_bias": config["qkv_bias"],
        "attention_type": config["attention_type"],
        "act_layer": ACTIVATIONS[act],
        "eps": config["layer_norm_eps"],
    }


def config_to_transformers(model: nn.Module) -> dict[str, Any]:
    """The `TimesformerConfig` of a `TimeSformer`, as a mapping.

    Raises:
        ValueError: if the grid of the position embeddings is not square.
    """
    rows, columns = model.base_grid
    _require(rows == columns, f"base_grid={model.base_grid} that is no square")
    block = model.blocks[0] if len(model.blocks) else None
    ours = activation_name(block.mlp.act) if block is not None else "gelu"
    return DEFAULTS | {
        "model_type": "timesformer",
        "image_size": rows * model.patch_size,
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "num_frames": model.num_frames,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.num_heads,
        "intermediate_size": block.mlp.fc1.out_features if block is not None else 4 * model.embed_dim,
        "hidden_act": next(name for name, known in ACTIVATIONS.items() if known == ours),
        "layer_norm_eps": model.norm.eps,
        "qkv_bias": block is None or block.attn.qkv.bias is not None,
        "attention_type": model.attention_type,
    }


def _side(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    sides = {value} if isinstance(value, int) else set(value)
    _require(len(sides) == 1, f"{name}={value} that is no square")
    return sides.pop()


def _require(condition: bool, feature: str) -> None:
    if not condition:
        raise ValueError(f"config: {feature} is not supported by TimeSformer")

"""Weights of transformers' ViTs under timm's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

LEFT_OUT = re.compile(r"embeddings\.mask_token$|pooler\.|^text_(model|projection)\.|^logit_(scale|bias)$")
"""Weights that do not affect the features and logits of images."""

NAMES = [
    (r"^(vit|deit|dinov2|dinov2_with_registers|vision_model)\.", ""),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embedding(s|\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embedding(s\.projection|s)?\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(encoder\.layers?|model\.layer|layers?)\.", "blocks."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.(attention\.)?", "attn_pool."),
    (r"\.(self_attn|attention)\.(o_proj|out_proj|output\.dense)\.", ".attn.proj."),
    (r"\.(self_attn|attention)\.(attention\.query|q_proj)\.", ".attn.q_proj."),
    (r"\.(self_attn|attention)\.(attention\.key|k_proj)\.", ".attn.k_proj."),
    (r"\.(self_attn|attention)\.(attention\.value|v_proj)\.", ".attn.v_proj."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^(post_)?layernorm\.", "norm."),
    (r"^((cls_)?classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]
"""Patterns of transformers' names and their replacements by timm's names, applied in this order.

Queries, keys, values and gates that are apart get the names of timm's `Eva`, which `timm_blocks.plain_names` reads.
"""


def state_dict_from_transformers(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a ViT under timm's names.

    Args:
        state_dict: state dict of a model of transformers.
        config: result of `config_from_transformers` for the model.
    """
    renamed = {_renamed(name, config): value for name, value in state_dict.items() if not LEFT_OUT.search(name)}
    unused = [
        *(["attn_pool."] if config.get("attn_pool") is None else []),
        *([] if config.get("final_norm", True) else ["norm."]),
        *([] if config["reg_tokens"] or "reg_token" not in renamed else ["reg_token"]),  # a tensor without rows
    ]
    renamed = {name: value for name, value in renamed.items() if not name.startswith(tuple(unused))}
    token = renamed.pop("embeddings.distillation_token", None)
    if token is not None:
        renamed["dist_token" if config.get("distilled") else "reg_token"] = token
    for name in ("cls_token", "pos_embed"):  # an embedding's table has fewer axes
        if name in renamed:
            renamed[name] = renamed[name].view(1, -1, renamed[name].shape[-1])
    # Registers are inserted after positions are added, so the class token's position becomes part of the token.
    if config["no_embed_class"] and "pos_embed" in renamed:
        positions = renamed["pos_embed"]
        renamed |= {"cls_token": renamed["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    kernel = renamed["patch_embed.proj.weight"]
    if kernel.dim() == 2:  # of rows in the order of a `PackedBatch`
        p = config["patch_size"]
        renamed["patch_embed.proj.weight"] = kernel.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)
    for kind in ("weight", "bias"):
        if f"attn_pool.in_proj_{kind}" in renamed:
            q, kv = renamed.pop(f"attn_pool.in_proj_{kind}").tensor_split([config["embed_dim"]])
            renamed |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": kv}
    if "head.weight" in renamed and "head.bias" not in renamed:  # a projection
        renamed["head.bias"] = renamed["head.weight"].new_zeros(config["num_classes"])
    return renamed


def _renamed(name: str, config: Mapping[str, Any]) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    name = name.replace(".mlp.up_proj.", ".mlp.fc1_x." if config.get("gated_mlp") else ".mlp.fc1.")
    return re.sub(r"^norm\.", "fc_norm.", name) if config.get("fc_norm") else name

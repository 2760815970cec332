"""Reads blocks, rotary embeddings and attention pools of timm's ViTs, EVAs and NaFlexViTs, and their weights' names.

What ReViT does not have raises an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from revit_fast.layers.mlp import activation_of
from revit_fast.layers.rope import Rope
from revit_fast.models.spec import AttentionPool, Mlp, Norm


def require(condition: bool, feature: str) -> None:
    """Raises an error that `feature` is not supported unless `condition` holds."""
    if not condition:
        raise ValueError(f"vit: {feature} is not supported by ReViT")


def norm_of(name: str, module: nn.Module | None) -> Norm | None:
    """A norm as data; None for none. timm has norms of its own that compute the same."""
    if module is None or isinstance(module, nn.Identity):
        return None
    of_timm = type(module).__module__.startswith("timm.layers.")
    is_layer = type(module) is nn.LayerNorm or (of_timm and isinstance(module, nn.LayerNorm))
    is_rms = type(module) is nn.RMSNorm or (of_timm and type(module).__name__ in ("RmsNorm", "RmsNormFp32"))
    require(is_layer or is_rms, f"a norm other than LayerNorm and RMSNorm ({name} is {type(module).__name__})")
    wanted = ("weight", "bias") if is_layer else ("weight",)
    require(all(getattr(module, n) is not None for n in wanted), f"a norm without {' or '.join(wanted)} ({name})")
    # As in torch.nn.functional.rms_norm.
    eps = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
    return Norm(eps, "layer" if is_layer else "rms")


def block_keywords(name: str, block: nn.Module) -> dict[str, Any]:
    """Keywords of a block, see `keywords.BLOCK_KEYWORDS`.

    Args:
        name: its dotted name.
        block: a `Block` or `EvaBlock` of timm.
    """
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block

    require(type(block) in (Block, EvaBlock), f"blocks of type {type(block).__name__} ({name})")
    attn, mlp = _attention(f"{name}.attn", block.attn), _mlp(f"{name}.mlp", block.mlp)
    norms = [norm_of(f"{name}.{n}", getattr(block, n)) for n in ("norm1", "norm2")]
    require(None not in norms, f"a block without norm ({name})")
    drops = {attn.pop("drop"), *mlp.pop("drops")}
    require(len(drops) == 1, f"dropout of different rates in a block ({name})")
    paths = {float(getattr(path, "drop_prob", 0.0) or 0.0) for path in (block.drop_path1, block.drop_path2)}
    require(len(paths) == 1, f"stochastic depth of different rates in a block ({name})")
    scales = [_is_scaled(block, i) for i in (1, 2)]
    require(scales != [False, True], f"LayerScale of the MLP alone ({name})")
    init = getattr(block.ls1, "init_values", None) if type(block) is Block else block.init_values
    return {
        **attn,
        **mlp,
        "norm1_eps": norms[0].eps,
        "norm2_eps": norms[1].eps,
        "norm1_layer": norms[0].kind,
        "norm2_layer": norms[1].kind,
        "init_values": float(init) if scales[0] else None,
        "attn_only_scale": scales == [True, False],
        "proj_drop_rate": drops.pop(),
        "drop_path_rate": paths.pop(),
    }


def _is_scaled(block: nn.Module, branch: int) -> bool:
    if hasattr(block, f"ls{branch}"):
        return not isinstance(getattr(block, f"ls{branch}"), nn.Identity)
    return getattr(block, f"gamma_{branch}") is not None


def _attention(name: str, attn: nn.Module) -> dict[str, Any]:
    known = ("Attention", "EvaAttention", "AttentionRope")
    require(type(attn).__name__ in known, f"attention of type {type(attn).__name__} ({name})")
    fused = attn.qkv is not None
    projections = {"qkv": attn.qkv} if fused else {f"{n}_proj": getattr(attn, f"{n}_proj") for n in "qkv"}
    for part, layer in (projections | {"proj": attn.proj}).items():
        require(type(layer) is nn.Linear, f"{name}.{part} is {type(layer).__name__} instead of Linear, which")
    biased = [p.bias is not None for p in projections.values()]
    bias: bool | str = all(biased)
    if (fused and getattr(attn, "q_bias", None) is not None) or biased == [True, False, True]:
        bias = "qv"
    require(bias == "qv" or len(set(biased)) == 1, f"a bias of some of queries, keys and values ({name})")
    require(attn.attn_drop.p == 0, f"attention dropout (attn_drop_rate={attn.attn_drop.p}); set it to 0")
    default = abs(attn.scale * attn.head_dim**0.5 - 1) < 1e-6
    require(default, f"a scale of {attn.scale} for a head dimension of {attn.head_dim} ({name})")
    qk = [norm_of(f"{name}.{n}_norm", getattr(attn, f"{n}_norm")) for n in "qk"]
    require(qk[0] == qk[1], f"different norms of queries and keys ({name})")
    gate = getattr(attn, "gate", None)
    fits = gate is None or (type(gate) is nn.Linear and (gate.bias is not None) == bool(bias))
    require(fits, f"a gate other than a linear layer with the bias of the queries ({name})")
    n_kv = getattr(attn, "num_kv_heads", None)
    return {
        "num_heads": attn.num_heads,
        "head_dim": attn.head_dim,
        "num_kv_heads": None if n_kv == attn.num_heads else n_kv,
        "qkv_bias": bias,
        "proj_bias": attn.proj.bias is not None,
        "qk_norm": qk[0],
        "attn_norm": norm_of(f"{name}.norm", getattr(attn, "norm", None)),
        "gated_attn": gate is not None,
        "drop": attn.proj_drop.p,
    }


def _mlp(name: str, mlp: nn.Module) -> dict[str, Any]:
    kind = type(mlp).__name__
    require(kind in ("Mlp", "GluMlp", "SwiGLU"), f"an MLP of type {kind} ({name})")
    first = ("fc1_g", "fc1_x") if kind == "SwiGLU" else ("fc1",)
    layers = {part: getattr(mlp, part) for part in (*first, "fc2")}
    for part, layer in layers.items():
        require(type(layer) is nn.Linear, f"{name}.{part} is {type(layer).__name__} instead of Linear, which")
    require(not getattr(mlp, "gate_last", False), f"a gated MLP whose second half is the gate (gate_last, {name})")
    biases = {layer.bias is not None for layer in layers.values()}
    require(len(biases) == 1, f"a bias in some layers of the MLP alone ({name})")
    act = activation_of(mlp.act)
    require(act is not None, f"the activation {type(mlp.act).__name__} ({name}.act)")
    return {
        "hidden_dim": mlp.fc2.in_features,
        "act_layer": act,
        "mlp_bias": biases.pop(),
        "gated_mlp": kind != "Mlp",
        "mlp_norm": norm_of(f"{name}.norm", getattr(mlp, "norm", None)),
        "drops": (mlp.drop1.p, mlp.drop2.p),
    }


def pool_of(pool: nn.Module | None) -> AttentionPool | None:
    """An attention pool as data; None for none."""
    if pool is None:
        return None
    require(type(pool).__name__ == "AttentionPoolLatent", f"pooling by {type(pool).__name__} (attn_pool)")
    plain = pool.latent_len == 1 and pool.pos_embed is None and pool.latent.shape[-1] == pool.proj.in_features
    require(
        plain and pool.pool == "token" and pool.mlp is not None, "an attention pool other than SigLIP's (attn_pool)"
    )
    normed = norm_of("attn_pool.q_norm", pool.q_norm) or norm_of("attn_pool.k_norm", pool.k_norm)
    require(normed is None, "a norm of queries and keys (attn_pool.q_norm)")
    layers = (pool.q, pool.kv, pool.proj)
    require(all(type(layer) is nn.Linear for layer in layers), "an attention pool with other layers (attn_pool)")
    require(pool.proj.bias is not None, "an attention pool's projection without bias (attn_pool.proj)")
    mlp = _mlp("attn_pool.mlp", pool.mlp)
    require(not any(mlp.pop("drops")) and not pool.proj_drop.p, "dropout in the attention pool (attn_pool)")
    act, hidden, bias = mlp["act_layer"], mlp["hidden_dim"], mlp["mlp_bias"]
    made = Mlp(hidden, act, bias, mlp["gated_mlp"], mlp["mlp_norm"])
    return AttentionPool(pool.num_heads, made, norm_of("attn_pool.norm", pool.norm), pool.q.bias is not None)


def rope_of(rope: nn.Module | None, blocks: Iterable[nn.Module]) -> Rope | None:
    """A rotary embedding as data; None for none.

    Args:
        rope: the module of the model.
        blocks: its blocks, which say how pairs lie.
    """
    if rope is None:
        return None
    kind, shared = type(rope).__name__, {}
    halves = {bool(getattr(block.attn, "rotate_half", False)) for block in blocks}
    require(len(halves) == 1, "rotary embeddings of different layouts in the blocks (rotate_half)")
    shared["half"] = halves.pop()
    shared |= {n: getattr(rope, f"{n}_coords", None) for n in ("shift", "jitter", "rescale")}
    shared |= {"temperature": float(rope.temperature or 0), "order": rope.grid_indexing}
    if kind == "RotaryEmbeddingMixed":
        return Rope("mixed", **shared)
    if kind == "RotaryEmbeddingMRope":
        return Rope("interleaved", sections=tuple(rope.mrope_section[1:]), **shared)
    shared |= {"offset": float(rope.grid_offset), "normalize": rope.normalize_coords}
    if kind == "RotaryEmbeddingDinoV3":
        require(rope.min_period is None and rope.max_period is None, "a rotary embedding by periods (min_period)")
        return Rope(coords="centered", **shared)
    require(kind == "RotaryEmbeddingCat", f"a rotary embedding of type {kind} (rope)")
    require(not rope.in_pixels and rope.grid_type == "index", "a rotary embedding in pixels (in_pixels)")
    reference = None if rope.ref_feat_shape is None else tuple(rope.ref_feat_shape)
    return Rope(reference=reference, **shared)


PARTS = {
    r"(blocks\.\d+\.attn)\.qkv\.(weight)": (r"\1.q_proj.\2", r"\1.k_proj.\2", r"\1.v_proj.\2"),
    r"(blocks\.\d+\.attn)\.q_bias": (r"\1.q_proj.bias",),
    r"(blocks\.\d+\.attn)\.v_bias": (r"\1.v_proj.bias",),
    r"(blocks\.\d+)\.ls(\d)\.gamma": (r"\1.gamma_\2",),
    r"(.*\bmlp)\.fc1\.(weight|bias)": (r"\1.fc1_g.\2", r"\1.fc1_x.\2"),
}
"""EVA's names of the parts of a parameter, by patterns of ReViT's name. The parts are stacked."""


def parts_of(name: str, theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under which EVA has the parts of a ReViT's parameter; its own name if they are not there."""
    if name.endswith(".attn.qkv.bias") and name.replace("qkv", "k_proj") in theirs:
        return tuple(name.replace("qkv", f"{n}_proj") for n in "qkv")
    for pattern, parts in PARTS.items():
        found = re.fullmatch(pattern, name)
        names = tuple(found.expand(part) for part in parts) if found else ()
        if names and all(part in theirs for part in names):
            return names
    return (name,)


def plain_names(weights: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """A state dict with EVA's names under those of a `VisionTransformer`; others stay.

    Args:
        weights: the state dict.
        own: names of the parameters of the ReViT that takes it.
    """
    parts = {name: parts_of(name, weights) for name in own}
    parts = {name: names for name, names in parts.items() if names != (name,)}
    renamed = {name: torch.cat([weights[part] for part in names]) for name, names in parts.items()}
    taken = {part for names in parts.values() for part in names}
    return {name: value for name, value in weights.items() if name not in taken} | renamed

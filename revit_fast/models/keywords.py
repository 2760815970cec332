"""Specs from keyword arguments, and back as JSON values: what `ReViT(...)` takes and `config.json` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from functools import partial
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.layers.mlp import Activation, as_activation
from revit_fast.layers.rope import Rope
from revit_fast.models.spec import (
    Attention,
    AttentionPool,
    Block,
    Divide,
    Embed,
    Head,
    LayerScale,
    Mlp,
    Norm,
    Positions,
    Prefix,
    ViTSpec,
)

T = TypeVar("T")


def spec_of(
    *,
    grids: Sequence[int] = DEFAULT_GRIDS,
    base_grid: tuple[int, int] | None = None,
    patch_size: int = 16,
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "token",
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    head_dim: int | None = None,
    hidden_dim: int | None = None,
    num_kv_heads: int | None = None,
    attn_scale: float | None = None,
    qkv_bias: bool | str = True,
    proj_bias: bool = True,
    qk_norm: Norm | Mapping[str, Any] | None = None,
    attn_norm: Norm | Mapping[str, Any] | None = None,
    gated_attn: bool = False,
    mlp_bias: bool = True,
    gated_mlp: bool = False,
    mlp_norm: Norm | Mapping[str, Any] | None = None,
    patch_bias: bool = True,
    patch_norm: Norm | Mapping[str, Any] | None = None,
    init_values: float | None = None,
    residual_scale: float = 1.0,
    attn_only_scale: bool = False,
    stem_chans: int | None = None,
    aux_head: bool = False,
    class_token: bool = True,
    reg_tokens: int = 0,
    distilled: bool = False,
    no_embed_class: bool = False,
    abs_pos_embed: bool = True,
    pos_factorized: bool = False,
    pos_keep_aspect: bool = False,
    pos_interpolation: str = "bicubic",
    pos_antialias: bool = True,
    pos_align_corners: bool = False,
    rope: Rope | Mapping[str, Any] | None = None,
    pre_norm: bool = False,
    final_norm: bool = True,
    fc_norm: bool | None = None,
    pool_include_prefix: bool = False,
    attn_pool: AttentionPool | Mapping[str, Any] | None = None,
    act_layer: str | type[nn.Module] | partial | Activation | Sequence = "gelu",
    eps: float = 1e-6,
    norm_pre_eps: float | None = None,
    norm_eps: float | None = None,
    norm_layer: str = "layer",
    norm_pre_layer: str | None = None,
    final_norm_layer: str | None = None,
    drop_rate: float = 0.0,
    pos_drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    blocks: Sequence[Mapping[str, Any]] | None = None,
) -> ViTSpec:
    """The spec that keyword arguments of `ReViT` stand for; names are timm's where it has them.

    Args:
        grids: configured square token grids, strictly decreasing; index 0 is the longest.
        base_grid: (rows, columns) of the grid that `pos_embed` is stored for; default: the first of `grids`.
        patch_size: P in pixels.
        in_chans: image channels.
        num_classes: classes of the head; 0 for none.
        global_pool: see `Head.pool`.
        embed_dim: channels C.
        depth: number of blocks.
        num_heads: attention heads.
        head_dim: channels of a head; default embed_dim // num_heads.
        hidden_dim: channels between the layers of the MLP; default 4 * embed_dim.
        num_kv_heads: heads of keys and values; default num_heads.
        attn_scale: factor of the scores; default head_dim ** -0.5.
        qkv_bias: whether queries, keys and values have a bias; "qv": queries and values alone.
        proj_bias: whether attention's output projection has a bias.
        qk_norm: norm of queries and keys, its `kind` and `eps`; None for none.
        attn_norm: norm before attention's output projection.
        gated_attn: see `Attention.gate`.
        mlp_bias: whether the layers of the MLP have a bias.
        gated_mlp: see `Mlp.gated`.
        mlp_norm: norm of the MLP's hidden channels.
        patch_bias: whether the patch embedding has a bias.
        patch_norm: see `Embed.patch_norm`.
        init_values: initial LayerScale; None for no LayerScale.
        residual_scale: divisor of the blocks' branches before they are added (LV-ViT's `skip_lam`).
        attn_only_scale: LayerScale or divisor is attention's alone.
        stem_chans: see `Embed.stem`.
        aux_head: see `Head.token_labels`.
        class_token: whether there is a class token.
        reg_tokens: number of register tokens.
        distilled: DeiT's distillation token and second head.
        no_embed_class: prefix tokens carry no position embedding.
        abs_pos_embed: whether position embeddings are added to the patches.
        pos_factorized: see `Positions.factorized`.
        pos_keep_aspect: see `Positions.keep_aspect`.
        pos_interpolation: see `Positions.interpolation`.
        pos_antialias: see `Positions.antialias`.
        pos_align_corners: see `Positions.align_corners`.
        rope: rotary position embedding, or its fields that differ from the default; None for none.
        pre_norm: a norm between embedding and blocks.
        final_norm: a norm after the blocks.
        fc_norm: apply the final norm after pooling; default: if global_pool is "avg".
        pool_include_prefix: "avg" and "map" pool the prefix tokens too.
        attn_pool: how "map" pools, or the fields of it that `keywords_of` writes.
        act_layer: activation of the MLP, see `layers.mlp.as_activation`.
        eps: of every norm.
        norm_pre_eps: eps of the norm between embedding and blocks, if it differs.
        norm_eps: eps of the final norm, if it differs.
        norm_layer: kind of every norm, see `Norm.kind`.
        norm_pre_layer: kind of the norm between embedding and blocks, if it differs.
        final_norm_layer: kind of the final norm, if it differs.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout of the embedding.
        proj_drop_rate: dropout after attention's projection and in the MLP.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        blocks: for each block the keywords in which it differs, of those in `BLOCK_KEYWORDS`.

    Raises:
        TypeError, ValueError: for values that no model can have; the message names the keyword.
    """
    grids = check_grids(grids)
    if blocks is not None and len(blocks) != depth:
        raise ValueError(f"blocks: expected one entry for each of {depth} blocks, got {len(blocks)}")
    common = {
        "num_heads": num_heads,
        "head_dim": head_dim or embed_dim // num_heads,
        "num_kv_heads": num_kv_heads,
        "attn_scale": attn_scale,
        "qkv_bias": qkv_bias,
        "proj_bias": proj_bias,
        "qk_norm": qk_norm,
        "attn_norm": attn_norm,
        "gated_attn": gated_attn,
        "gated_mlp": gated_mlp,
        "mlp_norm": mlp_norm,
        "attn_only_scale": attn_only_scale,
        "hidden_dim": hidden_dim or 4 * embed_dim,
        "act_layer": act_layer,
        "mlp_bias": mlp_bias,
        "norm1_eps": eps,
        "norm2_eps": eps,
        "norm1_layer": norm_layer,
        "norm2_layer": norm_layer,
        "init_values": init_values,
        "residual_scale": residual_scale,
        "proj_drop_rate": proj_drop_rate,
    }
    pooled = global_pool == "avg" if fc_norm is None else fc_norm
    return ViTSpec(
        dim=embed_dim,
        embed=Embed(
            patch_size,
            in_chans,
            Positions(
                (grids[0], grids[0]) if base_grid is None else tuple(base_grid),
                pos_factorized,
                pos_keep_aspect,
                pos_interpolation,
                pos_antialias,
                pos_align_corners,
                pos_drop_rate,
            )
            if abs_pos_embed
            else None,
            Prefix(class_token, distilled, reg_tokens, not no_embed_class),
            patch_bias,
            stem_chans,
            Norm(eps if norm_pre_eps is None else norm_pre_eps, norm_pre_layer or norm_layer) if pre_norm else None,
            _made(Rope, rope, reference=_pair, sections=_pair),
            _made(Norm, patch_norm),
        ),
        blocks=tuple(
            _block(
                common | {"drop_path_rate": drop_path_rate * i / max(depth - 1, 1)} | dict(blocks[i] if blocks else {})
            )
            for i in range(depth)
        ),
        head=Head(
            num_classes,
            global_pool,
            Norm(eps if norm_eps is None else norm_eps, final_norm_layer or norm_layer) if final_norm else None,
            pooled,
            pool_include_prefix,
            aux_head,
            drop_rate,
            _made(AttentionPool, attn_pool, norm=partial(_made, Norm), mlp=_mlp_of),
        ),
        grids=grids,
    )


ADDED = (
    *("num_kv_heads", "qk_norm", "attn_norm", "gated_attn", "gated_mlp", "mlp_norm", "attn_only_scale"),
    *("abs_pos_embed", "pos_interpolation", "pos_antialias", "pos_align_corners"),
    *("rope", "patch_norm", "attn_pool"),
)
"""Keywords that files name only where they differ from the default: files of models without them stay as they were."""

BLOCK_KEYWORDS = (
    "num_heads",
    "head_dim",
    "num_kv_heads",
    "qk_norm",
    "attn_norm",
    "gated_attn",
    "gated_mlp",
    "mlp_norm",
    "attn_only_scale",
    "attn_scale",
    "qkv_bias",
    "proj_bias",
    "hidden_dim",
    "act_layer",
    "mlp_bias",
    "norm1_eps",
    "norm2_eps",
    "norm1_layer",
    "norm2_layer",
    "init_values",
    "residual_scale",
    "proj_drop_rate",
    "drop_path_rate",
)
"""Keywords of `spec_of` that an entry of its `blocks` may hold; `eps` and `norm_layer` of each norm by itself."""


def _pair(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)


def _made(kind: type[T], value: T | Mapping[str, Any] | None, **fields: Callable[[Any], Any]) -> T | None:
    """A part of a spec from its fields, some of which are made by functions; None for none."""
    if value is None or isinstance(value, kind):
        return value
    return kind(**{name: fields[name](field) if name in fields else field for name, field in value.items()})


def _mlp_of(value: Mlp | Mapping[str, Any]) -> Mlp:
    return _made(Mlp, value, act=as_activation, norm=partial(_made, Norm))


def _as_json(part: Any) -> Any:
    """The fields of a part of a spec that differ from their defaults, as JSON values."""
    if isinstance(part, Activation):
        return part.as_json()
    if not is_dataclass(part):
        return list(part) if isinstance(part, tuple) else part
    values = ((field, getattr(part, field.name)) for field in dataclass_fields(part))
    return {field.name: _as_json(value) for field, value in values if value != field.default}


def _block(keywords: Mapping[str, Any]) -> Block:
    unknown = sorted(set(keywords) - set(BLOCK_KEYWORDS))
    if unknown:
        raise TypeError(f"blocks: unknown {', '.join(unknown)}; an entry may hold {', '.join(BLOCK_KEYWORDS)}")
    k, scale = keywords, None
    if k["init_values"] and k["residual_scale"] != 1:
        raise ValueError(
            f"residual_scale: LayerScale (init_values={k['init_values']}) scales the branches already, got "
            f"{k['residual_scale']}; give one of the two"
        )
    if k["init_values"]:
        scale = LayerScale(k["init_values"])
    elif k["residual_scale"] != 1:
        scale = Divide(k["residual_scale"])
    return Block(
        Attention(
            *(k["num_heads"], k["head_dim"], k["qkv_bias"], k["proj_bias"], k["attn_scale"], k["num_kv_heads"]),
            *(_made(Norm, k["qk_norm"]), _made(Norm, k["attn_norm"]), k["gated_attn"]),
        ),
        Mlp(
            *(k["hidden_dim"], as_activation(k["act_layer"]), k["mlp_bias"], k["gated_mlp"]),
            _made(Norm, k["mlp_norm"]),
        ),
        Norm(k["norm1_eps"], k["norm1_layer"]),
        Norm(k["norm2_eps"], k["norm2_layer"]),
        scale,
        not k["attn_only_scale"],
        k["proj_drop_rate"],
        k["drop_path_rate"],
    )


def _block_keywords(block: Block) -> dict[str, Any]:
    return {
        "num_heads": block.attn.heads,
        "head_dim": block.attn.head_dim,
        "num_kv_heads": block.attn.kv_heads,
        "qk_norm": _as_json(block.attn.qk_norm),
        "attn_norm": _as_json(block.attn.out_norm),
        "gated_attn": block.attn.gate,
        "gated_mlp": block.mlp.gated,
        "mlp_norm": _as_json(block.mlp.norm),
        "attn_only_scale": not block.scales_mlp,
        "attn_scale": block.attn.scale,
        "qkv_bias": block.attn.qkv_bias,
        "proj_bias": block.attn.out_bias,
        "hidden_dim": block.mlp.hidden,
        "act_layer": block.mlp.act.as_json(),
        "mlp_bias": block.mlp.bias,
        "norm1_eps": block.norm1.eps,
        "norm2_eps": block.norm2.eps,
        "norm1_layer": block.norm1.kind,
        "norm2_layer": block.norm2.kind,
        "init_values": block.scale.init if isinstance(block.scale, LayerScale) else None,
        "residual_scale": block.scale.by if isinstance(block.scale, Divide) else 1.0,
        "proj_drop_rate": block.drop,
        "drop_path_rate": block.drop_path,
    }


def keywords_of(spec: ViTSpec) -> dict[str, Any]:
    """The keywords of `spec_of` that give this spec, as JSON values.

    Raises:
        ValueError: for an activation that no file can hold.
    """
    embed, prefix, head = spec.embed, spec.embed.prefix, spec.head
    entries = [_block_keywords(block) for block in spec.blocks]
    rate = entries[-1]["drop_path_rate"] if entries else 0.0
    first = entries[0] if entries else _block_keywords(Block(Attention(1, spec.dim), Mlp(4 * spec.dim)))
    of_norms = ("norm1_eps", "norm2_eps", "norm1_layer", "norm2_layer")
    eps, kind = first["norm1_eps"], first["norm1_layer"]
    common = {name: value for name, value in first.items() if name not in of_norms} | {"drop_path_rate": rate}
    differing = []
    for i, entry in enumerate(entries):
        expected = {
            **common,
            "norm1_eps": eps,
            "norm2_eps": eps,
            "norm1_layer": kind,
            "norm2_layer": kind,
            "drop_path_rate": rate * i / max(len(entries) - 1, 1),
        }
        differing.append({name: value for name, value in entry.items() if value != expected[name]})
    positions = embed.positions or Positions((spec.grids[0], spec.grids[0]))
    keywords = {
        "grids": list(spec.grids),
        "base_grid": list(positions.base_grid),
        "patch_size": embed.patch_size,
        "in_chans": embed.in_chans,
        "num_classes": head.classes,
        "global_pool": head.pool,
        "embed_dim": spec.dim,
        "depth": len(spec.blocks),
        **common,
        "patch_bias": embed.bias,
        "stem_chans": embed.stem,
        "aux_head": head.token_labels,
        "class_token": prefix.cls,
        "reg_tokens": prefix.registers,
        "distilled": prefix.dist,
        "no_embed_class": not prefix.positioned,
        "abs_pos_embed": embed.positions is not None,
        "pos_interpolation": positions.interpolation,
        "pos_antialias": positions.antialias,
        "pos_align_corners": positions.align_corners,
        "rope": _as_json(embed.rope),
        "patch_norm": _as_json(embed.patch_norm),
        "attn_pool": _as_json(head.attention),
        "pos_factorized": positions.factorized,
        "pos_keep_aspect": positions.keep_aspect,
        "pre_norm": embed.norm is not None,
        "final_norm": head.norm is not None,
        "fc_norm": head.norm_pooled,
        "pool_include_prefix": head.pool_prefix,
        "eps": eps,
        "norm_pre_eps": embed.norm.eps if embed.norm is not None and embed.norm.eps != eps else None,
        "norm_eps": head.norm.eps if head.norm is not None and head.norm.eps != eps else None,
        "drop_rate": head.drop,
        "pos_drop_rate": positions.drop,
        "blocks": differing if any(differing) else None,
        **_norm_layers(kind, embed.norm, head.norm),
    }
    defaults = signature(spec_of).parameters
    return {n: value for n, value in keywords.items() if n not in ADDED or value != defaults[n].default}


def _norm_layers(kind: str, pre: Norm | None, final: Norm | None) -> dict[str, str]:
    """The keywords for kinds of norms, those of a model of LayerNorms left out: its files stay as they were."""
    kinds = {} if kind == Norm().kind else {"norm_layer": kind}
    others = {"norm_pre_layer": pre, "final_norm_layer": final}
    return kinds | {name: norm.kind for name, norm in others.items() if norm is not None and norm.kind != kind}

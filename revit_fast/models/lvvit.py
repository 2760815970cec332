"""LV-ViT ("All Tokens Matter", arXiv 2104.10858) as a ReViT: its architectures, and models with the official weights.

LV-ViT differs from DeiT in a convolutional stem (`ConvStem`), in branches that are divided by a constant before
they are added to the residual stream, in an MLP of three times the width, and in projections of queries, keys and
values without bias. State dicts have the official names; norm parameters have a leading length axis.

The official models were trained with a second head that classifies every patch token; at inference half the largest of
its logits is added to the class token's. Here that head is off unless `aux_head=True`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.models.vit import ReViT
from revit_fast.models.weights import state_dict_of

SHARED: dict[str, Any] = {"qkv_bias": False, "eps": 1e-5}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t": SHARED | {"embed_dim": 240, "depth": 12, "num_heads": 4, "stem_chans": 64, "residual_scale": 1.0},
    "s": SHARED | {"embed_dim": 384, "depth": 16, "num_heads": 6, "stem_chans": 64, "residual_scale": 2.0},
    "m": SHARED | {"embed_dim": 512, "depth": 20, "num_heads": 8, "stem_chans": 64, "residual_scale": 2.0},
    "l": SHARED | {"embed_dim": 768, "depth": 24, "num_heads": 12, "stem_chans": 128, "residual_scale": 3.0},
}
"""Arguments of `ReViT` by the letter of the size."""

CROP_PCT = {"t": 0.9, "s": 0.9, "m": 1.0, "l": 1.0}
MLP_RATIO = 3


def lvvit_t(grids: Sequence[int] = DEFAULT_GRIDS, **kwargs: Any) -> ReViT:
    """LV-ViT-T with random weights; `kwargs` are arguments of `ReViT`."""
    return _make("t", grids, kwargs)


def lvvit_s(grids: Sequence[int] = DEFAULT_GRIDS, **kwargs: Any) -> ReViT:
    """LV-ViT-S with random weights; `kwargs` are arguments of `ReViT`."""
    return _make("s", grids, kwargs)


def lvvit_m(grids: Sequence[int] = DEFAULT_GRIDS, **kwargs: Any) -> ReViT:
    """LV-ViT-M with random weights; `kwargs` are arguments of `ReViT`."""
    return _make("m", grids, kwargs)


def lvvit_l(grids: Sequence[int] = DEFAULT_GRIDS, **kwargs: Any) -> ReViT:
    """LV-ViT-L with random weights; `kwargs` are arguments of `ReViT`."""
    return _make("l", grids, kwargs)


def _make(size: str, grids: Sequence[int], kwargs: Mapping[str, Any]) -> ReViT:
    options = ARCHITECTURES[size] | kwargs
    model = ReViT(grids=grids, **{"hidden_dim": MLP_RATIO * options["embed_dim"], **options})
    model.pretrained_cfg = {"crop_pct": CROP_PCT[size]}
    return model


def from_lvvit_state_dict(
    state_dict: Mapping[str, Tensor],
    grids: Sequence[int] = DEFAULT_GRIDS,
    *,
    num_heads: int | None = None,
    residual_scale: float | None = None,
    aux_head: bool = False,
) -> ReViT:
    """A ReViT in evaluation mode with the weights of an official LV-ViT, its LayerNorms repeated for every length.

    For images of a single grid the result equals that of the original at that input size. The architecture is read from
    the shapes.

    Args:
        state_dict: state dict of the official `LV_ViT` with its stem `PatchEmbed4_2` or `PatchEmbed4_2_128`, or a
            checkpoint that holds it.
        grids: configured token grids, strictly decreasing.
        num_heads: attention heads; by default those of the official model of this width.
        residual_scale: its `skip_lam`; by default that of the same official model.
        aux_head: whether to add half the largest token-label logits, as the original does at inference.

    Raises:
        ValueError: if weights are missing or are of another architecture, or if the number of heads is not given by
            them.
    """
    state_dict = state_dict_of(state_dict, "state_dict")
    expected = ["pos_embed", "patch_embed.conv1.weight", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"]
    expected += ["blocks.0.attn.proj.weight", *["aux_head.weight"] * aux_head]
    missing = [name for name in expected if name not in state_dict]
    if missing:
        raise ValueError(
            f"state_dict: no weights of an LV-ViT with its convolutional stem: {', '.join(missing)} missing"
        )
    embed_dim, stem_chans, half_patch, _ = state_dict["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    official = {known["embed_dim"]: known for known in ARCHITECTURES.values()}
    given = {"num_heads": num_heads, "residual_scale": residual_scale}
    for name, value in given.items():
        if value is None and embed_dim not in official:
            raise ValueError(
                f"{name}: not known for {embed_dim} channels (official models have {', '.join(map(str, official))}); "
                f"give {name}=..."
            )
        given[name] = official[embed_dim][name] if value is None else value
    width = state_dict["blocks.0.attn.proj.weight"].shape[1]
    if width % given["num_heads"]:
        raise ValueError(f"num_heads: expected a divisor of the attention's {width} channels, got {given['num_heads']}")
    side = math.isqrt(state_dict["pos_embed"].shape[1] - 1)
    num_classes = state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0
    model = ReViT(
        grids=grids,
        base_grid=(side, side),
        patch_size=2 * half_patch,
        in_chans=state_dict["patch_embed.conv1.weight"].shape[1],
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        hidden_dim=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        head_dim=width // given["num_heads"],
        stem_chans=stem_chans,
        aux_head=aux_head,
        **SHARED | {"qkv_bias": "blocks.0.attn.qkv.bias" in state_dict},
        **given,
    )
    model.to(dtype=state_dict["pos_embed"].dtype)
    model.load_weights(state_dict, "state_dict")
    return model.eval()

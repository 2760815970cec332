"""Creates models from timm's architecture names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.models.vit import ReViT


def create_model(
    name: str, grids: Sequence[int] = DEFAULT_GRIDS, weights: str | Path | None = None, **kwargs: Any
) -> ReViT:
    """A ReViT with the architecture of a timm ViT.

    Args:
        name: timm's name of a ViT or DeiT, for instance "deit_small_patch16_224".
        grids: configured token grids, strictly decreasing.
        weights: `.safetensors` or `.pth` of a plain ViT or of a ReViT; None: random weights.
        kwargs: passed on to `timm.create_model`.

    Raises:
        ImportError: where timm is not installed.
        TypeError: for `pretrained`, because weights come from a file.
        ValueError: for an unknown name, an architecture that is not supported, or weights that do not fit.
    """
    try:
        import timm
    except ImportError:
        raise ImportError('name: architectures by name need timm: pip install "revit-fast[timm]"') from None
    if not timm.is_model(name):
        family = timm.list_models(f"{name.split('_')[0]}*") if name else []
        near = get_close_matches(name, family or timm.list_models(), n=5, cutoff=0.3 if family else 0.6)
        raise ValueError(f"name: timm knows no model {name!r}; similar: {', '.join(near) or 'none'}")
    if "pretrained" in kwargs:
        raise TypeError(
            "pretrained: not taken, as weights come from a file here; for timm's own give "
            f"ReViT.from_timm(timm.create_model({name!r}, pretrained=True))"
        )
    model = ReViT.from_timm(timm.create_model(name, pretrained=False, **kwargs), grids=grids)
    if weights is not None:
        model.load_checkpoint(weights)
    return model

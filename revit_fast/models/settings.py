"""How a model expects its images: normalisation, crop and interpolation, under timm's names.

Imports neither torch nor NumPy, so that the command line can read its defaults without them.
"""

from __future__ import annotations

from typing import Any

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEIT_CROP_PCT = 0.9

SETTINGS = ("mean", "std", "crop_pct", "interpolation")
"""Names of the settings."""


def input_settings(model: Any) -> dict[str, Any]:
    """mean, std, crop_pct and interpolation of a model's timm configuration; DeiT's where it has none.

    Args:
        model: a `ReViT` or a `TimeSformer`.
    """
    config = model.pretrained_cfg or {}
    interpolation = config.get("interpolation")
    return {
        "mean": config.get("mean") or IMAGENET_MEAN,
        "std": config.get("std") or IMAGENET_STD,
        "crop_pct": config.get("crop_pct") or DEIT_CROP_PCT,
        "interpolation": interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
    }

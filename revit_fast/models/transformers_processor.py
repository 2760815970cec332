"""Preprocessing settings from image processors of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Names of the interpolations that revit-fast has, by Pillow's numbers."""


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
    return {
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": _crop_pct(processor),
        "interpolation": INTERPOLATIONS[resample],
    }


def _crop_pct(processor: Mapping[str, Any]) -> float:
    if processor.get("max_num_patches") is not None:  # of NaFlex: whole images in their own proportions, without a size
        return 1.0
    scaled_px = _side(processor, "size")
    seen_px = _side(processor, "crop_size") if processor.get("do_center_crop", False) else scaled_px
    _require_setting(seen_px <= scaled_px, f"a crop_size of {seen_px} px beyond the size of {scaled_px} px")
    return seen_px / scaled_px


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

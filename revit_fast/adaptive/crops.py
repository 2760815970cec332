"""The part of an image that a model sees, and the grid of its patches."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=1024)  # many images have the same size
def eval_box(height: int, width: int, image_px: int, crop_pct: float) -> tuple[float, float, float, float]:
    """The region, (left, upper, right, lower) in source pixels, that timm's evaluation transform shows the model.

    timm scales the shorter side to `floor(image_px / crop_pct)` and the longer one in proportion, rounded down. It then
    cuts out a centred square of `image_px`, whose corner is rounded to a pixel. Resizing this region gives the same
    result without computing the pixels that timm cuts away: the filter takes the same source pixels with the same
    weights. Two roundings may differ: of the region's edges to float32 and, if the two passes run in another order, of
    the image between them.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        image_px: side of the square that the model sees, in pixels.
        crop_pct: share of the scaled shorter side that is kept, in (0, 1].
    """
    scaled = math.floor(image_px / crop_pct)
    shorter, longer = min(height, width), max(height, width)
    longer_scaled = int(scaled * longer / shorter)
    out_height, out_width = (scaled, longer_scaled) if height <= width else (longer_scaled, scaled)
    top, left = (round((side - image_px) / 2.0) for side in (out_height, out_width))
    # Multiplying before dividing makes the edges of the image exact.
    right, bottom = (left + image_px) * width / out_width, (top + image_px) * height / out_height
    return left * width / out_width, top * height / out_height, min(right, width), min(bottom, height)


MAX_ENLARGEMENT = 100.0
RATIO_STEP = 1e-5
"""Precision of the search for the ratio, and the smallest ratio."""


@lru_cache(maxsize=1024)
def aspect_grid(
    height: int, width: int, max_tokens: int, patch_size: int = 16, max_ratio: float | None = None
) -> tuple[int, int]:
    """The grid (rows, columns) of an image that keeps its aspect ratio under a budget of tokens.

    The image is scaled by the largest ratio that gives at most `max_tokens` patches. Partial patches at the right and
    lower edge count as whole ones. Resizing the image to whole patches stretches it by less than one patch per side.
    The choice is exactly that of timm's NaFlex data pipeline (`get_image_size_for_seq`) and of SigLIP 2: this is the
    same bisection with the same steps.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        max_tokens: largest number of patches.
        patch_size: P in pixels.
        max_ratio: largest ratio; 1 never enlarges an image. By default 100.

    Raises:
        ValueError: if an argument is below 1 (`max_ratio`: not above 0), or the image would have to shrink to a
            hundred-thousandth of its size or less.
    """
    given = {"height": height, "width": width, "max_tokens": max_tokens, "patch_size": patch_size}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value!r}")
    if max_ratio is not None and not max_ratio > 0:
        raise ValueError(f"max_ratio: expected a positive number or None, got {max_ratio!r}")

    def grid_at(ratio: float) -> tuple[int, int]:
        return max(math.ceil(height * ratio / patch_size), 1), max(math.ceil(width * ratio / patch_size), 1)

    low, high = RATIO_STEP / 10, MAX_ENLARGEMENT
    while high - low >= RATIO_STEP:
        middle = (low + high) / 2
        rows, columns = grid_at(middle)
        low, high = (middle, high) if rows * columns <= max_tokens else (low, middle)
    ratio = low if max_ratio is None else min(low, max_ratio)
    if ratio <= RATIO_STEP:
        raise ValueError(
            f"height, width: {height}x{width} pixels cannot be scaled to {max_tokens} patches of {patch_size}; "
            "resize the image first"
        )
    return grid_at(ratio)

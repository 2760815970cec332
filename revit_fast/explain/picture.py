"""Draws an image with the region that the model sees and the patches of that region."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

PICTURE_PX = (560, 460)
"""Width and height that a picture is scaled to fit in; small images are scaled up."""

MAX_ASPECT = 2.5
"""Largest aspect ratio of the part of an image that is shown; a larger one would leave no room for the grid."""

OUTLINE = (255, 176, 0)
HEAT, HEAT_SHARE = (255, 60, 0), 0.85
"""Colour of attention, and its share in the patch that gets the most."""

LIGHT, DARK = (255, 255, 255), (0, 0, 0)

OUTLINE_PX = 3

MIN_PATCH_PX = 8
"""Patches smaller than this in the picture get lines without a dark edge; the edges would cover them."""


class Picture(NamedTuple):
    """A drawn picture.

    Attributes:
        image: the picture in RGB.
        is_cut: whether it leaves out the far ends of a very long image.
    """

    image: Image.Image
    is_cut: bool


def draw_grid(image: np.ndarray, crop: tuple[float, float, float, float], grid: int) -> Picture:
    """Scales the image to `PICTURE_PX`, dims what the model does not see, outlines the rest and draws its patches.

    A line is light with a dark edge, so that it shows on any image. It lies on the pixel next to the border of two
    patches.

    Args:
        image: uint8 `[H, W, 3]`, `[H, W, 1]` or `[H, W]`.
        crop: the region that the model sees, (left, upper, right, lower) in pixels of the image.
        grid: patches a side.
    """
    pixels, x, y, is_cut = _placed(image, crop, grid)
    return Picture(_finished(_with_lines(pixels, x, y)), is_cut)


def draw_attention(image: np.ndarray, crop: tuple[float, float, float, float], weights: np.ndarray) -> Image.Image:
    """The picture of `draw_grid` without lines; patches in grey are coloured by their weight.

    Args:
        image: see `draw_grid`.
        crop: see `draw_grid`.
        weights: `[grid, grid]`, not negative; the largest gets the strongest colour.
    """
    pixels, x, y, _ = _placed(image, crop, len(weights))
    columns, rows = _pixel(x, pixels.shape[1]), _pixel(y, len(pixels))
    inside = pixels[rows[0] : rows[-1], columns[0] : columns[-1]]
    share = np.repeat(np.repeat(weights, np.diff(rows), axis=0), np.diff(columns), axis=1)[..., None]
    share = HEAT_SHARE * share / max(float(weights.max()), np.finfo(np.float32).tiny)
    inside[:] = (1 - share) * inside.mean(axis=2, keepdims=True) + share * np.array(HEAT, dtype=np.float32)
    return _finished(pixels)


def _placed(
    image: np.ndarray, crop: tuple[float, float, float, float], grid: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """The scaled image, float32 `[H, W, 3]`, dimmed outside; where patches begin and end; whether it is cut."""
    pixels = np.repeat(
        image.reshape(*image.shape[:2], -1), 3 if image.size == image.shape[0] * image.shape[1] else 1, 2
    )
    height, width = pixels.shape[:2]
    left, upper, right, lower = window = _window(width, height, crop)
    scale = min(PICTURE_PX[0] / (right - left), PICTURE_PX[1] / (lower - upper))
    size = tuple(max(1, round(scale * side)) for side in (right - left, lower - upper))
    # The nearest filter keeps the single pixels of a small image visible.
    method = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.BICUBIC
    scaled = Image.fromarray(pixels).resize(size, method, box=window, reducing_gap=3.0)
    x, y = (
        (np.linspace(low, high, grid + 1) - start) * n / extent
        for low, high, start, n, extent in (
            (crop[0], crop[2], left, size[0], right - left),
            (crop[1], crop[3], upper, size[1], lower - upper),
        )
    )
    is_cut = window != (0.0, 0.0, float(width), float(height))
    return _dimmed(np.asarray(scaled, dtype=np.float32), x, y), x, y, is_cut


def _finished(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().astype(np.uint8))


def _window(width: int, height: int, crop: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The part of an image that is shown: all of it, unless it is very long."""
    limit = MAX_ASPECT * min(width, height)
    window = []
    for size, low, high in ((width, crop[0], crop[2]), (height, crop[1], crop[3])):
        shown = min(float(size), limit)
        start = min(max((low + high - shown) / 2, 0.0), size - shown)
        window.append((start, start + shown))
    (left, right), (upper, lower) = window
    return left, upper, right, lower


def _pixel(position: np.ndarray, size: int) -> np.ndarray:
    """The pixel that shows a line at a position."""
    return np.clip(np.floor(position), 0, size - 1).astype(int)


def _dimmed(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Makes the outside grey and low in contrast, so that it differs from bright and dark images alike."""
    rows, columns = _pixel(y[[0, -1]], len(pixels)), _pixel(x[[0, -1]], pixels.shape[1])
    inside = np.s_[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
    dimmed = np.repeat(0.35 * pixels.mean(axis=2, keepdims=True) + 40, 3, axis=2)
    dimmed[inside] = pixels[inside]
    return dimmed


def _with_lines(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    columns, rows = _pixel(x, width), _pixel(y, height)
    lines, frame = np.zeros((2, height, width), dtype=bool)
    region = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    lines[region][rows[1:-1] - rows[0]] = True
    lines[region][:, columns[1:-1] - columns[0]] = True
    frame[region] = True
    frame[rows[0] + OUTLINE_PX : rows[-1] + 1 - OUTLINE_PX, columns[0] + OUTLINE_PX : columns[-1] + 1 - OUTLINE_PX] = (
        False
    )
    has_edges = (x[-1] - x[0]) / (len(x) - 1) >= MIN_PATCH_PX
    if has_edges:
        _mix(pixels, _grown(lines), DARK, 0.4)
    _mix(pixels, _grown(frame), DARK, 0.6)
    _mix(pixels, lines, LIGHT, 0.8 if has_edges else 0.5)
    _mix(pixels, frame, OUTLINE, 1.0)
    return pixels


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels beside it."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _mix(pixels: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], share: float) -> None:
    pixels[mask] = (1 - share) * pixels[mask] + share * np.array(colour, dtype=np.float32)

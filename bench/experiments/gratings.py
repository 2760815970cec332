"""Images whose sufficient token length is known by construction.

The class of an image is the direction of a grating. Its difficulty is how fine the grating is. The part of every
pattern that resizing to a shorter length would keep is removed, so that the rest at that length is smaller than the
rounding of pixels. Classes can then be distinguished only at the sufficient length and at longer ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.train.data import ArrayImages

CONTRAST = (45.0, 70.0)
"""Amplitude of the gratings, in grey levels."""

NOISE = 4.0
"""Standard deviation of the noise of every pixel, in grey levels."""

BACKGROUND = 12.0
"""Amplitude of the slow waves behind the gratings, in grey levels."""


ITERATIONS = 200
"""Largest number of iterations of `without_coarse`."""

MAX_LEFT = 0.005
"""Largest share of a grating's amplitude at a length that should not show it: a fifth of a grey level, below noise."""


def make_synthetic(
    n: int,
    grids: Sequence[int] = DEFAULT_GRIDS,
    patch_size: int = 2,
    seed: int = 0,
    n_classes: int = 4,
    interpolation: str = "bicubic",
) -> tuple[ArrayImages, np.ndarray]:
    """A set of images in random order, with the same number for every class and length up to one.

    Images have the pixels of the longest length. Phase, frequency within its band, contrast, brightness, slow waves
    behind and noise differ from image to image and say nothing about the class. The model must see the whole images:
    use a preprocessing with crop_pct 1 and the same interpolation.

    Args:
        n: number of images.
        grids: grids of the model, strictly decreasing.
        patch_size: P of the model, in pixels.
        seed: the same seed gives the same images.
        n_classes: directions of gratings, 2 to 6.
        interpolation: interpolation of the model's preprocessing, "bicubic" or "bilinear".

    Returns:
        The images, and int64 `[n]`: the index of the smallest length that shows the class, 0 the longest.

    Raises:
        ValueError: for other numbers; for grids (more than three, or close together) for which no pattern can be shown
            at one length and lost at the next shorter one.
    """
    grids = check_grids(grids)
    if n < 1:
        raise ValueError(f"n: expected at least 1 image, got {n}")
    if not 2 <= n_classes <= 6:
        raise ValueError(f"n_classes: expected 2 to 6 directions, got {n_classes}")
    sides = [grid * patch_size for grid in grids]
    rng = np.random.default_rng(seed)
    place = rng.permutation(n)
    sufficient, labels = place % len(grids), place // len(grids) % n_classes
    pixels = np.empty((n, sides[0], sides[0]))
    for length in range(len(grids)):
        mine = sufficient == length
        pixels[mine] = _gratings(labels[mine], n_classes, length, sides, interpolation, rng)
    pixels += _background(n, sides[0], rng) + NOISE * rng.standard_normal(pixels.shape)
    images = pixels.round().clip(0, 255).astype(np.uint8)
    names = [f"synthetic {i}" for i in range(n)]
    return ArrayImages(images, labels, _class_names(n_classes), names), sufficient.astype(np.int64)


def directions(n_classes: int) -> np.ndarray:
    """Directions of the gratings, `[n_classes, 2]` as (x, y); the larger component is 1, the other at least 3/4.

    Resizing treats the axes separately, and keeps nothing of a pattern if it keeps nothing along one of them. Slanted
    gratings are fine along both axes, and can be lost at several shorter lengths.
    """
    angle = np.linspace(-1, 1, (n_classes + 1) // 2) if n_classes > 2 else np.zeros(1)
    angle = np.repeat(np.pi / 4 + angle * (np.pi / 4 - np.arctan(0.75)), 2)[:n_classes]
    vectors = np.stack([np.cos(angle), np.sin(angle) * (-1.0) ** np.arange(n_classes)], axis=1)
    return vectors / np.abs(vectors).max(axis=1, keepdims=True)


def band(length: int, sides: Sequence[int]) -> tuple[float, float]:
    """Range of cycles per image of the gratings for which this length is the smallest that shows them."""
    finest = sides[length] / 2
    coarsest = sides[length + 1] / 2 if length + 1 < len(sides) else finest / 2
    return coarsest + 0.4 * (finest - coarsest), coarsest + 0.75 * (finest - coarsest)


def gratings_at(frequency: np.ndarray, phase: np.ndarray, labels: np.ndarray, n_classes: int, side: int) -> np.ndarray:
    """Gratings `[n, side, side]` of amplitude 1.

    Args:
        frequency: cycles per image, `[n]`, of the finer component.
        phase: phase in radians, `[n]`.
        labels: index of the direction, `[n]`.
        n_classes: number of directions.
        side: side in pixels.
    """
    position = (np.arange(side) + 0.5) / side
    cycles = frequency[:, None] * directions(n_classes)[labels]
    along = cycles[:, 0, None, None] * position + cycles[:, 1, None, None] * position[:, None]
    return np.cos(2 * np.pi * along + phase[:, None, None])


def _gratings(labels, n_classes, length, sides, interpolation, rng) -> np.ndarray:
    """Gratings `[n, S, S]` that length `length` shows and shorter lengths do not."""
    n = len(labels)
    frequency, phase = rng.uniform(*band(length, sides), n), rng.uniform(0, 2 * np.pi, n)
    patterns = gratings_at(frequency, phase, labels, n_classes, sides[0])
    patterns = without_coarse(patterns, sides[length + 1 :], interpolation)
    patterns /= np.abs(patterns).max(axis=(1, 2), keepdims=True, initial=1e-9)
    for side in sides[length + 1 :]:
        weights = resize_matrix(sides[0], side, interpolation)
        left = np.abs(weights @ patterns @ weights.T).max(initial=0.0)
        if left > MAX_LEFT:
            raise ValueError(
                f"grids: {side} px would show {left:.1%} of a pattern that {sides[length]} px are needed for, instead "
                f"of at most {MAX_LEFT:.1%}; give at most three grids, further apart, such as (14, 10, 7)"
            )
    return rng.uniform(*CONTRAST, (n, 1, 1)) * patterns


def without_coarse(patterns: np.ndarray, sides: Sequence[int], interpolation: str = "bicubic") -> np.ndarray:
    """The part of patterns `[n, S, S]` that becomes zero when it is resized to any of `sides`.

    Resizing is X -> R X R'. It keeps P X P', where P is the projection onto the rows of R. Repeated subtraction of this
    part for one size after another leads to the part that no size keeps (von Neumann's alternating projections).
    """
    kept = [_row_projection(patterns.shape[1], side, interpolation) for side in sides]
    for _ in range(ITERATIONS if len(sides) > 1 else 1):
        before = patterns
        for projection in kept:
            patterns = patterns - projection @ patterns @ projection
        if np.abs(patterns - before).max(initial=0.0) < 1e-6:
            break
    return patterns


def resize_matrix(side_in: int, side_out: int, interpolation: str = "bicubic") -> np.ndarray:
    """Weights `[side_out, side_in]` of Pillow's antialiased resize along one axis."""
    columns = torch.eye(side_in, dtype=torch.float64)[None, None]
    resized = F.interpolate(columns, (side_out, side_in), mode=interpolation, antialias=True, align_corners=False)
    return resized[0, 0].numpy()


def _row_projection(side_in: int, side_out: int, interpolation: str) -> np.ndarray:
    weights = resize_matrix(side_in, side_out, interpolation)
    return np.linalg.pinv(weights) @ weights


def _background(n: int, side: int, rng) -> np.ndarray:
    """Brightness and one slow wave in a random direction, `[n, side, side]`; every length shows them alike."""
    position = (np.arange(side) + 0.5) / side
    cycles = rng.uniform(-1.5, 1.5, (n, 2, 1, 1))
    phase, amplitude = rng.uniform(0, 2 * np.pi, (n, 1, 1)), rng.uniform(0, BACKGROUND, (n, 1, 1))
    waves = amplitude * np.sin(2 * np.pi * (cycles[:, 0] * position + cycles[:, 1] * position[:, None]) + phase)
    return rng.uniform(110, 146, (n, 1, 1)) + waves


def _class_names(n_classes: int) -> list[str]:
    return [f"{180 * i / n_classes:g} degrees" for i in range(n_classes)]

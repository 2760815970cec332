"""Measures of the complexity of images that need no model, and images at either extreme."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from revit_fast.adaptive.policies import grey_entropy

EDGE = 16.0
"""Smallest difference of neighbouring grey levels that counts as an edge."""


def entropy(images: Sequence[np.ndarray]) -> np.ndarray:
    """Entropy `[N]` in bits of the grey values of each image, see `policies.grey_entropy`."""
    found = [np.repeat(grey(image).astype(np.uint8).reshape(1, -1, 1), 3, axis=2) for image in images]
    return np.array([grey_entropy(rows)[0] for rows in found])


def edge_density(images: Sequence[np.ndarray]) -> np.ndarray:
    """Share `[N]` of each image's pixels whose gradient (central differences) is at least `EDGE` grey levels."""
    found = []
    for image in images:
        down, right = np.gradient(grey(image).astype(np.float64))
        found.append(float((np.hypot(down, right) >= EDGE).mean()))
    return np.array(found)


def grey(image: np.ndarray) -> np.ndarray:
    """Grey levels `[H, W]` of an image `[H, W]` or `[H, W, 3]`."""
    return image if image.ndim == 2 else image.mean(axis=2).round()


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1): equal values share their mean rank."""
    return (rankdata(values) - 1) / len(values)


def parts_of(values: np.ndarray, n: int) -> np.ndarray:
    """Part 0 to n - 1 of each value; parts are of similar size, and equal values are in the same part."""
    return np.minimum((ranks(values) * n).astype(np.int64), n - 1)


def complexity(images: Sequence[np.ndarray]) -> np.ndarray:
    """Mean rank `[N]` of entropy and edge density among these images, 0 the simplest."""
    return (ranks(entropy(images)) + ranks(edge_density(images))) / 2


def extreme_images(n: int, side: int, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """n uint8 images of each kind: "flat" and "gradient" are simple, "noise" and "texture" complex."""
    rng = np.random.default_rng(seed)
    position = np.arange(side) / side
    made: dict[str, list[np.ndarray]] = {"flat": [], "gradient": [], "texture": [], "noise": []}
    for _ in range(n):
        made["flat"].append(np.full((side, side), rng.integers(0, 256), dtype=np.uint8))
        angle, low, high = rng.uniform(0, 2 * np.pi), rng.uniform(0, 100), rng.uniform(155, 255)
        along = np.cos(angle) * position + np.sin(angle) * position[:, None]
        along = (along - along.min()) / np.ptp(along)
        made["gradient"].append((low + (high - low) * along).astype(np.uint8))
        cycles = rng.uniform(0.3, 0.5, (4, 2)) * side * rng.choice([-1, 1], (4, 2))
        waves = [np.sin(2 * np.pi * (x * position + y * position[:, None]) + rng.uniform(0, 6)) for x, y in cycles]
        made["texture"].append((127.5 + 127.5 * np.sign(sum(waves))).clip(0, 255).astype(np.uint8))
        made["noise"].append(rng.integers(0, 256, (side, side), dtype=np.uint8))
    return made

"""Photographs, generated and real, as pixels and as files."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

SIZE = (375, 500)
"""Height and width of most photographs."""


def photo(seed: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """Smooth shapes under noise, `[H, W, 3]` uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / a + y / b) for a, b in rng.uniform(5, 80, (3, 2))]
    noise = rng.normal(0, 12, (height, width, 3)).astype(np.float32)
    return (127 + 80 * np.stack(waves, axis=-1) + noise).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, **options) -> bytes:
    """An image as a JPEG file; `options` are those of Pillow's encoder."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@lru_cache(maxsize=1)
def _samples() -> list[Image.Image]:
    from skimage.data import coffee
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in (*load_sample_images().images, coffee())]


def real_photo(seed: int, width: int = SIZE[1], height: int = SIZE[0]) -> Image.Image:
    """A part of a sample photograph of scikit-learn or scikit-image, resized."""
    sample = _samples()[seed % len(_samples())]
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.7, 1.0) * min(sample.width / width, sample.height / height)
    left, upper = rng.uniform(0, 1, 2) * (sample.width - scale * width, sample.height - scale * height)
    box = (left, upper, left + scale * width, upper + scale * height)
    return sample.resize((width, height), Image.Resampling.BICUBIC, box=box)


def jpeg(seed: int) -> bytes:
    """A real photograph as a JPEG of quality 90."""
    return encoded(real_photo(seed), quality=90)

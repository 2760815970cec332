"""Generated photographs, as pixels and as files."""

from __future__ import annotations

import io

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


def jpeg(seed: int) -> bytes:
    """A photograph-sized JPEG of quality 90."""
    return encoded(Image.fromarray(photo(seed)), quality=90)

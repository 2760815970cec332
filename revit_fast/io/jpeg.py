"""JPEGs decoded by simplejpeg, a thin layer over libjpeg-turbo, where that gives exactly Pillow's pixels.

It is faster than Pillow: `pip install "revit-fast[jpeg]"`, which every extra that decodes includes. Without it, Pillow
decodes all files.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # arrays need no Pillow
    from PIL import Image

FORMATS = ("JPEG", "MPO")
"""Pillow's names of files that begin with a JPEG; in an MPO more pictures follow."""

MODES = ("RGB", "L")
"""Pillow's modes of JPEGs whose pixels are the same in both decoders. They convert CMYK differently."""

METADATA_BYTES = 1 << 20
"""A file may be longer than its pixels by this much. A longer one is not read into memory."""

SAMPLINGS = ("444", "422", "420", "440", "411", "GRAY")
"""What simplejpeg calls the ways to sample chroma that it writes."""


def same_pixels(image: Image.Image, file: io.BufferedIOBase) -> np.ndarray | None:
    """The pixels that Pillow would decode, as the file stores them (not turned), if simplejpeg can give exactly these.

    Both libraries decode with libjpeg-turbo at its defaults. simplejpeg refuses files over which libjpeg-turbo warns,
    which Pillow reads or refuses by rules of its own.

    Args:
        image: the file as Pillow opened it; its header has been read, its pixels have not.
        file: the file itself; its position may change.

    Returns:
        uint8 array `[H, W, 3]`, or None where Pillow must decode: simplejpeg is not installed or is not a match for
        this Pillow, the file is not grey or in RGB, is damaged, or is longer than its pixels.
    """
    decode = matching_decoder() if image.format in FORMATS and image.mode in MODES else None
    if decode is None:
        return None
    width, height = image.size
    if file.seek(0, io.SEEK_END) > 3 * width * height + METADATA_BYTES:
        return None
    file.seek(0)
    try:
        pixels = decode(file.read(), strict=True)
    except (ValueError, RuntimeError):  # Pillow decides whether such a file is an error, and says which
        return None
    return pixels if pixels.shape == (height, width, 3) else None


@lru_cache(maxsize=1)
def matching_decoder() -> Callable[..., np.ndarray] | None:
    """simplejpeg's decoder if it gives the pixels of the Pillow that is installed; else None.

    Each may come with another build of libjpeg. So both first decode noise in every sampling, and a progressive file
    that lacks its last scan, which libjpeg smooths: any difference in transforms, upsampling or rounding shows.
    """
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        right = all(np.array_equal(_by_pillow(file), simplejpeg.decode_jpeg(file, strict=True)) for file in _probes())
    except Exception:  # another version of either, with other arguments or files that it cannot read
        return None
    return simplejpeg.decode_jpeg if right else None


def _probes() -> list[bytes]:
    import simplejpeg
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (35, 27, 3), dtype=np.uint8)
    files = []
    for sampling in SAMPLINGS:
        space = "GRAY" if sampling == "GRAY" else "RGB"
        channels = np.ascontiguousarray(noise[..., : 1 if space == "GRAY" else 3])
        files.append(simplejpeg.encode_jpeg(channels, 75, space, sampling))
    progressive = io.BytesIO()
    Image.fromarray(noise).save(progressive, "JPEG", quality=75, progressive=True)
    start_of_scan, end_of_image = b"\xff\xda", b"\xff\xd9"
    scans = progressive.getvalue()
    return [*files, scans[: scans.rindex(start_of_scan)] + end_of_image]


def _by_pillow(file: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))

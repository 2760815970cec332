"""Keeps a source as it is when its producer hands it over, although it is decoded later or in another thread.

A generator may fill one array again and again, `PIL.ImageSequence` gives one object for every frame, and
`with Image.open(path) as image: yield image` closes the file behind the image.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from revit_fast.io.images import (
    ORIENTATION_TAG,
    ImageError,
    ImageSource,
    Source,
    as_image_error,
    is_file,
    is_pil_image,
    loading_lock,
    name_of,
    orientation_of,
    read_all,
)
from revit_fast.io.samples import encoded_bytes, in_eight_bits

if TYPE_CHECKING:  # as in `images`
    from PIL import Image

REOPENED = ("JPEG", "PNG")
"""Formats whose encoded bytes are copied if an image is not loaded yet: decoding them takes longest."""


class Held(NamedTuple):
    """A source and what is decoded in its place.

    Attributes:
        source: the source as it was given.
        kept: the source itself if nobody can change it, otherwise a copy.
        name: the source's name for messages.
    """

    source: ImageSource
    kept: ImageSource
    name: str


def held(source: ImageSource, *, copy: bool = True) -> Held:
    """Takes a source over from its producer, which may change it from now on.

    Arrays, tensors on the CPU, bytearrays, memoryviews and PIL images are copied, and open files are read to their end.
    Paths and bytes are not copied, and the files of paths are read later. A PIL image that is not loaded yet is loaded
    first. For the JPEGs and PNGs among them the file's bytes are copied instead, so that the pixels are decoded by
    whoever decodes `kept`. An image that cannot be loaded, and a file that cannot be read, is kept as a `Source` with
    the reason.

    Args:
        source: the source.
        copy: False for a source that does not change before it is decoded; nothing is copied then.
    """
    return Held(source, _kept(source) if copy else source, name_of(source))


def own_pixels(pixels: np.ndarray, source: ImageSource) -> np.ndarray:
    """The decoded pixels of a source; a copy if they share the memory of the source, an array or a tensor."""
    given = source.detach().numpy() if isinstance(source, Tensor) and source.device.type == "cpu" else source
    return pixels.copy() if isinstance(given, np.ndarray) and np.may_share_memory(pixels, given) else pixels


def _kept(source: ImageSource) -> ImageSource:
    if isinstance(source, np.ndarray):
        return source.copy()
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, Tensor):
        return source.detach().clone() if source.device.type == "cpu" else source
    take = _kept_image if is_pil_image(source) else read_all if is_file(source) else None
    if take is None:
        return source
    try:
        return take(source)
    except ImageError as error:
        return Source(name_of(source), str(error))


def _kept_image(image: Image.Image) -> Image.Image:
    with loading_lock(image):
        again = _opened_again(image)
        if again is not None:
            return again
        with as_image_error():
            return _copied(image)


def _copied(image: Image.Image) -> Image.Image:
    """A copy of an image in eight bits, with its orientation: TIFFs and changed metadata have it outside of `info`."""
    from PIL import Image

    loaded = in_eight_bits(image)  # this needs tags that a copy loses
    copy, orientation = loaded.copy(), orientation_of(image)
    if orientation_of(copy) != orientation:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        copy = loaded.copy()  # without the metadata that the comparison has read
        copy.info["exif"] = exif.tobytes()
    return copy


def _opened_again(image: Image.Image) -> Image.Image | None:
    """An image of its own over a copy of the encoded bytes; None if it would not load the same pixels.

    That is so for images that are loaded, have several frames, or were changed after they were opened (draft mode,
    metadata).
    """
    from PIL import Image

    if image.format not in REOPENED or not getattr(image, "tile", None) or getattr(image, "is_animated", False):
        return None
    try:
        again = Image.open(io.BytesIO(encoded_bytes(image)), formats=(image.format,))
    except Exception:  # a closed or damaged file: loading the image gives the reason
        return None

    def state(image: Image.Image) -> tuple:
        # Without this entry, reading a PNG's metadata would load its pixels; nobody has changed them yet.
        orientation = orientation_of(image) if image.format == "JPEG" or "exif" in image.info else None
        return image.size, image.mode, image.tile, image.info, orientation

    return again if state(again) == state(image) else None

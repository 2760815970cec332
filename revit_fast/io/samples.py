"""PIL images of any mode in eight bits a sample. Pillow clips deeper grey, and of deeper colour it drops the low byte.

Sixteen bits become eight by the rule of the PNG specification, `round(v * 255 / 65535)`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # as in `images`
    from PIL import Image

BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
"""TIFF's tags for how samples are stored."""

EIGHT_OF_SIXTEEN = ((np.arange(1 << 16, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)

GREY_STEPS = {"L;2": 85, "L;4": 17}
"""By how much grey levels are apart that Pillow unpacks from fewer bits than eight."""

OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""The last letter of a raw mode that reads the low byte where the given one reads the high byte."""


def in_eight_bits(image: Image.Image) -> Image.Image:
    """Loads an image, and gives it in a mode whose samples have eight bits.

    An image that has such a mode is returned itself. Grey of sixteen bits (the modes "I;16...") becomes "L", or "LA" if
    a level stands for transparent. So does that of twelve bits in a TIFF; there, zero may also stand for white. Colour
    of sixteen bits in a PNG or TIFF that is not loaded yet is decoded again for its low bytes. Where Pillow hides them
    (a TIFF compressed plane by plane, JPEG 2000, SGI), high bytes alone are up to one level off.

    Args:
        image: the image, at the frame to be read. A file that it reads from stays open where Pillow leaves it open.

    Raises:
        ValueError: for the modes "I" (except from a PGM, which has sixteen bits) and "F", and for signed samples.
    """
    deep = _deep_colour(image)
    step = GREY_STEPS.get(_raw_mode(image)) if image.format == "PNG" else None
    image.load()
    if _tag(image, SAMPLE_FORMAT, (1,))[0] == 2:
        raise ValueError(_without_white("signed integers"))
    if deep is not None:
        return deep
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _shallow_grey(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(_without_white(f'{kind} (mode "{image.mode}")'))
    if image.mode == "La":  # Pillow converts it to nothing else
        return image.convert("LA")
    key = image.info.get("transparency")
    if step is not None and isinstance(key, int):
        image = image.copy()
        image.info["transparency"] = step * key  # Pillow leaves it as the file has it, and scales the pixels
    return image


def encoded_bytes(image: Image.Image) -> bytes:
    """The bytes of the file that an image was opened from; the file's position stays.

    Raises:
        Exception: of any type, if the file is closed, or was none.
    """
    position = image.fp.tell()
    image.fp.seek(0)
    try:
        return image.fp.read()
    finally:
        image.fp.seek(position)


def _without_white(kind: str) -> str:
    return (
        f"its pixels are {kind}, which do not say what value white has; scale them to 0...255 and give them as uint8, "
        "for example (array / white * 255).round().astype(numpy.uint8)"
    )


def _tag(image: Image.Image, tag: int, default: Any) -> Any:
    """A tag of a TIFF; the default for an image that is none."""
    return image.tag_v2.get(tag, default) if image.format == "TIFF" and hasattr(image, "tag_v2") else default


def _shallow_grey(image: Image.Image) -> Image.Image:
    from PIL import Image

    grey, key = np.asarray(image), image.info.get("transparency")
    white = 4095 if _tag(image, BITS_PER_SAMPLE, (16,))[0] == 12 else 65535
    values = grey if white == 65535 else (np.minimum(grey, white).astype(np.uint32) * 65535 + white // 2) // white
    values = values if _tag(image, PHOTOMETRIC, 1) != 0 else 65535 - values
    levels = EIGHT_OF_SIXTEEN[values]
    if not isinstance(key, int):
        return Image.fromarray(levels)
    return Image.fromarray(np.stack([levels, _opaque(grey != key)], axis=2))


def _opaque(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def _raw_mode(image: Image.Image) -> str:
    """The layout of the samples in an image that is not loaded yet, in Pillow's words; "" if it is loaded."""
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _deep_colour(image: Image.Image) -> Image.Image | None:
    """An image in eight bits of the sixteen-bit colour, or grey and alpha, that a file has; None if it has none."""
    from PIL import Image

    readers = _readers(image)
    if readers is None:
        return None
    mode, layouts = readers
    encoded, frame = encoded_bytes(image), image.tell()

    def decoded(layout: Callable[[str], str]) -> np.ndarray:
        with Image.open(io.BytesIO(encoded), formats=(image.format,)) as again:
            if frame:
                again.seek(frame)
            again.tile = [tile._replace(args=_with_raw_mode(tile.args, layout)) for tile in again.tile]
            again.load()
            return np.asarray(again)

    parts = [decoded(layout) for layout in layouts]
    if mode == "LA":  # four bytes a pixel, of which each was read as a channel
        high, low = parts[0][..., 0::2], parts[0][..., 1::2]
    else:
        high, low = parts
    samples = (high.astype(np.uint16) << 8) | low
    levels, key = EIGHT_OF_SIXTEEN[samples], image.info.get("transparency")
    if mode == "RGB" and isinstance(key, tuple):
        mode, levels = "RGBA", np.dstack([levels, _opaque((samples != key).any(axis=2))])
    return Image.frombytes(mode, levels.shape[1::-1], levels.tobytes())


def _with_raw_mode(arguments: Any, layout: Callable[[str], str]) -> Any:
    return (layout(arguments[0]), *arguments[1:]) if isinstance(arguments, tuple) else layout(arguments)


def _readers(image: Image.Image) -> tuple[str, list[Callable[[str], str]]] | None:
    """The mode of an image of sixteen-bit colour that is not loaded yet, and how to read high and low bytes of it.

    Pillow keeps the first byte of a sample that is said to have its high byte first, and the second of one that is said
    to have it last. So it gives the low bytes if it is told the wrong order.
    """
    raw = _raw_mode(image)
    if image.format == "PNG":
        if image.tell():  # Pillow draws later frames of an animation over one another
            return None
        if raw == "LA;16B":
            return "LA", [lambda raw: "RGBA"]
    elif image.format != "TIFF":
        return None
    elif _tag(image, PLANAR, 1) == 2:
        if _tag(image, BITS_PER_SAMPLE, (8,))[0] != 16 or len(raw) != 1 or image.tile[0].codec_name != "raw":
            return None
        # Pillow takes the planes for planes of bytes.
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        return image.mode, [lambda raw: f"{raw};16{order}", lambda raw: f"{raw};16{OTHER_BYTE[order]}"]
    if raw[:-1] not in ("RGB;16", "RGBA;16", "RGBa;16", "RGBX;16", "CMYK;16"):
        return None
    mode = "RGBa" if raw.startswith("RGBa") else image.mode
    return mode, [lambda raw: raw.replace("a", "A"), lambda raw: raw[:-1].replace("a", "A") + OTHER_BYTE[raw[-1]]]

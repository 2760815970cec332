"""Opens encoded images by their contents, of the formats that may be read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # as in `images`
    from PIL import Image

SERVED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""Formats that a server reads by default: those that browsers show. Nobody's decoders read more files of strangers."""

PROGRAMS = ("EPS", "WMF")
"""Formats that are drawn by a program outside of Pillow (Ghostscript, Windows), so they are read only by request."""

COMMON = ("JPEG", "PNG", "WEBP")
"""Formats to try first: Pillow reads these without importing every decoder that it has."""

HEIF, HEIF_BRANDS = "HEIF", (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""HEIC, the format of phones, which Pillow reads with pillow-heif, and how such files begin after eight bytes."""

TILE_WIDTH, TILE_LENGTH = 322, 323


def check_formats(formats: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of formats in capitals; None stands for all but `PROGRAMS`.

    Raises:
        TypeError, ValueError: if it is no list of names, is empty, or a name is unknown to the installed Pillow.
    """
    if formats is None:
        return None
    if isinstance(formats, str) or not all(isinstance(name, str) for name in formats):
        raise TypeError(f'formats: expected names such as ("JPEG", "PNG"), got {formats!r}')
    names = tuple(name.upper() for name in formats)
    known = {*SERVED, HEIF}
    if not known.issuperset(names):
        known |= set(_all_formats())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"formats: expected some of {', '.join(sorted(known))}, got {', '.join(unknown) or 'none'}")
    return names


def open_image(file: io.BufferedIOBase, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens an encoded image: reads its header, and decodes nothing (except of an ICO, whose pictures are files again).

    Args:
        file: the file, which can seek.
        formats: names of the formats that may be read, as `check_formats` gives them.

    Raises:
        ValueError: if the file is in none of the formats, or in a kind of one that Pillow does not read.
        Exception: of any type, for damaged files, and those with over twice `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    start = file.read(16)
    for names in _in_turn(formats, start):
        try:
            image = Image.open(file, formats=names)
        except UnidentifiedImageError:
            continue
        _check_size(largest_part(image))
        if image.format == "TIFF":
            _check_whole(image)
        return image
    raise ValueError(_why_not(start, formats))


def largest_part(image: Image.Image) -> tuple[int, int]:
    """(width, height), in pixels, of the largest picture to decode for an opened image: it, or a tile of a TIFF."""
    tags = getattr(image, "tag_v2", None) or {}
    tile = tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)
    return max(image.size, tile, key=lambda size: size[0] * size[1])


def _check_size(size: tuple[int, int]) -> None:
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > 2 * limit:
        raise ValueError(f"has a part of {size[0]}x{size[1]} pixels, over {2 * limit}: a decompression bomb")


def _check_whole(image: Image.Image) -> None:
    """Raises a ValueError for a TIFF whose strips or tiles end before it does: Pillow leaves the rest black."""
    right, bottom = (max(tile[1][side] for tile in image.tile) for side in (2, 3))
    if sorted((right, bottom)) != sorted(image.size):  # its sides are exchanged where it will be turned
        width, height = image.size
        raise ValueError(f"has pixels for {right}x{bottom} of {width}x{height}: truncated, or damaged")


def _all_formats() -> list[str]:
    from PIL import Image

    Image.init()
    return list(Image.OPEN)


def _in_turn(formats: tuple[str, ...] | None, start: bytes) -> Iterator[tuple[str, ...]]:
    """Names to hand to Pillow, one group after the other. The order does not depend on which formats may be read."""

    def allowed(name: str) -> bool:
        return name not in PROGRAMS if formats is None else name in formats

    yield tuple(filter(allowed, COMMON))
    if _is_heif(start) and allowed(HEIF):
        reads_heif()
    others = [name for name in _all_formats() if name not in COMMON and allowed(name)]
    yield tuple(sorted(others, key=lambda name: name not in SERVED))


def _is_heif(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def reads_heif() -> bool:
    """Whether Pillow reads HEIC images, for which it needs pillow-heif; from then on it does."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _why_not(start: bytes, formats: tuple[str, ...] | None) -> str:
    """The reason why Pillow opened none of the formats that may be read."""
    import PIL
    from PIL import Image

    legal = f"; expected one of {', '.join(formats)}" if formats is not None else ""
    if _is_heif(start) and (formats is None or HEIF in formats) and not reads_heif():
        return 'a HEIC image; reading it needs pillow-heif: pip install "revit-fast[heif]"'
    for name, (_, accept) in Image.OPEN.items():
        known = accept(start.ljust(16, b"\0")) if accept is not None else False
        if isinstance(known, str):
            return f"{known[0].lower()}{known[1:]}{legal}"
        if known and formats is not None and name not in formats:
            return f"of the format {name}, which may not be read here{legal}"
        if known and formats is None and name in PROGRAMS:
            return (
                f"of the format {name}, which a program outside of Pillow draws: convert it, to PNG for example, or "
                f'allow it where the files are your own: formats=("{name}", ...)'
            )
        if known:
            return f"of the format {name}, but damaged, or of a kind that Pillow {PIL.__version__} does not read"
    return f"not an image{legal}" if formats is not None else f"not an image that Pillow {PIL.__version__} reads"

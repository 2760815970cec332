"""Image files: finding them, and decoding them to upright uint8 RGB arrays.

Needs Pillow: `pip install "revit-fast[cli]"`.
"""

from __future__ import annotations

import glob
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""Names that are taken for images inside a folder, in any case."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that may run, whatever a file is called: never Pillow's others, some of which start programs (EPS)."""

ORIENTATION_TAG = 0x0112


class ImageError(Exception):
    """A file that cannot be read as an image; the text is the reason, without the path."""


class Source(NamedTuple):
    """A file to read, or why there is none at this path."""

    path: str
    error: str | None = None


class Decoded(NamedTuple):
    """What became of a source: an array `[H, W, 3]` or an error, and the milliseconds that it took."""

    path: str
    image: np.ndarray | None
    error: str | None
    ms: float


def find_images(paths: Iterable[str]) -> Iterator[Source]:
    """The image files that the given paths name, found while they are consumed.

    Args:
        paths: a file is taken whatever its suffix. A folder stands for the files below it that end in one of
            `SUFFIXES`, sorted by name, without those whose name starts with a dot and without following links to other
            folders. A glob pattern (`**` descends) stands for its sorted matches, as if the shell had expanded it.

    Yields:
        One `Source` per file in the order of the paths. A path that leads to no image gives one with an error, and so
        does a folder called like an image (unless it is given with a trailing slash), which is not entered.
    """
    for path in map(os.fspath, paths):
        if not os.path.lexists(path) and glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            # A pattern that descends by itself matches folders beside the files in them.
            matches = [m for m in matches if "**" not in path or _is_image_name(m) or not os.path.isdir(m)]
            if not matches:
                yield Source(path, "no file matches this pattern")
            for match in matches:
                yield from _find_in_path(match)
        else:
            yield from _find_in_path(path)


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _find_in_path(path: str) -> Iterator[Source]:
    if not os.path.isdir(path):
        yield Source(path)
    elif _is_image_name(path):
        yield _folder_like_image(path)
    else:
        found = False
        for source in _find_in_folder(path):
            found = True
            yield source
        if not found:
            yield Source(path, f"no images in this folder (looked for {', '.join(SUFFIXES)})")


def _find_in_folder(folder: str) -> Iterator[Source]:
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield Source(folder, _os_reason(error))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from [_folder_like_image(entry.path)] if _is_image_name(entry.name) else _find_in_folder(entry.path)
        elif _is_image_name(entry.name):
            yield Source(entry.path)


def _folder_like_image(path: str) -> Source:
    return Source(path, f"is a folder, not an image; to read the images in it, give {path}{os.sep}")


def read_rgb(path: str | os.PathLike) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file to an upright RGB array.

    The EXIF orientation is applied. Transparent pixels are composited on white. Sixteen-bit grey is scaled to eight
    bits by the rule of the PNG specification, `round(v * 255 / 65535)`. Grey, palette and CMYK become RGB. Of an
    animation the first frame is taken.

    Args:
        path: the file; its contents decide the format, not its suffix.

    Returns:
        uint8 array `[H, W, 3]`.

    Raises:
        ImageError: with the reason: missing, empty, not an image, truncated, or larger than
            `2 * PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("is a folder, not an image")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size == 0:
            raise ImageError("empty file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            return _upright_rgb(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not a JPEG, PNG or WebP image") from None
    except OSError as error:
        raise ImageError(_os_reason(error)) from error
    except Exception as error:  # decoders raise whatever a damaged file leads them to: struct.error, SyntaxError, ...
        raise ImageError(str(error) or type(error).__name__) from error


def _os_reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _upright_rgb(image: Image.Image) -> np.ndarray:
    """RGB pixels of a loaded image, its orientation applied."""
    turn = _upright_transposition(image)
    if image.mode.startswith("I"):
        # convert("RGB") would clip sixteen-bit values at 255.
        grey = np.asarray(image if turn is None else image.transpose(turn))
        key = image.info.get("transparency")
        grey = np.where(grey == key, 65535, grey) if isinstance(key, int) else grey
        scaled = (np.clip(grey, 0, 65535).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
    image = image.convert("RGB")
    return np.array(image if turn is None else image.transpose(turn))


def _upright_transposition(image: Image.Image) -> Image.Transpose | None:
    """What turns the stored pixels upright by the EXIF orientation, None where they are."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make the pixels unreadable
        return None
    return {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)


def read_ahead(sources: Iterable[Source], n_workers: int) -> Iterator[Decoded]:
    """Decodes sources on `n_workers` threads, in order, never more than `2 * n_workers` ahead of the consumer.

    Args:
        sources: from `find_images`; consumed as results are.
        n_workers: decoding threads (Pillow's decoders release the GIL).

    Yields:
        One `Decoded` per source, in the order of the sources; a file that cannot be read gives its error.
    """
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="revit-fast-decode")
    ahead: deque[Future[Decoded]] = deque()
    try:
        for source in sources:
            ahead.append(pool.submit(_decode, source))
            if len(ahead) == 2 * n_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(source: Source) -> Decoded:
    if source.error is not None:
        return Decoded(source.path, None, source.error, 0.0)
    begin = time.perf_counter()
    image, reason = None, None
    try:
        image = read_rgb(source.path)
    except ImageError as error:
        reason = str(error)
    return Decoded(source.path, image, reason, 1e3 * (time.perf_counter() - begin))

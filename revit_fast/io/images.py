"""Images: finds files, and decodes every kind of image source to an upright uint8 RGB array.

Encoded images need Pillow: `pip install "revit-fast[cli]"`. With simplejpeg, which comes with it, most JPEGs decode
faster, to the same pixels (see `jpeg`).
"""

from __future__ import annotations

import glob
import io
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from revit_fast.io import jpeg

if TYPE_CHECKING:  # arrays need no Pillow, so it is imported only when it is needed
    from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""Suffixes of file names that count as images inside a folder, in upper or lower case."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats whose decoders may run, whatever a file's name. Pillow's others never run: some start programs (EPS)."""

ORIENTATION_TAG = 0x0112

_LOADING = tuple(threading.Lock() for _ in range(64))
"""Locks for PIL images, which share them: Pillow loads pixels and metadata when they are first used, and two threads
that load one image spoil it."""


class Kind(NamedTuple):
    """A kind of file to find in folders.

    Attributes:
        one: the singular with its article, for messages.
        many: the plural, for messages.
        suffixes: suffixes, in lower case, of file names that count as this kind inside a folder.
    """

    one: str
    many: str
    suffixes: tuple[str, ...]

    def has_name(self, path: str) -> bool:
        """Whether the name of a file or folder has one of the suffixes."""
        return path.lower().endswith(self.suffixes)


IMAGES = Kind("an image", "images", SUFFIXES)


class ImageError(Exception):
    """A source that cannot be read as an image; the text is the reason, without the source's name."""


class Source(NamedTuple):
    """A file to read, or the reason why there is none at this path."""

    path: str
    error: str | None = None


ImageSource = "str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor | Source"
"""A source of an image: a path, the bytes of a file, a PIL image, or uint8 pixels `[H, W, 3]` or `[H, W]`."""


def find_images(paths: Iterable[str], kind: Kind = IMAGES) -> Iterator[Source]:
    """Finds the image files that the given paths name, one by one as the result is consumed.

    Args:
        paths: a file is accepted with any suffix. A folder stands for the files below it that end in one of the kind's
            suffixes, sorted by name. Names that start with a dot are left out, and links to other folders are not
            followed. A glob pattern (`**` descends) stands for its sorted matches, as if the shell had expanded it.
        kind: kind of the files: images or others.

    Yields:
        One `Source` per file in the order of the paths. A path without any image gives a `Source` with an error. So
        does a folder with the suffix of an image, unless it is given with a trailing slash; it is not entered.
    """
    for path in map(os.fspath, paths):
        if not os.path.lexists(path) and glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            # A pattern with `**` matches folders as well as the files in them.
            matches = [m for m in matches if "**" not in path or kind.has_name(m) or not os.path.isdir(m)]
            if not matches:
                yield Source(path, "no file matches this pattern")
            for match in matches:
                yield from _find_in_path(match, kind)
        else:
            yield from _find_in_path(path, kind)


def _find_in_path(path: str, kind: Kind) -> Iterator[Source]:
    if not os.path.isdir(path):
        yield Source(path)
    elif kind.has_name(path):
        yield _folder_like(path, kind)
    else:
        found = False
        for source in _find_in_folder(path, kind):
            found = True
            yield source
        if not found:
            yield Source(path, f"no {kind.many} in this folder (looked for {', '.join(kind.suffixes)})")


def _find_in_folder(folder: str, kind: Kind) -> Iterator[Source]:
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield Source(folder, os_reason(error))
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            like = kind.has_name(entry.name)
            yield from [_folder_like(entry.path, kind)] if like else _find_in_folder(entry.path, kind)
        elif kind.has_name(entry.name):
            yield Source(entry.path)


def _folder_like(path: str, kind: Kind) -> Source:
    return Source(path, f"is a folder, not {kind.one}; to read the {kind.many} in it, give {path}{os.sep}")


def name_of(source: ImageSource) -> str:
    """The name of a source in messages."""
    if isinstance(source, Source):
        return source.path
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        try:
            return f"<{len(source)} bytes>"
        except ValueError:  # its owner has released it
            return "<memoryview>"
    if isinstance(source, (np.ndarray, Tensor)):
        return f"<array {'x'.join(map(str, source.shape))}>"
    return f"<{type(source).__name__}>"


def check_sources(sources: object) -> None:
    """Raises a TypeError for a single image. Some could be iterated by mistake: a path by letters, an array by rows."""
    single = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Tensor, Source)
    if isinstance(sources, single) or is_pil_image(sources):
        got = type(sources).__name__
        raise TypeError(f"sources: expected an iterable of images, got one {got}; wrap it: [image]")


def on_one_line(text: str) -> str:
    """Escapes control characters and undecodable bytes: a file name must not break a line or control the terminal."""
    return text if text.isprintable() else repr(text)[1:-1]


def read_rgb(source: ImageSource, *, draft_px: int | None = None) -> np.ndarray:
    """Reads the upright RGB pixels of an image.

    Encoded images are JPEG, PNG or WebP; their contents decide the format, not their name. The EXIF orientation is
    applied. Transparent pixels are composited on white. Sixteen-bit grey is scaled to eight bits by the rule of the PNG
    specification, `round(v * 255 / 65535)`. Grey, palette and CMYK become RGB. An animation gives its first frame. An
    array is returned unchanged.

    Args:
        source: a path, the bytes of a file, a PIL image, or a uint8 array or CPU tensor `[H, W, 3]`, `[H, W, 1]` or
            `[H, W]`.
        draft_px: allows decoding a JPEG at a half, a quarter or an eighth of its size (a scaled DCT), as long as its
            shorter side keeps at least this many pixels. The result is approximate: the pixels of a box filter.

    Returns:
        uint8 array `[H, W, 3]` (an array as the source may be grey).

    Raises:
        ImageError: with the reason: missing, empty, not an image, truncated, larger than
            `2 * PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb), or an array of another type or shape.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    with as_image_error():
        if isinstance(source, Source):
            if source.error is not None:
                raise ImageError(source.error)
            source = source.path
        if isinstance(source, (str, os.PathLike)):
            return _read_file(source, draft_px)
        if isinstance(source, (bytes, bytearray, memoryview)):
            return _decode(_opened(source), draft_px)
        if is_pil_image(source):
            if 0 in source.size:
                raise ImageError("expected at least one pixel, got {}x{}".format(*source.size))
            with loading_lock(source):
                source.load()
                turn = _upright_transposition(source)
            return _rgb(source, turn)
        if isinstance(source, Tensor) and source.device.type == "cpu":
            return _checked_array(source.numpy())
    raise ImageError(f"expected a path, bytes, a PIL image or a uint8 array, got {type(source).__name__}")


def encoded_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header of an encoded image; nothing is decoded.

    Raises:
        ImageError: if the header cannot be read; reasons as for `read_rgb`.
    """
    with as_image_error(), _open(_opened(data)) as image:
        return image.size


@contextmanager
def as_image_error() -> Iterator[None]:
    """Turns the exceptions of decoders into `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except ModuleNotFoundError as error:
        raise ImageError('decoding needs Pillow: pip install "revit-fast[cli]"') from error
    except OSError as error:
        if type(error).__name__ == "UnidentifiedImageError":
            raise ImageError("not a JPEG, PNG or WebP image") from None
        raise ImageError(os_reason(error)) from error
    except Exception as error:  # damaged files make decoders raise many types: struct.error, SyntaxError, ...
        raise ImageError(str(error) or type(error).__name__) from error


def is_pil_image(source: object) -> bool:
    """Whether a source is a PIL image; imports no Pillow."""
    image_class = getattr(sys.modules.get("PIL.Image"), "Image", None)  # another thread may be importing it just now
    return image_class is not None and isinstance(source, image_class)


def loading_lock(image: Image.Image) -> threading.Lock:
    """The lock to take while an image's pixels or metadata may be loaded."""
    return _LOADING[id(image) // 64 % len(_LOADING)]  # objects lie 16 bytes or more apart


def _opened(data: bytes) -> io.BytesIO:
    if len(data) == 0:
        raise ImageError("empty file")
    return io.BytesIO(data)


def check_file(path: str | os.PathLike, kind: Kind = IMAGES) -> None:
    """Raises an `ImageError` if the path is not a regular file with contents, an OSError if it does not exist."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"is a folder, not {kind.one}")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")
    if status.st_size == 0:
        raise ImageError("empty file")


def _read_file(path: str | os.PathLike, draft_px: int | None) -> np.ndarray:
    check_file(path)
    with open(path, "rb") as file:
        return _decode(file, draft_px)


def _open(file: io.BufferedIOBase) -> Image.Image:
    from PIL import Image

    return Image.open(file, formats=FORMATS)


def _decode(file: io.BufferedIOBase, draft_px: int | None) -> np.ndarray:
    with _open(file) as image:
        if image.format in jpeg.FORMATS:
            full_size = image.size
            if draft_px is not None:
                image.draft("RGB", _draft_size(image.size, draft_px))
            if image.size == full_size and _upright_transposition(image) is None:
                pixels = jpeg.same_pixels(image, file)
                if pixels is not None:
                    return pixels
        image.load()
        return _rgb(image, _upright_transposition(image))


def _draft_size(size: tuple[int, int], draft_px: int) -> tuple[int, int]:
    """The size to request from the decoder, which uses its smallest scale that is not below this size."""
    scale = draft_px / min(size)
    return tuple(max(1, int(np.ceil(side * scale))) for side in size)


def _checked_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ImageError(f"expected uint8 pixels, got {array.dtype}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise ImageError(f"expected shape [H, W, 3], [H, W, 1] or [H, W], got {list(array.shape)}")
    return array


def os_reason(error: OSError) -> str:
    """The message of an OSError in lower case, without the path."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _rgb(image: Image.Image, turn: Image.Transpose | None) -> np.ndarray:
    """RGB pixels of a loaded image, turned upright."""
    from PIL import Image

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
    if image.mode != "RGB":  # else convert would copy
        image = image.convert("RGB")
    return _copied_out(image if turn is None else image.transpose(turn))


class _PixelFile:
    """A file in memory of known size: the array that Pillow writes an image's pixels into."""

    def __init__(self, n_bytes: int) -> None:
        self.pixels, self._end = np.empty(n_bytes, np.uint8), 0

    def write(self, data: bytes) -> None:
        begin, self._end = self._end, self._end + len(data)
        self.pixels[begin : self._end] = np.frombuffer(data, np.uint8)


def _copied_out(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image in a new array `[H, W, 3]`.

    Pillow stores four bytes a pixel, so this copy is needed. `numpy.array(image)` would make three.
    """
    from PIL import ImageFile

    width, height = image.size
    file = _PixelFile(3 * width * height)
    ImageFile._save(image, file, [("raw", (0, 0, width, height), 0, "RGB")])
    return file.pixels.reshape(height, width, 3)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation; 1, which is upright, if there is none or it cannot be read."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make the pixels unreadable
        return 1


def _upright_transposition(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the stored pixels upright; None if they are upright."""
    from PIL import Image

    return {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation_of(image))

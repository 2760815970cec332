"""Images: decodes every kind of image source to an upright uint8 RGB array. `finding` finds the files.

Which formats are read, see `formats`; what becomes of samples that have not eight bits, see `samples`.

Encoded images need Pillow: `pip install "revit-fast[cli]"`. With simplejpeg, which comes with it, most JPEGs decode
faster, to the same pixels (see `jpeg`).
"""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from torch import Tensor

from revit_fast.io import jpeg
from revit_fast.io.finding import IMAGES, Kind, Source, find_images, os_reason
from revit_fast.io.formats import check_formats, largest_part, open_image
from revit_fast.io.samples import in_eight_bits

if TYPE_CHECKING:  # arrays need no Pillow, so it is imported only when it is needed
    from PIL import Image

ORIENTATION_TAG = 0x0112

_LOADING = tuple(threading.Lock() for _ in range(64))
"""Locks for PIL images and open files, which share them. Pillow loads pixels and metadata when they are first used, and
two threads that load one image spoil it; two that read one file get a part each."""


class ImageError(Exception):
    """A source that cannot be read as an image; the text is the reason, without the source's name."""


ImageSource = "str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | Tensor | Source"
"""A source of an image: a path, the bytes of a file, an open file, a PIL image, or uint8 pixels.

An open file is any object with a method `read` that gives bytes: it is read from where it stands to its end, and is set
back to where it stood if it can seek."""


def as_sources(sources: object, kind: Kind = IMAGES, name: str = "sources") -> Iterable[ImageSource]:
    """The sources of the argument `name`: a text or path stands for what `find_images` finds there.

    Raises:
        TypeError: for a single image of another form.
    """
    if isinstance(sources, (str, os.PathLike)):
        return (source if source.error else source.path for source in find_images([sources], kind))
    check_sources(sources, name)
    return sources


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
    if is_file(source) and isinstance(getattr(source, "name", None), str):
        return source.name
    if isinstance(source, (np.ndarray, Tensor)):
        return f"<array {'x'.join(map(str, source.shape))}>"
    return f"<{type(source).__name__}>"


def check_sources(sources: object, name: str = "sources") -> None:
    """Raises a TypeError for a single image, given as the argument `name`.

    Some could be iterated by mistake: a path by letters, an array by rows, a file by lines.
    """
    single = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Tensor, Source)
    if isinstance(sources, single) or is_pil_image(sources) or is_file(sources):
        got = type(sources).__name__
        raise TypeError(f"{name}: expected an iterable of images, got one {got}; wrap it: [image]")


def read_rgb(source: ImageSource, *, draft_px: int | None = None, formats: Sequence[str] | None = None) -> np.ndarray:
    """Reads the upright RGB pixels of an image.

    An encoded image may have any format that Pillow reads; its contents decide the format, not its name. The EXIF
    orientation is applied. Transparent pixels are composited on white. Sixteen-bit samples, of grey or of colour, are
    scaled to eight bits by the rule of the PNG specification, `round(v * 255 / 65535)`. Grey, palette, CMYK, YCbCr,
    HSV and LAB become RGB; colour profiles are not applied. An animation gives its first frame, a TIFF its first page.
    A PIL image gives the frame at which it is. An array is returned unchanged.

    Args:
        source: a path, the bytes of a file, an open file, a PIL image, or a uint8 array or CPU tensor `[H, W, 3]`,
            `[H, W, 1]` or `[H, W]`.
        draft_px: allows decoding a JPEG at a half, a quarter or an eighth of its size (a scaled DCT), as long as its
            shorter side keeps at least this many pixels. The result is approximate: the pixels of a box filter.
        formats: Pillow's names of the formats whose decoders may run on encoded images; by default all but those that
            start other programs, see `formats.PROGRAMS`.

    Returns:
        uint8 array `[H, W, 3]` (an array as the source may be grey).

    Raises:
        ImageError: with the reason: missing, empty, not an image, of a format that may not be read, truncated, larger
            than `2 * PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb), 32-bit integers or floating-point numbers,
            which do not say what value white has, a file in text mode, or an array of another type or shape.
        TypeError, ValueError: for names of formats that Pillow does not know.
    """
    formats = check_formats(formats)
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    with as_image_error():
        if isinstance(source, Source):
            if source.error is not None:
                raise ImageError(source.error)
            source = source.path
        if is_file(source):
            source = read_all(source)
        if isinstance(source, (str, os.PathLike)):
            return _read_file(source, draft_px, formats)
        if isinstance(source, (bytes, bytearray, memoryview)):
            return _decode(_opened(source), draft_px, formats)
        if is_pil_image(source):
            if 0 in source.size:
                raise ImageError("expected at least one pixel, got {}x{}".format(*source.size))
            with loading_lock(source):
                image, turn = in_eight_bits(source), _upright_transposition(source)
            return _rgb(image, turn)
        if isinstance(source, Tensor) and source.device.type == "cpu":
            return _checked_array(source.numpy())
    raise ImageError(f"expected a path, bytes, an open file, a PIL image or a uint8 array, got {type(source).__name__}")


def encoded_size(data: bytes, formats: Sequence[str] | None = None) -> tuple[int, int]:
    """(width, height) in pixels from the header of an encoded image, or of a TIFF's tile if that is larger.

    Nothing is decoded, except of an ICO, whose pictures are files of their own; Pillow bounds their pixels.

    Args:
        data: the bytes of a file.
        formats: see `read_rgb`.

    Raises:
        ImageError: if the header cannot be read; reasons as for `read_rgb`.
    """
    formats = check_formats(formats)
    with as_image_error(), open_image(_opened(data), formats) as image:
        return largest_part(image)


def is_file(source: object) -> bool:
    """Whether a source is an open file, or behaves like one. Some know their path as well; some paths can read."""
    is_path = isinstance(source, os.PathLike) and not hasattr(source, "seek")
    return callable(getattr(source, "read", None)) and not is_path


def read_all(file: BinaryIO) -> bytes:
    """The bytes of an open file from where it stands. A file that can seek is set back there, so it can be read again.

    Raises:
        ImageError: for a file in text mode, one that stands at its end, and with the reason why it cannot be read.
    """
    with as_image_error(), loading_lock(file):
        if hasattr(file, "readable") and not file.readable():
            raise ImageError('the file is not open for reading; open it with open(path, "rb")')
        can_seek = hasattr(file, "seekable") and file.seekable()
        position = file.tell() if can_seek else None
        try:
            data = file.read()
        except UnicodeDecodeError:
            data = ""
        if can_seek:
            file.seek(position)
    if isinstance(data, str):
        raise ImageError('the file is open in text mode; open it in binary mode: open(path, "rb")')
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(f"the file's read() gave {type(data).__name__}, expected bytes")
    if len(data) == 0:
        raise ImageError("nothing is left to read where the file stands; if it was written or read before: seek(0)")
    return bytes(data)


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
        raise ImageError(os_reason(error)) from error
    except Exception as error:  # damaged files make decoders raise many types: struct.error, SyntaxError, ...
        raise ImageError(str(error) or type(error).__name__) from error


def is_pil_image(source: object) -> bool:
    """Whether a source is a PIL image; imports no Pillow."""
    image_class = getattr(sys.modules.get("PIL.Image"), "Image", None)  # another thread may be importing it just now
    return image_class is not None and isinstance(source, image_class)


def loading_lock(source: Image.Image | BinaryIO) -> threading.Lock:
    """The lock to take while an image's pixels or metadata may be loaded, or a file may be read."""
    return _LOADING[id(source) // 64 % len(_LOADING)]  # objects lie 16 bytes or more apart


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


def _read_file(path: str | os.PathLike, draft_px: int | None, formats: tuple[str, ...] | None) -> np.ndarray:
    check_file(path)
    with open(path, "rb") as file:
        return _decode(file, draft_px, formats)


def _decode(file: io.BufferedIOBase, draft_px: int | None, formats: tuple[str, ...] | None) -> np.ndarray:
    with open_image(file, formats) as image:
        if image.format in jpeg.FORMATS:
            full_size = image.size
            if draft_px is not None:
                image.draft("RGB", _draft_size(image.size, draft_px))
            if image.size == full_size and _upright_transposition(image) is None:
                pixels = jpeg.same_pixels(image, file)
                if pixels is not None:
                    return pixels
        loaded = in_eight_bits(image)
        return _rgb(loaded, _upright_transposition(image))


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


def _rgb(image: Image.Image, turn: Image.Transpose | None) -> np.ndarray:
    """RGB pixels of a loaded image of eight bits a sample, turned upright."""
    from PIL import Image

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

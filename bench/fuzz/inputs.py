"""Real image files of every kind that Pillow writes here, and ways to damage bytes."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, features

from bench.photos import photo

ORIENTATION_TAG = 0x0112
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LENGTHS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Values that fields of lengths and sizes do not expect."""
MAGICS = (b"\xff\xd8\xff\xe0", PNG_SIGNATURE, b"RIFF\x40\x00\x00\x00WEBPVP8 ", b"GIF89a", b"BM", b"II*\x00", b"MM\x00*")


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    """An image as a file of a format."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def real_files() -> dict[str, bytes]:
    """Small files by name: formats, modes, compressions and metadata as they are met outside."""
    rgb = Image.fromarray(photo(0, 44, 60))
    frames = [Image.fromarray(photo(seed, 24, 32)) for seed in (1, 2)]
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    turned = Image.Exif()
    turned[ORIENTATION_TAG] = 6
    sixteen = Image.fromarray((np.arange(44 * 60).reshape(44, 60) * 24).astype(np.uint16))
    files = {
        "jpeg": saved(rgb, "JPEG", quality=90),
        "jpeg-444": saved(rgb, "JPEG", subsampling=0),
        "jpeg-progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg-grey": saved(rgb.convert("L"), "JPEG"),
        "jpeg-cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg-exif": saved(rgb, "JPEG", exif=turned.tobytes(), comment=b"a comment"),
        "jpeg-restart": saved(rgb, "JPEG", restart_marker_blocks=2),
        "png-16": saved(sixteen, "PNG"),
        "png-key": saved(rgb.convert("P"), "PNG", transparency=3),
        "png-exif": saved(rgb, "PNG", exif=turned.tobytes(), icc_profile=bytes(200)),
        "png-animated": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif": saved(rgb.convert("P"), "GIF"),
        "gif-animated": saved(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0),
        "bmp": saved(rgb, "BMP"),
        "bmp-palette": saved(rgb.convert("P"), "BMP"),
        "tiff": saved(rgb, "TIFF"),
        "tiff-deflate": saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-lzw": saved(rgb.convert("L"), "TIFF", compression="tiff_lzw"),
        "tiff-exif": saved(rgb, "TIFF", exif=turned),
    }
    files |= {f"png-{mode}": saved(rgb.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB")}
    files |= {f"png-{mode}": saved(clear.convert(mode), "PNG") for mode in ("LA", "RGBA")}
    if features.check("webp"):
        files["webp"] = saved(rgb, "WEBP")
        files["webp-lossless"] = saved(clear, "WEBP", lossless=True)
        files["webp-animated"] = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    if features.check("avif"):
        files["avif"] = saved(rgb, "AVIF", speed=10)
    return files


def _span(rng: random.Random, n: int, longest: int = 64) -> tuple[int, int]:
    """Begin and end of a range of `n` bytes."""
    begin = rng.randrange(n)
    return begin, min(n, begin + rng.randint(1, longest))


def flip_bits(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def splice(rng: random.Random, data: bytearray, other: bytes) -> bytes:
    return bytes(data[: rng.randrange(len(data))] + other[rng.randrange(max(1, len(other))) :])


def set_length(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    size, order = rng.choice((1, 2, 4)), rng.choice(("big", "little"))
    begin = rng.randrange(min(len(data), 512) if rng.random() < 0.7 else len(data))
    data[begin : begin + size] = (rng.choice(LENGTHS) & (256**size - 1)).to_bytes(size, order)
    return bytes(data)


def duplicate(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    begin, end = _span(rng, len(data), 1024)
    place = rng.randrange(len(data))
    data[place:place] = data[begin:end] * rng.choice((1, 1, 8))
    return bytes(data)


def delete(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    begin, end = _span(rng, len(data))
    del data[begin:end]
    return bytes(data)


def overwrite(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    begin, end = _span(rng, len(data))
    data[begin:end] = rng.randbytes(end - begin)
    return bytes(data)


def noise(rng: random.Random, data: bytearray, _: bytes) -> bytes:
    return rng.choice((b"", *MAGICS)) + rng.randbytes(rng.choice((0, 1, 7, 100, 4000)))


MUTATIONS = (flip_bits, truncate, splice, set_length, duplicate, delete, overwrite, noise)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made anew, so that damage reaches the decoder; others unchanged."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    out, place = bytearray(data), len(PNG_SIGNATURE)
    while place + 12 <= len(out):
        end = place + 8 + struct.unpack_from(">I", out, place)[0]
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bytes after one to three random mutations; parts of `other` may be spliced in."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            data = rng.choice(MUTATIONS)(rng, bytearray(data), other)
    return with_right_checksums(data) if rng.random() < 0.7 else data


def damaged_files(seed: int) -> Iterator[tuple[str, bytes]]:
    """Endless names and contents of damaged files; one seed gives the same files again."""
    files, rng = real_files(), random.Random(seed)
    names = list(files)
    while True:
        name = rng.choice(names)
        yield name, damaged(rng, files[name], files[rng.choice(names)])

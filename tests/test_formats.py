"""Images of every format, mode and depth that Pillow opens, and open files as sources."""

import asyncio
import gzip
import io
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, features
from small_models import make_model

import revit_fast as rf
from revit_fast.cli import build_parser
from revit_fast.explain import explain
from revit_fast.io import finding, formats
from revit_fast.io.held import held
from revit_fast.io.images import (
    ORIENTATION_TAG,
    ImageError,
    Source,
    check_sources,
    encoded_size,
    find_images,
    name_of,
    read_rgb,
)
from revit_fast.video import ClipPreprocessor

RNG = np.random.default_rng(0)
BLOCKS = np.kron(RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
DEEP = RNG.integers(0, 65536, (3, 5, 4), dtype=np.uint16)
DEEP[0, 0], DEEP[0, 1] = 255, (0, 128, 129, 65535)


def as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def rule(values):
    """The PNG specification's, in exact arithmetic."""
    return ((2 * 255 * np.asarray(values, np.int64) + 65535) // (2 * 65535)).astype(np.uint8)


def on_white(rgba):
    image = Image.fromarray(np.ascontiguousarray(rgba))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def encoded(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png(samples, colour_type, bits=16, transparent=None, width=None):
    """A PNG written by hand, for Pillow writes neither deep colour nor few bits with a transparent level."""
    rows = samples.astype(">u2").reshape(len(samples), -1) if bits == 16 else samples
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width or samples.shape[1], len(samples), bits, colour_type, 0, 0, 0))]
    if transparent is not None:
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(samples, photometric, order="<", planar=1, extra=(), sample_format=1, bits=None, data=None, **tags):
    """An uncompressed TIFF written by hand."""
    height, width, n = samples.shape
    bits, samples = bits or 8 * samples.itemsize, samples.astype(samples.dtype.newbyteorder(order))
    planes = [np.moveaxis(samples, 2, 0)[i].tobytes() for i in range(n)] if planar == 2 else [samples.tobytes()]
    planes = [data] if data is not None else planes
    begins = np.cumsum([8, *map(len, planes)]).tolist()
    entries = {256: [width], 257: [height], 258: [bits] * n, 259: [1], 262: [photometric], 277: [n], 284: [planar]}
    entries |= {278: [height], 273: begins[:-1], 279: [len(p) for p in planes], 339: [sample_format] * n}
    entries |= {338: list(extra)} if extra else {}
    entries |= {int(tag[1:]): [value] for tag, value in tags.items()}
    begins[-1] += begins[-1] % 2
    ifd, outside = b"", b""
    after = begins[-1] + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, outside = struct.pack(f"{order}I", after + len(outside)), outside + packed
        ifd += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, begins[-1])
    body = (head + b"".join(planes)).ljust(begins[-1], b"\0")
    return body + struct.pack(f"{order}H", len(entries)) + ifd + bytes(4) + outside


needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")

LOSSLESS = ("BMP", "DIB", "GIF", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")


class TestFormats:
    @pytest.mark.parametrize("kind", LOSSLESS)
    def test_contents_decide(self, kind, tmp_path):
        data = encoded(BLOCKS, kind, **({"lossless": True} if kind == "WEBP" else {}))
        (tmp_path / "x.jpg").write_bytes(data)
        for source in (data, tmp_path / "x.jpg", io.BytesIO(data)):
            np.testing.assert_array_equal(read_rgb(source), BLOCKS)
        assert encoded_size(data) == (48, 32)

    @needs_avif
    def test_avif(self):
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        data = encoded(BLOCKS, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
        np.testing.assert_allclose(read_rgb(data).astype(int), np.rot90(BLOCKS, -1), atol=3)

    def test_icons(self):
        largest = np.ascontiguousarray(BLOCKS[:, :32])
        np.testing.assert_array_equal(read_rgb(encoded(largest, "ICO", sizes=[(16, 16), (32, 32)])), largest)

    def test_heic(self):
        heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
        file = io.BytesIO()
        heif.from_pillow(Image.fromarray(BLOCKS)).save(file, quality=-1, chroma=444)
        np.testing.assert_allclose(read_rgb(file.getvalue()).astype(int), BLOCKS, atol=4)
        with pytest.raises(ImageError, match="of the format HEIF, which may not be read here"):
            encoded_size(file.getvalue(), formats.SERVED)

    @pytest.mark.parametrize("brand", ["heic", "mif1"])
    def test_heic_without_pillow_heif(self, monkeypatch, brand):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(ImageError, match=r'reading it needs pillow-heif: pip install "revit-fast\[heif\]"'):
            read_rgb(b"\0\0\0\x18ftyp" + brand.encode() + bytes(40))

    @pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
    def test_the_first_frame_of_a_file_and_the_present_one_of_an_image(self, kind):
        frames = [Image.fromarray(np.roll(BLOCKS, 16 * i, axis=1)) for i in range(3)]
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(read_rgb(data), BLOCKS)
        image = Image.open(io.BytesIO(data))
        image.seek(1)
        for source in (held(image).kept, image):
            np.testing.assert_array_equal(read_rgb(source), np.asarray(frames[1]))

    def test_the_rest_of_a_gif_is_transparent(self):
        image = Image.fromarray(BLOCKS).quantize(6)
        expected = np.asarray(image.convert("RGB")).copy()
        expected[np.asarray(image) == 2] = 255
        np.testing.assert_array_equal(read_rgb(encoded(image, "GIF", transparency=2)), expected)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation(self, kind, orientation):
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        data = encoded(BLOCKS, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        turned = [None, 0, 1, 2, 3, 4, 5, 6, 7][orientation]
        flip, swap = BLOCKS.swapaxes(0, 1), turned >= 4
        expected = [BLOCKS, BLOCKS[:, ::-1], BLOCKS[::-1, ::-1], BLOCKS[::-1]][turned] if not swap else None
        if swap:
            expected = [flip, np.rot90(BLOCKS, -1), flip[::-1, ::-1], np.rot90(BLOCKS, 1)][turned - 4]
        for source in (data, held(Image.open(io.BytesIO(data))).kept):
            np.testing.assert_array_equal(read_rgb(source), expected)


class TestWhatMayBeRead:
    def test_no_program_is_started(self, monkeypatch, tmp_path):
        data = encoded(BLOCKS, "EPS")
        drawn = Image.fromarray(BLOCKS).im
        started = []
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args) or drawn)
        for refused in (None, ("PNG", "JPEG")):
            with pytest.raises(ImageError, match="of the format EPS, which"):
                read_rgb(data, formats=refused)
        with pytest.raises(ImageError, match=r'convert it, .* formats=\("EPS", ...\)'):
            read_rgb(data)
        assert not started
        np.testing.assert_array_equal(read_rgb(data, formats=("eps",)), BLOCKS)
        assert started

    def test_an_allow_list(self):
        bmp, page = encoded(BLOCKS, "BMP"), encoded(BLOCKS, "TIFF")
        assert encoded_size(bmp, formats.SERVED) == (48, 32)
        for read in (encoded_size, lambda data, names: read_rgb(data, formats=names)):
            with pytest.raises(
                ImageError, match="of the format TIFF, which may not be read here; expected one of JPEG"
            ):
                read(page, formats.SERVED)
            with pytest.raises(ImageError, match="of the format BMP, which may not be read here; expected one of TIFF"):
                read(bmp, ("TIFF",))
            with pytest.raises(ImageError, match="not an image; expected one of TIFF"):
                read(b"no image", ("TIFF",))

    def test_names_of_formats_are_checked(self):
        for wrong, reason in ((("PNG", "JPG"), "got JPG"), ((), "got none")):
            with pytest.raises(ValueError, match=f"formats: expected some of AVIF, .*{reason}"):
                read_rgb(b"", formats=wrong)
        with pytest.raises(TypeError, match="formats: expected names"):
            read_rgb(b"", formats="PNG")
        with pytest.raises(ValueError, match="formats: they are image formats"):
            ClipPreprocessor(None, formats=("PNG",), policy="cycle")

    def test_a_pipeline_has_its_own(self):
        sources = [encoded(BLOCKS, kind) for kind in ("PNG", "GIF")]
        pipe = rf.pipeline(make_model(), policy="cycle", formats=("gif",), n_decoders=1)
        results = list(pipe.with_policy("cycle")(sources))
        assert results[0].reason == "of the format PNG, which may not be read here; expected one of GIF"
        assert results[1].error is None

    def test_an_option_of_the_commands(self, capsys):
        parse = build_parser().parse_args
        for command in (["predict", "a.png"], ["serve"]):
            assert parse(command).formats is None
            assert parse([*command, "--formats", "jpeg,PNG"]).formats == ("JPEG", "PNG")
        with pytest.raises(SystemExit):
            parse(["predict", "a.png", "--formats", "jpg"])
        assert "--formats: expected some of AVIF, " in capsys.readouterr().err

    def test_damaged_and_unknown_kinds_are_named(self):
        page = tiff(np.zeros((4, 4, 1), np.float64), 1, sample_format=3)
        with pytest.raises(ImageError, match="of the format TIFF, but damaged, or of a kind that Pillow"):
            read_rgb(page)

    def test_a_tiff_whose_strips_end_early(self):
        with pytest.raises(ImageError, match="has pixels for 48x32 of 48x64: truncated, or damaged"):
            read_rgb(tiff(BLOCKS, 2, t257=64, t278=32))

    def test_files_in_folders(self, tmp_path, monkeypatch):
        monkeypatch.setattr(finding, "reads_heif", lambda: True)
        for name in ("a.gif", "b.TIFF", "c.avif", "d.bmp", "e.heic", "f.eps", "g.txt"):
            (tmp_path / name).write_bytes(b"x")
        assert [os.path.basename(s.path)[0] for s in find_images([str(tmp_path)])] == list("abcde")


class TestPixelLimits:
    """Pixels are counted before any is decoded."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)

    @pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
    def test_of_an_image(self, kind):
        data = encoded(Image.new("RGB", (101, 100)), kind)
        for read in (read_rgb, encoded_size):
            with pytest.raises(ImageError, match="decompression bomb"):
                read(data)

    def test_of_a_frame_that_is_larger_than_its_gif(self):
        data = bytearray(encoded(Image.new("L", (200, 200)), "GIF"))
        data[6:10] = struct.pack("<2H", 2, 2)
        for read in (read_rgb, encoded_size):
            with pytest.raises(ImageError, match="decompression bomb"):
                read(bytes(data))

    def test_of_a_tile_that_is_larger_than_its_tiff(self):
        data = tiff(np.zeros((4, 4, 3), np.uint8), 2, t322=4096, t323=4096, t324=8, t325=48)
        for read in (read_rgb, encoded_size):
            with pytest.raises(ImageError, match="has a part of 4096x4096 pixels, over 10000: a decompression bomb"):
                read(data)
        assert encoded_size(tiff(np.zeros((4, 4, 3), np.uint8), 2, t322=64, t323=64, t324=8, t325=48)) == (64, 64)

    @pytest.mark.parametrize("kind", ["ICO", "ICNS"])
    def test_of_a_picture_in_an_icon(self, kind):
        picture = encoded(Image.new("RGBA", (200, 200)), "PNG")
        if kind == "ICO":
            data = struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture
        else:
            data = struct.pack(">4sI4sI", b"icns", len(picture) + 16, b"icp4", len(picture) + 8) + picture
        with pytest.raises(ImageError, match="decompression bomb"):
            read_rgb(data)


class TestSixteenBits:
    @pytest.mark.parametrize(
        "wrap", [bytes, lambda d: Image.open(io.BytesIO(d)), lambda d: held(Image.open(io.BytesIO(d))).kept]
    )
    def test_colour_follows_the_rule_of_grey(self, wrap):
        deep = np.stack([np.arange(65536), np.arange(65536)[::-1], np.arange(65536) ^ 0x5555], axis=1)
        deep = deep.astype(np.uint16).reshape(64, 1024, 3)
        np.testing.assert_array_equal(read_rgb(wrap(png(deep, 2))), rule(deep))
        grey = deep[..., 0]
        np.testing.assert_array_equal(read_rgb(wrap(png(grey, 0))), as_rgb(rule(grey)))

    def test_alpha(self):
        np.testing.assert_array_equal(read_rgb(png(DEEP, 6)), on_white(rule(DEEP)))
        grey = DEEP[..., :2]
        np.testing.assert_array_equal(read_rgb(png(grey, 4)), on_white(rule(grey)[..., [0, 0, 0, 1]]))

    def test_a_transparent_colour_is_compared_in_all_its_bits(self):
        deep = DEEP[..., :3].copy()
        deep[1, 1] = deep[2, 2] + 1  # the same high bytes
        expected = rule(deep)
        expected[2, 2] = 255
        np.testing.assert_array_equal(read_rgb(png(deep, 2, transparent=deep[2, 2].tolist())), expected)

    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("planar", [1, 2], ids=["pixels", "planes"])
    def test_tiff(self, order, planar):
        data, turned = (tiff(DEEP[..., :3], 2, order, planar, t274=orientation) for orientation in (1, 6))
        for source in (data, Image.open(io.BytesIO(data))):
            np.testing.assert_array_equal(read_rgb(held(source).kept), rule(DEEP[..., :3]))
        for source in (turned, Image.open(io.BytesIO(turned))):
            np.testing.assert_array_equal(read_rgb(held(source).kept), np.rot90(rule(DEEP[..., :3]), -1))

    @pytest.mark.parametrize("order", "<>")
    def test_tiff_with_more_channels(self, order):
        np.testing.assert_array_equal(read_rgb(tiff(DEEP, 2, order, extra=[2])), on_white(rule(DEEP)))
        np.testing.assert_array_equal(read_rgb(tiff(DEEP, 2, order, extra=[0])), rule(DEEP[..., :3]))
        inks = Image.frombytes("CMYK", (5, 3), rule(DEEP).tobytes())
        np.testing.assert_array_equal(read_rgb(tiff(DEEP, 5, order)), np.asarray(inks.convert("RGB")))
        opacity = DEEP[..., 3:]
        premultiplied = np.concatenate([np.minimum(DEEP[..., :3], opacity), opacity], axis=2)
        expected = (premultiplied[..., :3] + (65535.0 - opacity)) / 257
        np.testing.assert_allclose(read_rgb(tiff(premultiplied, 2, order, extra=[1])), expected, atol=1.6)

    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
    def test_compressed_tiff(self, compression):
        """Pillow writes no deep colour; libtiff hands grey over in the same way."""
        grey = DEEP[..., 0]
        np.testing.assert_array_equal(read_rgb(encoded(grey, "TIFF", compression=compression)), as_rgb(rule(grey)))

    def test_white_may_be_zero(self):
        grey = DEEP[..., :1]
        np.testing.assert_array_equal(read_rgb(tiff(grey, 0)), as_rgb(255 - rule(grey)[..., 0]))

    def test_twelve_bits(self):
        values = np.array([[0, 1, 2048, 4095]])
        packed = b"".join(struct.pack(">I", a << 12 | b)[1:] for a, b in values.reshape(-1, 2).tolist())
        data = tiff(np.zeros((1, 4, 1), np.uint16), 1, bits=12, data=packed)
        for source in (data, held(Image.open(io.BytesIO(data))).kept):
            np.testing.assert_array_equal(read_rgb(source), as_rgb([[0, 0, 128, 255]]))

    @pytest.mark.parametrize(("bits", "level"), [(1, 1), (2, 2), (4, 9), (8, 9)])
    def test_a_transparent_level_of_few_bits(self, bits, level):
        levels = np.array([level, 0, level, 1][: 8 // bits] * bits)[: 8 // bits]
        byte = sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(levels))
        data = png(np.array([[byte]], np.uint8), 0, bits, [level], width=len(levels))
        expected = np.where(levels == level, 255, levels * (255 // (2**bits - 1)))
        np.testing.assert_array_equal(read_rgb(data), as_rgb(expected[None]))

    def test_numbers_without_a_white_are_refused(self):
        image = Image.fromarray(BLOCKS).convert("L")
        fix = "which do not say what value white has; scale them to 0...255 and give them as uint8"
        deep = encoded(Image.fromarray(DEEP[..., 0]), "PPM")
        for source, kind in (
            (image.convert("I"), r'32-bit integers \(mode "I"\)'),
            (image.convert("F"), r'floating-point numbers \(mode "F"\)'),
            (tiff(np.zeros((2, 2, 1), np.float32), 1, sample_format=3), "floating-point"),
            (tiff(np.zeros((2, 2, 1), np.int32), 1, sample_format=2), "signed"),
            (tiff(np.zeros((2, 2, 1), np.uint32), 1), "32-bit"),
            (tiff(np.zeros((2, 2, 1), np.int8), 1, sample_format=2), "signed integers"),
        ):
            with pytest.raises(ImageError, match=f"its pixels are {kind}.*, {fix}"):
                read_rgb(held(source).kept)
        for source in (deep, Image.open(io.BytesIO(deep)), held(Image.open(io.BytesIO(deep))).kept):
            np.testing.assert_array_equal(read_rgb(source), as_rgb(rule(DEEP[..., 0])))


class TestModes:
    RGBA = Image.fromarray(RNG.integers(0, 256, (6, 7, 4), dtype=np.uint8))
    RGB = RGBA.convert("RGB")

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
    @pytest.mark.parametrize("wrap", [lambda image: image, lambda image: held(image).kept])
    def test_opaque(self, mode, wrap):
        image = self.RGB.convert(mode)
        np.testing.assert_array_equal(read_rgb(wrap(image)), np.asarray(image.convert("RGB")))

    def test_colours_are_right(self):
        primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]], np.uint8)
        image = Image.fromarray(primaries)
        for mode in ("RGBX", "CMYK", "HSV", "YCbCr"):
            np.testing.assert_allclose(read_rgb(image.convert(mode)).astype(int), primaries, atol=2, err_msg=mode)
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        lab = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
        np.testing.assert_allclose(read_rgb(lab).astype(int), primaries, atol=24)  # 8 bits of LAB are coarse

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
    def test_alpha(self, mode):
        image = self.RGBA.convert("LA").convert("La") if mode == "La" else self.RGBA.convert(mode)
        straight = {"RGBa": self.RGBA, "La": self.RGBA.convert("LA")}.get(mode, image).convert("RGBA")
        atol = 2 if mode in ("RGBa", "La") else 0  # those are rounded by their alpha
        expected = on_white(np.asarray(straight)).astype(int)
        for source in (image, held(image).kept):
            np.testing.assert_allclose(read_rgb(source).astype(int), expected, atol=atol)

    def test_a_palette_with_an_alpha_for_each_colour(self):
        image = Image.fromarray(BLOCKS).quantize(6)
        alphas = bytes([0, 255, 128, 7, 200, 66])
        colours = np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)[:6]
        table = np.concatenate([colours, np.frombuffer(alphas, np.uint8)[:, None]], axis=1)
        data = encoded(image, "PNG", transparency=alphas)
        for source in (data, held(Image.open(io.BytesIO(data))).kept):
            np.testing.assert_array_equal(read_rgb(source), on_white(table[np.asarray(image)]))


PNG = encoded(BLOCKS, "PNG")


class NamedBytes(io.BytesIO):
    """An open file that knows its path, as those of fsspec do."""

    def __fspath__(self):
        return "no such path"


class Stream(io.RawIOBase):
    """A socket or a pipe: it gives a few bytes at a time, and cannot seek."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self._data.readinto(memoryview(buffer)[:1000])


@pytest.fixture
def pipe():
    return rf.pipeline(make_model(), policy="cycle", n_decoders=2)


class TestOpenFiles:
    @pytest.fixture
    def opened(self, tmp_path):
        path = tmp_path / "x.png"
        path.write_bytes(PNG)
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED))
            archive.writestr("in.png", PNG)
            spooled, offset = stack.enter_context(tempfile.SpooledTemporaryFile()), io.BytesIO(b"header" + PNG)
            spooled.write(PNG)
            spooled.seek(0)
            offset.seek(6)
            yield [
                stack.enter_context(open(path, "rb")),
                stack.enter_context(open(path, "rb", buffering=0)),
                io.BytesIO(PNG),
                offset,
                NamedBytes(PNG),
                spooled,
                stack.enter_context(archive.open("in.png")),
                gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(PNG))),
                Stream(PNG),
                SimpleNamespace(read=lambda: PNG),
            ]

    def test_each_kind(self, opened, pipe):
        for file in opened:
            np.testing.assert_array_equal(read_rgb(file), BLOCKS)
        for produce in (iter, list):
            results = list(pipe.with_policy(("fixed", 4))(produce(opened[:8])))
            assert [r.error for r in results] == [None] * 8
            assert all(r.source is file for r, file in zip(results, opened, strict=False))

    def test_a_file_stays_where_it_stood(self):
        file = io.BytesIO(b"ab" + PNG)
        file.seek(2)
        for _ in range(2):
            np.testing.assert_array_equal(read_rgb(file), BLOCKS)
            assert file.tell() == 2

    def test_one_file_several_times_in_a_list(self, pipe):
        file = io.BytesIO(PNG)
        assert [r.error for r in pipe([file] * 40)] == [None] * 40

    def test_a_file_that_is_written_again(self, pipe):
        pictures = [np.roll(BLOCKS, 16 * i, axis=1) for i in range(3)]
        pipe = pipe.with_policy(("fixed", pipe.prep.grids[0]))
        expected = [r.logits.tolist() for r in pipe(pictures)]

        def produce():
            file = io.BytesIO()
            for picture in pictures:
                file.seek(0)
                file.truncate()
                file.write(encoded(picture, "PNG"))
                file.seek(0)
                yield file
            file.close()

        async def stream():
            return [r async for r in pipe.stream(produce())]

        def in_session():
            with pipe.session() as session:
                return [future.result(60) for future in [session.submit(source) for source in produce()]]

        for results in (list(pipe(produce())), asyncio.run(stream()), in_session()):
            assert [r.logits.tolist() for r in results] == expected
        assert len(pipe.classify(produce())) == 3

    def test_a_stream_is_explained_from_one_reading(self, pipe):
        (found,) = explain(pipe, [Stream(PNG)])
        assert found.error is None

    def test_one_file_is_no_list_of_them(self, pipe, tmp_path):
        for file in (io.BytesIO(PNG), Stream(PNG)):
            with pytest.raises(TypeError, match=rf"got one {type(file).__name__}; wrap it: \[image\]"):
                check_sources(file)
            with pytest.raises(TypeError, match="images: expected an iterable of images, got one"):
                pipe.prep(file)

    def test_what_cannot_be_read(self, pipe, tmp_path):
        (tmp_path / "x.png").write_bytes(PNG)
        closed, written = io.BytesIO(PNG), io.BytesIO()
        closed.close()
        written.write(PNG)
        text = "the file is open in text mode; open it in binary mode"
        with open(tmp_path / "x.png") as as_text, open(tmp_path / "y", "wb") as write_only:
            cases = [
                (as_text, text),
                (io.StringIO("text"), text),
                (closed, "closed"),
                (written, r"nothing is left to read where the file stands; .*: seek\(0\)"),
                (write_only, "not open for reading"),
                (SimpleNamespace(read=lambda: None), r"read\(\) gave NoneType, expected bytes"),
            ]
            for file, reason in cases:
                with pytest.raises(ImageError, match=reason):
                    read_rgb(file)
                kept = held(file).kept
                assert isinstance(kept, Source)
                assert kept.path == name_of(file)
            results = list(pipe(iter([file for file, _ in cases])))
            assert all(r.error == f"{name_of(r.source)}: {r.reason}" for r in results)

    def test_names(self, tmp_path):
        (tmp_path / "x.png").write_bytes(PNG)
        with open(tmp_path / "x.png", "rb") as file, tempfile.TemporaryFile() as unnamed:
            assert name_of(file) == str(tmp_path / "x.png")
            assert name_of(unnamed) == f"<{type(unnamed).__name__}>"
        assert name_of(io.BytesIO()) == "<BytesIO>"

import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from revit_fast.io import finding, images
from revit_fast.io.finding import PassedOver
from revit_fast.io.images import ImageError, Source, find_images, name_of, read_rgb

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 21, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def save(array, path, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


def png(width, height, pixels, bits=8, colour_type=2):
    """A PNG written by hand: what Pillow cannot save, or what claims to be larger than its pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)))
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


UPRIGHT = {
    1: lambda s: s,
    2: lambda s: s[:, ::-1],
    3: lambda s: s[::-1, ::-1],
    4: lambda s: s[::-1],
    5: lambda s: s.swapaxes(0, 1),
    6: lambda s: np.rot90(s, -1),
    7: lambda s: s[::-1, ::-1].swapaxes(0, 1),
    8: lambda s: np.rot90(s, 1),
}
"""What the EXIF standard asks for, from where row 0 and column 0 of the stored image belong."""


class TestReadRgb:
    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_orientation_is_applied_exactly(self, tmp_path, suffix, orientation):
        exif = Image.Exif()
        exif[images.ORIENTATION_TAG] = orientation
        path = save(RGB, tmp_path / f"x.{suffix}", exif=exif, lossless=True)
        np.testing.assert_array_equal(read_rgb(path), UPRIGHT[orientation](RGB))

    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    def test_orientation_of_jpeg(self, tmp_path, orientation):
        exif = Image.Exif()
        exif[images.ORIENTATION_TAG] = orientation
        path = save(RGB, tmp_path / "x.jpg", exif=exif)
        with Image.open(path) as stored:
            np.testing.assert_array_equal(read_rgb(path), UPRIGHT[orientation](np.asarray(stored)))

    def test_orientation_of_sixteen_bit_grey(self, tmp_path):
        exif = Image.Exif()
        exif[images.ORIENTATION_TAG] = 6
        path = save(GREY.astype(np.uint16) * 257, tmp_path / "x.png", exif=exif)
        np.testing.assert_array_equal(read_rgb(path), as_rgb(np.rot90(GREY, -1)))

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    @pytest.mark.parametrize("exif", [b"Exif\0\0MM\0\x2a\xff\xff\xff\xff", b"Exif\0\0II", b"Exif\0\0" + b"\xff" * 40])
    def test_damaged_exif_does_not_hide_the_pixels(self, tmp_path, exif):
        path = save(RGB, tmp_path / "x.jpg", exif=exif)
        with Image.open(path) as stored:
            np.testing.assert_array_equal(read_rgb(path), np.asarray(stored))

    def test_rgb_and_grey_pass_unchanged(self, tmp_path):
        np.testing.assert_array_equal(read_rgb(save(RGB, tmp_path / "rgb.png")), RGB)
        np.testing.assert_array_equal(read_rgb(save(GREY, tmp_path / "grey.png")), as_rgb(GREY))
        bits = GREY > 127
        np.testing.assert_array_equal(read_rgb(save(bits, tmp_path / "bits.png")), as_rgb(bits * np.uint8(255)))

    def test_result_is_a_contiguous_writable_copy(self, tmp_path):
        array = read_rgb(save(RGB, tmp_path / "x.png"))
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous
        assert array.flags.writeable

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_alpha_is_composited_on_white(self, tmp_path, mode, suffix):
        colour = RGB if mode == "RGBA" else as_rgb(GREY)
        alpha = RNG.integers(0, 256, GREY.shape, dtype=np.uint8)
        alpha[:3], alpha[3:6] = 0, 255
        channels = [colour, alpha[..., None]] if mode == "RGBA" else [GREY[..., None], alpha[..., None]]
        path = save(np.concatenate(channels, axis=2), tmp_path / f"x.{suffix}", lossless=True, exact=True)
        opacity = alpha[..., None] / 255.0
        np.testing.assert_allclose(read_rgb(path), colour * opacity + 255 * (1 - opacity), atol=1)
        assert (read_rgb(path)[:3] == 255).all(), "hidden colours must not show"
        np.testing.assert_array_equal(read_rgb(path)[3:6], colour[3:6])

    def test_palette(self, tmp_path):
        palette = Image.fromarray(RGB).quantize(16)
        palette.save(tmp_path / "x.png")
        expected = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
        np.testing.assert_array_equal(read_rgb(tmp_path / "x.png"), expected)

    def test_palette_with_transparency(self, tmp_path):
        palette = Image.fromarray(RGB).quantize(16)
        palette.save(tmp_path / "x.png", transparency=3)
        expected = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
        expected[np.asarray(palette) == 3] = 255
        np.testing.assert_array_equal(read_rgb(tmp_path / "x.png"), expected)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_transparent_grey_becomes_white(self, tmp_path, bits):
        grey = np.array([[10, 20, 30]], np.uint8)
        stored = grey if bits == 8 else grey.astype(np.uint16) * 257
        save(stored, tmp_path / "x.png", transparency=int(stored[0, 1]))
        np.testing.assert_array_equal(read_rgb(tmp_path / "x.png"), as_rgb([[10, 255, 30]]))

    def test_transparent_colour_becomes_white(self, tmp_path):
        stored = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
        save(stored, tmp_path / "x.png", transparency=(4, 5, 6))
        np.testing.assert_array_equal(read_rgb(tmp_path / "x.png"), [[[1, 2, 3], [255, 255, 255]]])

    def test_sixteen_bit_grey_is_scaled_not_clipped(self, tmp_path):
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        expected = np.floor(values * (255 / 65535) + 0.5).astype(np.uint8)
        np.testing.assert_array_equal(read_rgb(save(values, tmp_path / "x.png")), as_rgb(expected))

    @pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
    def test_sixteen_bit_colour_and_alpha(self, tmp_path, colour_type, channels):
        values = RNG.integers(0, 65536, (1, 40, channels), dtype=np.uint16)
        path = tmp_path / "x.png"
        path.write_bytes(png(40, 1, b"\0" + values.astype(">u2").tobytes(), bits=16, colour_type=colour_type))
        opacity = values[..., 3 if channels == 4 else 1, None] / 65535 if channels != 3 else 1.0
        colour = values[..., :1] if channels == 2 else values[..., :3]
        expected = np.broadcast_to(colour / 257 * opacity + 255 * (1 - opacity), (1, 40, 3))
        # Pillow keeps the high byte of each sample: up to 1 off, of colour and of alpha.
        np.testing.assert_allclose(read_rgb(path), expected, atol=2.5)

    def test_cmyk_jpeg(self, tmp_path):
        cmyk = np.zeros((16, 64, 4), np.uint8)
        cmyk[:, 16:32, 3] = cmyk[:, 32:48, 0] = cmyk[:, 48:, 2] = 255  # white, black, cyan, yellow
        Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "x.jpg", quality=100)
        got = read_rgb(tmp_path / "x.jpg")[8, 8::16].astype(int)
        np.testing.assert_allclose(got, [[255] * 3, [0] * 3, [0, 255, 255], [255, 255, 0]], atol=3)

    @pytest.mark.parametrize("suffix", ["png", "webp"])
    def test_first_frame_of_an_animation(self, tmp_path, suffix):
        frames = [Image.fromarray(np.roll(RGB, shift, axis=1)) for shift in range(3)]
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(read_rgb(tmp_path / f"x.{suffix}"), RGB)

    def test_contents_decide_not_the_suffix(self, tmp_path):
        path = save(RGB, tmp_path / "x.png").rename(tmp_path / "x.dat")
        np.testing.assert_array_equal(read_rgb(path), RGB)

    def test_large_but_no_bomb(self, tmp_path, monkeypatch):
        path = save(RGB, tmp_path / "x.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RGB.shape[0] * RGB.shape[1] - 1)
        with pytest.warns(Image.DecompressionBombWarning):
            np.testing.assert_array_equal(read_rgb(path), RGB)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "empty file"),
            (b"not an image", "not an image that Pillow"),
            (
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                "format EPS, which a program outside of Pillow draws",
            ),
            (png(65000, 65000, bytes(99)), "decompression bomb"),
            (png(20, 20, bytes(99)), "truncated"),
        ],
        ids=["empty", "text", "postscript", "bomb", "header only"],
    )
    def test_unreadable_contents(self, tmp_path, content, reason):
        path = tmp_path / "x.jpg"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=f"(?i){reason}"):
            read_rgb(path)

    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_truncated(self, tmp_path, suffix, share):
        noise = RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)
        path = save(noise, tmp_path / f"x.{suffix}")
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageError) as caught:
            read_rgb(path)
        assert str(caught.value)

    def test_missing_folder_and_fifo(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.jpg")
        for path, reason in [("absent", "no such file"), ("", "is a folder"), ("pipe.jpg", "not a regular file")]:
            with pytest.raises(ImageError, match=reason):
                read_rgb(tmp_path / path)


class TestFindImages:
    @pytest.fixture
    def tree(self, tmp_path):
        for name in (
            "b.png",
            "a/z.JPG",
            "a/y.jpeg",
            "a/deep/x.webp",
            "a-.jpg",
            "notes.txt",
            ".hidden.jpg",
            "a/._z.jpg",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        (tmp_path / "empty").mkdir()
        return tmp_path

    def found(self, *paths):
        return list(find_images(map(str, paths)))

    def test_folder_is_searched_below_and_sorted(self, tree):
        names = ["a/deep/x.webp", "a/y.jpeg", "a/z.JPG", "a-.jpg", "b.png"]
        assert self.found(tree) == [Source(str(tree / name)) for name in names]
        assert self.found(tree) == [Source(str(p)) for p in sorted(tree / name for name in names)]

    def test_explicit_files_keep_their_order_whatever_they_are(self, tree):
        paths = [tree / "notes.txt", tree / "b.png", tree / "absent.jpg", tree / "b.png"]
        assert self.found(*paths) == [Source(str(p)) for p in paths]

    def test_glob(self, tree):
        assert self.found(tree / "*.[jp][pn]g") == [Source(str(tree / "a-.jpg")), Source(str(tree / "b.png"))]
        assert self.found(tree / "a" / "**" / "*.webp") == [Source(str(tree / "a/deep/x.webp"))]

    def test_glob_finds_no_file_twice(self, tree):
        paths = [source.path for source in self.found(tree / "a" / "**")]
        assert sorted(paths) == [str(tree / name) for name in ("a/deep/x.webp", "a/y.jpeg", "a/z.JPG")]

    def test_glob_that_matches_a_folder_searches_it(self, tree):
        assert Source(str(tree / "a/deep/x.webp")) in self.found(tree / "a*")

    def test_name_with_brackets_is_no_pattern(self, tree):
        path = tree / "photo[1].jpg"
        path.write_bytes(b"x")
        assert self.found(path) == [Source(str(path))]

    def test_nothing_found_is_an_error_that_names_the_path(self, tree):
        (no_match,) = self.found(tree / "*.gif")
        assert no_match == (str(tree / "*.gif"), "no file matches this pattern")
        (no_image,) = self.found(tree / "empty")
        assert no_image.path == str(tree / "empty")
        assert "no images in this folder" in no_image.error

    def test_folder_called_like_an_image(self, tree):
        folder = tree / "album.jpg"
        folder.mkdir()
        (folder / "inside.png").write_bytes(b"x")
        assert [s.path for s in self.found(tree) if s.error] == [str(folder)]
        for path in (folder, tree / "*.jpg"):
            (error,) = [s for s in self.found(path) if s.error]
            assert error.path == str(folder)
            assert "is a folder" in error.error
        assert self.found(f"{folder}/") == [Source(str(folder / "inside.png"))]

    def test_links(self, tree):
        (tree / "loop").symlink_to(tree, target_is_directory=True)
        (tree / "broken.jpg").symlink_to(tree / "absent")
        paths = [source.path for source in self.found(tree)]
        assert len(paths) == 6
        assert str(tree / "broken.jpg") in paths

    def test_lists_name_files_and_folders(self, tree, monkeypatch):
        named = [str(tree / "b.png"), str(tree / "a"), str(tree / "absent.jpg")]
        expected = self.found(*named)
        (tree / "list.txt").write_bytes("\r\n".join([*named, "", ""]).encode())
        assert self.found(f"@{tree}/list.txt") == expected
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(named).encode())))
        assert self.found("-") == expected
        assert self.found("-") == [Source("-", "it names no file; give one path a line")]
        (absent,) = self.found("@absent.txt")
        assert absent.error == "this list cannot be read: no such file or directory"
        monkeypatch.chdir(tree)
        for name in ("-", "@2x.png"):
            save(RGB, tree / "x.png").rename(tree / name)
            assert self.found(name) == [Source(name)], "a file of this name is meant first"

    @pytest.mark.parametrize("has_heif", [False, True])
    def test_other_files_are_counted_by_type(self, tree, monkeypatch, has_heif):
        monkeypatch.setattr(finding, "reads_heif", lambda: has_heif)
        for name in ("1.HEIC", "2.heic", "a/3.txt", "README", ".DS_Store"):
            (tree / name).write_bytes(b"x")
        passed = PassedOver()
        found = list(find_images([str(tree)], passed=passed))
        assert sum(source.path.lower().endswith(".heic") for source in found) == 2 * has_heif
        assert passed == {".txt": 2, "": 1} | ({} if has_heif else {".heic": 2})
        heif = 'passed over 5 files: 2 .heic, 2 .txt, 1 without a suffix; to read .heic: pip install "revit-fast[heif]"'
        assert passed.line() == ("passed over 3 files: 2 .txt, 1 without a suffix" if has_heif else heif)
        (tree / "empty" / "only.heic").write_bytes(b"x")
        (only,) = find_images([str(tree / "empty")], passed=passed)
        assert (only.error is None) == has_heif
        assert has_heif or 'passed over 1 file: 1 .heic; to read .heic: pip install "revit-fast[heif]"' in only.error

    def test_files_are_found_while_they_are_consumed(self, tree):
        sources = find_images([str(tree / "b.png"), str(tree / "late")])
        next(sources)
        save(RGB, tree / "late.png")
        (tree / "late").mkdir()
        save(RGB, tree / "late" / "new.png")
        assert list(sources) == [Source(str(tree / "late/new.png"))]


class TestSources:
    def test_bytes_and_images_and_arrays(self, tmp_path):
        path = save(RGB, tmp_path / "x.png")
        for source in (str(path), path, path.read_bytes(), memoryview(path.read_bytes()), Image.open(path), RGB):
            np.testing.assert_array_equal(read_rgb(source), RGB)
        np.testing.assert_array_equal(read_rgb(torch.from_numpy(GREY)), GREY)
        assert read_rgb(RGB) is RGB, "pixels that are there already are not copied"

    def test_a_pil_image_is_turned_upright(self, tmp_path):
        image = Image.fromarray(RGB)
        exif = image.getexif()
        exif[images.ORIENTATION_TAG] = 6
        image.save(tmp_path / "x.png", exif=exif)
        np.testing.assert_array_equal(read_rgb(Image.open(tmp_path / "x.png")), UPRIGHT[6](RGB))

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            (b"", "empty file"),
            (b"\xff\xd8\xff", "of the format JPEG, but damaged"),
            (Source("x", "nothing there"), "nothing there"),
            (RGB.astype(np.float32), "uint8"),
            (RGB[None], r"\[1, 13, 21, 3\]"),
            (RGB[:0], r"\[0, 21, 3\]"),
            (Image.new("RGB", (5, 0)), "at least one pixel, got 5x0"),
            (None, "NoneType"),
            (3, "int"),
        ],
    )
    def test_what_is_no_image(self, source, reason):
        with pytest.raises(ImageError, match=reason):
            read_rgb(source)

    def test_names(self):
        sources = ("a/b.png", b"123", RGB, Source("p", "e"), Image.fromarray(RGB))
        assert [name_of(s) for s in sources] == ["a/b.png", "<3 bytes>", "<array 13x21x3>", "p", "<Image>"]


class TestDraft:
    @pytest.mark.parametrize(
        ("draft_px", "side"), [(None, 800), (401, 800), (400, 400), (101, 200), (100, 100), (1, 100)]
    )
    def test_the_smallest_scale_that_is_large_enough(self, tmp_path, draft_px, side):
        image = Image.fromarray(RGB).resize((1200, 800), Image.Resampling.BICUBIC)
        image.save(tmp_path / "x.jpg")
        assert read_rgb(tmp_path / "x.jpg", draft_px=draft_px).shape == (side, side * 3 // 2, 3)

    def test_only_jpegs(self, tmp_path):
        assert read_rgb(save(RGB, tmp_path / "x.png"), draft_px=1).shape == RGB.shape

"""JPEGs decode to exactly Pillow's pixels with and without simplejpeg, and are copied once at most."""

import io
import random
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

import revit_fast as rf
from revit_fast.io import images, jpeg
from revit_fast.io.images import ImageError, read_rgb
from revit_fast.ops.resize import STACKED_BYTES, _image_tensors

NOISE = np.random.default_rng(0).integers(0, 256, (120, 140, 3), dtype=np.uint8)
SMOOTH = np.asarray(Image.fromarray(NOISE[:9, :11]).resize((140, 120), Image.Resampling.BICUBIC))
SIZES = [(1, 1), (1, 17), (7, 3), (8, 8), (33, 31), (101, 75)]


def encoded(array, format="JPEG", **options):
    file = io.BytesIO()
    image = Image.fromarray(array) if isinstance(array, np.ndarray) else array
    image.save(file, format, **options)
    return file.getvalue()


def by_pillow(file):
    """Pillow's pixels by the plain route."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("RGB"))


@pytest.fixture
def fast(monkeypatch):
    """simplejpeg must serve; holds whether it gave the pixels of each file."""
    pytest.importorskip("simplejpeg")
    assert jpeg.matching_decoder() is not None, "simplejpeg and Pillow of this environment differ"
    served, real = [], jpeg.same_pixels

    def same_pixels(image, file):
        pixels = real(image, file)
        served.append(pixels is not None)
        return pixels

    monkeypatch.setattr(jpeg, "same_pixels", same_pixels)
    return served


@pytest.fixture
def slow(monkeypatch):
    """Pillow must serve, as where simplejpeg is not installed."""
    monkeypatch.setattr(jpeg, "matching_decoder", lambda: None)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("picture", [NOISE, SMOOTH], ids=["noise", "smooth"])
class TestPixels:
    def check(self, files, fast):
        for name, file in files.items():
            np.testing.assert_array_equal(read_rgb(file), by_pillow(file), err_msg=str(name))
        assert fast == [True] * len(files)

    def test_pillows_files(self, picture, size, fast):
        files = {
            (quality, sampling, progressive): encoded(
                picture[: size[0], : size[1]], quality=quality, subsampling=sampling, progressive=progressive
            )
            for quality in (1, 75, 95)
            for sampling in (0, 1, 2)
            for progressive in (False, True)
        }
        self.check(files, fast)

    def test_other_forms(self, picture, size, fast):
        array = picture[: size[0], : size[1]]
        plain = encoded(array)
        whole = encoded(array, progressive=True)
        files = {
            "grey": encoded(array[..., 0]),
            "RGB, not YCbCr": encoded(array, keep_rgb=True),
            "restart markers": encoded(array, restart_marker_blocks=1),
            "own Huffman tables": encoded(array, optimize=True),
            "bytes after the end": plain + b"\xff\xd8 more" * 9,
            "Adobe's marker of RGB over YCbCr": plain[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0" + plain[2:],
            "progressive, without its last scan": whole[: whole.rindex(b"\xff\xda")] + b"\xff\xd9",
            "sixteen-bit quantisation": encoded(array, qtables=[[300 + i for i in range(64)]] * 2),
            "MPO": encoded(array, "MPO", save_all=True, append_images=[Image.fromarray(array[::-1])]),
        }
        self.check(files, fast)

    def test_samplings_that_pillow_does_not_write(self, picture, size, fast):
        import simplejpeg

        array = np.ascontiguousarray(picture[: size[0], : size[1]])
        self.check({s: simplejpeg.encode_jpeg(array, 85, "RGB", s) for s in ("440", "411")}, fast)


class TestPillowDecides:
    """Files that simplejpeg must not serve."""

    def test_cmyk(self, fast):
        file = encoded(Image.fromarray(NOISE).convert("CMYK"))
        np.testing.assert_array_equal(read_rgb(file), by_pillow(file))
        assert fast == [False]

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_photographs(self, fast, orientation):
        exif = Image.Exif()
        exif[images.ORIENTATION_TAG] = orientation
        file = encoded(SMOOTH[:, :75], exif=exif)
        turned = by_pillow(file)
        if orientation != 1:
            turn = images._upright_transposition(Image.open(io.BytesIO(file)))
            turned = np.array(Image.fromarray(turned).transpose(turn))
        np.testing.assert_array_equal(read_rgb(file), turned)
        assert fast == ([True] if orientation == 1 else [])

    def test_a_file_longer_than_its_pixels_is_not_read_whole(self, fast, tmp_path):
        file = encoded(SMOOTH)
        path = tmp_path / "x.jpg"
        for longer, served in (
            (SMOOTH.size + jpeg.METADATA_BYTES, True),
            (SMOOTH.size + jpeg.METADATA_BYTES + 1, False),
        ):
            path.write_bytes(file.ljust(longer, b"\0"))
            np.testing.assert_array_equal(read_rgb(path), by_pillow(file))
            assert fast.pop() == served

    def test_truncated(self, fast):
        for file in (encoded(NOISE), encoded(NOISE, progressive=True)):
            for n_bytes in (len(file) - 2, len(file) * 2 // 3, len(file) // 3):
                with pytest.raises(ImageError, match="truncated"):
                    read_rgb(file[:n_bytes])
        assert not any(fast)

    def test_truncated_files_read_where_pillow_is_told_to(self, fast, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        file = encoded(NOISE)[:9000]
        np.testing.assert_array_equal(read_rgb(file), by_pillow(file))
        assert fast == [False]

    def test_a_bomb_is_not_decoded(self, fast, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", NOISE.shape[0] * NOISE.shape[1] // 2 - 1)
        with pytest.raises(ImageError, match="decompression bomb"):
            read_rgb(encoded(NOISE))
        assert fast == []

    @pytest.mark.parametrize("seed", range(6))
    def test_damaged_files_give_the_pixels_or_the_error_of_pillow(self, fast, monkeypatch, seed):
        draw = random.Random(seed)
        options = [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}]
        wholes = [encoded(SMOOTH[:50, :61], **o) for o in options]
        files = [damaged(draw.choice(wholes), draw) for _ in range(100)]
        got = [outcome(file) for file in files]
        assert any(fast)
        assert not all(fast)
        monkeypatch.setattr(jpeg, "matching_decoder", lambda: None)
        for file, with_simplejpeg in zip(files, got, strict=True):
            expected = outcome(file)
            assert type(with_simplejpeg) is type(expected)
            np.testing.assert_array_equal(with_simplejpeg, expected)


def damaged(file, draw):
    """The file with some bytes changed, removed or inserted; its size in pixels stays below a million."""
    while True:
        data = bytearray(file)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(2, len(data) if draw.random() < 0.5 else 700)
            kind = draw.randrange(3)
            if kind == 0:
                data[at] = draw.randrange(256)
            elif kind == 1:
                del data[at : at + draw.randint(1, 20)]
            else:
                data[at:at] = draw.randbytes(draw.randint(1, 8))
        try:
            n_pixels = np.prod(images.encoded_size(bytes(data)))
        except ImageError:
            n_pixels = 0
        if n_pixels < 1e6:
            return bytes(data)


def outcome(file):
    try:
        return read_rgb(file)
    except ImageError as error:
        return str(error)


class TestMatchingDecoder:
    """simplejpeg serves only if it agrees with the Pillow that is installed."""

    @pytest.fixture(autouse=True)
    def _asked_anew(self):
        jpeg.matching_decoder.cache_clear()
        yield
        jpeg.matching_decoder.cache_clear()

    def test_it_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
        assert jpeg.matching_decoder() is None
        file = encoded(NOISE)
        np.testing.assert_array_equal(read_rgb(file), by_pillow(file))

    @pytest.mark.parametrize("sampling", jpeg.SAMPLINGS)
    def test_it_decodes_one_sampling_otherwise(self, monkeypatch, sampling):
        real = pytest.importorskip("simplejpeg")

        def other(file, strict):
            fast = real.decode_jpeg_header(file)[3].upper() == sampling
            return real.decode_jpeg(file, fastdct=fast, strict=strict)

        monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(decode_jpeg=other, encode_jpeg=real.encode_jpeg))
        assert jpeg.matching_decoder() is None
        file = encoded(NOISE)
        np.testing.assert_array_equal(read_rgb(file), by_pillow(file))

    def test_it_upsamples_otherwise(self, monkeypatch):
        real = pytest.importorskip("simplejpeg")
        other = SimpleNamespace(
            decode_jpeg=lambda file, strict: real.decode_jpeg(file, fastupsample=True), encode_jpeg=real.encode_jpeg
        )
        monkeypatch.setitem(sys.modules, "simplejpeg", other)
        assert jpeg.matching_decoder() is None

    def test_it_is_too_old_to_be_strict(self, monkeypatch):
        real = pytest.importorskip("simplejpeg")
        other = SimpleNamespace(decode_jpeg=lambda file: real.decode_jpeg(file), encode_jpeg=real.encode_jpeg)
        monkeypatch.setitem(sys.modules, "simplejpeg", other)
        assert jpeg.matching_decoder() is None


class TestDraft:
    PHOTO = np.asarray(Image.fromarray(SMOOTH).resize((1203, 801)))

    def test_full_decoding_is_the_default_and_pillows(self):
        file = encoded(self.PHOTO)
        prep = rf.AdaptivePreprocessor(policy=("fixed", 7))
        np.testing.assert_array_equal(prep.decode(file), by_pillow(file))

    @pytest.mark.parametrize("format", ["JPEG", "MPO"])
    @pytest.mark.parametrize("size", [(1203, 801), (801, 1203), (505, 401), (499, 249), (249, 248), (90, 60)], ids=str)
    def test_a_draft_keeps_the_pixels_that_the_longest_grid_needs(self, size, format):
        prep = rf.AdaptivePreprocessor(policy=("fixed", 7), draft=True)
        file = encoded(Image.fromarray(self.PHOTO).resize(size), format)
        pixels = prep.decode(file)
        assert min(pixels.shape[:2]) >= min(prep.draft_px, *size)
        smaller = min(-(-side // 2) for side in size) >= prep.draft_px
        assert (pixels.shape != (size[1], size[0], 3)) == smaller, "half the size is used exactly where it is enough"
        if not smaller:
            np.testing.assert_array_equal(pixels, by_pillow(file))


class TestCopies:
    """From the decoder's own output to patch rows, an upright RGB photograph is copied once by Pillow's route, and not
    at all by simplejpeg's."""

    PHOTO = np.asarray(Image.fromarray(SMOOTH).resize((1203, 801)))

    def peak_bytes(self, source):
        """Largest memory of Python and numpy while decoding, without the file; Pillow's and libjpeg's is not seen."""
        n_file = 0 if isinstance(source, bytes) else source.stat().st_size
        read_rgb(source)
        tracemalloc.start()
        pixels = read_rgb(source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pixels.shape == self.PHOTO.shape
        return peak - n_file

    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_pillows_route(self, slow, monkeypatch, tmp_path, format):
        def copied(*args, **kwargs):
            raise AssertionError("a copy inside Pillow")

        for name in ("convert", "copy", "tobytes"):
            monkeypatch.setattr(Image.Image, name, copied)
        path = tmp_path / "x"
        path.write_bytes(encoded(self.PHOTO, format))
        for source in (path, path.read_bytes()):
            assert self.peak_bytes(source) < 1.2 * self.PHOTO.nbytes

    def test_simplejpegs_route(self, fast, monkeypatch, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(encoded(self.PHOTO))
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # Pillow reads the header only
        for source in (path, path.read_bytes()):
            assert self.peak_bytes(source) < 1.1 * self.PHOTO.nbytes
        assert all(fast)

    @pytest.mark.parametrize("route", ["fast", "slow"])
    def test_the_resize_reads_the_decoded_pixels(self, request, route):
        request.getfixturevalue(route)
        pixels = read_rgb(encoded(self.PHOTO))
        assert pixels.nbytes > STACKED_BYTES
        tensors = _image_tensors([pixels, pixels])
        assert [t.data_ptr() for t in tensors] == [pixels.ctypes.data] * 2


class TestLazyImages:
    @pytest.mark.parametrize("format", ["JPEG", "PNG"])
    def test_threads_may_share_an_image_that_is_not_loaded(self, format):
        exif = Image.Exif()
        exif[images.ORIENTATION_TAG] = 6
        picture = Image.fromarray(SMOOTH).resize((1200, 900))
        file = encoded(picture, format, exif=exif)
        expected = read_rgb(file)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                shared = Image.open(io.BytesIO(file))
                for pixels in pool.map(read_rgb, [shared] * 8):
                    np.testing.assert_array_equal(pixels, expected)

"""From clip files to classes: decoding, one grid a clip, the pipeline, `revit-fast predict`."""

import csv
import io
import json
import os
import pickle
import re
import shlex
import struct
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import only_on
from small_models import drawn

import revit_fast as rf
from revit_fast import ops
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.policies import grey_entropy
from revit_fast.cli import build_parser, main
from revit_fast.video import (
    ClipError,
    ClipPipeline,
    ClipPreprocessor,
    PackedClips,
    TimeSformer,
    optimize,
    pipeline,
    read_clip,
    read_folder,
    reader,
    save_folder,
)
from revit_fast.video.checkpoints import is_checkpoint
from revit_fast.video.pipeline import clip_macs
from revit_fast.video.reader import spread

av = pytest.importorskip("av")

pytestmark = [only_on("cpu", reason="clips are decoded on the CPU"), pytest.mark.usefixtures("one_thread")]

GRIDS = (4, 3, 2)
PATCH = 8


def moving(n_frames, height=48, width=64, seed=0):
    """Frames `[F, H, W, 3]` of a smooth picture that grows lighter, so that codecs leave which frame it is."""
    coarse = np.random.default_rng(seed).integers(0, 100, (height // 16, width // 16, 3))
    smooth = coarse.repeat(16, axis=0).repeat(16, axis=1)
    return np.stack([(smooth + 150 * i / max(n_frames - 1, 1)).astype(np.uint8) for i in range(n_frames)])


def quarters(n_frames=3):
    """Frames `[F, 48, 64, 3]` whose four quarters differ."""
    frames = moving(n_frames) // 4
    frames[:, :24, :32] += 190
    frames[:, :24, 32:] += 90
    return frames


SHOWN = {
    (1, 0, 0, 1): lambda f: f,
    (-1, 0, 0, 1): lambda f: f[:, :, ::-1],
    (1, 0, 0, -1): lambda f: f[:, ::-1],
    (-1, 0, 0, -1): lambda f: f[:, ::-1, ::-1],
    (0, 1, 1, 0): lambda f: f.swapaxes(1, 2),
    (0, 1, -1, 0): lambda f: np.rot90(f, -1, (1, 2)),
    (0, -1, 1, 0): lambda f: np.rot90(f, 1, (1, 2)),
    (0, -1, -1, 0): lambda f: f[:, ::-1, ::-1].swapaxes(1, 2),
}
"""A QuickTime matrix (a, b, c, d) moves a pixel at (x, y) to (ax + cy, bx + dy), and the frames back into view."""


def with_display_matrix(path, a, b, c, d):
    """Writes a matrix into the track header of an MP4, by hand: PyAV knows rotations alone, or none."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(65536 * number) for number in (a, b, c, d))
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def encode(path, frames, codec="mpeg4", pixel_aspect=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def level(frames):
    """Mean grey of every frame: which one it is."""
    return frames.reshape(len(frames), -1).mean(axis=1, dtype=float)


@pytest.fixture
def clip(tmp_path):
    return encode(tmp_path / "clip.mp4", moving(12))


def make_model(**options):
    arguments = dict(
        grids=GRIDS, base_grid=(4, 4), num_frames=3, patch_size=PATCH, num_classes=5, embed_dim=16, depth=2, num_heads=2
    )
    return drawn(TimeSformer(**arguments | options))


class TestReader:
    @pytest.mark.parametrize("n_total", [3, 4, 8, 11, 300])
    def test_frames_are_spread_as_in_the_examples_of_transformers(self, n_total):
        for n in (1, 2, 3):
            found = spread(n_total, n)
            assert found == np.clip(np.linspace(0, n_total, num=n), 0, n_total - 1).astype(np.int64).tolist()
            assert len(set(found)) == n
        assert spread(n_total, n_total) == list(range(n_total)), "every frame once"

    @pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.avi", "mpeg4")])
    @pytest.mark.parametrize("as_bytes", [False, True])
    def test_the_frames_asked_for_are_read(self, tmp_path, name, codec, as_bytes):
        """Also where the container does not say how many there are (Matroska)."""
        frames = moving(12)
        path = encode(tmp_path / name, frames, codec)
        got = read_clip(path.read_bytes() if as_bytes else path, 5)
        assert (got.shape, got.dtype) == ((5, 48, 64, 3), np.uint8)
        assert np.abs(level(got) - level(frames[spread(12, 5)])).max() < 4, "next frames are 13 apart"

    def test_a_name_with_a_colon_is_a_file(self, tmp_path, monkeypatch):
        encode(tmp_path / "12:30.mp4", moving(3))
        monkeypatch.chdir(tmp_path)
        assert len(read_clip("12:30.mp4", 2)) == 2

    @pytest.mark.parametrize("as_file", [False, True])
    @pytest.mark.parametrize("shown", SHOWN)
    def test_frames_are_turned_and_mirrored(self, tmp_path, shown, as_file):
        frames = quarters()
        path = with_display_matrix(encode(tmp_path / "a.mp4", frames), *shown)
        got = read_clip(io.BytesIO(path.read_bytes()) if as_file else path, 3)
        assert np.abs(SHOWN[shown](frames).astype(int) - got).mean() < 4

    @pytest.mark.parametrize(("aspect", "width"), [((4, 3), 85), ((8, 9), 57), ((2, 1), 128), ((1, 2), 32)])
    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
    def test_pixels_that_are_not_square(self, tmp_path, name, aspect, width):
        frames = quarters()
        got = read_clip(encode(tmp_path / name, frames, pixel_aspect=Fraction(*aspect)), 3)
        assert got.shape == (3, 48, width, 3)
        columns = ((np.arange(width) + 0.5) * 64 / width).astype(int)
        inside = np.abs(columns - 31.5) > 3  # the filter blurs edges
        assert np.abs(frames[:, :, columns].astype(int) - got)[:, :, inside].mean() < 4

    def test_the_width_of_the_stored_frames_is_scaled(self, tmp_path):
        path = encode(tmp_path / "a.mp4", quarters(), pixel_aspect=Fraction(2))
        assert read_clip(with_display_matrix(path, 0, 1, -1, 0), 3).shape == (3, 128, 48, 3)

    def test_what_no_player_shows(self, tmp_path):
        path = with_display_matrix(encode(tmp_path / "a.mp4", quarters()), 0.866, 0.5, -0.5, 0.866)
        with pytest.raises(ClipError, match="is shown turned by 30 degrees, expected quarter turns"):
            read_clip(path, 3)
        path = encode(tmp_path / "b.mp4", quarters(), pixel_aspect=Fraction(9))
        with pytest.raises(ClipError, match=r"its pixels are 9:1, expected 1:8 to 8:1"):
            read_clip(path, 3)

    def test_open_files(self, tmp_path, clip):
        with open(clip, "rb") as file, open(clip, errors="replace") as text:
            assert np.array_equal(read_clip(file, 3), read_clip(clip, 3))
            assert file.tell() == 0
            with pytest.raises(ClipError, match="in text mode"):
                read_clip(text, 3)
        with pytest.raises(ClipError, match="nothing is left to read"):
            read_clip(io.BytesIO(), 3)

    def test_arrays_are_sampled(self):
        frames = moving(9)
        assert np.array_equal(read_clip(frames, 3), frames[[0, 4, 8]])

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "empty file"),
            (b"no clip at all" * 100, "not an AVI, Matroska, WebM, MP4 or QuickTime clip, or damaged"),
            (b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nCLIP\n#EXT-X-ENDLIST\n", "not an AVI, Matroska"),
        ],
    )
    def test_what_is_no_clip(self, tmp_path, clip, content, reason):
        """A playlist that names a good clip is none either."""
        path = tmp_path / "bad.mp4"
        path.write_bytes(content.replace(b"CLIP", str(clip).encode()))
        with pytest.raises(ClipError, match=reason):
            read_clip(path, 2)

    def test_other_sources_are_refused(self, tmp_path, clip):
        image = io.BytesIO()
        pytest.importorskip("PIL.Image").new("RGB", (32, 32)).save(image, "JPEG")
        audio = tmp_path / "sound.mp4"
        with av.open(str(audio), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        for source, reason in [
            (tmp_path / "missing.mp4", "no such file or directory"),
            (tmp_path, "is a folder, not a clip"),
            (image.getvalue(), "not an AVI"),
            (audio, "has no video stream"),
            (moving(2).astype(np.float32), "expected uint8 frames, got float32"),
            (moving(2)[0], r"expected frames \[F, H, W, 3\], got \[48, 64, 3\]"),
            (7, "expected a path, bytes, an open file or uint8 frames"),
            (b"", "empty file"),
        ]:
            with pytest.raises(ClipError, match=reason):
                read_clip(source, 2)

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
    def test_too_few_frames(self, tmp_path, name):
        path = encode(tmp_path / name, moving(4))
        with pytest.raises(ClipError, match="has 4 frames, and the model takes 5"):
            read_clip(path, 5)
        assert len(read_clip(path, 4)) == 4

    def test_the_extra_is_named_where_it_is_missing(self, clip, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ClipError, match=r'needs PyAV: pip install "revit-fast\[video\]"'):
            read_clip(clip, 2)


def rewritten(path, source, change, **options):
    """Writes the packets of a clip again, with contents `change(contents)` at the same times; None leaves one out."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        if not hasattr(new, "add_stream_from_template"):
            pytest.skip("this PyAV cannot copy a stream")
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet, content in zip(packets, change([bytes(packet) for packet in packets]), strict=True):
            if content is not None:
                changed = av.Packet(content)
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.duration, changed.is_keyframe, changed.stream = packet.duration, packet.is_keyframe, stream
                new.mux(changed)
    return path


def hidden(content):
    """A packet of VP8 whose frame is decoded and not shown."""
    return bytes([content[0] & ~0x10]) + content[1:]


class TestCounts:
    """The header's number of frames, duration and rate are no ground for where frames lie."""

    N = 60

    def write(self, path, *, n=N, codec="libx264", times=None, start=0, encoding=None, **options):
        """A clip whose frames are grey, 3 levels apart, in groups of ten."""
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt, stream.gop_size = 48, 64, "yuv420p", 10
            stream.bit_rate, stream.options = 2_000_000, encoding or {}
            noise = np.random.default_rng(0).integers(0, 8, (n, 48, 64, 3))
            for i in range(n):
                frame = av.VideoFrame.from_ndarray((20 + 3 * i + noise[i]).astype(np.uint8), format="rgb24")
                frame.pts, frame.time_base = start + (i if times is None else int(times[i])), Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    def check(self, path, n=N, asked=8):
        got = level(read_clip(path, asked))
        want = 23.5 + 3 * np.array(spread(n, asked))
        assert np.abs(got - want).max() < 6, f"frames {((got - 23.5) / 3).round().astype(int)} of {n}"

    @pytest.mark.parametrize("ext", [".mp4", ".mov"])
    @pytest.mark.parametrize(
        "movflags",
        [
            "frag_keyframe",
            "frag_keyframe+empty_moov",
            "empty_moov+default_base_moof+frag_every_frame",
            "dash",
            "faststart",
        ],
    )
    def test_fragments(self, tmp_path, ext, movflags):
        self.check(self.write(tmp_path / f"a{ext}", movflags=movflags))

    @pytest.mark.parametrize(("ext", "codec"), [(".mkv", "libx264"), (".webm", "libvpx"), (".mkv", "mpeg1video")])
    def test_neither_count_nor_duration(self, tmp_path, ext, codec):
        """FFmpeg may make up a duration from bit rates, which is no reason to report a clip."""
        if codec == "mpeg1video":
            path = tmp_path / f"a{ext}"
            with av.open(str(path), "w", options={"live": "1"}) as container:
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 48, 64, "yuv420p", 1000
                for frame in 20 + 3 * np.arange(self.N)[:, None, None, None] + np.full((1, 48, 64, 3), 3):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.astype(np.uint8), format="rgb24")))
                container.mux(stream.encode())
        else:
            path = self.write(tmp_path / f"a{ext}", codec=codec, live="1")
        self.check(path)

    @staticmethod
    def with_count(path, count):
        """Sets the numbers of frames in both headers of an AVI file."""
        content = bytearray(path.read_bytes())
        for chunk, offset in ((b"avih", 24), (b"strh", 40)):
            struct.pack_into("<I", content, content.find(chunk) + offset, count)
        path.write_bytes(content)
        return path

    @pytest.mark.parametrize("count", [0, 1, 9, 59, 60])
    @pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
    def test_an_avi_header_that_counts_too_few(self, tmp_path, count, codec):
        self.check(self.with_count(self.write(tmp_path / "a.avi", codec=codec), count))

    def test_an_avi_header_that_counts_too_many(self, tmp_path):
        path = self.with_count(self.write(tmp_path / "a.avi", codec="mpeg4"), 200)
        with pytest.raises(ClipError, match=r"ends after 6\.00 s, and its duration is 20\.00 s"):
            read_clip(path, 8)

    @pytest.mark.parametrize("ext", [".mp4", ".mkv"])
    def test_a_variable_frame_rate(self, tmp_path, ext):
        steps = np.random.default_rng(0).integers(1, 9, self.N)
        steps[30] = 100
        self.check(self.write(tmp_path / f"a{ext}", times=steps.cumsum()))

    @pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov"}, {"movflags": "dash"}])
    @pytest.mark.parametrize("ext", [".mp4", ".mkv"])
    def test_a_clip_that_starts_late(self, tmp_path, ext, options):
        self.check(self.write(tmp_path / f"a{ext}", start=1000, **options if ext == ".mp4" else {}))

    @pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
    @pytest.mark.parametrize(
        ("ext", "codec", "options"),
        [
            (".mkv", "libx264", {}),
            (".webm", "libvpx", {}),
            (".avi", "mpeg4", {}),
            (".mp4", "mpeg4", {"movflags": "faststart"}),
            (".mov", "libx264", {"movflags": "faststart"}),
        ],
    )
    def test_a_clip_that_was_cut_off(self, tmp_path, ext, codec, options, share):
        path = self.write(tmp_path / f"a{ext}", codec=codec, **options)
        content = path.read_bytes()
        start = max(content.find(b"movi"), 0)  # in an AVI file the headers are long
        path.write_bytes(content[: start + int((len(content) - start) * share)])
        with pytest.raises(ClipError, match=r"ends after [0-5]\.\d\d s, and its duration is 6\.00 s") as caught:
            read_clip(path, 3)
        end_s = float(str(caught.value).split()[2])
        assert abs(end_s - 6 * share) < 1.5, "the end in the message is that of the file"

    def test_a_clip_that_was_cut_off_where_nothing_says_so(self, tmp_path):
        path = self.write(tmp_path / "a.mkv", live="1")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with av.open(str(path)) as container:
            n = sum(1 for _ in container.decode(video=0))
        assert 20 < n < 40
        self.check(path, n)

    def test_packets_without_pictures(self, tmp_path):
        """Some in the middle make the clip shorter; if all at the end are, the clip is damaged."""
        whole = self.write(tmp_path / "whole.webm", codec="libvpx", encoding={"lag-in-frames": "0"})

        def some(contents):
            return [hidden(content) if i < 40 and i % 4 else content for i, content in enumerate(contents)]

        path = rewritten(tmp_path / "a.webm", whole, some)
        shown = [i for i in range(self.N) if not (i < 40 and i % 4)]
        want = 23.5 + 3 * np.array(shown)[spread(len(shown), 8)]
        assert np.abs(level(read_clip(path, 8)) - want).max() < 6
        with pytest.raises(ClipError, match="has 30 frames, and the model takes 31"):
            read_clip(path, 31)

        def half(contents):
            return [*contents[:30], *map(hidden, contents[30:])]

        for name, options in (("b.webm", {}), ("c.webm", {"live": "1"})):
            with pytest.raises(ClipError, match=r"ends after 3\.00 s, and its duration is 6\.00 s"):
                read_clip(rewritten(tmp_path / name, whole, half, **options), 8)

    def test_packets_of_two_frames(self, tmp_path):
        """VP9 can join frames in one packet, so that there are more frames than packets."""

        def joined(contents):
            marker = bytes([0b110_01_001])  # sizes of two bytes, two frames
            for first, second in zip(contents[::2], contents[1::2], strict=True):
                yield first + second + marker + struct.pack("<HH", len(first), len(second)) + marker
                yield None

        encoding = {"lag-in-frames": "0", "auto-alt-ref": "0"}
        whole = self.write(tmp_path / "whole.webm", codec="libvpx-vp9", encoding=encoding)
        self.check(rewritten(tmp_path / "a.webm", whole, joined))

    def test_a_clip_is_decoded_once_and_no_further_than_needed(self, tmp_path, monkeypatch):
        path = self.write(tmp_path / "a.mp4", codec="mpeg4", movflags="faststart")
        opened, plain = [], reader._opened
        monkeypatch.setattr(reader, "_opened", lambda file: opened.append(file) or plain(file))
        self.check(path)
        assert len(opened) == 2, "once for the packets, once for the frames"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
        with pytest.raises(ClipError, match="Invalid data"):
            read_clip(path, 2)
        assert np.abs(level(read_clip(path, 1)) - 23.5) < 6, "the first frame lies before the damage"

    def test_sound_of_another_length(self, tmp_path):
        """The header of Matroska has the duration of the longest stream: here sound that goes on after the picture."""
        for n_sound, ext in ((10, ".mkv"), (1, ".mkv"), (10, ".mp4"), (1, ".mp4")):
            path = tmp_path / f"{n_sound}{ext}"
            with av.open(str(path), "w") as container:
                video, sound = container.add_stream("mpeg4", rate=10), container.add_stream("aac", rate=8000)
                video.height, video.width, video.pix_fmt, video.bit_rate = 48, 64, "yuv420p", 2_000_000
                for i in range(n_sound):
                    samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
                    samples.sample_rate, samples.pts, samples.time_base = 8000, 8000 * i, Fraction(1, 8000)
                    container.mux(sound.encode(samples))
                container.mux(sound.encode())
                for i in range(40):
                    frame = np.full((48, 64, 3), 23 + 3 * i, np.uint8)
                    container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(video.encode())
            self.check(path, 40)


class TestPipeline:
    def test_logits_are_those_of_the_model(self, tmp_path):
        model = make_model()
        frames = [moving(n, seed=n) for n in (5, 9, 3)]
        results = list(pipeline(model, policy="cycle", labels=list("abcde"))(frames))
        fast = optimize(model)
        for result, clip, grid in zip(results, frames, GRIDS, strict=True):
            taken = read_clip(clip, 3)
            rows = ops.resize_patchify(
                list(taken),
                grid * PATCH,
                PATCH,
                boxes=eval_box(48, 64, grid * PATCH, 1.0),
                mean=[0.45] * 3,
                std=[0.225] * 3,
                interpolation="bilinear",
            )
            assert result.error is None
            assert result.grid == grid
            assert result.n_tokens == 3 * grid**2 + 1
            assert torch.equal(result.logits, fast(PackedClips(rows, (3,)))[0])
            assert {entry["label"] for entry in result.top()} == set("abcde")

    def test_the_assigner_is_asked_about_every_frame(self):
        torch.manual_seed(0)
        tla = drawn(rf.TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8, 16)))
        prep = ClipPreprocessor(tla, n_frames=3, patch_size=PATCH, crop_pct=1.0)
        clips = [moving(3, seed=1), moving(3, 64, 48, seed=2)]
        found = prep.assign(clips)
        for clip, grid, probabilities in zip(clips, found.grids, found.probabilities, strict=True):
            box = eval_box(*clip.shape[1:3], GRIDS[0] * PATCH, 1.0)
            mean = tla.predict_proba(list(clip), box).mean(0).numpy()
            assert np.allclose(probabilities, mean, atol=1e-6)
            assert grid == GRIDS[mean.argmax()]

    def test_entropies_are_means_too(self):
        prep = ClipPreprocessor(None, grids=GRIDS, n_frames=3, patch_size=PATCH, policy=("entropy", [5.0, 3.0]))
        clips = [moving(3, 64, 64, seed=1), np.zeros((3, 64, 64, 3), np.uint8)]
        found = prep.assign(clips)
        assert found.grids[1] == GRIDS[-1], "black frames need the fewest tokens"
        assert found.entropy[1] == 0
        assert grey_entropy(clips[0].reshape(3, -1, 3)).max() > 0

    def test_a_bad_clip_is_one_error(self, clip, tmp_path):
        short = encode(tmp_path / "short.mp4", moving(2))
        results = list(pipeline(make_model())([clip, tmp_path / "missing.mp4", short, clip]))
        assert [r.error is None for r in results] == [True, False, False, True]
        assert results[1].reason == "no such file or directory"
        assert "has 2 frames, and the model takes 3" in results[2].error
        assert torch.equal(results[0].logits, results[3].logits)

    def test_a_cascade_looks_again(self, clip):
        results = list(pipeline(make_model(), policy=("cascade", 1.0))([clip]))
        assert results[0].grid == GRIDS[0]
        assert results[0].n_tokens == sum(3 * g * g + 1 for g in GRIDS)

    def test_multiply_adds_are_counted(self):
        model = make_model()
        c, n, f, hidden = 16, 9, 3, 64
        block = (n * f + 1) * (9 * c * c + 2 * c * hidden) + 2 * c * (n * f * f + f * (n + 1) ** 2)
        assert clip_macs(model, n, f) == n * f * 3 * PATCH**2 * c + 2 * block + 5 * c
        assert ClipPreprocessor.for_model(model, policy="cycle").macs[1] == clip_macs(model, n, f)

    def test_sides_and_grids_pack_the_same(self):
        prep = ClipPreprocessor.for_model(make_model(), policy="cycle")
        clips = [moving(3, seed=1), moving(3, 64, 48, seed=2)]
        expected, got = prep.pack(clips, [4, 2]), prep.pack(clips, [(4, 4), (2, 2)])
        assert got.grids == expected.grids == ((4, 4), (2, 2))
        assert torch.equal(got.frames.data, expected.frames.data)
        assert [prep.n_patches(grid) for grid in got.grids] == [48, 12]

    def test_a_module_that_is_no_timesformer(self):
        class Counts(torch.nn.Module):
            grids, patch_size, in_chans, num_classes, num_prefix_tokens, num_frames = GRIDS, PATCH, 3, 2, 2, 3
            input_device = torch.device("cpu")

            def forward(self, clips):
                grids = zip(clips.grids, clips.n_frames, strict=True)
                return torch.tensor([[rows * columns, n] for (rows, columns), n in grids])

        prep = ClipPreprocessor(grids=GRIDS, patch_size=PATCH, n_frames=3, policy="cycle")
        results = list(ClipPipeline(Counts().eval(), prep)([moving(5), moving(9), moving(3)]))
        assert [r.logits.tolist() for r in results] == [[g * g, 3] for g in GRIDS]
        assert [r.n_tokens for r in results] == [3 * g * g + 2 for g in GRIDS]

    def test_pickled_it_gives_the_same(self):
        pipe = pipeline(make_model(), policy="cycle")
        again = pickle.loads(pickle.dumps(pipe))
        assert type(again) is ClipPipeline
        (before,), (after,) = (list(p([moving(3)])) for p in (pipe, again))
        assert torch.equal(before.logits, after.logits)

    def test_parts_that_do_not_fit_are_refused(self):
        model = make_model()
        image_model = rf.ReViT(grids=GRIDS, patch_size=PATCH, embed_dim=8, depth=1, num_heads=1, num_classes=2).eval()
        with pytest.raises(TypeError, match="expected a TimeSformer, got ReViT"):
            ClipPipeline(image_model, ClipPreprocessor.for_model(model, policy="cycle"))
        with pytest.raises(TypeError, match="expected a ReViT, got TimeSformer"):
            ClipPipeline(model, rf.AdaptivePreprocessor.for_model(image_model, policy="cycle"))
        with pytest.raises(ValueError, match=r"grids \(5,\) differ .*\(4, 3, 2\); make it with ClipPreprocessor"):
            ClipPipeline(model, ClipPreprocessor.for_model(model, policy="cycle", grids=(5,)))
        with pytest.raises(TypeError, match="expected a TimeSformer, got Linear"):
            ClipPipeline(torch.nn.Linear(2, 2), ClipPreprocessor.for_model(model, policy="cycle"))
        with pytest.raises(ValueError, match="n_frames: expected an int of at least 1, got 0"):
            ClipPreprocessor.for_model(model, policy="cycle", n_frames=0)
        with pytest.raises(ValueError, match="draft"):
            ClipPreprocessor.for_model(model, policy="cycle", draft=True)
        with pytest.raises(ValueError, match="aspect"):
            ClipPreprocessor.for_model(model, policy="cycle", aspect="keep")
        with pytest.raises(ValueError, match="calibrated on images"):
            ClipPreprocessor.for_model(model, policy="cycle").calibrate([])


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as Hugging Face writes it: grid 4, 3 frames, patches of 8 px."""
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(
        image_size=32,
        patch_size=PATCH,
        num_frames=3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=5,
        id2label={i: f"action {i}" for i in range(5)},
        label2id={f"action {i}": i for i in range(5)},
    )
    model = drawn(transformers.TimesformerForVideoClassification(config))
    model.save_pretrained(tmp_path / "model")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "resample": 3}
    processor |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "model", model


class TestFolder:
    def test_a_folder_of_transformers_is_read(self, folder):
        path, hf = folder
        model, classes = read_folder(path)
        assert classes == tuple(f"action {i}" for i in range(5))
        assert model.grids == (4, 3, 2), "14, 10 and 7 in proportion"
        assert model.pretrained_cfg == {
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
            "crop_pct": 0.8,
            "interpolation": "bicubic",
        }
        x = torch.randn(2, 3, 3, 32, 32)
        with torch.no_grad():
            assert (model(x) - hf(x).logits).abs().max() <= 2e-5

    def test_a_model_of_several_lengths_comes_back_as_it_was(self, tmp_path):
        model = make_model(attention_type="joint_space_time", act_layer="gelu_tanh", hidden_dim=24)
        model.pretrained_cfg = {"mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
        save_folder(tmp_path / "model", model, classes=list("abcde"))
        assert is_checkpoint(tmp_path / "model")
        again, classes = read_folder(tmp_path / "model")
        assert classes == tuple("abcde")
        assert again.grids == GRIDS
        assert again.pretrained_cfg["crop_pct"] == pytest.approx(0.9, abs=0.02)
        assert {k: v for k, v in again.pretrained_cfg.items() if k != "crop_pct"} == {
            k: v for k, v in model.pretrained_cfg.items() if k != "crop_pct"
        }
        clips = [torch.randn(3, 3, 32, 32), torch.randn(2, 3, 16, 24)]
        with torch.no_grad():
            assert torch.equal(again(clips), model(clips))
        save_folder(tmp_path / "model", again)
        assert read_folder(tmp_path / "model").classes is None

    def test_a_folder_that_is_saved_to_again_stays_and_its_files_are_known(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = Path("config.json")
        save_folder(".", make_model())
        Path("log.txt").write_text("mine")
        save_folder(".", make_model(), classes=list("abcde"))
        assert Path.cwd() == tmp_path
        assert sorted(os.listdir()) == ["config.json", "log.txt", "model.safetensors", "preprocessor_config.json"]
        for name in ("model.safetensors", "preprocessor_config.json"):
            content = Path(name).read_bytes()
            Path(name).write_bytes(content + b" ")
            with pytest.raises(ValueError, match=rf"checkpoint: {name} is not the file that config.json names"):
                read_folder(".")
            Path(name).unlink()
            with pytest.raises(FileNotFoundError, match=rf"lacks {name}"):
                read_folder(".")
            Path(name).write_bytes(content)
        assert read_folder(".").classes == tuple("abcde")
        read = json.loads(config.read_text())
        config.write_text(json.dumps(read | {"files": None}))
        with pytest.raises(ValueError, match=r"config.json: files: expected bytes and sha256 of model.safetensors"):
            read_folder(".")
        del read["files"]
        config.write_text(json.dumps(read))
        Path("preprocessor_config.json").unlink()
        assert read_folder(".").classes == tuple("abcde"), "older folders name no files"

    def test_what_transformers_makes_of_our_folder_is_read(self, tmp_path):
        """It keeps what our configuration says of our files, and writes others."""
        transformers = pytest.importorskip("transformers")
        save_folder(tmp_path / "ours", make_model())
        config = transformers.TimesformerConfig.from_pretrained(tmp_path / "ours")
        model = transformers.TimesformerForVideoClassification(config)
        torch.nn.init.constant_(model.classifier.bias, 3)
        model.save_pretrained(tmp_path / "theirs")
        assert "model.safetensors" in json.loads((tmp_path / "theirs" / "config.json").read_text())["files"]
        assert read_folder(tmp_path / "theirs").model.head.bias.eq(3).all()

    def test_a_folder_of_something_else_is_not_replaced(self, tmp_path):
        (tmp_path / "note.txt").write_text("mine")
        with pytest.raises(ValueError, match="exists and holds no TimeSformer"):
            save_folder(tmp_path, make_model())
        with pytest.raises(ValueError, match="5 classes, got 2 names"):
            save_folder(tmp_path / "model", make_model(), classes=["a", "b"])
        assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]

    def test_what_is_wrong_with_a_folder_is_named(self, folder):
        path, _ = folder
        (path / "preprocessor_config.json").write_text(json.dumps({"resample": 0}))
        with pytest.raises(ValueError, match="resample=0 is not supported"):
            read_folder(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"attention_type": "space_only"}))
        with pytest.raises(ValueError, match="space_only"):
            read_folder(path)
        (path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="cannot be read as JSON"):
            read_folder(path)
        (path / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            read_folder(path)


class TestPredict:
    def run(self, capsys, *args):
        code = main(["predict", *map(str, args)])
        return code, *capsys.readouterr()

    def test_clips_are_classified(self, capsys, folder, clip):
        path, hf = folder
        code, out, err = self.run(capsys, clip, "--model", path, "--format", "json", "--top-k", 3)
        assert code == 0, err
        (record,) = json.loads(out)
        taken = torch.from_numpy(read_clip(clip, 3))
        rows = ClipPreprocessor.for_model(read_folder(path).model, policy=("fixed", 4)).pack([taken.numpy()], [4])
        patches = rows.frames.data.view(3, 4, 4, PATCH, PATCH, 3).permute(0, 5, 1, 3, 2, 4)
        with torch.no_grad():
            expected = hf(patches.reshape(1, 3, 3, 32, 32)).logits.softmax(1)[0]
        assert record["path"] == str(clip)
        assert (record["grid"], record["tokens"]) == (4, 49)
        assert [entry["class"] for entry in record["top"]] == [f"action {i}" for i in expected.topk(3).indices.tolist()]
        got = torch.tensor([entry["probability"] for entry in record["top"]])
        assert (got - expected.topk(3).values).abs().max() <= 2e-5
        assert "1 clips (0 failed)" in err

    def test_folders_policies_and_errors(self, capsys, folder, tmp_path):
        clips = tmp_path / "clips"
        clips.mkdir()
        for i in range(3):
            encode(clips / f"{i}.mp4", moving(5 + i, seed=i))
        (clips / "3.mp4").write_bytes(b"nothing")
        (clips / "note.txt").write_text("left out")
        args = [clips, "--model", folder[0], "--format", "csv", "--grid", "mixed", "--frames", 5]
        code, out, err = self.run(capsys, *args)
        assert code == 1
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["grid"] for row in rows] == ["4", "3", "2", ""]
        assert [row["tokens"] for row in rows] == ["81", "46", "21", ""]
        assert "not an AVI" in rows[3]["error"]
        assert "4 clips (1 failed)" in err

    def test_weights_are_in_float32(self, capsys, folder, clip):
        for dtype in ("auto", "float32"):
            code, _, err = self.run(capsys, clip, "--model", folder[0], "--dtype", dtype)
            assert code == 0
            assert f"--dtype {dtype}: weights in float32\n" in err
        for dtype in ("bfloat16", "int8"):
            code, out, err = self.run(capsys, clip, "--model", folder[0], "--dtype", dtype)
            assert (code, out) == (2, "")
            assert f"--dtype: clips are classified in float32, got {dtype}; give float32 or auto\n" in err

    def test_an_assigner_chooses(self, capsys, folder, clip, tmp_path):
        torch.manual_seed(0)
        tla = drawn(rf.TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8, 16)))
        tla.save(tmp_path / "tla.safetensors")
        args = [clip, "--model", folder[0], "--assigner", tmp_path / "tla.safetensors", "--format", "json"]
        code, out, _ = self.run(capsys, *args)
        assert code == 0
        (record,) = json.loads(out)
        lengths = record["lengths"]
        assert sum(lengths.values()) == pytest.approx(1, abs=1e-5)
        assert record["grid"] == int(max(lengths, key=lengths.get))

    def test_images_and_clips_do_not_mix(self, capsys, folder, clip, tmp_path):
        image = tmp_path / "a.jpg"
        image.write_bytes(b"")
        code, out, err = self.run(capsys, clip, image, "--model", folder[0])
        assert (code, out) == (2, "")
        assert "a.jpg is an image, and --model" in err
        assert "takes clips; a run takes one kind" in err
        code, out, err = self.run(capsys, image, clip, "--model", "deit_tiny_patch16_224")
        assert (code, out) == (2, "")
        assert "clip.mp4 is a clip, and --model deit_tiny_patch16_224 takes images" in err
        assert "give --model a folder of a TimeSformer" in err

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            (["--grid", "5"], "expected mixed or one of the model's [4, 3, 2], got 5"),
            (["--engine", "ray"], "clips are classified in one process"),
            (["--draft"], "draft"),
            (["--policy", "argmax"], "needs an assigner"),
            (["--weights", "missing.safetensors"], "there is no file"),
        ],
    )
    def test_usage_errors(self, capsys, folder, clip, options, text):
        code, out, err = self.run(capsys, clip, "--model", folder[0], *options)
        assert (code, out) == (2, "")
        assert text in err

    def test_frames_are_for_clips(self, capsys, tmp_path):
        code, _, err = self.run(capsys, tmp_path, "--frames", 3, "--model", "deit_tiny_patch16_224")
        assert code == 2
        assert "--frames" in err

    def test_the_extra_is_named_where_it_is_missing(self, capsys, folder, clip, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        code, _, err = self.run(capsys, clip, "--model", folder[0])
        assert code == 2
        assert 'pip install "revit-fast[video]"' in err


class TestPage:
    TEXT = (Path(__file__).parent.parent / "docs" / "video.md").read_text(encoding="utf-8")

    def blocks(self, language):
        return re.findall(rf"^```{language}\n(.*?)^```", self.TEXT, re.DOTALL | re.MULTILINE)

    def test_python_blocks_run_in_turn(self, clip, tmp_path, monkeypatch):
        transformers = pytest.importorskip("transformers")
        narrow = dict(hidden_size=24, num_attention_heads=3, intermediate_size=32)
        monkeypatch.setattr(transformers, "TimesformerConfig", partial(transformers.TimesformerConfig, **narrow))
        monkeypatch.chdir(tmp_path)
        names = {"clip": clip, "assigner": drawn(rf.TokenLengthAssigner(thumbnail_px=16, widths=(8, 16)))}
        for block in self.blocks("python"):
            exec(compile(block, "docs/video.md", "exec"), names)
        assert names["tokens"].shape == (1, 1 + 14 * 14 * 8, 24)
        assert names["result"].error is None
        assert is_checkpoint(tmp_path / "runs" / "clips")

    def test_commands_are_understood(self):
        lines = [line for block in self.blocks("sh") for line in block.splitlines()]
        assert len(lines) == 3
        for line in lines:
            program, *args = shlex.split(line)
            assert program == "revit-fast"
            build_parser().parse_args(args)

"""Sources whose producer changes them as soon as it has handed them over: results are those of what was handed over."""

import asyncio
import io
import threading

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageSequence
from small_models import GRIDS, PATCH, drawn, make_model

import revit_fast as rf
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.io.held import held
from revit_fast.io.images import ImageError, Source, read_rgb
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.decoding import Decoders
from revit_fast.streaming.results import Result
from revit_fast.video import TimeSformer
from revit_fast.video.pipeline import ClipPipeline, ClipPreprocessor

N = 8
rng = np.random.default_rng(0)
# Few colours in large areas: GIF and JPEG keep them apart.
PIXELS = [np.kron(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) for _ in range(N)]


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def animated(kind, **options):
    first, *others = map(Image.fromarray, PIXELS)
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=others, **options)
    return file.getvalue()


def arrays():
    buffer = np.empty_like(PIXELS[0])
    for pixels in PIXELS:
        buffer[:] = pixels
        yield buffer
    buffer[:] = 0


def views():
    """Views of one buffer that go on after it was filled again."""
    for buffer in arrays():
        yield buffer[::-1, ::2]


def tensors():
    buffer = torch.empty(PIXELS[0].shape, dtype=torch.uint8)
    for pixels in PIXELS:
        yield buffer.copy_(torch.from_numpy(pixels))
    buffer.zero_()


def bytearrays():
    buffer = bytearray()
    for pixels in PIXELS:
        buffer[:] = encoded(pixels)
        yield buffer
    buffer.clear()


def memoryviews():
    buffer = bytearray(1 << 16)
    for pixels in PIXELS:
        data = encoded(pixels)
        buffer[: len(data)] = data
        with memoryview(buffer)[: len(data)] as view:
            yield view


def pasted():
    image = Image.new("RGB", (32, 24))
    for pixels in PIXELS:
        image.paste(Image.fromarray(pixels))
        yield image
    image.paste("black", (0, 0, 32, 24))


def closed(kind):
    def images():
        for pixels in PIXELS:
            with Image.open(io.BytesIO(encoded(pixels, kind))) as image:
                yield image

    return images


def frames(kind, **options):
    return lambda: ImageSequence.Iterator(Image.open(io.BytesIO(animated(kind, **options))))


PRODUCERS = {
    "array": arrays,
    "views": views,
    "tensor": tensors,
    "bytearray": bytearrays,
    "memoryview": memoryviews,
    "pasted": pasted,
    "png": closed("PNG"),
    "jpeg": closed("JPEG"),
    "webp": closed("WEBP"),
    "bmp": closed("BMP"),
    "gif frames": frames("GIF"),
    "apng frames": frames("PNG"),
    "webp frames": frames("WEBP", lossless=True),
    "tiff frames": frames("TIFF"),
}


@pytest.fixture(scope="module")
def pipe():
    return rf.pipeline(make_model(), policy="cycle", n_decoders=1)


@pytest.fixture
def late(pipe, monkeypatch):
    """Nothing is decoded on another thread, and nothing is assigned, before the producer has ended."""
    over, assign, decode = threading.Event(), pipe.prep.assign, pipe.prep.decode

    def assign_late(*args):
        assert over.wait(60)
        return assign(*args)

    def decode_late(source):
        assert not threading.current_thread().name.startswith("revit-fast-decode") or over.wait(60)
        return decode(source)

    monkeypatch.setattr(pipe.prep, "assign", assign_late)
    monkeypatch.setattr(pipe.prep, "decode", decode_late)

    def ended(sources):
        yield from sources
        over.set()

    return ended


def right(pipe, producer):
    """The result of each source alone, before the producer goes on."""
    prep = pipe.prep
    pixels = [read_rgb(source).copy() for source in producer()]
    assert len({p.tobytes() for p in pixels}) == N
    grids = prep.assign(pixels, range(N)).grids
    return [pipe.logits(prep.pack([p], [g]))[0] for p, g in zip(pixels, grids, strict=True)]


def in_session(pipe, sources):
    with pipe.session() as session:
        return [future.result(60) for future in [session.submit(source) for source in sources]]


def streamed(pipe, sources):
    async def run():
        return [result async for result in pipe.stream(sources)]

    return asyncio.run(run())


async def asynchronous(sources):
    for source in sources:
        yield source


ENTRIES = {
    "call": lambda pipe, sources: list(pipe(sources)),
    "session": in_session,
    "stream": streamed,
    "async stream": lambda pipe, sources: streamed(pipe, asynchronous(sources)),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_producer_that_goes_on(pipe, late, producer, entry):
    produce = PRODUCERS[producer]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.prep, "assign", AdaptivePreprocessor.assign.__get__(pipe.prep))
        expected = right(pipe, produce)
    results = ENTRIES[entry](pipe, late(produce()))
    assert [r.error for r in results] == [None] * N
    wrong = [
        i for i, (r, logits) in enumerate(zip(results, expected, strict=True)) if not torch.equal(r.logits, logits)
    ]
    assert wrong == []


@pytest.mark.parametrize("producer", PRODUCERS)
def test_classify_and_assign(pipe, producer):
    produce = PRODUCERS[producer]
    expected = right(pipe, produce)
    tops = [Result(0, "", logits=logits).top(2) for logits in expected]
    got = [entry["predictions"] for entry in pipe.classify(produce(), 2)]
    assert [[e["label"] for e in top] for top in got] == [[e["label"] for e in top] for top in tops]
    busy = pipe.with_policy(("entropy", [1.5, 1.0]))
    grids = busy.prep.assign([read_rgb(source).copy() for source in produce()]).grids
    assert [r.grid for r in busy.assign(produce())] == grids


def test_a_preprocessor_of_a_generator(pipe):
    prep = AdaptivePreprocessor.for_model(make_model(), policy="cycle")
    got, expected = prep(arrays()), prep(PIXELS)
    assert torch.equal(got.batch.data, expected.batch.data)


@pytest.mark.parametrize("entry", ENTRIES)
def test_clips(entry):
    options = dict(grids=GRIDS, patch_size=PATCH, num_classes=5, num_frames=2, embed_dim=16, depth=1, num_heads=2)
    model = drawn(TimeSformer(**options))
    pipe = ClipPipeline(model, ClipPreprocessor.for_model(model, policy="cycle"), n_decoders=1)
    clips = [np.stack([PIXELS[i], PIXELS[(i + 3) % N], PIXELS[i]]) for i in range(N)]
    expected = [r.logits for r in pipe(clips)]

    def produce():
        buffer = np.empty_like(clips[0])
        for clip in clips:
            buffer[:] = clip
            yield buffer
        buffer[:] = 0

    results = ENTRIES[entry](pipe, produce())
    assert all(torch.equal(r.logits, logits) for r, logits in zip(results, expected, strict=True))


class TestCopies:
    @pytest.mark.parametrize("copy", [True, False])
    def test_only_what_a_producer_could_change(self, copy):
        """Nothing in a list or tuple is copied, and nothing with copy=False; a result has the source itself."""

        def decoded(sources):
            decoders = Decoders(sources, read_rgb, 1, StageTimes(), copy=copy)
            items = []
            while len(items) < N:
                items += decoders.chunk(60)[0]
            decoders.close()
            assert all(item.source is pixels for item, pixels in zip(items, PIXELS, strict=True))
            return [item.decoded.result().image for item in items]

        for sources in (PIXELS, tuple(PIXELS)):
            assert all(image is pixels for image, pixels in zip(decoded(sources), PIXELS, strict=True))
        for image, pixels in zip(decoded(iter(PIXELS)), PIXELS, strict=True):
            assert np.array_equal(image, pixels)
            assert np.shares_memory(image, pixels) is not copy

    def test_every_entry_point_hands_the_choice_on(self, pipe):
        """What was filled again shows that it was not copied."""
        last = right(pipe.with_policy(("fixed", GRIDS[0])), arrays)[-1]
        pipe = pipe.with_policy(("fixed", GRIDS[0]))
        go = threading.Event()
        assign = pipe.prep.assign
        pipe.prep.assign = lambda *args: (go.wait(60), assign(*args))[1]

        def ended():
            buffer = np.zeros_like(PIXELS[0])
            for _ in range(3):
                yield buffer
            buffer[:] = PIXELS[-1]
            go.set()

        async def run():
            return [r async for r in pipe.stream(ended(), copy=False)]

        results = [*pipe(ended(), copy=False), *asyncio.run(run())]
        with pipe.session(copy=False) as session:
            results += [f.result(60) for f in [session.submit(source) for source in ended()]]
        assert len(results) == 9
        assert all(torch.equal(r.logits, last) for r in results)
        top = Result(0, "", logits=last).top(1)
        assert all(entry["predictions"] == top for entry in pipe.classify(ended(), 1, copy=False))

    @pytest.mark.parametrize("source", ["a.png", b"abc", Source("b.png"), 7], ids=str)
    def test_what_cannot_change_is_handed_on(self, source):
        assert held(source).kept is source


class TestHeldImages:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_the_producer_does_not_decode(self, kind):
        """The producer's image stays as it was, and can still be loaded."""
        image = Image.open(io.BytesIO(encoded(PIXELS[0], kind)))
        position = image.fp.tell()
        kept = held(image).kept
        assert image.tile
        assert kept.tile
        assert image.fp.tell() == position
        assert np.array_equal(read_rgb(kept), read_rgb(image))

    def test_in_draft_mode(self):
        image = Image.open(io.BytesIO(encoded(np.kron(PIXELS[0], np.ones((4, 4, 1), np.uint8)), "JPEG")))
        image.draft("L", (32, 24))
        kept = held(image).kept
        assert kept.size == image.size == (32, 24)
        assert np.array_equal(read_rgb(kept), read_rgb(image))

    @pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
    @pytest.mark.parametrize("changed", [False, True], ids=["in the file", "changed"])
    @pytest.mark.parametrize("loaded", [False, True], ids=["lazy", "loaded"])
    def test_orientation(self, kind, changed, loaded):
        exif = Image.Exif()
        exif[0x0112] = 1 if changed else 6
        image = Image.open(io.BytesIO(encoded(PIXELS[0], kind, exif=exif.tobytes())))
        if loaded:
            image.load()
        if changed:
            image.getexif()[0x0112] = 6
        pixels = read_rgb(held(image).kept)
        assert pixels.shape == (32, 24, 3)
        assert np.array_equal(pixels, read_rgb(image))

    @pytest.mark.parametrize("loaded", [False, True])
    def test_transparent_palettes(self, loaded):
        image = Image.fromarray(PIXELS[0]).quantize(8)
        image.info["transparency"] = 2
        file = io.BytesIO()
        image.save(file, "PNG")
        image = Image.open(file)
        if loaded:
            image.load()
        assert np.array_equal(read_rgb(held(image).kept), read_rgb(file.getvalue()))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
    def test_damaged_and_closed(self, pipe, kind):
        """One error in its place, with the reason that the image gives without a producer."""
        data = encoded(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
        closed = Image.open(io.BytesIO(data))
        closed.close()

        def torn():
            with Image.open(io.BytesIO(data[: len(data) * 2 // 3])) as image:
                yield image
            yield closed
            yield PIXELS[0]

        if kind == "WEBP":  # its decoder refuses the torn file when it is opened
            data = encoded(PIXELS[0], kind) * 2
        results = list(pipe(torn()))
        assert results[-1].error is None
        for result in results[:-1]:
            if result.error is not None:
                assert result.error == f"<{type(result.source).__name__}>: {result.reason}"
        assert results[1].error is not None
        if kind != "WEBP":
            with pytest.raises(ImageError) as reason:
                read_rgb(Image.open(io.BytesIO(data[: len(data) * 2 // 3])))
            assert results[0].reason == str(reason.value)

    def test_the_reason_of_a_buffer_that_was_filled_again(self, pipe):
        buffer = bytearray(b"no image")

        def produce():
            yield buffer
            buffer.extend(b" at all")
            with memoryview(buffer) as view:
                yield view

        results = list(pipe(produce()))
        reason = f"not an image that Pillow {PIL.__version__} reads"
        assert [r.error for r in results] == [f"<{n} bytes>: {reason}" for n in (8, 15)]
        assert {r.reason for r in results} == {reason}

"""resize_patchify is bit-equal to Pillow 13 + ToTensor + Normalize; the PyTorch reference is too."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from revit_fast import PackedBatch, ops, reference
from revit_fast.ops import _library
from revit_fast.ops.resize import STACKED_BYTES, resized_rows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the C++ extension is not built")


def noise(height: int, width: int, channels: int | None = 3, seed: int = 0) -> np.ndarray:
    """Extreme values in half of the pixels, so that the overshoot of bicubic weights must be clipped."""
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels is None else (height, width, channels)
    values = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.where(rng.random(shape) < 0.5, values, np.where(values < 128, 0, 255).astype(np.uint8))


def pillow(image: np.ndarray, size, box=None, interpolation="bicubic") -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1:] == (1,) else image))
    return image.resize((size[1], size[0]), FILTERS[interpolation], box=box).convert("RGB")


def to_normalised(image: Image.Image, mean, std) -> torch.Tensor:
    """torchvision's ToTensor and Normalize, spelt out so that the tests run beside any torch; held equal below."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    return values.sub(mean).div(std)


def test_normalisation_is_that_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    for mean, std in ((MEAN, STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0, 0.1, 1 / 3), (1, 0.7, 1 / 3))):
        expected = transforms.normalize(transforms.to_tensor(image), list(mean), list(std))
        assert torch.equal(to_normalised(image, mean, std), expected)


def pillow_rows(images, sizes, patch_size, boxes=None, interpolation="bicubic", mean=MEAN, std=STD) -> torch.Tensor:
    boxes = boxes or [None] * len(images)
    resized = [pillow(*args, interpolation) for args in zip(images, sizes, boxes, strict=True)]
    return PackedBatch.from_images([to_normalised(image, mean, std) for image in resized], patch_size).data


@st.composite
def batches(draw):
    patch = draw(st.sampled_from([1, 2, 7, 14, 16]))
    # One pixel, primes, the neighbours of vector widths, and thin images in both directions.
    side = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 3, 61, 97, 101]))
    shape = st.one_of(st.tuples(side, side), st.sampled_from([(997, 5), (5, 997), (1, 500), (500, 1)]))
    images, sizes, boxes = [], [], []
    for seed in range(draw(st.integers(1, 3))):
        height, width = draw(shape)
        grid_side = st.integers(1, max(1, 48 // patch))
        sizes.append((patch * draw(grid_side), patch * draw(grid_side)))
        kind = draw(st.sampled_from(["plain", "strided", "flipped", "grey", "grey1", "planar"]))
        if kind == "strided":
            image = noise(2 * height, width + 3, seed=seed)[::2, 2 : width + 2]
        elif kind == "flipped":
            image = noise(height, width, seed=seed)[::-1, ::-1]
        elif kind == "planar":
            image = np.moveaxis(noise(3 * height, width, None, seed=seed).reshape(3, height, width), 0, -1)
        else:
            image = noise(height, width, {"plain": 3, "grey": None, "grey1": 1}[kind], seed=seed)
        images.append(image)
        if draw(st.booleans()):
            boxes.append(None)
            continue
        fractions = st.one_of(st.floats(0, 1), st.integers(0, 4).map(lambda n: n / 4))
        edges = []
        for n in (width, height):
            begin = n * draw(fractions) * 0.9
            edges.append((begin, min(float(n), begin + max(0.01, n * draw(fractions)))))
            if draw(st.booleans()):  # on whole pixels: with a matching size, Pillow's crop
                edges[-1] = (float(int(begin)), float(int(begin) + 1))
        boxes.append((edges[0][0], edges[1][0], edges[0][1], edges[1][1]))
    return images, sizes, patch, boxes, draw(st.sampled_from(list(FILTERS)))


@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_equals_pillow_bitwise(isa, batch):
    images, sizes, patch, boxes, interpolation = batch
    packed = ops.resize_patchify(images, sizes, patch, mean=MEAN, std=STD, boxes=boxes, interpolation=interpolation)
    truth = pillow_rows(images, sizes, patch, boxes, interpolation)
    assert torch.equal(packed.data, truth)
    assert packed.grids == tuple((h // patch, w // patch) for h, w in sizes)


@settings(max_examples=examples(60), deadline=None)
@given(batch=batches())
def test_reference_equals_pillow_bitwise(batch):
    images, sizes, patch, boxes, interpolation = batch
    tensors = [torch.from_numpy(image.copy()) for image in images]
    tensors = [t.unsqueeze(-1) if t.dim() == 2 else t for t in tensors]
    whole = [(0, 0, t.shape[1], t.shape[0]) for t in tensors]
    edges = [box or full for box, full in zip(boxes, whole, strict=True)]
    rows = reference.resize_patchify(tensors, edges, sizes, patch, None, bicubic=interpolation == "bicubic")
    resized = [np.asarray(pillow(*args, interpolation)) for args in zip(images, sizes, boxes, strict=True)]
    pixels = [torch.from_numpy(r.copy()).permute(2, 0, 1) for r in resized]
    assert torch.equal(rows, PackedBatch.from_images(pixels, patch).data)


@pytest.mark.parametrize(
    ("source", "target"), [((375, 500), (224, 224)), ((500, 375), (112, 160)), ((1201, 40), (64, 32))]
)
def test_photo_sizes_in_every_interpolation(isa, source, target):
    image = noise(*source)
    for interpolation in FILTERS:
        rows = ops.resize_patchify([image], target, 16, mean=MEAN, std=STD, interpolation=interpolation).data
        assert torch.equal(rows, pillow_rows([image], [target], 16, interpolation=interpolation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3), (None, None)])
def test_every_value_of_every_channel_is_normalised_as_by_torchvision(isa, dtype, mean, std):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    rows = ops.resize_patchify([image], 16, 4, mean=mean, std=std, dtype=dtype).data
    truth = pillow_rows([image], [(16, 16)], 4, mean=mean or (0, 0, 0), std=std or (1, 1, 1))
    assert torch.equal(rows, truth.to(dtype))


def test_uint8_rows_await_their_normalisation(isa):
    image = noise(50, 61)
    packed = ops.resize_patchify([image], (32, 48), 16, mean=MEAN, std=STD, dtype=torch.uint8)
    pixels = torch.from_numpy(np.asarray(pillow(image, (32, 48))).copy()).permute(2, 0, 1)
    assert torch.equal(packed.data, PackedBatch.from_images([pixels], 16).data)
    assert torch.equal(packed.normalization, torch.tensor([MEAN, STD]))
    plain = ops.resize_patchify([image], (32, 48), 16, dtype=torch.uint8)
    assert torch.equal(plain.normalization, torch.tensor([[0.0] * 3, [1.0] * 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_default_device_and_dtype_have_no_say(dtype):
    resize = partial(ops.resize_patchify, [noise(9, 11)], 4, 2, mean=(0.5, 0.25, 0.125), std=(1, 2, 4), dtype=dtype)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            there = resize()
    finally:
        torch.set_default_dtype(before)
    here = resize()
    assert torch.equal(there.data, here.data)
    if dtype == torch.uint8:
        assert there.normalization.dtype == torch.float32
        assert torch.equal(there.normalization, here.normalization)


def test_a_fake_call_leaves_nothing_to_real_ones():
    image, options = np.full((5, 5, 3), 51, np.uint8), {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.resize_patchify([image], 4, 4, **options)
    real = ops.resize_patchify([image], 4, 4, **options)
    assert type(fake.data) is not torch.Tensor
    assert fake.data.shape == real.data.shape
    expected = (torch.tensor(0.2) - torch.tensor(options["mean"])) / torch.tensor(options["std"])
    torch.testing.assert_close(real.data.view(16, 3), expected.expand(16, 3))


def test_result_does_not_depend_on_pack_or_threads(isa):
    images = [noise(375, 500, seed=1), noise(40, 997, seed=2), noise(997, 5, seed=3)]
    sizes = [(224, 224), (48, 160), (16, 16)]
    alone = torch.cat([ops.resize_patchify([im], [s], 16).data for im, s in zip(images, sizes, strict=True)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(ops.resize_patchify(images, sizes, 16).data, alone), threads
            backwards = ops.resize_patchify(images[::-1], sizes[::-1], 16).split()
            assert torch.equal(torch.cat(backwards[::-1]), alone), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (13, 28, 3), (90, 70, 3)])
@pytest.mark.parametrize("boxes", [None, (1.5, 2, 10, 12.25), [None, (0, 0, 9, 9), None, (3, 3, 12, 5), None]])
def test_images_of_one_shape(shape, boxes):
    """Small arrays of one shape go in as one; the result is that of each alone, in any memory."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(5)]
    images[1] = np.frombuffer(images[1].tobytes(), np.uint8).reshape(shape)  # read-only
    images[2] = images[2][::-1]
    images[3] = np.asfortranarray(images[3])
    assert (images[0].nbytes <= STACKED_BYTES) == (shape != (90, 70, 3))
    each = boxes if isinstance(boxes, list) else [boxes] * 5
    resize = partial(ops.resize_patchify, sizes=14, patch_size=2, mean=MEAN, std=STD)
    alone = [resize([image], boxes=[box]).data for image, box in zip(images, each, strict=True)]
    assert torch.equal(resize(images, boxes=boxes).data, torch.cat(alone))
    mixed = resize([*images, torch.from_numpy(images[0])])
    assert torch.equal(mixed.split()[0], mixed.split()[5])


def test_read_only_and_tensor_images_are_taken_as_they_are():
    image = noise(30, 40)
    frozen = image.copy()
    frozen.flags.writeable = False
    truth = ops.resize_patchify([image], 16, 4).data
    assert torch.equal(ops.resize_patchify([frozen], 16, 4).data, truth)
    assert torch.equal(ops.resize_patchify([torch.from_numpy(image)], 16, 4).data, truth)


def test_lengths_and_one_box_for_all_are_handed_on():
    images = [noise(30, 40, seed=1), noise(50, 60, seed=2)]
    box = (1.5, 2.0, 20.25, 29.0)
    packed = ops.resize_patchify(images, [8, 4], 2, boxes=box, lengths=(16, 4))
    assert packed.length_index.tolist() == [0, 1]
    assert packed.seqlens == (16, 4)
    truth = pillow_rows(images, [(8, 8), (4, 4)], 2, [box, box], mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(packed.data, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_without_a_pack_are_those_of_the_pack(packs_made, dtype):
    images, sizes = [noise(30, 40, seed=1), noise(50, 60, None, seed=2)], [(8, 4), (6, 6)]
    options = {"mean": MEAN, "std": STD, "boxes": [(1.5, 2.0, 20.25, 29.0), None], "dtype": dtype}
    rows, grids = resized_rows(images, sizes, 2, **options)
    assert packs_made == []
    packed = ops.resize_patchify(images, sizes, 2, **options)
    assert packs_made == [2]
    assert torch.equal(rows, packed.data)
    assert grids.tolist() == [[4, 2], [3, 3]] == [list(grid) for grid in packed.grids]
    if dtype == torch.uint8:
        assert torch.equal(packed.normalization, torch.tensor([MEAN, STD]))
    else:
        assert packed.normalization is None


@needs_extension
def test_gil_is_released():
    image = noise(3000, 4000)
    progress, done = [], threading.Event()

    def count():
        while not done.is_set():
            progress.append(time.perf_counter())
            time.sleep(0.0005)

    counter = threading.Thread(target=count)
    counter.start()
    begin = time.perf_counter()
    ops.resize_patchify([image] * 8, 224, 16)
    end = time.perf_counter()
    done.set()
    counter.join()
    during = [t for t in progress if begin < t < end]
    assert len(during) >= 3, f"another thread ran {len(during)} times in {end - begin:.3f} s"


def raw_arguments(table=True):
    return (
        [torch.from_numpy(noise(9, 11)), torch.from_numpy(noise(5, 4))],
        torch.tensor([[0.0, 0, 11, 9], [0.5, 1, 4, 5]], dtype=torch.float64),
        torch.tensor([[4, 8], [2, 2]]),
        2,
        torch.randn(3, 256) if table else None,
        True,
        9,
    )


@pytest.mark.parametrize("table", [True, False])
def test_opcheck(table):
    torch.library.opcheck(torch.ops.revit_fast.resize_patchify.default, raw_arguments(table))


def test_raw_op_compiles():
    compiled = torch.compile(lambda *a: torch.ops.revit_fast.resize_patchify(*a) * 2, fullgraph=True, backend="eager")
    arguments = raw_arguments()
    assert torch.equal(compiled(*arguments), torch.ops.revit_fast.resize_patchify(*arguments) * 2)


@needs_extension
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, [torch.zeros(9, 11, 3), torch.zeros(5, 4, 3)], r"images\[0\]"),
        (0, [torch.zeros(9, 11, 4, dtype=torch.uint8)] * 2, r"images\[0\]"),
        (0, [torch.zeros(0, 11, 3, dtype=torch.uint8)] * 2, r"images\[0\]"),
        (1, torch.zeros(2, 4), "boxes"),
        (1, torch.full((2, 4), float("nan"), dtype=torch.float64), r"boxes\[0\]"),
        (1, torch.tensor([[0.0, 0, 12, 9], [0, 0, 4, 5]], dtype=torch.float64), r"boxes\[0\]"),
        (2, torch.zeros(2, 2), "sizes"),
        (2, torch.tensor([[4, 8], [3, 2]]), r"sizes\[1\]"),
        (3, 0, "patch_size"),
        (4, torch.zeros(3, 255), "table"),
        (4, torch.zeros(3, 256, dtype=torch.float64), "table"),
        (6, 8, "n_rows"),
        (0, [], "images must not be empty"),
    ],
)
def test_raw_op_refuses(position, value, message):
    arguments = list(raw_arguments())
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.revit_fast.resize_patchify(*arguments)


GOOD = noise(9, 11)
call = partial(ops.resize_patchify, [GOOD, GOOD], 4, 2)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda: ops.resize_patchify([], 4, 2), ValueError, "images: .*empty"),
        (lambda: ops.resize_patchify(GOOD, 4, 2), TypeError, r"images: .*wrap it"),
        (lambda: ops.resize_patchify([GOOD / 255], 4, 2), TypeError, r"images\[0\]: .*float64.*255"),
        (lambda: ops.resize_patchify([torch.rand(9, 9, 3)], 4, 2), TypeError, r"images\[0\]: .*float32.*255"),
        (lambda: ops.resize_patchify([GOOD.astype(np.uint16)], 4, 2), TypeError, r"images\[0\]: .*uint16.*257"),
        (lambda: ops.resize_patchify([GOOD / 255] * 2, 4, 2), TypeError, r"images\[0\]: .*float64.*255"),
        (lambda: ops.resize_patchify([noise(9, 9, 4)] * 2, 4, 2), ValueError, r"images\[0\]: .*alpha"),
        (lambda: ops.resize_patchify([GOOD, GOOD > 3], 4, 2), TypeError, r"images\[1\]: .*bool"),
        (lambda: ops.resize_patchify([GOOD[:0]] * 2, 4, 2), ValueError, r"images\[0\]: .*at least one pixel"),
        (lambda: ops.resize_patchify([GOOD > 3], 4, 2), TypeError, r"images\[0\]: .*bool.*255"),
        (lambda: ops.resize_patchify([Image.fromarray(GOOD)], 4, 2), TypeError, r"images\[0\]: .*asarray"),
        (lambda: ops.resize_patchify([noise(9, 9, 4)], 4, 2), ValueError, r"images\[0\]: .*alpha"),
        (lambda: ops.resize_patchify([GOOD, noise(3, 9, 8)], 4, 2), ValueError, r"images\[1\]: .*permute"),
        (lambda: ops.resize_patchify([GOOD[:0]], 4, 2), ValueError, r"images\[0\]: .*at least one pixel"),
        (
            lambda: ops.resize_patchify([torch.empty(4, 4, 3, dtype=torch.uint8, device="meta")], 4, 2),
            ValueError,
            "CPU",
        ),
        (lambda: ops.resize_patchify([GOOD], (4, 5), 2), ValueError, "sizes: .*multiples of patch_size 2, got 4x5"),
        (lambda: ops.resize_patchify([GOOD], 0, 2), ValueError, "sizes: .*positive multiples"),
        (lambda: ops.resize_patchify([GOOD], [4, 4], 2), ValueError, r"sizes: expected one per image \(1\)"),
        (lambda: ops.resize_patchify([GOOD], 4.0, 2), TypeError, "sizes: "),
        (lambda: ops.resize_patchify([GOOD], [(4, 4, 4)], 2), TypeError, r"sizes\[0\]: "),
        (lambda: ops.resize_patchify([GOOD], 4, 0), ValueError, "patch_size: "),
        (lambda: call(boxes=[(0, 0, 4, 4)]), ValueError, r"boxes: expected one per image \(2\)"),
        (lambda: call(boxes=(0, 0, 12, 9)), ValueError, r"boxes\[0\]: .*within the image \(0, 0, 11, 9\)"),
        (lambda: call(boxes=[None, (-1, 0, 4, 4)]), ValueError, r"boxes\[1\]: .*within"),
        (lambda: call(boxes=(4, 0, 4, 4)), ValueError, r"boxes\[0\]: expected left < right"),
        (lambda: call(boxes=(0, 0, float("nan"), 4)), ValueError, r"boxes\[0\]: "),
        (lambda: call(boxes=[None, (0, 0, 4)]), TypeError, r"boxes\[1\]: expected four"),
        (lambda: call(std=(1, 0, 1)), ValueError, "std: must not be zero"),
        (lambda: call(mean=(1, 0)), ValueError, "mean: expected three"),
        (lambda: call(mean=0.5), TypeError, "mean: expected three"),
        (lambda: call(interpolation="nearest"), ValueError, "interpolation: .*'nearest'"),
        (lambda: call(dtype=torch.float64), TypeError, "dtype: .*float64"),
    ],
)
def test_bad_input_is_named(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()

"""The synthetic set keeps its promise: after resizing, classes part at the sufficient length, and not below it."""

import numpy as np
import pytest
import torch

from bench.experiments import gratings
from bench.experiments.gratings import band, gratings_at, make_synthetic, resize_matrix, without_coarse
from revit_fast import ops
from revit_fast.adaptive.preprocess import AdaptivePreprocessor

pytestmark = pytest.mark.beside

SETS = [((14, 10, 7), 2, "bicubic"), ((7, 5, 4), 4, "bicubic"), ((4, 2), 4, "bilinear")]
N_CLASSES = 4


def seen(images, side, patch_size, interpolation):
    """Pixels `[N, side, side]` as the model's preprocessing shows them, in float64."""
    prep = AdaptivePreprocessor(
        grids=(side // patch_size, 1),
        patch_size=patch_size,
        crop_pct=1.0,
        policy="cycle",
        interpolation=interpolation,
        dtype=torch.uint8,
    )
    grid = side // patch_size
    rows = prep.pack([images.image(i) for i in range(len(images))], [grid] * len(images)).data[:, ::3]
    rows = rows.view(len(images), grid, grid, patch_size, patch_size).transpose(2, 3)
    return rows.reshape(len(images), side, side).double().numpy()


def nearest(pixels, length, sides, interpolation):
    """The class whose gratings, of any frequency and phase, explain most of each image: a matched filter.

    It knows how images are made; what it cannot tell apart, no model can.
    """
    scores = np.zeros((N_CLASSES, len(pixels)))
    weights = resize_matrix(sides[0], pixels.shape[1], interpolation)
    flat = (pixels - pixels.mean(axis=(1, 2), keepdims=True)).reshape(len(pixels), -1)
    for c in range(N_CLASSES):
        for frequency in np.linspace(*band(length, sides), 7):
            pair = gratings_at(np.full(2, frequency), np.array([0, np.pi / 2]), np.full(2, c), N_CLASSES, sides[0])
            pair = weights @ without_coarse(pair, sides[length + 1 :], interpolation) @ weights.T
            basis = np.linalg.svd(pair.reshape(2, -1), full_matrices=False)[2]
            scores[c] = np.maximum(scores[c], ((flat @ basis.T) ** 2).sum(axis=1))
    return scores.argmax(axis=0)


@pytest.mark.parametrize(("grids", "patch_size", "interpolation"), SETS)
def test_classes_part_at_the_sufficient_length_and_not_below(grids, patch_size, interpolation):
    sides = [g * patch_size for g in grids]
    images, sufficient = make_synthetic(300 * len(grids), grids, patch_size, 0, N_CLASSES, interpolation)
    for shown, side in enumerate(sides):
        pixels = seen(images, side, patch_size, interpolation)
        for length in range(len(grids)):
            mine = sufficient == length
            right = (nearest(pixels[mine], length, sides, interpolation) == images.labels[mine]).mean()
            if shown <= length:
                assert right > 0.98, f"{side} px show what {sides[length]} px suffice for"
            else:
                assert abs(right - 1 / N_CLASSES) < 4 * np.sqrt(0.25 * 0.75 / 300), f"{side} px: {right}"


@pytest.mark.parametrize(("grids", "patch_size", "interpolation"), SETS)
def test_without_noise_short_lengths_show_the_same_of_every_class(monkeypatch, grids, patch_size, interpolation):
    """Of gratings of contrast 45 and more, at most a grey level is left of what rounding makes of them."""
    sides = [g * patch_size for g in grids]
    monkeypatch.setattr(gratings, "NOISE", 0.0)
    monkeypatch.setattr(gratings, "BACKGROUND", 0.0)
    images, sufficient = make_synthetic(60 * len(grids), grids, patch_size, 1, N_CLASSES, interpolation)
    for shown, side in enumerate(sides):
        pixels = seen(images, side, patch_size, interpolation)
        spread = (pixels - np.median(pixels, axis=(1, 2), keepdims=True)).std(axis=(1, 2))
        assert spread[sufficient < shown].max(initial=0) < 0.8
        assert spread[sufficient >= shown].min() > 10


def test_the_matrix_is_pillows():
    """The float weights that patterns are taken away with are those of the resize that models see, up to rounding."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    for interpolation in ("bicubic", "bilinear"):
        weights = resize_matrix(28, 20, interpolation)
        got = ops.resize_patchify([image], 20, 20, interpolation=interpolation, dtype=torch.uint8).data
        got = got.view(20, 20, 3)[..., 0].numpy()
        assert np.abs(np.clip(weights @ np.clip(image @ weights.T, 0, 255), 0, 255) - got).max() <= 1.2


def test_balanced_seeded_and_varied():
    images, sufficient = make_synthetic(240, seed=3)
    again, _ = make_synthetic(240, seed=3)
    other, _ = make_synthetic(240, seed=4)
    pixels = np.stack([images.image(i) for i in range(240)])
    np.testing.assert_array_equal(pixels, np.stack([again.image(i) for i in range(240)]))
    assert not np.array_equal(pixels, np.stack([other.image(i) for i in range(240)]))
    counts = np.zeros((3, 4), int)
    np.add.at(counts, (sufficient, images.labels), 1)
    assert (counts == 20).all()
    assert len({image.tobytes() for image in pixels}) == 240
    assert (pixels == 255).mean() < 1e-3, "clipping would bring back what was taken away"
    assert (pixels == 0).mean() < 1e-3
    assert images.image(0).shape == (28, 28)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"grids: .* px would show .*at most three grids"):
        make_synthetic(100, (14, 12, 10, 7))
    with pytest.raises(ValueError, match="n_classes: expected 2 to 6"):
        make_synthetic(100, n_classes=7)
    with pytest.raises(ValueError, match="n: expected"):
        make_synthetic(0)

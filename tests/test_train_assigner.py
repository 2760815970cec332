"""Training of the assigner: what it learns, that it is the same every time, what is kept and what is refused."""

import numpy as np
import pytest
import tiny_training
import torch
import torch.nn.functional as F
from tiny_training import GRIDS

import revit_fast as rf
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.io.images import ImageError
from revit_fast.train.assigner import _LabelLoss, _SufficesLoss, make_thumbnails, train_assigner
from revit_fast.train.data import ArrayImages

OPTIONS = dict(epochs=6, batch_size=64, seed=1)


def make_assigner(seed=0, thumbnail_px=32, widths=(8, 16)):
    torch.manual_seed(seed)
    return rf.TokenLengthAssigner(GRIDS, thumbnail_px=thumbnail_px, widths=widths)


def pixels(images):
    return [images.image(i) for i in range(len(images))]


def train(seed=0, **options):
    images, sufficient = tiny_training.synthetic(900, 5)
    tla = make_assigner(seed)
    return tla, train_assigner(tla, images, sufficient, **OPTIONS | options)


def test_it_learns_the_sufficient_length():
    """On images of other seeds; chance is one third."""
    tla, history = train(epochs=12)
    images, sufficient = tiny_training.synthetic(600, 6)
    assert (tla.predict_proba(pixels(images)).argmax(1).numpy() == sufficient).mean() > 0.9
    assert history.epochs[history.best - 1].held_out_accuracy > 0.9
    assert not history.collapsed
    assert not tla.training
    losses = [epoch.held_out_loss for epoch in history.epochs]
    assert history.best == 1 + losses.index(min(losses))


def test_the_same_bits_every_time():
    runs = [train(), train(), train(seed=3), train(flip=False)]
    images = pixels(tiny_training.synthetic(600, 6)[0])[:50]
    p = [tla.predict_proba(images) for tla, _ in runs]
    assert torch.equal(p[0], p[1])
    assert runs[0][1].epochs == runs[1][1].epochs
    assert not torch.equal(p[0], p[2]), "another initialisation"
    assert not torch.equal(p[0], p[3]), "without flips"


def test_the_best_epoch_is_kept_and_calibrated():
    """Bit for bit the assigner as it was after that epoch: a shorter training is not the same, its schedule differs."""
    images, sufficient = tiny_training.synthetic(900, 5)
    tla = make_assigner()
    states = []

    def keep(epoch):
        states.append({name: t.clone() for name, t in tla.network.state_dict().items()})

    # A rate at which epochs differ in both directions.
    history = train_assigner(tla, images, sufficient, **OPTIONS | {"lr": 0.05, "epochs": 8}, progress=keep)
    kept = tla.network.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in states[history.best - 1].items())
    held_out = [images.image(int(i)) for i in history.held_out]
    other = make_assigner()
    other.network.load_state_dict(kept)
    expected = other.eval().calibrate(held_out, sufficient[history.held_out])
    assert tla.calibration.temperature == expected.temperature
    assert tla.calibration.entropies == expected.entropies
    np.testing.assert_array_equal(tla.calibration.suffices, expected.suffices)


def test_thumbnails_are_those_of_inference():
    """Of the region that the model sees, and normalised to the same bits."""
    rng = np.random.default_rng(0)
    images = ArrayImages([rng.integers(0, 256, (40 + i, 70, 3), dtype=np.uint8) for i in range(9)], [0] * 9, ["a"])
    model = rf.ReViT(grids=GRIDS, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=1).eval()
    tla = make_assigner().eval()
    places, rows = make_thumbnails(tla, images, model, np.array([7, 2, 3]))
    assert places.tolist() == [7, 2, 3]
    prep = AdaptivePreprocessor.for_model(model, tla)
    some = [images.image(i) for i in (7, 2, 3)]
    assert torch.equal(tla.normalised(rows.flatten(0, 1)), tla.thumbnails(some, prep.seen(some)))
    assert not torch.equal(tla.normalised(rows.flatten(0, 1)), tla.thumbnails(some))


def test_dropped_and_unreadable_images_are_left_out():
    class Torn(ArrayImages):
        def image(self, i):
            if i % 5 == 0:
                raise ImageError("torn")
            return super().image(i)

    images, sufficient = tiny_training.synthetic(900, 5)
    labels = sufficient.copy()
    labels[1::5] = -1
    torn = Torn(np.stack(pixels(images)), images.labels, images.classes)
    a = make_assigner()
    history = train_assigner(a, torn, labels, **OPTIONS)
    assert not np.isin(history.held_out % 5, [0, 1]).any()
    b = make_assigner()
    rest = np.flatnonzero((np.arange(900) % 5) > 1)
    train_assigner(b, images.subset(rest), sufficient[rest], **OPTIONS)
    some = pixels(images)[:20]
    assert torch.equal(a.predict_proba(some), b.predict_proba(some))


class TestLosses:
    def test_labels(self):
        logits, labels = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 3, (50,))
        plain = _LabelLoss(torch.ones(3))(logits, labels, None)
        assert plain.item() == pytest.approx(F.cross_entropy(logits, labels).item())
        weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
        by_hand = sum(-weights[y] * x.log_softmax(0)[y] for x, y in zip(logits, labels, strict=True)) / 50
        assert _LabelLoss(weights)(logits, labels, None).item() == pytest.approx(by_hand.item())

    def test_suffices(self):
        """Binary cross-entropies of the cumulative probabilities, one by one."""
        logits, labels = 3 * torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 4, (40,))
        cumulative = logits.softmax(1).flip(1).cumsum(1).flip(1)[:, 1:]  # P(label <= length), the longest left out
        for enough in (torch.rand(40, 4).double(), (torch.rand(40, 4) < 0.5).double()):
            got = _SufficesLoss(torch.ones(4))(logits, labels, enough)
            assert got.item() == pytest.approx(F.binary_cross_entropy(cumulative, enough[:, 1:]).item())

    def test_it_learns_by_either(self):
        images, sufficient = tiny_training.synthetic(900, 5)
        enough = sufficient[None] >= np.arange(3)[:, None]
        tla = make_assigner()
        train_assigner(tla, images, sufficient, sufficiency=enough, objective="suffices", **OPTIONS | {"epochs": 12})
        others, truth = tiny_training.synthetic(600, 6)
        assert (tla.predict_proba(pixels(others)).argmax(1).numpy() == truth).mean() > 0.85


def flat_images(n):
    """Images that say nothing about themselves."""
    return ArrayImages(np.full((n, 28, 28), 99, np.uint8), [0] * n, ["a"])


class TestBalance:
    def test_collapse_is_seen(self):
        labels = np.array([0] * 30 + [2] * 170)
        tla = make_assigner(thumbnail_px=16, widths=(4,))
        history = train_assigner(tla, flat_images(200), labels, **OPTIONS)
        assert history.collapsed
        assert history.to_json()["collapsed"] is True
        only = train_assigner(make_assigner(thumbnail_px=16, widths=(4,)), flat_images(50), labels[-50:], **OPTIONS)
        assert not only.collapsed, "there was nothing else to predict"

    def test_balanced_weights_make_rare_labels_as_likely(self):
        """On noise, which says nothing of the label, probabilities are the shares of labels, or equal."""
        noise = np.random.default_rng(0).integers(0, 256, (1000, 28, 28), dtype=np.uint8)
        images, labels = ArrayImages(noise, [0] * 1000, ["a"]), np.array([0] * 150 + [2] * 850)
        shares = {}
        for balanced in (False, True):
            tla = make_assigner(thumbnail_px=16, widths=(4,))
            train_assigner(tla, images, labels, balanced=balanced, **OPTIONS | {"epochs": 15, "lr": 0.01})
            logits = tla._logits(tla.thumbnails(pixels(images)))[:, [0, 2]]
            shares[balanced] = logits.softmax(1)[:, 0].mean().item()
        assert shares[False] == pytest.approx(0.15, abs=0.06)
        assert shares[True] == pytest.approx(0.5, abs=0.12)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"labels": np.zeros(3, int)}, r"labels: expected 8 indices from 0 to 2.*got int64 \[3\]"),
            ({"labels": np.full(8, 3)}, "labels: expected 8 indices from 0 to 2"),
            ({"labels": np.full(8, -1)}, "expected at least 4 readable ones with a label, got 0"),
            ({"objective": "regret"}, "objective: expected one of label, suffices, got 'regret'"),
            ({"objective": "suffices"}, r'sufficiency: .* "suffices" needs \[3, 8\] numbers in \[0, 1\], got None'),
            ({"objective": "suffices", "sufficiency": np.ones((8, 3))}, r"needs \[3, 8\] .*, got \[8, 3\] from 1"),
            ({"objective": "suffices", "sufficiency": np.full((3, 8), 1.5)}, r"got \[3, 8\] from 1\.5 to 1\.5"),
            ({"objective": "suffices", "sufficiency": np.full((3, 8), np.nan)}, r"got \[3, 8\] from nan to nan"),
            ({"epochs": 0}, "epochs, batch_size, held_out_share: expected"),
            ({"held_out_share": 1.0}, "held_out_share: expected"),
        ],
    )
    def test_arguments(self, options, message):
        arguments = {"labels": np.zeros(8, int)} | options
        with pytest.raises(ValueError, match=message):
            train_assigner(make_assigner(), flat_images(8), **arguments)


def test_a_loss_that_is_no_number_gives_no_assigner():
    with pytest.raises(ValueError, match=r"lr: the loss of epoch 1 is nan, nan on held-out images; .* than 1e\+30"):
        train(lr=1e30)


def test_macs_of_a_timm_backbone():
    """The same number as by the formula, where there is one."""
    tla = make_assigner(widths=(8, 20, 33))
    expected = tla.macs
    hidden = tla.network
    tla.network = torch.nn.Sequential(hidden)  # no SeparableCNN any more: its layers are counted
    assert tla.macs == expected
    assert tla.training

"""Labels: rules against brute force, predictions against the pipeline, files, cross-fitting."""

import csv
import json

import numpy as np
import pytest
import tiny_training
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import drawn
from tiny_training import GRIDS, PATCH, SETTINGS

import revit_fast as rf
from revit_fast.io.images import ImageError
from revit_fast.io.names import csv_line
from revit_fast.train.data import ArrayImages
from revit_fast.train.labels import (
    FORMAT,
    LengthLabels,
    Predictions,
    cross_fit,
    length_labels,
    predict_lengths,
)


def brute_force(right, rule, unsolved):
    """The label of one image: right[i] says whether length i gets it right, 0 the longest."""
    n = len(right)
    for i in reversed(range(n)):
        if right[i] and (rule == "smallest" or all(right[:i])):
            return i
    return {"longest": 0, "shortest": n - 1, "drop": -1}[unsolved]


@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.tuples(*[st.booleans()] * n), max_size=20).map(lambda x: (n, x))),
    st.sampled_from(["smallest", "stable"]),
    st.sampled_from(["longest", "shortest", "drop"]),
)
def test_rules(sample, rule, unsolved):
    n_lengths, images = sample
    correct = np.array(images, dtype=bool).reshape(len(images), n_lengths).T
    labels = length_labels(correct, rule, unsolved)
    assert labels.dtype == np.int64
    assert labels.tolist() == [brute_force(right, rule, unsolved) for right in images]


def test_bad_rules():
    with pytest.raises(ValueError, match="rule: expected one of smallest, stable, got 'largest'"):
        length_labels(np.ones((2, 3)), "largest")
    with pytest.raises(ValueError, match="unsolved: expected one of longest, shortest, drop, got 'keep'"):
        length_labels(np.ones((2, 3)), unsolved="keep")
    with pytest.raises(ValueError, match=r"correct: expected bool \[n_lengths, N\], got \[3\]"):
        length_labels(np.ones(3))


class Torn(ArrayImages):
    """A set of which some images cannot be read."""

    def image(self, i):
        if i % 7 == 3:
            raise ImageError("torn")
        return super().image(i)


@pytest.fixture(scope="module")
def model():
    model = rf.ReViT(grids=GRIDS, patch_size=PATCH, num_classes=5, embed_dim=24, depth=2, num_heads=3, hidden_dim=40)
    model.pretrained_cfg = dict(SETTINGS)
    return drawn(model)


def odd_images(n=40, kind=ArrayImages):
    """Images of many sizes, colour and grey."""
    rng = np.random.default_rng(0)
    shapes = [tuple(rng.integers(9, 60, 2)) + ((3,) if i % 3 else ()) for i in range(n)]
    pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    return kind(pixels, rng.integers(0, 5, n), list("abcde"))


class TestPredictLengths:
    @pytest.mark.parametrize("pack_tokens", [50, 4096])
    def test_bitwise_what_the_pipeline_gives(self, model, pack_tokens):
        images = odd_images()
        predictions = predict_lengths(model, images, pack_tokens=pack_tokens)
        assert predictions.logits.shape == (3, 40, 5)
        assert predictions.logits.dtype == np.float32
        pipe = rf.pipeline(model)
        for length, grid in enumerate(GRIDS):
            results = pipe.with_policy(("fixed", grid))(images.image(i) for i in range(40))
            np.testing.assert_array_equal(predictions.logits[length], np.stack([r.logits for r in results]))

    def test_unreadable_images_move_no_other(self, model, monkeypatch):
        from revit_fast.train import labels

        monkeypatch.setattr(labels, "CHUNK", 6)
        whole = predict_lengths(model, odd_images())
        done = []
        torn = predict_lengths(model, odd_images(kind=Torn), progress=lambda *a: done.append(a))
        assert torn.unreadable == dict.fromkeys(range(3, 40, 7), "torn")
        np.testing.assert_array_equal(torn.readable, np.arange(40) % 7 != 3)
        np.testing.assert_array_equal(torn.logits[:, torn.readable], whole.logits[:, torn.readable])
        assert np.isnan(torn.logits[:, ~torn.readable]).all()
        assert not torn.correct(odd_images().labels)[:, ~torn.readable].any()
        assert done[-1] == (40, 40)

    def test_correct(self):
        logits = np.array([[[1, 2], [4, 3], [np.nan, 0]], [[2, 1], [5, 0], [0, 1]]], dtype=np.float32)
        correct = Predictions((3, 2), logits).correct([1, 0, 0])
        assert correct.tolist() == [[True, True, False], [False, True, False]]
        with pytest.raises(ValueError, match="labels: expected one class for each of 3"):
            Predictions((3, 2), logits).correct([1, 0])

    def test_probability_and_sufficiency(self):
        logits = np.log(np.array([[[3, 1], [1, 3], [1, 1]], [[1, 1], [3, 1], [9, 1]]], dtype=np.float32))
        logits[1, 2] = np.nan
        predictions = Predictions((3, 2), logits)
        np.testing.assert_allclose(predictions.probability([0, 0, 0]), [[0.75, 0.25, 0.5], [0.5, 0.75, 0]], rtol=1e-6)
        np.testing.assert_allclose(predictions.sufficiency([0, 0, 0]), [[1, 1, 1], [0.75, 1, 0.5]], rtol=1e-6)
        np.testing.assert_allclose(predictions.sufficiency([1, 1, 1])[1], [1, 0.5, 0.5], rtol=1e-6)
        huge = Predictions((3,), np.array([[[1e4, 0.0], [-1e4, 1e4]]], dtype=np.float32))
        assert huge.probability([0, 0]).tolist() == [[1.0, 0.0]]

    def test_settings(self, model):
        images = odd_images(4)
        other = predict_lengths(model, images, settings={"crop_pct": 0.5}).logits
        assert not np.array_equal(other, predict_lengths(model, images).logits)


class TestFile:
    @pytest.fixture
    def labels(self):
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((3, 9, 4)).astype(np.float32)
        names = ["plain", "a,b", 'quo"te', "two\nlines", "", "naïve/图.png", "g", "h", "i"]
        images = ArrayImages(np.zeros((9, 8, 8), np.uint8), rng.integers(0, 4, 9), list("wxyz"), names)
        return LengthLabels.of(Predictions(GRIDS, logits, {4: "torn"}), images, "stable", "drop"), images

    def test_round_trip(self, labels, tmp_path):
        labels, images = labels
        labels.save(tmp_path / "labels.csv")
        read = LengthLabels.load(tmp_path / "labels.csv")
        assert (read.grids, read.names, read.rule, read.unsolved) == (GRIDS, labels.names, "stable", "drop")
        np.testing.assert_array_equal(read.labels, labels.labels)
        np.testing.assert_array_equal(read.correct, labels.correct)
        assert [p.name for p in tmp_path.iterdir()] == ["labels.csv"]
        text = (tmp_path / "labels.csv").read_text(encoding="utf-8").splitlines()
        assert text[0] == "name,label,grid,right_7,right_5,right_4,rule,unsolved,images"
        shuffled = images.subset([5, 0, 3])
        np.testing.assert_array_equal(read.of_images(shuffled), labels.labels[[5, 0, 3]])

    def test_files_of_versions_before(self, labels, tmp_path):
        path = tmp_path / "labels.csv"
        labels[0].save(path)
        rows = list(csv.reader(path.open(newline="", encoding="utf-8")))
        head = {"format": FORMAT, "grids": GRIDS, "rule": "stable", "unsolved": "drop", "images": 9}
        text = f"# {json.dumps(head)}\n" + "".join(csv_line(row[:-3]) for row in rows)
        path.write_text(text, encoding="utf-8", newline="")
        read = LengthLabels.load(path)
        assert (read.grids, read.names, read.rule, read.unsolved) == (GRIDS, labels[0].names, "stable", "drop")
        np.testing.assert_array_equal(read.labels, labels[0].labels)
        for broken in ("{}", '{"format": "revit-fast length labels 9", "grids": [2], "rule": "stable"}'):
            path.write_text(f"# {broken}\n" + text.split("\n", 1)[1], encoding="utf-8", newline="")
            with pytest.raises(ValueError, match="line 1: not a file that `revit-fast label` wrote"):
                LengthLabels.load(path)

    def test_summary(self, labels):
        labels, _ = labels
        solved = labels.correct[0]  # by the stable rule nothing is solved that the longest gets wrong
        assert labels.unsolved_share == pytest.approx(1 - solved.mean())
        assert labels.labels[4] == -1, "an image that cannot be read has no label"
        assert labels.histogram.sum() == (labels.labels >= 0).sum()
        assert f"unsolved {labels.unsolved_share:.2%}" in labels.summary()

    @pytest.mark.parametrize(
        ("line", "text", "message"),
        [
            (0, "name,label", "line 1: expected name,label,grid and right_GRID for every grid"),
            (0, "name,label,grid,right_7,right_5", r"line 1: expected name,label,grid and right_GRID"),
            (1, "plain,3,2,1,1,1,stable,drop,9", r"line 2: expected a name, an index into \[7, 5, 4\]"),
            (1, "plain,1,7,1,1,1,stable,drop,9", "line 2: .*got 'plain,1,7,1,1,1'"),
            (2, "plain,1,5,1,1,stable,drop,9", "line 3"),
            (2, "plain,,,1,1,yes,stable,drop,9", "line 3"),
            (2, "plain", "line 3"),
            (2, "plain,1,5,1,1,1,stable,drop,8", "expected one rule, unsolved, images in all lines"),
        ],
    )
    def test_damage_is_named(self, labels, tmp_path, line, text, message):
        path = tmp_path / "labels.csv"
        labels[0].save(path)
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[line] = text
        path.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            LengthLabels.load(path)

    def test_what_is_missing_is_named(self, labels, tmp_path):
        labels, _ = labels
        with pytest.raises(FileNotFoundError, match="there is no file"):
            LengthLabels.load(tmp_path / "absent.csv")
        others = ArrayImages(np.zeros((2, 8, 8), np.uint8), [0, 1], list("wxyz"), ["plain", "other"])
        with pytest.raises(ValueError, match="1 of 2 images have no label, the first 'other'"):
            labels.of_images(others)
        twice = LengthLabels(GRIDS, ("a", "a"), np.zeros(2, np.int64), np.ones((3, 2), bool))
        with pytest.raises(ValueError, match="two images have the same name"):
            twice.of_images(others)


def test_labels_of_a_trained_model_are_the_sufficient_lengths():
    """Where a shorter length is right it is by luck, one time in four, as classes cannot be told apart there."""
    images, sufficient = tiny_training.synthetic(600, 1)
    correct = predict_lengths(tiny_training.trained(), images).correct(images.labels)
    for length in range(3):
        mine = sufficient == length
        for shown in range(3):
            if shown <= length:
                assert correct[shown, mine].mean() > 0.95
            else:
                assert abs(correct[shown, mine].mean() - 0.25) < 0.13
    labels = length_labels(correct)
    lucky = correct[1:, sufficient == 0].any(axis=0)
    assert (labels[sufficient == 0][~lucky] == 0).mean() > 0.95
    assert (labels[sufficient == 2] == 2).mean() > 0.95


class TestCrossFit:
    def test_every_image_by_a_model_that_has_not_seen_it(self):
        """Each model knows the images that it was trained on, and says so in its class."""
        images = ArrayImages(
            np.repeat(np.arange(1, 31, dtype=np.uint8)[:, None, None], 64, axis=1).reshape(30, 8, 8),
            np.arange(30) % 3,
            list("abc"),
        )
        seen = []

        def train(part):
            seen.append({int(part.image(i)[0, 0]) for i in range(len(part))})
            model = rf.ReViT(grids=(2, 1), patch_size=4, num_classes=9, embed_dim=8, depth=0, num_heads=1)
            with torch.no_grad():
                model.head.weight.zero_()
                model.head.bias.copy_(torch.arange(9.0) == len(seen) - 1)
            return model.eval()

        done = []
        predictions = cross_fit(images, 4, 0, train, progress=lambda *a: done.append(a))
        assert done == [(i, 4) for i in range(1, 5)]
        by = predictions.logits[0].argmax(axis=1)
        assert predictions.logits.shape == (2, 30, 9)
        for i, model in enumerate(by):
            assert i + 1 not in seen[model]
        assert sorted(len(s) for s in seen) == [22, 22, 23, 23]

    def test_models_of_different_shapes(self):
        sizes = iter([2, 3])

        def train(part):
            return rf.ReViT(
                grids=(2, 1), patch_size=4, num_classes=next(sizes), embed_dim=8, depth=0, num_heads=1
            ).eval()

        with pytest.raises(ValueError, match="train_fn: expected models of the same grids and classes"):
            cross_fit(odd_images(8), 2, 0, train)

    def test_unreadable_images_keep_their_place(self, model):
        predictions = cross_fit(odd_images(kind=Torn), 3, 1, lambda part: model)
        assert sorted(predictions.unreadable) == list(range(3, 40, 7))
        whole = predict_lengths(model, odd_images(kind=Torn)).logits
        np.testing.assert_array_equal(predictions.logits, whole)

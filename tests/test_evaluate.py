"""Evaluation: numbers and statistics by hand, determinism, plots, commands."""

import copy
import gzip
import json
import struct
import sys
import weakref

import numpy as np
import pytest
import tiny_training
import torch
from helpers import full
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import GRIDS, SETTINGS

import revit_fast as rf
from revit_fast.adaptive.policies import Calibration
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.cli import main
from revit_fast.models.macs import forward_macs
from revit_fast.streaming.bundle import read_bundle, save_bundle
from revit_fast.train.assigner import calibrate_on
from revit_fast.train.data import ArrayImages
from revit_fast.train.evaluate import evaluate, matched_entropy, threshold_for_drop
from revit_fast.train.labels import LengthLabels, Predictions, length_labels, predict_lengths
from revit_fast.train.statistics import mcnemar, paired_interval
from revit_fast.train.timing import measure, run


class TestStatistics:
    def test_mcnemar_by_hand(self):
        """5 against 1: 2 * (C(6,0) + C(6,1)) / 2^6."""
        a, b = np.array([1, 1, 1, 1, 1, 0], bool), np.array([0, 0, 0, 0, 0, 1], bool)
        assert mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 64)
        assert mcnemar(a, a) == 1.0, "no image tells them apart"

    def test_the_interval_by_hand(self):
        """10 against 4 of 98: 6 / 100 and 1.959964 standard errors, each the root of (15 / 100 - 0.06^2) / 100."""
        a = np.array([True] * 10 + [False] * 4 + [True] * 84)
        b = np.array([False] * 10 + [True] * 4 + [True] * 84)
        assert paired_interval(a, b) == pytest.approx((0.06 - 0.0749926, 0.06 + 0.0749926), abs=1e-6)
        low, high = paired_interval(a, a)
        assert (low, high) == pytest.approx((-0.0195996, 0.0195996), abs=1e-6), "a width where the two never differ"

    @pytest.mark.parametrize(
        ("p_more", "p_fewer", "n"), [full(0.05, 0.05, 100), full(0.02, 0.1, 200), (0.0, 0.03, 300)]
    )
    def test_the_interval_covers(self, p_more, p_fewer, n):
        """In about 95 % of samples, of which some have few images that differ, the true difference lies within."""
        rng = np.random.default_rng(0)
        covered = 0
        for cells in rng.multinomial(n, [p_more, p_fewer, 1 - p_more - p_fewer], 4000):
            a = np.repeat([True, False, True], cells)
            b = np.repeat([False, True, True], cells)
            low, high = paired_interval(a, b)
            covered += low <= p_more - p_fewer <= high
        assert 0.93 <= covered / 4000 <= 0.99

    def test_the_interval_shrinks_around_the_difference(self):
        rng = np.random.default_rng(0)
        a, b = rng.random((2, 200_000)) < [[0.8], [0.7]]
        low, high = paired_interval(a, b)
        assert low < a.mean() - b.mean() < high
        assert high - low < 0.006
        assert paired_interval(b, a) == pytest.approx((-high, -low))


# Four images, three lengths, two classes; margins of logits decide how sure each is.
MARGINS = np.array([[4.0, 3.0, 4.0, -2.0], [3.0, 2.0, -1.0, -3.0], [2.0, -0.5, -2.0, -1.0]])
"""Of class 0, which is right, over class 1: [length, image]."""


@pytest.fixture
def hand_made():
    """A model whose predictions are given, and four images."""
    model = rf.ReViT(grids=GRIDS, patch_size=4, num_classes=2, embed_dim=8, depth=1, num_heads=1).eval()
    model.pretrained_cfg = dict(SETTINGS)
    pixels = [np.full((28, 28), 9, np.uint8) for _ in range(4)]
    for i, image in enumerate(pixels):
        image[: 7 * i] = np.arange(7 * i)[:, None]  # entropies grow with i
    images = ArrayImages(pixels, [0] * 4, ["yes", "no"])
    logits = np.stack([MARGINS, np.zeros((3, 4))], axis=2).astype(np.float32)
    return model, images, Predictions(GRIDS, logits)


@pytest.fixture
def report(hand_made):
    model, images, predictions = hand_made
    return evaluate(model, None, images, predictions=predictions, cascade=(0.5, 0.8, 1.0))


class TestByHand:
    """Right at length 0: images 0, 1, 2; at length 1: 0, 1; at length 2: 0."""

    def test_fixed(self, hand_made, report):
        model = hand_made[0]
        for i, (grid, accuracy) in enumerate(zip(GRIDS, (0.75, 0.5, 0.25), strict=True)):
            row = report.row(f"fixed {grid}x{grid}")
            assert row.accuracy == accuracy
            assert row.tokens == grid**2
            assert row.gmacs == forward_macs(model, grid**2) / 1e9
            assert row.difference == accuracy - 0.75
            assert row.p_value == (None, 1.0, 0.5)[i]  # 1 and 2 images differ, all in one direction
            assert row.shares == tuple(float(i == j) for j in range(3))
            assert row.captured is None

    def test_oracle(self, report):
        row = report.row("oracle")
        assert row.accuracy == 0.75
        assert row.tokens == (16 + 25 + 49 + 49) / 4, "the image that none is right for gets the longest"
        assert row.captured == 1.0
        assert report.label_shares == (0.5, 0.25, 0.25)
        assert report.unsolved_share == 0.25

    def test_cascade(self, hand_made, report):
        """Margins of 2, .5, 2, 1 at the shortest are confidences of .88, .62, .88, .73."""
        model = hand_made[0]
        macs = [forward_macs(model, g * g) / 1e9 for g in GRIDS]
        always = report.row("cascade 0.5")
        assert (always.tokens, always.accuracy) == (16, 0.25)
        row = report.row("cascade 0.8")  # 0 and 2 stop at 4x4, 1 (.88) and 3 (.95) at 5x5
        assert row.shares == (0, 0.5, 0.5)
        assert row.tokens == (16 + (16 + 25) + 16 + (16 + 25)) / 4
        assert row.gmacs == pytest.approx((2 * macs[2] + 2 * (macs[2] + macs[1])) / 4, rel=1e-12)
        assert row.accuracy == 0.5
        never = report.row("cascade 1")
        assert (never.tokens, never.accuracy) == (16 + 25 + 49, 0.75)

    def test_gain(self, report):
        """Random with the cascade's shares is right for .5 * 2/4 + .5 * 1/4 = .375; the oracle for .75."""
        assert report.row("cascade 0.8").captured == pytest.approx((0.5 - 0.375) / (0.75 - 0.375))

    def test_entropy(self, hand_made):
        model, images, predictions = hand_made
        report = evaluate(model, None, images, predictions=predictions)
        row = report.row("entropy")
        pipe = rf.pipeline(model, policy=row.policy)
        grids = [r.grid for r in pipe.assign(images.image(i) for i in range(4))]
        assert grids == sorted(grids)
        assert row.tokens == np.mean([g * g for g in grids]), "the policy in the report does what it reports"

    def test_random(self, hand_made):
        model, images, predictions = hand_made
        many = ArrayImages([images.image(0)] * 4000, [0] * 4000, images.classes)
        logits = np.tile(predictions.logits, (1, 1000, 1))
        row = evaluate(model, None, many, predictions=Predictions(GRIDS, logits)).row("random")
        assert row.accuracy == pytest.approx(0.5, abs=0.01)
        assert row.tokens == pytest.approx(30, abs=0.3)
        assert row.p_value is None

    def test_baselines_take_the_shares_of_the_policy_that_is_to_be_deployed(self, hand_made):
        model, images, predictions = hand_made
        tla = rf.TokenLengthAssigner.for_model(model).eval()
        for grid, accuracy in zip(GRIDS, (0.75, 0.5, 0.25), strict=True):
            match = ("fixed", grid)
            report = evaluate(model, tla, images, policies=["argmax"], predictions=predictions, match=match)
            for name in ("random", "entropy"):
                assert report.row(name).tokens == grid**2
                assert report.row(name).accuracy == accuracy

    def test_unreadable_images_count_nowhere(self, hand_made):
        model, images, predictions = hand_made
        logits = predictions.logits.copy()
        logits[:, 3] = np.nan

        class Torn(ArrayImages):
            def image(self, i):
                if i == 3:
                    raise rf.images.ImageError("torn")
                return super().image(i)

        torn = Torn([images.image(i) for i in range(4)], [0] * 4, images.classes)
        report = evaluate(model, None, torn, predictions=Predictions(GRIDS, logits, {3: "torn"}))
        assert (report.n_images, report.n_unreadable) == (3, 1)
        assert report.row("fixed 7x7").accuracy == 1.0
        assert "1 more could not be read" in report.table()

    def test_refused(self, hand_made):
        model, images, predictions = hand_made
        with pytest.raises(ValueError, match=r"predictions: of 4 images at grids \(7, 5, 4\); expected 2"):
            evaluate(model, None, images.subset([0, 1]), predictions=predictions)
        with pytest.raises(ValueError, match="cascade: expected bounds in"):
            evaluate(model, None, images, predictions=predictions, cascade=[2])
        with pytest.raises(ValueError, match="n_random: expected at least 5 seeds"):
            evaluate(model, None, images, predictions=predictions, n_random=3)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(0, 10**6))
@settings(deadline=None)
def test_matched_entropy(values, seed):
    entropy = np.array(values) / 5
    shares = np.random.default_rng(seed).dirichlet([1, 1, 1])
    chosen, bits = matched_entropy(entropy, shares)
    counts = np.bincount(chosen, minlength=3)
    assert np.abs(counts.cumsum() - shares.cumsum() * len(values)).max() <= 0.5 + 1e-9
    assert bits == sorted(bits, reverse=True)
    order = np.argsort(chosen, kind="stable")
    assert (np.diff(entropy[order]) <= 0).all() or all(
        entropy[chosen == i].min() >= entropy[chosen == j].max()
        for i in range(3)
        for j in range(i + 1, 3)
        if (chosen == i).any() and (chosen == j).any()
    )
    if len(set(values)) == len(values):
        np.testing.assert_array_equal((entropy[:, None] < np.array(bits)).sum(axis=1), chosen)


class TestThresholdForDrop:
    def make(self, n=60, seed=0):
        rng = np.random.default_rng(seed)
        p = rng.dirichlet([1, 1, 1], n).astype(np.float32)
        suffices = np.stack([np.ones(n, np.float32), p[:, 1] + p[:, 2], p[:, 2]], axis=1)
        correct = np.stack([np.ones(n, bool), rng.random(n) < suffices[:, 1], rng.random(n) < suffices[:, 2]])
        return Calibration(1.0, suffices, (6.0, 5.0)), correct

    @pytest.mark.parametrize("drop", [0.0, 0.05, 0.2, 0.9])
    def test_against_brute_force(self, drop):
        calibration, correct = self.make()
        n = correct.shape[1]

        def accuracy(θ):
            right = 0
            for i in range(n):
                length = max(j for j in range(3) if j == 0 or calibration.suffices[i, j] >= θ)
                right += correct[length, i]
            return right / n

        θ = threshold_for_drop(calibration, correct, drop)
        candidates = sorted({0.0, 1.0, *calibration.suffices[:, 1:].ravel().tolist()})
        keeps = [accuracy(c) >= 1 - drop - 1e-12 for c in candidates]
        lowest = next(i for i in range(len(candidates)) if all(keeps[i:]))
        assert candidates[lowest] == θ

    def test_of_probabilities(self):
        """What is certain counts as what is right; half as much may be lost where everything is half as probable."""
        calibration, correct = self.make()
        θ = threshold_for_drop(calibration, correct, 0.1)
        assert threshold_for_drop(calibration, correct.astype(np.float32), 0.1) == θ
        assert threshold_for_drop(calibration, 0.5 * correct, 0.05) == θ

    def test_impossible(self):
        calibration, correct = self.make()
        sure = Calibration(1.0, np.ones_like(calibration.suffices), (6.0, 5.0))
        with pytest.raises(ValueError, match=r"drop: even θ = 1 loses more than 0\.00%"):
            threshold_for_drop(sure, correct, 0.0)
        with pytest.raises(ValueError, match=r"right: expected \[3, 60\]"):
            threshold_for_drop(calibration, correct[:, :5], 0.1)


ASSIGNED_CASCADE = ("assigned-cascade", {"threshold": 0.4, "confidence": 0.9})


def make_assigner():
    torch.manual_seed(0)
    return rf.TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8, 8)).eval()


@pytest.fixture(scope="module")
def whole():
    """A trained model, an assigner, images and their report."""
    model, tla = tiny_training.trained(), make_assigner()
    images = tiny_training.synthetic(300, 8)[0]
    tla.calibrate([images.image(i) for i in range(300)], [i % 3 for i in range(300)])
    policies = ["argmax", ("threshold", 0.4), ("budget", 25), ("budget", {"mean_gmacs": 0.0006}), ASSIGNED_CASCADE]
    return model, tla, images, evaluate(model, tla, images, policies=policies, cascade=(0.9,))


class TestWhole:
    def test_rows_are_what_a_pipeline_does(self, whole):
        """Accuracy, tokens and shares of every policy, from a pipeline that runs it."""
        model, tla, images, report = whole
        pipe = rf.pipeline(model, tla)
        pixels = [images.image(i) for i in range(300)]
        checked = 0
        for row in report.rows:
            if row.kind in ("random", "cascade", "assigned-cascade"):
                continue
            results = list(pipe.with_policy(row.policy)(pixels))
            assert np.mean([r.grid**2 for r in results]) == pytest.approx(row.tokens, rel=1e-12), row.name
            right = [r.logits.argmax().item() for r in results] == images.labels
            assert right.mean() == pytest.approx(row.accuracy, rel=1e-12), row.name
            macs = np.mean([forward_macs(model, r.grid**2) for r in results])
            asked = row.kind == "assigner"
            assert row.gmacs == pytest.approx((macs + asked * tla.macs) / 1e9, rel=1e-12), row.name
            checked += 1
        assert checked == 3 + 4 + 1 + 1
        assert report.row("TLA budget 25").tokens <= 25

    @pytest.mark.parametrize("name", ["cascade 0.9", "TLA assigned-cascade threshold 0.4, confidence 0.9"])
    def test_the_cascade_that_is_timed_is_the_one_reported(self, whole, name):
        model, tla, images, report = whole
        pixels, row = [images.image(i) for i in range(300)], report.row(name)
        pipe = rf.pipeline(model, tla)
        logits = run(pipe, row.policy, pixels)
        right = np.argmax(logits, axis=1) == images.labels
        assert right.mean() == row.accuracy
        results = list(pipe.with_policy(row.policy)(pixels))
        assert row.shares == tuple(np.mean([r.grid == g for r in results]) for g in GRIDS)
        starts = [GRIDS[-1]] * 300
        if row.kind == "assigned-cascade":
            starts = [r.grid for r in pipe.with_policy(("threshold", 0.4)).assign(pixels)]
        n_ran = [sum(start <= g <= r.grid for g in GRIDS) for r, start in zip(results, starts, strict=True)]
        n_tokens = [r.n_tokens - n * model.num_prefix_tokens for r, n in zip(results, n_ran, strict=True)]
        assert row.tokens == pytest.approx(np.mean(n_tokens), rel=1e-12)
        macs = [
            sum(forward_macs(model, g * g) for g in GRIDS if start <= g <= r.grid)
            for r, start in zip(results, starts, strict=True)
        ]
        assert row.gmacs == pytest.approx((np.mean(macs) + (row.kind != "cascade") * tla.macs) / 1e9, rel=1e-12)

    def test_the_same_every_time(self, whole, tmp_path):
        model, tla, images, report = whole
        policies = [row.policy for row in report.rows if row.kind in ("assigner", "assigned-cascade")]
        again = evaluate(model, tla, images, policies=policies, cascade=(0.9,))
        report.save(tmp_path / "a.json")
        again.save(tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        assert again.table() == report.table()
        read = json.loads((tmp_path / "a.json").read_text())
        assert read["rows"][0]["name"] == "fixed 7x7"
        assert read["n_images"] == 300

    def test_times(self, whole):
        """With a clock on which every policy takes as many seconds as it has asked for tokens."""
        _, tla, images, report = whole
        now = [0.0, 0.0]

        class Pipe:
            model = rf.optimize(whole[0])

            def with_policy(self, policy):
                self.policy = policy
                return self

            def __call__(self, pixels):
                for result in rf.pipeline(whole[0], tla, policy=self.policy)(pixels):
                    now[0] += result.n_tokens  # this model has no prefix tokens
                    yield result

        pixels = [images.image(i) for i in range(300)]
        timed = measure(report, Pipe(), pixels, rounds=2, clock=lambda: now[0])
        for row in timed.rows:
            if row.kind == "random":
                continue
            assert row.time.ratio == pytest.approx(49 / row.tokens, rel=1e-9), row.name
            assert row.time.images_per_s == pytest.approx(1 / row.tokens, rel=1e-9)
            assert row.time.quartiles == pytest.approx((row.time.images_per_s,) * 2)
        assert "rounds 2" in timed.table()
        assert "images/s" not in report.table()
        json.dumps(timed.to_json())

    def test_plot(self, whole, tmp_path):
        pytest.importorskip("matplotlib")
        for suffix in ("png", "svg", "pdf"):
            whole[3].plot(tmp_path / f"a.{suffix}")
            whole[3].plot(tmp_path / f"b.{suffix}")
            assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
        assert "confidence cascade" in (tmp_path / "a.svg").read_text() or (tmp_path / "a.svg").stat().st_size > 5000
        with pytest.raises(ValueError, match=r"expected \.png, \.svg or \.pdf"):
            whole[3].plot(tmp_path / "a.gif")


def write_idx(folder, images, split):
    """A set as the idx files of MNIST."""
    pixels = np.stack([images.image(i) for i in range(len(images))])
    for kind, data in (("images-idx3", pixels), ("labels-idx1", images.labels.astype(np.uint8))):
        head = struct.pack(f">BBBB{data.ndim}I", 0, 0, 8, data.ndim, *data.shape)
        (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + data.tobytes()))


class TestCommands:
    @pytest.fixture
    def place(self, tmp_path):
        """A bundle without an assigner, and a folder of images."""
        write_idx(tmp_path, tiny_training.synthetic(900, 5)[0], "train")
        write_idx(tmp_path, tiny_training.synthetic(300, 8)[0], "t10k")
        (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
        classes = ["0", "1", "2", "3"]
        save_bundle(tmp_path / "m", tiny_training.trained(), None, classes=classes, settings=SETTINGS, card="Mine.")
        return tmp_path

    def test_from_a_model_to_a_report(self, place, capsys):
        bundle, data = f"{place}/m", str(place)
        assert main(["label", bundle, data, "--output", f"{place}/labels.csv"]) == 0
        assert "accuracy" in capsys.readouterr().out
        labels = LengthLabels.load(place / "labels.csv")
        images = tiny_training.synthetic(900, 5)[0]
        expected = length_labels(predict_lengths(tiny_training.trained(), images).correct(images.labels))
        np.testing.assert_array_equal(labels.labels, expected)

        options = ["--labels", f"{place}/labels.csv", "--split", "train", "--epochs", "6"]
        options += ["--thumbnail-px", "32", "--widths", "8,16"]
        assert main(["train-assigner", bundle, data, *options]) == 0
        assert read_bundle(bundle).policy == "argmax"
        assert read_bundle(bundle).tla.widths == (8, 16)

        assert main(["calibrate", bundle, data, "--max-drop", "3", "--split", "test"]) == 0
        out = capsys.readouterr().out
        after = read_bundle(bundle)
        assert after.policy[0] == "threshold"
        assert after.card == "Mine."
        report = f"{place}/report.json"
        assert main(["evaluate", bundle, data, "--json", report, "--thresholds", "0.5,0.9"]) == 0
        table = capsys.readouterr().out
        read = json.loads((place / "report.json").read_text())
        mine = next(r for r in read["rows"] if r["policy"] == ["threshold", after.policy[1]])
        assert f"accuracy {mine['accuracy']:.2%}" in out, "what calibrate said of the same images"
        assert mine["difference"] >= -0.03 - 1e-9
        assert mine["tokens"] < 49
        assert mine["name"] in table
        assert table.splitlines()[-1].startswith("**Verdict.** ")
        assert read["verdict"] in table
        assert read["taken"] in table
        assert read["machine"] is None

    def test_a_cascade_that_a_bundle_has_is_reported_as_it_runs(self, place, capsys):
        save_bundle(place / "m", tiny_training.trained(), classes=list("0123"), policy=("cascade", 0.93))
        assert main(["evaluate", f"{place}/m", str(place), "--json", f"{place}/r.json", "--limit", "60"]) == 0
        rows = {row["name"]: row for row in json.loads((place / "r.json").read_text())["rows"]}
        assert rows["cascade 0.9"]["gmacs"] <= rows["cascade 0.93"]["gmacs"] <= rows["cascade 0.95"]["gmacs"]

    def test_worth_it(self, place, capsys, monkeypatch):
        monkeypatch.setattr("revit_fast.train.worth.TIMED_IMAGES", 8)
        options = ["--model", f"{place}/m", "--images", "200", "--json", f"{place}/w.json"]
        assert main(["worth-it", str(place), *options]) == 0
        table = capsys.readouterr().out
        read = json.loads((place / "w.json").read_text())
        assert read["n_images"] == 200
        assert table.splitlines()[-1] == f"**Verdict.** {read['verdict']}"
        assert "lower bound" not in read["verdict"], "the bundle was trained at its lengths"
        assert [row["name"] for row in read["rows"] if row["time"]][:3] == ["fixed 7x7", "fixed 5x5", "fixed 4x4"]
        assert main(["worth-it", str(place), *options, "--grids", "7", "6", "3"]) == 0
        assert "lower bound" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--model", "vit_tiny_patch16_224"], "--weights: give those of vit_tiny_patch16_224; random weights say"),
            (["--model", "no_such"], "--weights: give those of no_such"),
            (["--model", "no_such", "--weights", "none.pth"], "--model: timm knows no model 'no_such'"),
            (["--model", "{}/m", "--grids", "7"], "--grids: an assigner chooses between at least two"),
            (["--model", "{}/m", "--split", "odd"], "--split: "),
        ],
    )
    def test_worth_it_refuses(self, place, capsys, options, message):
        assert main(["worth-it", str(place), *(option.format(place) for option in options)]) == 2
        assert f"error: {message}" in capsys.readouterr().err

    def test_budget_and_limit_and_time(self, place, capsys):
        bundle, data = f"{place}/m", str(place)
        options = ["--split", "train", "--epochs", "2", "--limit", "200", "--output", f"{place}/new"]
        assert main(["train-assigner", bundle, data, *options]) == 0
        assert read_bundle(bundle).tla is None, "with --output the bundle stays as it was"
        assert main(["calibrate", f"{place}/new", data, "--budget", "30", "--split", "test"]) == 0
        timed = ["--time", "--rounds", "2", "--time-images", "20", "--thresholds", "0.5,0.5"]
        assert main(["evaluate", f"{place}/new", data, *timed]) == 0
        out = capsys.readouterr().out
        assert "images/s" in out
        assert main(["calibrate", f"{place}/new", data, "--budget", "3", "--split", "test"]) == 2
        assert "error: --budget: mean_tokens 3 is below the cost of the shortest length" in capsys.readouterr().err
        bundle = read_bundle(f"{place}/new")
        pipe = rf.load(f"{place}/new")
        images = tiny_training.synthetic(300, 8)[0]
        tokens = [r.grid**2 for r in pipe.assign(images.image(i) for i in range(300))]
        assert np.mean(tokens) <= 30

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("label", ["--output", "{}/labels.csv"]),
            ("train-assigner", []),
            ("calibrate", ["--budget", "30"]),
            ("evaluate", []),
        ],
    )
    def test_predictions_are_made_in_the_dtype(self, place, capsys, monkeypatch, command, options):
        save_bundle(place / "a", tiny_training.trained(), make_assigner(), classes=list("0123"), settings=SETTINGS)

        class Predicted(Exception):
            pass

        def predicted(model, images, **_):
            raise Predicted(model.dtype_used)

        monkeypatch.setattr("revit_fast.train.labels.predict_lengths", predicted)
        arguments = [command, f"{place}/a", str(place), "--split", "test", *(o.format(place) for o in options)]
        for dtype in ("bfloat16", "int8"):
            with pytest.raises(Predicted, match=rf"^torch\.{dtype}$"):
                main([*arguments, "--dtype", dtype])
            assert capsys.readouterr().err == f"--dtype {dtype}: weights in {dtype}\n"
        save_bundle(place / "a", copy.deepcopy(tiny_training.trained()).half(), make_assigner())
        assert main(arguments) == 2
        assert "error: --dtype: float16 is not served on the CPU; use" in capsys.readouterr().err

    def test_a_report_says_its_dtype(self, place, capsys, monkeypatch):
        timed = []

        def measured(report, pipe, pixels, **options):
            timed.append(pipe.model.dtype_used)
            return measure(report, pipe, pixels, **options)

        monkeypatch.setattr("revit_fast.train.timing.measure", measured)
        options = ["--time", "--rounds", "1", "--time-images", "5", "--json", f"{place}/r.json"]
        for asked, used in (([], "float32"), (["--dtype", "int8"], "int8")):
            assert main(["evaluate", f"{place}/m", str(place), "--limit", "50", *options, *asked]) == 0
            assert f"The model's weights are in {used}." in capsys.readouterr().out
            assert json.loads((place / "r.json").read_text())["dtype"] == used
        assert timed == [torch.float32, torch.int8]

    def test_calibration_holds_pixels_a_few_at_a_time(self, place, monkeypatch):
        model, images = tiny_training.trained(), tiny_training.synthetic(40, 3)[0]
        tla, image = rf.TokenLengthAssigner.for_model(model).eval(), images.image
        alive, most = set(), 0

        def counted(i):
            nonlocal most
            pixels = image(i).copy()
            alive.add(i)
            weakref.finalize(pixels, alive.discard, i)
            most = max(most, len(alive))
            return pixels

        predictions = predict_lengths(model, images)
        monkeypatch.setattr(images, "image", counted)
        monkeypatch.setattr("revit_fast.train.labels.CHUNK", 8)
        places = calibrate_on(tla, images, model, predictions)
        assert most <= 2 * 8, "of 40"
        assert places.tolist() == list(range(40))
        monkeypatch.undo()
        mine = tla.calibration
        labels = length_labels(predictions.correct(images.labels), unsolved="shortest")
        AdaptivePreprocessor.for_model(model, tla).calibrate([images.image(i) for i in range(40)], labels)
        np.testing.assert_array_equal(tla.calibration.suffices, mine.suffices)
        assert tla.calibration.temperature == mine.temperature

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["calibrate", "{}/m", "{}", "--budget", "30"], "has no assigner yet"),
            (["evaluate", "{}/absent", "{}"], "does not exist"),
            (["evaluate", "{}/m", "{}/absent"], "absent"),
            (["evaluate", "nothing", "{}"], "the package ships no model 'nothing'"),
            (["train-assigner", "{}/m", "{}", "--labels", "{}/none.csv", "--split", "train"], "there is no file"),
            (["calibrate", "{}/m", "{}", "--max-drop", "-1"], "expected percentage points"),
            (["calibrate", "{}/m", "{}"], "one of the arguments --budget --max-drop is required"),
            (["evaluate", "{}/m", "{}", "--thresholds", "7"], "expected numbers from 0 to 1"),
        ],
    )
    def test_usage_errors(self, place, capsys, arguments, message):
        assert main([a.format(place) for a in arguments]) == 2
        assert message in capsys.readouterr().err

    def test_without_scipy_it_says_what_to_install_before_the_work(self, place, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy.stats", None)
        for name in ("evaluate", "statistics"):
            monkeypatch.delitem(sys.modules, f"revit_fast.train.{name}")
        monkeypatch.setattr("revit_fast.train.labels.predict_lengths", None)
        assert main(["evaluate", f"{place}/m", str(place)]) == 2
        assert capsys.readouterr().err == 'revit-fast: scipy.stats is not installed: pip install "revit-fast[train]"\n'

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["label", "{}/m", "{}", "--output", "{}/absent/l.csv"], "--output: cannot write"),
            (["label", "{}/m", "{}", "--output", "{}/m"], "--output: cannot write"),
            (["evaluate", "{}/m", "{}", "--json", "{}/absent/r.json"], "--json: cannot write"),
            (["evaluate", "{}/m", "{}", "--plot", "{}/absent/r.png"], "--plot: cannot write"),
            (
                ["evaluate", "{}/m", "{}", "--plot", "r.gif"],
                "--plot: expected a name that ends in .png or",
            ),
            (["train-assigner", "{}/m", "{}", "--output", "{}"], "exists and is no bundle"),
            (["calibrate", "{}/m", "{}", "--budget", "30", "--output", "{}"], "exists and is no bundle"),
            (["train-assigner", "{}/absent", "{}"], "BUNDLE: the folder"),
            (["calibrate", "absent", "{}", "--budget", "30"], "BUNDLE: the package ships no model 'absent'"),
        ],
    )
    def test_what_cannot_be_written_is_said_before_the_work(self, place, capsys, monkeypatch, arguments, message):
        monkeypatch.setattr("revit_fast.train.labels.predict_lengths", None)
        assert main([a.format(place) for a in arguments]) == 2
        assert message in capsys.readouterr().err

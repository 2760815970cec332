"""What only a late stage would refuse is refused before the first update, the first prediction, or the first file."""

import json
import os
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train_helpers import MODEL_KWARGS, noise_images, tiny_config, write_folders

import revit_fast as rf
from revit_fast.cli import main
from revit_fast.streaming.bundle import save_bundle
from revit_fast.train import checks
from revit_fast.train import contest as contest_module
from revit_fast.train import fit as fit_module
from revit_fast.train import run as run_module
from revit_fast.train.assigner import train_assigner
from revit_fast.train.data import ArrayImages
from revit_fast.train.evaluate import evaluate
from revit_fast.train.fit import fit
from revit_fast.train.labels import LengthLabels
from revit_fast.train.trainer import Trainer


class Begun(Exception):
    """The stage that must not be reached."""


@pytest.fixture
def data(tmp_path):
    for split, n, seed in (("train", 48, 0), ("test", 9, 1)):
        write_folders(noise_images(n, seed), tmp_path / "data" / split)
    return tmp_path / "data"


@pytest.fixture
def no_update(monkeypatch):
    def begin(*arguments):
        raise Begun

    monkeypatch.setattr(Trainer, "_update", begin)


def config_of(data, **changes):
    return tiny_config(**{"data": str(data), "held_out_share": 0.25, **changes})


def other_class(data, out):
    shutil.copytree(data / "test" / "dark", data / "test" / "murky")


def class_lacks(data, out):
    shutil.rmtree(data / "test" / "dark")


def unreadable_test_images(data, out):
    for path in (data / "test").rglob("*.png"):
        path.write_bytes(b"no image")


def training_images_are_none(data, out):
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"")


def bundle_is_taken(data, out):
    (out / "bundle").mkdir(parents=True)
    (out / "bundle" / "thesis.tex").write_text("precious")


def bundle_of_training_is_taken(data, out):
    (out / "train" / "bundle").mkdir(parents=True)
    (out / "train" / "bundle" / "thesis.tex").write_text("precious")


def report_is_a_folder(data, out):
    (out / "report.json").mkdir(parents=True)


def weights_are_a_folder(data, out):
    (out / "train" / "best.safetensors").mkdir(parents=True)


def out_is_a_file(data, out):
    out.write_text("")


def one_class(data, out):
    for split in ("train", "test"):
        for name in ("middle", "bright"):
            shutil.rmtree(data / split / name)


PREPARED = {
    other_class: "classes: .*test has other classes: 'murky' not in",
    class_lacks: "'dark' of `classes` not in the set.*; for a class without images here, make an empty folder",
    unreadable_test_images: "images: none of the first 9 test images can be read, first ",
    training_images_are_none: "images: none of the first 16 training images can be read, first ",
    bundle_is_taken: "out/bundle exists and is no bundle",
    bundle_of_training_is_taken: "out/train/bundle exists and is no bundle",
    report_is_a_folder: "output: .*report.json is a folder",
    weights_are_a_folder: "output: .*best.safetensors is a folder",
    out_is_a_file: "output: .*out cannot be made, because .*out is a file",
    one_class: "classes: a model learns to tell at least two apart, and the images have one, 'dark'",
}


@pytest.mark.parametrize("prepare", PREPARED, ids=lambda f: f.__name__)
def test_fit_refuses_places_and_images_before_it_trains(data, tmp_path, no_update, prepare):
    prepare(data, tmp_path / "out")
    with pytest.raises((ValueError, OSError), match=PREPARED[prepare]):
        fit(config_of(data), tmp_path / "out")


ARGUMENTS = [
    ({"budget": {"mean_tokens": 3}}, {}, "budget: mean_tokens 3 is below the cost of the shortest length; expected 4 "),
    ({"budget": {"mean_gmacs": 1e-9}}, {}, "budget: mean_gmacs 1e-09 is below the cost"),
    ({"budget": {"mean_tokens": 5000}}, {}, "budget: mean_tokens 5000 is above the cost of the longest length; "),
    ({"budget": {"tokens": 9}}, {}, "budget: expected "),
    ({"max_drop": -0.1}, {}, r"max_drop: expected a share of accuracy in \[0, 1\), got -0.1"),
    ({"assigner": {"thumbnail_px": 30}}, {}, "thumbnail_px: expected a positive multiple of 4, got 30"),
    ({"assigner": {"width": (8, 8)}}, {}, "assigner: no assigner can be made with .*'width'"),
    ({"assigner": {"widths": ()}}, {}, "assigner: no assigner can be made"),
    ({"assigner": {"mean": (0.5,)}}, {}, "assigner: no assigner can be made"),
    ({"assigner": {"backbone": "no_such_model"}}, {}, "assigner: no assigner can be made with .*no_such_model"),
    ({"assigner": {"backbone": "vit_tiny_patch16_224"}}, {}, "assigner: no assigner can be made"),
    ({}, {"grids": (4,)}, r"grids: an assigner chooses between at least two, and the model has \[4\]"),
    ({}, {"held_out_share": 0.05}, "images: an assigner needs at least 4 to train on and 4 held out, got 46 and 2"),
    ({}, {"crop_pct": 0.0}, "crop_pct"),
    ({}, {"interpolation": "nearest"}, "interpolation"),
    ({}, {"mean": (0.5, 0.5)}, "mean"),
    ({}, {"batch_size": 64}, "batch_size: 36 images give 0 batches of 64 .*: a batch_size of at most 36$"),
    ({}, {"grad_accum_steps": 40}, "use smaller batches: a smaller grad_accum_steps, or give more images$"),
    ({}, {"sched": "cosin"}, "cosin"),
    ({}, {"opt": "adamwow"}, "adamwow"),
    ({}, {"weights": "nowhere.safetensors"}, "there is no file .*/nowhere.safetensors"),
]


@pytest.mark.parametrize(("options", "changes", "message"), ARGUMENTS, ids=lambda value: str(value)[:40])
def test_fit_refuses_arguments_before_it_trains(data, tmp_path, no_update, options, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        fit(config_of(data, **changes), tmp_path / "out", **options)
    assert not (tmp_path / "out" / "fit.json").exists()


def test_all_that_is_right_comes_to_the_first_update(data, tmp_path, no_update):
    with pytest.raises(Begun):
        fit(config_of(data), tmp_path / "out", budget={"mean_tokens": 9}, assigner={"widths": (8, 8)})
    kept = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert kept == {"budget": {"mean_tokens": 9}, "assigner": {"widths": [8, 8]}}


def test_what_is_refused_does_not_become_the_goal_of_the_run(data, tmp_path, no_update, capsys):
    command = ["fit", str(data), "--output", str(tmp_path / "out"), "--config", str(tmp_path / "train.json")]
    (tmp_path / "train.json").write_text(json.dumps(config_of(data).as_dict()))
    with pytest.raises(Begun):
        main([*command, "--max-drop", "5"])
    assert main([*command, "--resume", "--budget", "3"]) == 2
    assert "--budget: mean_tokens 3 is below the cost" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "fit.json").read_text()) == {"max_drop": 0.05}
    (tmp_path / "out" / "fit.json").write_text("")
    assert main([*command, "--resume"]) == 2
    assert "fit.json cannot be read: " in capsys.readouterr().err


def test_a_full_disk(data, tmp_path, no_update, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(OSError, match=r"output: .* has 0 MB of free space, and the run writes at least \d+ MB"):
        run_module.train(config_of(data), tmp_path / "out")


def test_a_folder_that_may_not_be_written(data, tmp_path, no_update, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "out" not in str(path) and access(path, mode))
    (tmp_path / "out").mkdir()
    with pytest.raises(PermissionError, match=r"output: nothing can be written to .*out; give another folder"):
        run_module.train(config_of(data), tmp_path / "out")


@pytest.mark.parametrize("command", ["train", "fit"])
def test_a_run_is_not_put_among_the_classes(tmp_path, no_update, command):
    """Without splits, its folder would be a class of the next run; beside splits, it does no harm."""
    data = tmp_path / "photos"
    write_folders(noise_images(), data)
    function = run_module.train if command == "train" else fit
    for folder in (data / "out", data / "dark" / "out"):
        with pytest.raises(ValueError, match=r"output: .* lies among the classes in .*photos, where the next run"):
            function(config_of(data), folder)
        assert not folder.exists()
    (tmp_path / "split").mkdir()
    data.rename(tmp_path / "split" / "train")
    with pytest.raises(Begun):
        function(config_of(tmp_path / "split"), tmp_path / "split" / "out")


def test_a_model_that_evaluation_would_refuse(data, tmp_path, no_update, monkeypatch):
    """Evaluation runs an optimised copy, which refuses what it does not know."""

    def changed(*args):
        model, head = build(*args)
        model.blocks[0].mlp.act = torch.nn.Hardswish()
        return model, head

    build = run_module.build_model
    monkeypatch.setattr(run_module, "build_model", changed)
    with pytest.raises(ValueError, match="model: "):
        run_module.train(config_of(data), tmp_path / "out")


def test_matplotlib_is_optional_at_the_end_of_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = namedtuple("Report", "save table")(lambda path: path.write_text("{}"), lambda: "table\n")
    plot = fit_module.Report.plot
    said = []
    fit_module._write(SimpleNamespace(**report._asdict(), plot=lambda path: plot(report, path)), tmp_path, said.append)
    assert sorted(os.listdir(tmp_path)) == ["report.json", "report.md"]
    assert said == ['report.png is left out; plot: it needs matplotlib: pip install "revit-fast[plot]"']


# Commands on a bundle and labelled images.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle with a calibrated assigner, and labelled images."""
    root = tmp_path_factory.mktemp("bundle")
    write_folders(noise_images(12), root / "images")
    torch.manual_seed(0)
    size = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32}
    model = rf.ReViT(grids=(4, 3, 2), patch_size=2, num_classes=3, **size).eval()
    tla = rf.TokenLengthAssigner(model.grids, thumbnail_px=8, widths=(4, 4)).eval()
    images = noise_images(12)
    tla.calibrate([images.image(i) for i in range(12)], [i % 3 for i in range(12)])
    save_bundle(root / "model", model, tla, classes=("bright", "dark", "middle"), policy="argmax")
    return root


@pytest.fixture
def no_predictions(monkeypatch):
    def begin(*arguments, **options):
        raise Begun

    monkeypatch.setattr("revit_fast.train.labels.predict_lengths", begin)


COMMANDS = [
    ("calibrate", ["--budget", "3"], "--budget: mean_tokens 3 is below the cost"),
    ("calibrate", ["--budget", "9", "--output", "IMAGES/new"], "--output: .* lies among the classes"),
    ("calibrate", ["--budget", "9", "--output", "FILE/new"], "--output: .* cannot be made, because .*file is a file"),
    ("train-assigner", ["--output", "FILE/new"], "--output: .* cannot be made, because .*file is a file"),
    ("train-assigner", ["--output", "IMAGES/new"], "--output: .* lies among the classes"),
    ("train-assigner", ["--thumbnail-px", "30"], "--thumbnail-px: expected a positive multiple of 4, got 30"),
    ("train-assigner", ["--lr", "nan"], "--lr: expected a finite number, 0 or more, got nan"),
    ("train-assigner", ["--batch-size", "1"], "expected at least 1, at least 2"),
    ("train-assigner", ["--limit", "3"], "images: an assigner needs at least 4 to train on and 4 held out, got 3"),
    ("train-assigner", ["--objective", "suffices", "--labels", "FILE"], "labels: .*file is empty"),
    ("train-assigner", ["--objective", "suffices", "--labels", "OTHER"], "images have no label, the first "),
    ("evaluate", ["--plot", "IMAGES/plot.png"], "--plot: .* lies among the classes"),
]


@pytest.mark.parametrize(("command", "options", "message"), COMMANDS, ids=lambda value: str(value)[:40])
def test_commands_refuse_before_they_predict(bundle, tmp_path, capsys, no_predictions, command, options, message):
    import re

    (tmp_path / "file").write_text("")
    correct = np.ones((3, 1), dtype=bool)
    LengthLabels((4, 3, 2), ("elsewhere/0.png",), np.zeros(1, dtype=np.int64), correct).save(tmp_path / "other")
    places = {"IMAGES": str(bundle / "images"), "FILE": str(tmp_path / "file"), "OTHER": str(tmp_path / "other")}
    for name, place in places.items():
        options = [option.replace(name, place) for option in options]
    arguments = [command, str(bundle / "model"), str(bundle / "images"), *options]
    if command != "evaluate" and "--output" not in options:
        arguments += ["--output", str(tmp_path / "new")]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_same_commands_come_to_their_predictions(bundle, tmp_path, no_predictions):
    for command, *options in (["calibrate", "--budget", "9"], ["train-assigner"]):
        with pytest.raises(Begun):
            main([command, str(bundle / "model"), str(bundle / "images"), *options, "--output", str(tmp_path / "new")])
    with pytest.raises(Begun):
        main(["evaluate", str(bundle / "model"), str(bundle / "images")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": [("threshold", 2)]}, "policy: expected"),
        ({"match": "sideways"}, "policy: expected one of"),
        ({"cascade": [1.5]}, "cascade: expected bounds"),
        ({"unsolved": "maybe"}, "unsolved: expected one of"),
    ],
)
def test_evaluate_checks_policies_before_it_predicts(monkeypatch, options, message):
    def begin(*arguments, **options):
        raise Begun

    monkeypatch.setattr("revit_fast.train.evaluate.predict_lengths", begin)
    size = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32}
    model = rf.ReViT(grids=(4, 3), patch_size=2, num_classes=3, **size).eval()
    tla = rf.TokenLengthAssigner(model.grids, thumbnail_px=8, widths=(4, 4)).eval()
    with pytest.raises(ValueError, match=message):
        evaluate(model, tla, noise_images(6), **options)


def test_an_assigner_of_other_grids_is_not_trained(monkeypatch):
    size = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32}
    model = rf.ReViT(grids=(4, 3), patch_size=2, num_classes=3, **size).eval()
    tla = rf.TokenLengthAssigner((4, 2), thumbnail_px=8, widths=(4, 4))
    with pytest.raises(ValueError, match=r"tla: it assigns grids \(4, 2\), the model has \(4, 3\)"):
        train_assigner(tla, noise_images(6), np.zeros(6, dtype=np.int64), model=model)


def test_a_sheet_with_too_many_images_is_refused_before_the_model_is_made(tmp_path, capsys, monkeypatch):
    from revit_fast.cli import explain

    found = [rf.io.images.Source(f"{i}.png") for i in range(201)]
    monkeypatch.setattr(explain, "find_images", lambda paths, passed: found)
    assert main(["explain", "photos", "--output", str(tmp_path / "sheet.png"), "--model", "no_such_model"]) == 2
    assert "--output: a PNG holds at most 200 images, got 201; write .html, or parts" in capsys.readouterr().err


# Advice is followed, and leads to the end.


def test_an_empty_folder_stands_for_a_class_without_test_images(data, tmp_path, no_update):
    class_lacks(data, None)
    (data / "test" / "dark").mkdir()
    with pytest.raises(Begun):
        fit(config_of(data), tmp_path / "out")


def test_a_class_without_images_is_removed_from_every_split(data, tmp_path, no_update):
    for path in (data / "train" / "dark").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"dark holds no image .*; put images of .* or remove it, also from other splits"
    ):
        fit(config_of(data), tmp_path / "out")
    shutil.rmtree(data / "train" / "dark")
    shutil.rmtree(data / "test" / "dark")
    with pytest.raises(Begun):
        fit(config_of(data), tmp_path / "out")


def test_the_advised_batch_size_is_taken(data, tmp_path, no_update):
    with pytest.raises(Begun):
        fit(config_of(data, batch_size=36), tmp_path / "out")


def test_a_threshold_that_cannot_be_found_loses_nothing(monkeypatch, tmp_path):
    """An assigner that is sure where it is wrong has no threshold for the drop; the bundle has the longest grid."""
    images = noise_images(48)
    write_folders(images, tmp_path / "data")

    def refuse(*arguments):
        raise ValueError("drop: even θ = 1 loses more than 0.30% of accuracy; allow more")

    monkeypatch.setattr(contest_module, "threshold_for", refuse)
    config = config_of(tmp_path / "data", epochs=1, warmup_epochs=0)
    said = []
    terminal = SimpleNamespace(write=said.append, flush=lambda: None)
    assert fit(config, tmp_path / "out", terminal=terminal, timed_images=0) is None
    assert "warning: drop: even θ = 1 loses more" in "".join(said)
    assert rf.streaming.bundle.read_bundle(tmp_path / "out" / "bundle").policy[0] in ("fixed", "cascade")


def test_sizes(tmp_path):
    assert MODEL_KWARGS["img_size"] == 8, "the grids above are of these images"
    with pytest.raises(ValueError, match="images: none of the first 2 things can be read"):
        checks.check_readable(Unreadable(), "things")


class Unreadable(ArrayImages):
    def __init__(self):
        super().__init__(np.zeros((2, 4, 4), dtype=np.uint8), [0, 1], ["a", "b"])

    def image(self, i):
        raise rf.io.images.ImageError("is truncated")

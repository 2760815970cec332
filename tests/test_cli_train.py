"""`revit-fast train` and `revit-fast fit`, as a shell runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from train_helpers import noise_images, write_folders

import revit_fast as rf
from revit_fast.cli import main
from revit_fast.cli.runs import add_config, field_texts
from revit_fast.streaming.bundle import read_bundle
from revit_fast.train import fit as fit_module
from revit_fast.train import kept as kept_module
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import NoSplitError
from revit_fast.train.datasets import open_images
from revit_fast.train.log import STEPS, read_rows
from revit_fast.train.run import evaluation_images, open_data

MODEL = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "img_size=8", "patch_size=2", "embed_dim=32", "depth=2"]
RECIPE = ["--batch-size", "8", "--lr", "0.003", "--warmup-epochs", "0", "--augment", "preset=light", "pad=1"]
OPTIONS = [*MODEL, "num_heads=2", "--grids", "4", "3", "2", *RECIPE, "--crop-pct", "1.0", "--log-steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise images of three classes as PNG files, in `train` and `test`."""
    root = tmp_path_factory.mktemp("images")
    for split, n, seed in (("train", 96, 0), ("test", 30, 1)):
        write_folders(noise_images(n, seed), root / split)
    return root


def test_train_writes_a_bundle_that_the_other_commands_take(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(folder), "--output", str(run), "--epochs", "6", *OPTIONS]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["n_images"] == 30
    assert set(result["accuracy"]) == {"4", "3", "2"}
    assert "training vit_tiny_patch16_224 on 96 images of 3 classes at grids 4, 3, 2, packed, 1 process(es)" in err
    assert "epoch 6/6  held out at 4/3/2: " in err
    bundle = read_bundle(run / "bundle")
    assert bundle.classes == ("bright", "dark", "middle")
    assert bundle.settings["crop_pct"] == 1.0
    assert main(["evaluate", str(run / "bundle"), str(folder)]) == 0
    assert f"{result['accuracy']['4']:.2%}" in capsys.readouterr().out


def test_a_run_that_is_there_is_not_overwritten(folder, tmp_path, capsys):
    command = ["train", str(folder), "--output", str(tmp_path), "--epochs", "1", *OPTIONS]
    assert main(command) == 0
    assert main(command) == 1
    assert "holds a run already; resume it, or give another folder" in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path), "--resume"]) == 0
    assert "from update 12 of 12" in capsys.readouterr().err
    assert main(["train", "--output", str(tmp_path), "--resume", "--lr", "0.1"]) == 2
    assert "has lr = 0.003" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"seed": 7}')
    assert main(["train", "--output", str(tmp_path), "--resume", "--config", str(tmp_path / "other.json")]) == 2
    assert "has seed = 0" in capsys.readouterr().err


@pytest.mark.processes
def test_two_processes_do_not_train_in_one_folder(folder, tmp_path, capsys):
    """The second is refused while the first runs, and takes its place once it is killed."""
    command = ["train", str(folder), "--output", str(tmp_path), "--epochs", "6", *OPTIONS]
    process = subprocess.Popen([sys.executable, "-m", "revit_fast.cli", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not read_rows(tmp_path / STEPS) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # so that it still runs then
    assert main([*command, "--resume"]) == 1
    assert f"another process is training in {tmp_path}; wait until" in capsys.readouterr().err
    process.kill()
    process.wait(timeout=60)
    (tmp_path / "checkpoint.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / "bundle.123.tmp").mkdir()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert main([*command, "--resume"]) == 0
    assert not list(tmp_path.glob("*.tmp")), "left by a run that was killed"


@pytest.mark.processes
def test_sigterm_leaves_a_checkpoint_to_go_on_from(folder, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "revit_fast.cli", "train"]
    options = [str(folder), "--epochs", "3", *OPTIONS]
    assert main(["train", *options, "--output", str(whole)]) == 0
    # A shell in the background may have set SIGINT to be ignored; SIGTERM is not.
    process = subprocess.Popen([*command, *options, "--output", str(cut)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not read_rows(cut / STEPS) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error[-2000:]
    assert f"--output {cut} --resume" in error.splitlines()[-1]
    done = len(read_rows(cut / STEPS))
    assert 0 < done < 36
    assert main(["train", "--output", str(cut), "--resume"]) == 0
    for a, b in zip(read_rows(whole / STEPS), read_rows(cut / STEPS), strict=True):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


def test_fit_makes_an_adaptive_model(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "fitted"
    options = ["--epochs", "6", "--held-out-share", "0.4", "--max-drop", "5", *OPTIONS]
    assert main(["fit", str(folder), "--output", str(out), *options]) == 0
    table = capsys.readouterr().out
    assert sorted(os.listdir(out)) == [
        "bundle",
        "fit.json",
        "labels.csv",
        "predictions",
        "report.json",
        "report.md",
        "report.png",
        "train",
    ]
    assert (out / "report.md").read_text() == table
    assert table.splitlines()[-1].startswith("**Verdict.** ")
    report = json.loads((out / "report.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert {"fixed 4x4", "TLA argmax", "oracle", "entropy"} <= set(names)
    card = (out / "bundle" / "README.md").read_text()
    assert "Trained by revit-fast on 58 images of 3 classes. The results are of 30 test images; " in card
    assert table.strip() in card
    assert "images/s" in table
    pipe = rf.load(out / "bundle")
    images = noise_images(30, seed=1)
    results = list(pipe([images.image(i) for i in range(30)]))
    bundle = read_bundle(out / "bundle")
    labels = [bundle.classes.index(images.classes[label]) for label in images.labels]
    right = np.mean([int(r.logits.argmax()) == label for r, label in zip(results, labels, strict=True)])
    (row,) = [row for row in report["rows"] if row["policy"] == list(bundle.policy)][:1]
    assert right == pytest.approx(row["accuracy"])
    assert report["taken"] == row["name"]
    n_passes = [1 if row["kind"] == "fixed" else [4, 3, 2][::-1].index(r.grid) + 1 for r in results]
    tokens = [r.n_tokens - n for r, n in zip(results, n_passes, strict=True)]
    assert row["kind"] not in ("fixed", "cascade") or np.mean(tokens) == pytest.approx(row["tokens"])
    # Once more: everything is there; nothing is predicted, trained or measured, and nothing changes.
    for module, name in (("kept", "predict_lengths"), ("fit", "rates"), ("fit", "train_assigner")):
        monkeypatch.setattr(f"revit_fast.train.{module}.{name}", None)
    capsys.readouterr()
    assert main(["fit", "--output", str(out), "--resume"]) == 0
    assert capsys.readouterr().out == table
    monkeypatch.undo()
    assert read_bundle(out / "bundle").policy == bundle.policy
    assert json.loads((out / "fit.json").read_text()) == {"max_drop": 0.05}
    # With another goal, which is then the one that is kept.
    assert main(["fit", "--output", str(out), "--resume", "--budget", "9", "--assigner", "widths=(8, 8)"]) == 0
    changed = read_bundle(out / "bundle")
    assert changed.tla.widths == (8, 8)
    assert json.loads((out / "fit.json").read_text()) == {"budget": {"mean_tokens": 9}, "assigner": {"widths": [8, 8]}}


def test_ctrl_c_in_every_stage_of_fit(folder, tmp_path, capsys, monkeypatch):
    """It ends the stage at once, and the run goes on from there."""
    out = tmp_path / "fitted"
    command = ["fit", str(folder), "--epochs", "1", "--max-drop", "5", *OPTIONS]
    for stage in ("predict_lengths", "train_assigner", "calibrate_on", "hold", "rates", "report_on"):
        with monkeypatch.context() as patch:
            patch.setattr(fit_module, "MAX_SKEW", 1.0)  # the assigner learns from training images
            place = kept_module if stage == "predict_lengths" else fit_module
            patch.setattr(place, stage, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT))
            assert main([*command, "--output", str(out)]) == 130
        err = capsys.readouterr().err
        assert "SIGINT: stopping; a second Ctrl-C quits at once\n" in err
        assert err.endswith(f"revit-fast: stopped by SIGINT; resume to go on: revit-fast fit --output {out} --resume\n")
        command = ["fit", "--resume"]
    assert "from update " in err


def test_fit_refuses_an_assigner_before_it_trains(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["fit", str(folder), "--output", str(out), *OPTIONS, "--assigner", "thumbnail_px=30"]) == 2
    assert "thumbnail_px: expected a positive multiple of 4, got 30" in capsys.readouterr().err
    assert not (out / "train").exists()


def test_fit_is_for_one_process(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fit", str(folder), "--output", str(tmp_path / "run"), *OPTIONS]) == 2
    assert "fit: runs as one process, got 2; start `revit-fast train` with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "DATA: expected images to train on"),
        (["/nonexistent"], 1, "/nonexistent"),
        (["DATA", "--mode", "sideways"], 2, "mode: expected one of packed, length-parallel, got 'sideways'"),
        (["DATA", "--augment", "preset=heavy"], 2, "expected preset deit, light, none"),
        (["DATA", "--augment", "light"], 2, "--augment: expected name=value, got 'light'"),
        (["DATA", "--model", "vit_nano"], 2, "timm knows no model 'vit_nano'"),
        (["DATA", "--weights", "/nonexistent.safetensors"], 1, "there is no file /nonexistent.safetensors"),
        (["DATA", "--config", "/nonexistent.json"], 2, "--config: cannot read /nonexistent.json"),
        (["DATA", "--output", __file__], 2, "test_cli_train.py is a file; give a folder"),
        (["DATA", "--threads", "100000"], 2, "--threads: expected 1 to 1024, got 100000"),
    ],
)
def test_usage_errors(folder, tmp_path, capsys, arguments, code, message):
    arguments = [str(folder) if a == "DATA" else a for a in arguments]
    assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == code
    assert message in capsys.readouterr().err


def test_a_configuration_is_an_object(folder, tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    assert main(["train", str(folder), "--output", str(tmp_path), "--config", str(tmp_path / "list.json")]) == 2
    assert "list.json holds no object of names and values, but [1]" in capsys.readouterr().err


def test_data_that_need_a_package_say_which(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "run"), *OPTIONS]) == 2
    assert "is a Hugging Face data set; to read it: pip install datasets" in capsys.readouterr().err


def test_a_device_that_there_is_not(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("train", "fit"):
        assert main([command, str(folder), "--output", str(tmp_path / "run"), "--device", "cuda"]) == 2
        assert "--device: expected cpu, got 'cuda'; PyTorch finds no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_test_split_says_what_to_do(folder, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    os.symlink(folder / "train", tmp_path / "data" / "train")
    assert main(["train", str(tmp_path / "data"), "--output", str(tmp_path / "run"), *OPTIONS]) == 2
    assert "set held_out_share to evaluate on a part of the training images" in capsys.readouterr().err


def test_images_without_splits_are_not_evaluated_on_themselves(folder, tmp_path, capsys):
    assert main(["train", str(folder / "train"), "--output", str(tmp_path / "run"), *OPTIONS]) == 2
    assert "has no splits: its images are those of training; set held_out_share" in capsys.readouterr().err


def test_training_images_are_no_test_split_whichever_part_of_them_is_held_out(folder):
    path, first = str(folder / "train"), open_images(str(folder / "train")).name(0)
    where = set()
    for seed in range(10):
        parts = open_data(TrainConfig(data=path, held_out_share=0.4, seed=seed))
        where.add(parts[0].name(0) == first)
        with pytest.raises(NoSplitError, match="has no splits: its images are those of training"):
            evaluation_images(path, *parts)
    assert where == {True, False}, "the first image was never held out, or always"


def test_epochs_are_judged_on_val_and_fit_reports_on_test(folder, tmp_path):
    for split, target in (("train", "train"), ("test", "test"), ("val", "test")):
        (tmp_path / split).symlink_to(folder / target)
    images, held_out = open_data(TrainConfig(data=str(tmp_path)))
    assert held_out.name(0).startswith(str(tmp_path / "val"))
    assert evaluation_images(str(tmp_path), images).name(0).startswith(str(tmp_path / "test"))


def test_every_choice_has_an_option_and_a_text():
    import argparse

    parser = argparse.ArgumentParser()
    add_config(parser.add_argument_group("choices"))
    text = " ".join(parser.format_help().split())
    for name, said in field_texts(TrainConfig).items():
        if name != "data":
            assert f"--{name.replace('_', '-')}" in text
            assert said.split(";")[0].split(":")[0].replace("`", "")[:20] in text
    assert field_texts(TrainConfig).keys() == {f for f in TrainConfig.__dataclass_fields__}

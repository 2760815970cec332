"""The command line as a user runs it: real files, the real model (DeiT-Ti), stdout, stderr and exit codes."""

import argparse
import csv
import functools
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from importlib import metadata

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from terminals import terminal

import revit_fast as rf
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.cli import arguments, build_parser, main, pipelines, report, serve
from revit_fast.io import progress
from revit_fast.models.classes import class_names
from revit_fast.ops.linear import cpu_integer_depths, cpu_multiplies_bf16
from revit_fast.streaming.decoding import CHUNK, MORE_SMALL

MODEL = "deit_tiny_patch16_224"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
N_CLASSES = 1000

pytestmark = pytest.mark.usefixtures("one_thread")
create_model_once = functools.cache(rf.create_model)


@pytest.fixture(autouse=True)
def models_are_loaded_once(monkeypatch):
    """Keeps the suite quick: every run of the command asks for the same few models."""
    monkeypatch.setattr(pipelines, "create_model", create_model_once)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint whose predictions depend on the image: timm's initialisation hardly looks at it."""
    torch.manual_seed(0)
    state = timm.create_model(MODEL).state_dict()
    state = {name: 5 * t if name.endswith(".weight") and t.dim() > 1 else t for name, t in state.items()}
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def model(weights):
    return create_model_once(MODEL, weights=weights).eval()


def photo(seed, height=60, width=80):
    """A smooth random image, so that JPEG and resizing leave something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Seven files of several formats and sizes, in the order in which a folder lists them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, suffix in enumerate(["jpg", "png", "webp", "JPEG", "png", "jpg", "png"]):
        photo(i, 60 + i, 100 - 11 * i).save(folder / f"{i}.{suffix}")
    return folder


def run(capsys, *args):
    """Exit code, stdout and stderr of `revit-fast predict` with DeiT-Ti."""
    code = main(["predict", *map(str, args), "--model", MODEL])
    out, err = capsys.readouterr()
    return code, out, err


def run_json(capsys, *args):
    code, out, _ = run(capsys, *args, "--format", "json")
    return code, json.loads(out)


def true_probabilities(model, image, grid):
    """Pillow's own resize of timm's evaluation crop (see test_preprocess.py), then the model on one image tensor."""
    image = image.convert("RGB")
    px = 16 * grid
    box = eval_box(image.height, image.width, px, 0.9)
    resized = np.array(image.resize((px, px), Image.Resampling.BICUBIC, box=box))
    x = ((torch.from_numpy(resized) / 255 - MEAN) / STD).permute(2, 0, 1)
    with torch.inference_mode():
        return model(x[None]).softmax(dim=-1)[0]


@pytest.fixture
def batches(monkeypatch):
    """A list that gets the tokens of every image of each forward, one tuple per forward."""
    seen = []
    pack = AdaptivePreprocessor.pack

    def recorded(self, images, grids):
        seen.append(tuple(rows * columns + 1 for rows, columns in grids))
        return pack(self, images, grids)

    monkeypatch.setattr(AdaptivePreprocessor, "pack", recorded)
    monkeypatch.setattr(pipelines.build_pipeline, "__defaults__", (math.inf,))  # however slow the machine
    return seen


def assert_predicts(record, model, path, grid, top_k=5):
    with Image.open(path) as image:
        expected = true_probabilities(model, image, grid)
    assert record["path"] == str(path)
    assert record["grid"] == grid
    assert record["tokens"] == grid * grid + 1
    assert record["ms"] > 0
    got = torch.tensor([entry["probability"] for entry in record["top"]])
    assert len(got) == top_k
    torch.testing.assert_close(got, expected.topk(top_k).values, rtol=1e-3, atol=1e-6)
    classes = [class_names(model).index(entry["class"]) for entry in record["top"]]
    torch.testing.assert_close(got, expected[classes], rtol=1e-3, atol=1e-6)


class TestPredictions:
    @pytest.mark.parametrize("grid", [14, 10, 7])
    def test_equal_the_model_on_each_image_alone(self, capsys, photos, weights, model, grid):
        code, records = run_json(capsys, photos, "--weights", weights, "--grid", grid)
        assert code == 0
        paths = sorted(photos.iterdir())
        assert len(records) == len(paths)
        for record, path in zip(records, paths, strict=True):
            assert_predicts(record, model, path, grid)
        best = [record["top"][0]["probability"] for record in records]
        assert max(best) > 1.5 * min(best), "these weights must tell the images apart, or the test shows nothing"

    def test_mixed_grids_take_turns(self, capsys, photos, weights, model):
        code, records = run_json(capsys, photos, "--weights", weights, "--grid", "mixed", "--top-k", 2)
        assert code == 0
        for i, (record, path) in enumerate(zip(records, sorted(photos.iterdir()), strict=True)):
            assert_predicts(record, model, path, (14, 10, 7)[i % 3], top_k=2)

    def test_orientation_and_modes_reach_the_model_upright(self, capsys, tmp_path, weights, model):
        upright = photo(3, 70, 50)
        exif = Image.Exif()
        exif[0x0112] = 6
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        grey = np.asarray(upright.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
        Image.fromarray(grey).save(tmp_path / "grey.png")
        upright.convert("RGBA").save(tmp_path / "opaque.webp", lossless=True)
        names = {"turned.png": upright, "grey16.png": upright.convert("L"), "grey.png": upright.convert("L")}
        names["opaque.webp"] = upright
        code, records = run_json(capsys, *(tmp_path / name for name in names), "--weights", weights, "--grid", 7)
        assert code == 0
        for record, image in zip(records, names.values(), strict=True):
            got = [entry["probability"] for entry in record["top"]]
            expected = true_probabilities(model, image, 7).topk(5).values
            torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-3, atol=1e-6, msg=record["path"])

    def test_a_model_that_returns_nan_is_an_error_of_the_image(self, capsys, photos, weights, tmp_path):
        from safetensors.torch import load_file

        state = load_file(weights)
        state["head.bias"] = torch.full((N_CLASSES,), float("nan"))
        save_file(state, tmp_path / "nan.safetensors")
        code, records = run_json(capsys, photos, "--weights", tmp_path / "nan.safetensors", "--grid", 7)
        assert code == 1
        assert [set(record) for record in records] == [{"path", "error"}] * 7


class TestErrors:
    def test_bad_files_in_the_middle(self, capsys, photos, weights, model):
        good = sorted(photos.iterdir())
        whole = good[0].read_bytes()
        (photos / "0a-empty.jpg").write_bytes(b"")
        (photos / "0b-truncated.jpg").write_bytes(whole[: len(whole) // 2])
        (photos / "3a-text.png").write_bytes(b"not an image")
        (photos / "3b-folder.jpg").mkdir()
        (photos / "9-broken.webp").symlink_to(photos / "vanished")
        (photos / "notes.txt").write_text("not looked at")
        code, out, err = run(capsys, photos, photos / "*.gif", "--weights", weights, "--grid", 7, "--format", "json")
        records = json.loads(out)
        assert code == 1
        assert [r["path"] for r in records] == [
            *(str(p) for p in sorted(photos.iterdir()) if p.suffix != ".txt"),
            str(photos / "*.gif"),
        ]
        reasons = {os.path.basename(r["path"]): r["error"] for r in records if "error" in r}
        assert set(reasons) == {
            *("0a-empty.jpg", "0b-truncated.jpg", "3a-text.png", "3b-folder.jpg", "9-broken.webp", "*.gif")
        }
        assert reasons["0a-empty.jpg"] == "empty file"
        assert "truncated" in reasons["0b-truncated.jpg"]
        assert "not an image that Pillow" in reasons["3a-text.png"]
        assert "folder" in reasons["3b-folder.jpg"]
        assert "no such file" in reasons["9-broken.webp"]
        assert "no file matches" in reasons["*.gif"]
        for name, reason in reasons.items():
            assert f"error: {photos / name}: {reason}" in err
        read = [r for r in records if "error" not in r]
        for record, path in zip(read, good, strict=True):
            assert_predicts(record, model, path, 7)
        assert "13 images (6 failed)" in err
        assert "passed over 1 file: 1 .txt\n" in err

    def test_a_file_that_vanishes_is_one_error(self, capsys, photos, monkeypatch):
        real = report.find_images

        def vanishing(*args):
            for source in real(*args):
                if source.path.endswith("2.webp"):
                    os.unlink(source.path)
                yield source

        monkeypatch.setattr(report, "find_images", vanishing)
        code, records = run_json(capsys, photos, "--grid", 7)
        assert code == 1
        assert [r.get("error") for r in records] == [None, None, "no such file or directory", *[None] * 4]

    def test_nothing_but_errors(self, capsys, tmp_path):
        code, records = run_json(capsys, tmp_path / "a.jpg", tmp_path / "b.jpg")
        assert code == 1
        assert [r["error"] for r in records] == ["no such file or directory"] * 2

    def test_a_damaged_file_moves_no_other_grid(self, capsys, photos):
        (photos / "1.png").write_bytes(b"")
        _, records = run_json(capsys, photos, "--grid", "mixed")
        assert [r.get("grid") for r in records] == [14, None, 7, 14, 10, 7, 14]

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (["--grid", "13"], "--grid"),
            (["--grid", "large"], "--grid"),
            (["--top-k", "0"], "--top-k"),
            (["--batch-tokens", "-5"], "--batch-tokens"),
            (
                ["--batch-tokens", "10"],
                "--batch-tokens: expected at least 197, the tokens of one image at grid 14",
            ),
            (["--batch-tokens", "49", "--grid", "7"], "--batch-tokens: expected at least 50, the tokens of one image"),
            (["--device", "cuda"], "--device: expected cpu, got 'cuda'; PyTorch finds no GPU here"),
            (["--device", "mps"], "--device: expected cpu, got 'mps'; there are kernels for CPUs and CUDA GPUs"),
            (["--device", "cuda", "--engine", "ray", "--output", "x"], "--device cuda: --engine ray computes on"),
            (["--threads", "0"], "--threads"),
            (["--threads", "100000"], "--threads: expected 1 to 1024, got 100000"),
            (["--workers", "2"], "--workers: everything runs in this process; give --engine ray"),
            (["--address", "head:6379"], "--address: everything runs in this process; give --engine ray"),
            (["--policy", "best"], "--policy: expected argmax, threshold:THETA"),
            (["--policy", "threshold"], "--policy: expected argmax, threshold:THETA"),
            (["--policy", "threshold:1.5"], "from 0 to 1"),
            (["--policy", "cascade:nan"], "from 0 to 1"),
            (["--policy", "assigned-cascade:0.5"], "--policy: expected argmax, threshold:THETA"),
            (["--policy", "assigned-cascade:0.5,2"], "from 0 to 1"),
            (["--policy", "assigned-cascade:0.5,0.5"], "needs an assigner"),
            (["--policy", "fixed"], "--policy: expected argmax, threshold:THETA"),
            (["--policy", "fixed:13"], "--policy: fixed: expected one of the model's [14, 10, 7], got 13"),
            (["--policy", "random:-1"], "--policy: expected a seed from 0"),
            (["--policy", "argmax"], "--policy: 'argmax' needs an assigner"),
            (["--budget", "nan"], "--budget: expected tokens such as 90, or 2.5gmacs, got 'nan'"),
            (["--budget", "90"], "--budget: a budget needs an assigner"),
            (["--assigner", "absent.safetensors"], "--assigner: there is no file absent.safetensors"),
            (["--trace", "absent/t.json"], "--trace: cannot write absent/t.json"),
            (["--format", "xml"], "--format"),
            (["--dtype", "float16"], "--dtype: invalid choice: 'float16' (choose from"),
            (["--weights", "absent.safetensors"], "--weights: there is no file absent.safetensors"),
            (["--labels", "absent.txt"], "--labels"),
            (["--output", "absent/x.json"], "--output"),
            (["--model", "no_such_model"], "--model: timm knows no model 'no_such_model'"),
            (["--model", "resnet18"], "--model: expected a timm VisionTransformer, Eva or NaFlexVit, got ResNet"),
            (["--colour"], "--colour"),
        ],
    )
    def test_usage(self, capsys, photos, monkeypatch, args, named):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["predict", str(photos), "--model", MODEL, *args]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        *before, last = err.splitlines()
        assert named in last
        assert "random weights" not in err, "errors come before warnings"
        assert not before or last.startswith("revit-fast predict: error: argument") or "unrecognized" in last, (
            "only what the parser refuses comes with the usage"
        )

    @pytest.mark.parametrize("args", [[], ["predict"], ["predikt", "x"]])
    def test_usage_of_the_command(self, capsys, args):
        assert main(args) == 2
        assert "usage: revit-fast" in capsys.readouterr().err

    def test_a_folder_here_is_given_with_a_separator(self, capsys, photos, monkeypatch):
        monkeypatch.chdir(photos.parent)
        assert main(["predict", "photos", "--model", "photos"]) == 2
        assert "--model: timm knows no model 'photos'; for the folder here, give ./photos" in capsys.readouterr().err

    def test_a_trace_that_cannot_be_written_is_said_first(self, capsys, photos, tmp_path):
        code, out, err = run(capsys, photos, "--grid", 7, "--trace", tmp_path)
        assert (code, out) == (2, "")
        assert f"--trace: cannot write {tmp_path}; give a file in a folder that can be written to" in err

    def test_a_cascade_decides_nothing_before_the_model_runs(self, capsys, photos):
        assert main(["assign", str(photos), "--model", MODEL, "--policy", "cascade:0.9"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "error: --policy: ('cascade', 0.9) decides by the model's own logits" in err

    @pytest.mark.parametrize("command", ["demo", "serve"])
    def test_ports_that_there_are_not(self, capsys, command):
        assert main([command, "--port", "99999"]) == 2
        assert "argument --port: expected 1 to 65535, got 99999" in capsys.readouterr().err

    def test_weights_that_do_not_fit(self, capsys, photos, weights, tmp_path):
        code = main(["predict", str(photos), "--model", "deit_small_patch16_224", "--weights", weights])
        assert code == 2
        assert "pos_embed" in capsys.readouterr().err
        (tmp_path / "x.safetensors").write_bytes(b"rubbish")
        assert main(["predict", str(photos), "--model", MODEL, "--weights", str(tmp_path / "x.safetensors")]) == 2
        assert "x.safetensors" in capsys.readouterr().err

    @pytest.mark.parametrize("package", ["PIL", "timm"])
    def test_missing_package_is_one_line(self, capsys, photos, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        assert main(["predict", str(photos), "--model", MODEL, "--weights", "x"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f'revit-fast: {package} is not installed: pip install "revit-fast[cli]"\n'


class TestBatches:
    def test_first_fit_up_to_the_limit(self, capsys, photos, batches):
        code, records = run_json(capsys, photos, "--grid", "mixed", "--batch-tokens", 298)
        assert code == 0
        assert batches == [(197, 101), (50, 197, 50), (101, 197)]
        assert [r["tokens"] for r in records] == [197, 101, 50, 197, 101, 50, 197]

    def test_prefix_tokens_count(self, capsys, photos, batches):
        run(capsys, photos, "--grid", 7, "--batch-tokens", 3 * 49)
        assert batches == [(50, 50)] * 3 + [(50,)]

    def test_one_forward_where_all_fit(self, capsys, photos, batches):
        run(capsys, photos, "--grid", "mixed")
        assert batches == [(197, 101, 50, 197, 101, 50, 197)]

    def test_the_batches_do_not_change_the_result(self, capsys, photos, weights):
        args = (photos, "--weights", weights, "--grid", "mixed")
        _, together = run_json(capsys, *args)
        _, alone = run_json(capsys, *args, "--batch-tokens", 197)
        for a, b in zip(together, alone, strict=True):
            assert [e["class"] for e in a["top"]] == [e["class"] for e in b["top"]]
            assert a["top"][0]["probability"] == pytest.approx(b["top"][0]["probability"], rel=1e-4)

    def test_files_are_streamed(self, capsys, tmp_path, monkeypatch):
        """The first results are printed while most files are unread, however many there are."""
        paths = [tmp_path / f"{i:03}.png" for i in range(160)]
        for i, path in enumerate(paths):
            photo(i, 20, 20).save(path)
        n_read, n_read_at_first = 0, None
        real_decode, real_write = AdaptivePreprocessor.decode, report.write

        def decode(self, source):
            nonlocal n_read
            n_read += 1
            return real_decode(self, source)

        def write(stream, text):
            nonlocal n_read_at_first
            if n_read_at_first is None and str(tmp_path) in text:
                n_read_at_first = n_read
            real_write(stream, text)

        monkeypatch.setattr(AdaptivePreprocessor, "decode", decode)
        monkeypatch.setattr(report, "write", write)
        code, out, _ = run(capsys, tmp_path, "--grid", 7, "--batch-tokens", 200)
        assert code == 0
        assert [line.split()[3] for line in out.splitlines()[1:]] == [str(path) for path in paths]
        chunk = CHUNK + MORE_SMALL
        ahead = 2 * 1 + chunk  # one decoding thread
        assert n_read_at_first <= chunk + ahead + 1
        assert n_read == 160


class TestFormats:
    def test_csv_and_table_say_what_json_says(self, capsys, photos, weights):
        (photos / "4a.png").write_bytes(b"")
        args = (photos, "--weights", weights, "--grid", "mixed", "--top-k", 3)
        _, records = run_json(capsys, *args)
        _, table, _ = run(capsys, *args)
        _, out, _ = run(capsys, *args, "--format", "csv")
        rows = list(csv.DictReader(io.StringIO(out)))
        header = "path,grid,tokens,ms,class_1,prob_1,class_2,prob_2,class_3,prob_3,error"
        assert out.splitlines()[0] == header
        lines = table.splitlines()
        assert lines[0].split() == ["grid", "tokens", "ms", "path", "top-3"]
        for record, row, line in zip(records, rows, lines[1:], strict=True):
            assert row["path"] == record["path"]
            assert row["error"] == record.get("error", "")
            assert record["path"] in line
            if "error" in record:
                assert {row[key] for key in header.split(",")[1:-1]} == {""}
                assert line.split()[:3] == ["-", "-", "-"]
                assert line.endswith("error: empty file")
                continue
            assert (int(row["grid"]), int(row["tokens"])) == (record["grid"], record["tokens"])
            assert float(row["ms"]) > 0
            assert line.split()[:2] == [str(record["grid"]), str(record["tokens"])]
            for rank, entry in enumerate(record["top"], start=1):
                assert row[f"class_{rank}"] == entry["class"]
                assert float(row[f"prob_{rank}"]) == pytest.approx(entry["probability"], rel=1e-4)
                assert f"{entry['class']} {entry['probability']:.3f}" in line
        assert len({line.index("  /") for line in lines[1:]}) == 1, "paths are aligned"

    def test_labels(self, capsys, photos, weights, tmp_path):
        labels = tmp_path / "labels.txt"
        labels.write_text("".join(f"class, {i}\n" for i in range(N_CLASSES)), encoding="utf-8")
        args = (photos / "1.png", "--weights", weights, "--top-k", 1)
        _, (plain) = run_json(capsys, *args)
        _, named = run_json(capsys, *args, "--labels", labels)
        name = f"class, {class_names(create_model_once(MODEL)).index(plain[0]['top'][0]['class'])}"
        assert named[0]["top"][0]["class"] == name
        _, out, _ = run(capsys, *args, "--labels", labels, "--format", "csv")
        assert next(csv.DictReader(io.StringIO(out)))["class_1"] == name
        labels.write_text("only one\n")
        code, out, err = run(capsys, *args, "--labels", labels)
        assert (code, out) == (2, "")
        assert "1000 classes" in err
        assert "1 lines" in err

    def test_top_k_stops_at_the_number_of_classes(self, capsys, photos):
        _, records = run_json(capsys, photos / "1.png", "--top-k", N_CLASSES + 5, "--grid", 7)
        assert len(records[0]["top"]) == N_CLASSES
        assert sum(entry["probability"] for entry in records[0]["top"]) == pytest.approx(1, abs=1e-4)

    def test_file_names_that_could_break_a_format(self, capsys, tmp_path):
        names = ['comma,"quote".png', "line\nbreak\x1b[31m.png", "umläut ✓.png"]
        for name in names:
            photo(0).save(tmp_path / name)
        paths = sorted(str(tmp_path / name) for name in names)
        _, records = run_json(capsys, tmp_path, "--grid", 7)
        assert [r["path"] for r in records] == paths
        _, out, _ = run(capsys, tmp_path, "--grid", 7, "--format", "csv")
        assert [row["path"] for row in csv.DictReader(io.StringIO(out, newline=""))] == paths
        _, out, _ = run(capsys, tmp_path, "--grid", 7)
        assert len(out.splitlines()) == 4
        assert "\x1b" not in out

    def test_undecodable_file_name_on_a_narrow_encoding(self):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
        report.write(stream, os.fsdecode(b"\xff\xc3\xa4.jpg") + "\n")
        assert raw.getvalue() == b"\\udcff\\xe4.jpg\n"

    def test_output_replaces_the_file_at_the_end(self, capsys, photos, tmp_path):
        target = tmp_path / "out.json"
        target.write_text("old")
        code, out, err = run(capsys, photos, "--grid", 7, "--format", "json", "--output", target)
        assert (code, out) == (0, "")
        assert "7 images" in err
        assert len(json.loads(target.read_text())) == 7
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "photos"]

    def test_output_to_a_device_does_not_replace_it(self, capsys, photos):
        assert run(capsys, photos, "--grid", 7, "--output", os.devnull)[0] == 0
        assert not os.path.isfile(os.devnull)

    def test_usage_error_leaves_the_output_alone(self, capsys, photos, tmp_path):
        target = tmp_path / "out.csv"
        target.write_text("old")
        assert run(capsys, photos, "--grid", 13, "--output", target)[0] == 2
        assert target.read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "photos"]


class TestInterruption:
    @pytest.fixture
    def interrupted(self, monkeypatch):
        """Ctrl-C arrives in the third forward."""
        pack = AdaptivePreprocessor.pack
        calls = 0

        def interrupt(*args):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return pack(*args)

        monkeypatch.setattr(AdaptivePreprocessor, "pack", interrupt)
        monkeypatch.setattr(pipelines.build_pipeline, "__defaults__", (math.inf,))

    def test_what_was_printed_stays_and_is_valid(self, capsys, photos, interrupted):
        code, records = run_json(capsys, photos, "--grid", 7, "--batch-tokens", 100)
        assert code == 130
        assert [os.path.basename(r["path"]) for r in records] == ["0.jpg", "1.png", "2.webp", "3.JPEG"]
        end = time.perf_counter() + 10
        while any(t.name.startswith("revit-fast-decode") for t in threading.enumerate()):
            assert time.perf_counter() < end, "decoding goes on"
            time.sleep(0.01)

    def test_output_is_all_or_nothing(self, capsys, photos, tmp_path, interrupted):
        target = tmp_path / "out.csv"
        target.write_text("old")
        assert run(capsys, photos, "--grid", 7, "--batch-tokens", 100, "--output", target)[0] == 130
        assert target.read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "photos"]


class TestProgress:
    def test_random_weights_are_announced(self, capsys, photos, weights):
        assert "random weights: predictions are meaningless" in run(capsys, photos, "--grid", 7)[2]
        assert "random" not in run(capsys, photos, "--grid", 7, "--weights", weights)[2]

    def test_plain_lines(self, capsys, photos, monkeypatch):
        monkeypatch.setattr(progress, "EVERY_S", 0.0)
        _, _, err = run(capsys, photos, "--grid", 7, "--batch-tokens", 50)
        *lines, last = [line for line in err.splitlines() if "images" in line]
        assert [line.split(" images")[0] for line in lines] == [f"{n} of 7" for n in range(8)]
        assert all("images/s" in line and "tokens/s" in line and "ends at" in line for line in lines[1:])
        assert "7 images (0 failed) in" in last

    def test_threads(self, capsys, photos):
        code, records = run_json(capsys, photos, "--grid", 7, "--threads", 2)
        assert code == 0
        assert [r["path"] for r in records] == sorted(map(str, photos.iterdir()))
        assert torch.get_num_threads() == 2

    def test_bar_on_a_terminal_leaves_stdout_alone(self, capsys, photos, monkeypatch):
        with terminal() as (stream, chunks):
            monkeypatch.setattr(sys, "stderr", stream)
            code = main(["predict", str(photos), "--model", MODEL, "--grid", "7", "--format", "json"])
            monkeypatch.undo()
        shown = b"".join(chunks).decode()
        assert code == 0
        assert len(json.loads(capsys.readouterr().out)) == 7
        assert "7/7" in shown
        assert "images/s" in shown
        assert "tokens/s" in shown
        assert "7 images (0 failed)" in shown

    def test_bar_and_table_on_one_terminal(self, photos, monkeypatch):
        (photos / "5.jpg").write_bytes(b"")
        with terminal() as (stream, chunks):
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setattr(sys, "stdout", stream)
            code = main(["predict", str(photos), "--model", MODEL, "--grid", "7", "--batch-tokens", "100"])
            monkeypatch.undo()
        shown = b"".join(chunks).decode()
        lines = shown.splitlines()
        assert code == 1
        assert lines[1].startswith("grid tokens"), "the table begins on a line of its own"
        last_bar = max(shown.rfind(f"{n}/7") for n in range(8))
        assert last_bar > 0
        assert "\x1b[2K" in shown[last_bar:], "the bar is cleared"
        for name in ("0.jpg", "3.JPEG", "6.png"):
            (line,) = [line for line in lines if str(photos / name) in line]
            assert "  7     50 " in line
        assert sum(str(photos / "5.jpg") in line for line in lines) == 1, "an error is shown once"


class TestEnv:
    def test_json(self, capsys):
        assert main(["env", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["torch"] == torch.__version__
        assert found["revit_fast"] == rf.__version__
        assert found["timm"] == timm.__version__
        assert found["threads"] == torch.get_num_threads()
        assert found["isa"] in found["isas"] or not found["extension"]
        assert found["bfloat16"].split()[0] == ("multiplied" if cpu_multiplies_bf16() else "widened")
        assert found["int8"].split()[0] == ("multiplied" if cpu_integer_depths() == 4 else "widened")
        assert ("never executed on hardware" in found["bfloat16"]) == (found["isa"] == "amx")
        assert ("never executed on hardware" in found["int8"]) == (found["isa"] in ("amx", "avxvnni"))
        assert "cpu" in found["attention"]
        assert len(found["cuda"]) == torch.cuda.device_count()
        assert found["jpeg"] == ("Pillow" if importlib.util.find_spec("simplejpeg") is None else "simplejpeg")

    def test_text(self, capsys):
        assert main(["env"]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["torch"] == torch.__version__
        assert lines["extension"].startswith(("built", "not built"))
        expected = {"python", "triton", "pillow", "numpy", "platform", "cpu", "malloc", "isa", "isas", "attention"}
        assert expected <= set(lines)

    def test_never_fails(self, capsys, monkeypatch):
        def broken(*args):
            raise OSError("broken installation")

        monkeypatch.setattr(metadata, "version", broken)
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setattr(torch.cuda, "device_count", broken)
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", broken)
        assert main(["env", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["triton"] is found["timm"] is None
        assert found["cuda"] == []
        assert main(["env"]) == 0


class TestProcess:
    @pytest.mark.processes
    def test_module_runs_and_stdout_may_be_closed_early(self, photos):
        args = [sys.executable, "-m", "revit_fast.cli", "predict", str(photos), "--model", MODEL, "--grid", "7"]
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 1
        assert "random weights" in err
        assert "Traceback" not in err
        assert "Exception ignored" not in err

    def test_help_and_version(self, capsys):
        assert main(["--help"]) == 0
        assert "predict" in capsys.readouterr().out
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == rf.__version__
        assert tuple(report.FORMATS) == arguments.RESULT_FORMATS


class TestHeads:
    """A file of weights brings its classes: their number, and their names if it has them."""

    @pytest.fixture
    def of_five(self, weights, tmp_path):
        from safetensors.torch import load_file

        state = load_file(weights)
        state |= {name: state[name][10:15].contiguous() for name in ("head.weight", "head.bias")}
        folder = tmp_path / "tuned"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"

    def test_another_number_is_said_in_one_line(self, capsys, photos, of_five):
        code, out, err = run(capsys, photos / "1.png", "--weights", of_five, "--grid", 7, "--format", "json")
        assert code == 0
        assert {entry["class"] for entry in json.loads(out)[0]["top"]} == set(range(5))
        said = f"--weights: 5 classes, as the head of {of_five}, instead of the 1000 of {MODEL}"
        assert [line for line in err.splitlines() if "classes" in line] == [said]

    @pytest.mark.parametrize(
        "config",
        [
            {"id2label": {str(i): f"kind {i}" for i in range(5)}},
            {"architecture": MODEL, "label_names": [f"kind {i}" for i in range(5)]},
            {
                "pretrained_cfg": {
                    "label_names": list("01234"),
                    "label_descriptions": {str(i): f"kind {i}" for i in range(5)},
                }
            },
            {"classes": [f"kind {i}" for i in range(5)]},
        ],
    )
    def test_names_come_from_the_configuration_beside_it(self, capsys, photos, of_five, tmp_path, config):
        (of_five.parent / "config.json").write_text(json.dumps(config))
        args = (photos / "1.png", "--weights", of_five, "--grid", 7)
        _, records = run_json(capsys, *args)
        assert {entry["class"] for entry in records[0]["top"]} == {f"kind {i}" for i in range(5)}
        (tmp_path / "own.txt").write_text("".join(f"own {i}\n" for i in range(5)))
        _, records = run_json(capsys, *args, "--labels", tmp_path / "own.txt")
        assert {entry["class"] for entry in records[0]["top"]} == {f"own {i}" for i in range(5)}, "--labels wins"

    def test_explain_and_a_bundle_follow_too(self, capsys, photos, of_five, tmp_path):
        rf.save_bundle(tmp_path / "bundle", create_model_once(MODEL), classes=map(str, range(N_CLASSES)))
        sheet = tmp_path / "sheet.html"
        model = ["--model", f"{tmp_path}/bundle", "--weights", str(of_five), "--grid", "7"]
        assert main(["explain", str(photos / "1.png"), *model, "--output", str(sheet)]) == 0
        assert f"--weights: 5 classes, as the head of {of_five}, instead of the 1000 of" in capsys.readouterr().err
        assert sheet.read_text().count('class="name"') == 5


class TestDevice:
    def test_the_model_and_its_packs_go_there(self, monkeypatch):
        """The meta device stands for a GPU, which there need not be."""
        monkeypatch.setattr(pipelines, "checked_device", lambda name: torch.device("meta"))
        monkeypatch.setattr(pipelines, "create_model", rf.create_model)
        args = build_parser().parse_args(["predict", "x", "--model", MODEL, "--device", "cuda"])
        pipe = pipelines.build_pipeline(args)
        assert pipe.model.pos_embed.device.type == "meta"
        assert pipe.prep.options["dtype"] == torch.uint8, "rows are normalised there"
        own = create_model_once(MODEL)
        assert pipelines.optimized(args, own).pos_embed.device.type == "meta"
        assert own.pos_embed.device.type == "cpu", "a command that saves the model again leaves it where it is"

    @pytest.mark.parametrize("name", ["cuda", "cuda:1"])
    def test_those_that_are_there(self, monkeypatch, name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert pipelines.checked_device(name) == torch.device(name)
        with pytest.raises(arguments.UsageError, match="expected cpu or cuda:0 or cuda:1, got 'cuda:2'"):
            pipelines.checked_device("cuda:2")

    def test_a_server_sees_one_gpu(self, monkeypatch):
        for seen, device, expected in ((None, "cuda:1", "1"), (None, "cuda", "0"), ("4,7", "cuda:1", "7")):
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if seen is not None:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
            args = argparse.Namespace(device=device)
            assert (serve.see_one_gpu(args), os.environ["CUDA_VISIBLE_DEVICES"], args.device) == (1, expected, "cuda")
        assert serve.see_one_gpu(argparse.Namespace(device="cpu")) == 0


class TestSources:
    def test_stdin_and_lists(self, capsys, photos, tmp_path, monkeypatch):
        named = [photos / "3.JPEG", photos / "0.jpg"]
        text = "".join(f"{path}\n" for path in named)
        (tmp_path / "list.txt").write_text(text)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        for source in (f"@{tmp_path}/list.txt", "-"):
            code, records = run_json(capsys, source, "--grid", 7)
            assert (code, [r["path"] for r in records]) == (0, list(map(str, named)))


def test_theta_stands_beside_the_probabilities(capsys, photos):
    args = ["predict", str(photos / "1.png"), "--model", "fashion-mnist", "--policy", "threshold:0.8125"]
    assert main(args) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[3:7] == ["P(14)", "P(10)", "P(7)", "θ"]
    assert row.split()[6] == "0.812"
    assert main([*args, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["threshold"] == 0.8125
    assert main([*args, "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out), strict=True)
    assert float(row["threshold"]) == 0.8125
    assert main([*args[:-1], "argmax"]) == 0
    assert "θ" not in capsys.readouterr().out, "argmax compares with none"


@pytest.mark.parametrize("budget", ["5000", "3gmacs"])
def test_a_budget_that_no_image_can_spend(capsys, photos, budget):
    assert main(["predict", str(photos), "--model", "fashion-mnist", "--budget", budget]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--budget: mean_" in line
    assert "is above the cost of the longest length; expected" in line

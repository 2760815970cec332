"""Names and text of the outside world: names that are no UTF-8, byte order marks, links in a circle, long numbers."""

import csv
import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from small_models import make_model
from train_helpers import noise_images, tiny_config, write_folders

import revit_fast as rf
from revit_fast.cli import arguments, main, report
from revit_fast.deploy import export, ray_dataset, results_folder
from revit_fast.explain import Explanation, write
from revit_fast.io.atomic import read_json, write_json
from revit_fast.io.folders import matches
from revit_fast.io.images import Source, find_images
from revit_fast.io.names import (
    decoded,
    from_text,
    loads,
    on_one_line,
    read_names,
    say,
    shortened,
    to_text,
    whole_number,
)
from revit_fast.io.tensors import tensors_and_metadata
from revit_fast.streaming.bundle import read_bundle
from revit_fast.streaming.results import Result
from revit_fast.train.data import ArrayImages
from revit_fast.train.datasets import open_images
from revit_fast.train.labels import LengthLabels
from revit_fast.train.run import read_config, train
from revit_fast.train.shards import expand_braces

FOREIGN = os.fsdecode(b"caf\xe9")
AWKWARD = [
    FOREIGN,
    r"caf\xe9",
    r"caf\x5cxe9",
    "a,b",
    'say "x"',
    "two\nlines",
    "back\rhere",
    " blanks ",
    "007",
    "\ud800",
    "é",
]
"""Names that are different, and that a careless writer makes equal, breaks or cannot write."""

ENDLESS = "9" * 5000


def shard_of(path, label):
    """A shard of one sample."""
    with tarfile.open(path, "w") as tar:
        for name, content in (("x.png", b"pixels"), ("x.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def foreign_folder(tmp_path):
    """Folders of classes, one of which has a name that is no UTF-8, as have two images."""
    images = noise_images(24)
    named = ArrayImages(images.image(slice(None)), images.labels, (FOREIGN, "middle", "bright"))
    for split in ("train", "test"):
        write_folders(named, tmp_path / split)
        for file in sorted((tmp_path / split / FOREIGN).iterdir())[:2]:
            file.rename(os.fsdecode(os.fsencode(file.with_suffix("")) + b"\xff.png"))
    return tmp_path


class TestTheRule:
    def test_it_is_reversible_and_utf8(self):
        rng = np.random.default_rng(0)
        letters = np.array(["\\", "x", "u", "d", "8", "5", "c", "f", "\udcff", "\udc80", "\ud800", "ä", "\n"])
        names = ["".join(rng.choice(letters, rng.integers(9))) for _ in range(5000)] + AWKWARD
        texts = [to_text(name) for name in names]
        assert [from_text(text) for text in texts] == names
        assert len(set(texts)) == len(set(names))
        for text in texts:
            text.encode()

    def test_what_it_writes(self):
        assert to_text(FOREIGN) == r"caf\xe9"
        assert to_text(r"caf\xe9") == r"caf\x5cxe9"
        assert to_text(r"C:\images\naïve\x1.png") == r"C:\images\naïve\x1.png"
        assert on_one_line("a\udcff\x1b\n") == r"a\xff\x1b\n"


class TestFiles:
    def test_label_files(self, tmp_path):
        ones = np.zeros(len(AWKWARD), dtype=np.int64)
        kept = LengthLabels((4, 3), tuple(AWKWARD), ones, np.ones((2, len(ones)), dtype=bool))
        kept.save(tmp_path / "labels.csv")
        assert LengthLabels.load(tmp_path / "labels.csv").names == kept.names

    def test_bundles(self, tmp_path):
        model = make_model(num_classes=len(AWKWARD))
        rf.save_bundle(tmp_path / "b", model, classes=AWKWARD, card="from \udcff")
        assert read_bundle(tmp_path / "b").classes == tuple(AWKWARD)
        card = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
        assert r"caf\xe9" in card
        assert r"two\nlines" in card
        assert read_bundle(tmp_path / "b").card == "from \udcff"

    def test_json(self, tmp_path):
        value = {FOREIGN: [FOREIGN, 1, None, {"a": AWKWARD}]}
        write_json(tmp_path / "x.json", value)
        assert read_json(tmp_path / "x.json") == value
        json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))[to_text(FOREIGN)][0].encode()

    @pytest.mark.parametrize("part_format", ["jsonl", "parquet"])
    def test_results_folders(self, tmp_path, part_format):
        if part_format == "parquet":
            pytest.importorskip("pyarrow")
        (tmp_path / "_done").mkdir()
        layout = results_folder.Layout(str(tmp_path), 4, part_format, 1, False, (), True)
        logits = torch.tensor([0.0, 1.0])
        results = [Result(i, Source(n), 4, 16, logits, None, labels=["a", FOREIGN]) for i, n in enumerate(AWKWARD[:2])]
        results.append(Result(2, Source(FOREIGN), error=f"{FOREIGN}: gone"))
        records = [layout.record_of(result, result.source.path) for result in results]
        layout.write(records, results_folder.PartReport(0, 3, 1, 32, 1.0, 1, "here"))
        manifest = {
            "format": results_folder.FORMAT,
            "inputs": {"images": 3},
            "part_images": 4,
            "part_format": part_format,
        }
        write_json(tmp_path / "_manifest.json", manifest)
        read = list(results_folder.read_records(tmp_path))
        assert [r["path"] for r in read] == [*AWKWARD[:2], FOREIGN]
        assert read[0]["top"][0]["class"] == FOREIGN

    def test_rows_and_manifests_of_cluster_runs(self, tmp_path):
        path = str(tmp_path / FOREIGN)
        row = ray_dataset._row(0, [Source(path)], [path], 4)
        row["paths"][0].encode()
        assert from_text(row["read"][0]) == str(tmp_path / FOREIGN)
        prep = rf.AdaptivePreprocessor.for_model(make_model(num_classes=2), policy=("fixed", 4))
        pipe = rf.AdaptivePipeline(make_model(num_classes=2), prep, labels=["a", FOREIGN])
        layout = results_folder.Layout(str(tmp_path / "out"), 4, "jsonl", 1, False, (), True)
        for _ in range(2):  # the second finds its own manifest
            results_folder.claim(layout, pipe, [Source(FOREIGN)])

    def test_exported_metadata(self):
        texts = export._as_text(export.model_settings(make_model(num_classes=2, depth=1), ["a", FOREIGN]))
        texts["classes"].encode()
        assert loads(texts["classes"]) == ["a", FOREIGN]

    def test_sheets(self, tmp_path):
        pytest.importorskip("PIL")
        write(tmp_path / "sheet.html", [Explanation(0, FOREIGN, error=FOREIGN)])
        assert "caf" in (tmp_path / "sheet.html").read_text(encoding="utf-8")


class TestCommands:
    @pytest.mark.parametrize("name", ["table", "json", "csv"])
    def test_results_of_predict(self, name):
        text = report.FORMATS[name](1)
        rows = [report.Prediction(n, None, 4, 16, 1.0, [{"label": FOREIGN, "score": 0.5}]) for n in AWKWARD]
        written = text.header() + "".join(map(text.row, rows)) + text.footer()
        written.encode()
        if name == "json":
            records = loads(written)
            assert [r["path"] for r in records] == AWKWARD
            assert records[0]["top"][0]["class"] == FOREIGN
        elif name == "csv":
            records = list(csv.DictReader(io.StringIO(written, newline="")))
            assert [from_text(r["path"]) for r in records] == AWKWARD
        else:
            assert len(written.splitlines()) == len(AWKWARD) + 1

    def test_training_keeps_its_bundle(self, foreign_folder, tmp_path, capsys):
        data = foreign_folder / os.fsdecode(b"d\xff")
        os.symlink(".", data)
        config = tiny_config(data=str(data), epochs=1, warmup_epochs=0)
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        train(config, tmp_path / os.fsdecode(b"run\xff"), terminal=narrow)
        run = tmp_path / os.fsdecode(b"run\xff")
        assert read_bundle(run / "bundle").classes == ("bright", FOREIGN, "middle")
        assert read_config(run).data == str(data)
        tensors_and_metadata((run / "checkpoint.safetensors").read_bytes())[1]["state"].encode()
        labels = tmp_path / "labels.csv"
        assert main(["label", str(run / "bundle"), str(foreign_folder), "--output", str(labels)]) == 0
        images = open_images(foreign_folder, "train", read_bundle(run / "bundle").classes)
        assert len(LengthLabels.load(labels).of_images(images)) == 24

    def test_a_narrow_stdout_ends_no_command(self, monkeypatch):
        raw = io.BytesIO()
        parser = arguments.argparse.ArgumentParser("p")
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True))
        assert arguments.run_command(parser, lambda args: print(f"é {FOREIGN}") or 0, []) == 0
        assert raw.getvalue() == b"\\xe9 caf\\udce9\n"

    def test_a_usage_error_is_one_line(self, capsys):
        def run(args):
            raise arguments.UsageError("DATA: \x1b[31m two\nlines")

        assert arguments.run_command(arguments.argparse.ArgumentParser("p"), run, []) == 2
        assert capsys.readouterr().err == "p: error: DATA: \\x1b[31m two\\nlines\n"

    def test_progress_on_any_terminal(self):
        raw = io.BytesIO()
        narrow = io.TextIOWrapper(raw, encoding="ascii")
        say(narrow, f"ü {FOREIGN}")
        assert raw.getvalue().endswith(b"\n")
        say(None, "nothing")


class TestTextFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_marks_and_line_ends(self, tmp_path, encoding, end):
        path = tmp_path / "names.txt"
        names = ["Käse", "a\u2028b", "a\x85b", r"caf\xe9"]
        for last in ("", end):
            path.write_bytes((end.join(names) + last).encode(encoding))
            assert read_names(path) == [*names[:3], FOREIGN]
        path.write_bytes(f'{{"name":{end}"Käse"}}'.encode(encoding))
        assert read_json(path) == {"name": "Käse"}

    @pytest.mark.parametrize("content", ["Käse\n".encode("latin-1"), "a\nb\n".encode("utf-16-le")])
    def test_other_encodings_are_refused(self, tmp_path, content, capsys):
        with pytest.raises(ValueError, match="save the file as UTF-8"):
            decoded(content)
        (tmp_path / "labels.txt").write_bytes(content)
        rf.save_bundle(tmp_path / "b", make_model(num_classes=2, depth=1))
        code = main(["predict", "x.png", "--model", str(tmp_path / "b"), "--labels", str(tmp_path / "labels.txt")])
        assert code == 2
        assert "--labels: cannot read" in capsys.readouterr().err

    def test_every_file_that_people_write_may_have_a_mark(self, tmp_path):
        mark = b"\xef\xbb\xbf"
        model = make_model(num_classes=2, depth=1)
        rf.save_bundle(tmp_path / "b", model, classes=["a", "b"])
        tiny_config(seed=3).save(tmp_path / "train.json")
        labels = LengthLabels((4, 3), ("x", "y"), np.array([0, -1]), np.ones((2, 2), dtype=bool))
        labels.save(tmp_path / "labels.csv")
        for path in (tmp_path / "b" / "config.json", tmp_path / "train.json", tmp_path / "labels.csv"):
            path.write_bytes(mark + path.read_bytes().replace(b"\n", b"\r\n"))
        assert read_bundle(tmp_path / "b").classes == ("a", "b")
        assert read_config(tmp_path).seed == 3
        assert LengthLabels.load(tmp_path / "labels.csv").names == ("x", "y")

    def test_class_names_beside_shards(self, tmp_path):
        shard_of(tmp_path / "train.tar", b"1")
        (tmp_path / "classes.txt").write_bytes("\ufeffa\r\ncaf\\xe9\r\n".encode())
        assert open_images(tmp_path).classes == ("a", FOREIGN)
        (tmp_path / "classes.txt").write_bytes(b"a\ncaf\xe9\n")
        with pytest.raises(ValueError, match=r"classes\.txt: line 2 is no UTF-8 text \(byte 0xe9\)"):
            open_images(tmp_path)


class TestCircles:
    @pytest.fixture
    def circle(self, tmp_path):
        """Two classes; links to the root, to the own folder, and two folders that link to each other."""
        root = tmp_path / "set"
        write_folders(noise_images(6), root)
        for name, target in (("up", root), ("own", root / "dark"), (FOREIGN, root / "bright")):
            os.symlink(target, root / "dark" / name)
        os.symlink(root / "dark", root / "bright" / "there")
        return root

    def test_class_folders(self, tmp_path, circle):
        (circle / "bright" / "there").unlink()
        (circle / "dark" / FOREIGN).unlink()
        with pytest.warns(UserWarning, match="a folder above it: it is left out") as said:
            images = open_images(circle)
        assert len(images) == 6
        assert len(said) == 2

    def test_links_that_lead_back_and_forth_end(self, circle):
        with pytest.warns(UserWarning, match="left out"):
            images = open_images(circle)
        assert len(images) < 20

    def test_patterns(self, circle, monkeypatch):
        for name in (FOREIGN, "own"):
            (circle / "dark" / name).unlink()
        (circle / "bright" / "there").unlink()
        with pytest.warns(UserWarning, match="left out"):
            found = list(find_images([f"{circle}/**/*.png"]))
        assert len(found) == 6
        assert not any("up" in source.path for source in found)
        monkeypatch.chdir(circle)
        with pytest.warns(UserWarning, match="left out"):
            assert len(matches("**/*.png")) == 6
        assert len(matches("dark/up/bright/**")) == 3, "what the pattern names is read"

    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path, monkeypatch, capsys):
        write_folders(noise_images(6), tmp_path)
        scan = os.scandir

        def guarded(path):
            if str(path).endswith("middle"):
                raise PermissionError(13, "Permission denied", path)
            return scan(path)

        monkeypatch.setattr(os, "scandir", guarded)
        with pytest.raises(PermissionError, match=r"Permission denied: .*middle"):
            open_images(tmp_path)


class TestEndlessNumbers:
    def test_whole_numbers(self):
        assert [whole_number(t) for t in ("0", "007", "0" * 5000 + "7", "x", "", "-1", "²", "٣")] == [
            0,
            7,
            7,
            *[None] * 5,
        ]
        assert whole_number(ENDLESS) == 10**18
        assert len(shortened(10**5000)) < 100
        assert len(shortened(ENDLESS)) < 100

    def test_options(self, capsys):
        for option in ("--top-k", "--threads", "--batch-tokens", "--grid", "--policy=fixed:", "--budget"):
            given = [option + ENDLESS] if option.endswith(":") else [option, ENDLESS]
            assert main(["predict", "x.png", *given]) == 2
            assert len(capsys.readouterr().err.splitlines()[-1]) < 400 + len(ENDLESS) * (option == "--threads")

    @pytest.mark.parametrize("text", [f'{{"seed": {ENDLESS}}}', f'{{"epochs": {"9" * 4000}}}', "[" * 100_000])
    def test_configs(self, tmp_path, text, capsys):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError):
            read_json(tmp_path / "c.json")
        code = main(["train", "data", "--output", str(tmp_path / "run"), "--config", str(tmp_path / "c.json")])
        assert code == 2
        assert "--config: cannot read" in capsys.readouterr().err
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(ValueError, match=r"train\.json cannot be read"):
            read_config(tmp_path)

    @pytest.mark.parametrize("name", ["epochs", "seed", "lr", "workers"])
    def test_numbers_that_fit_no_machine(self, name):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            tiny_config(**{name: 10**5000})

    def test_label_files(self, tmp_path):
        labels = LengthLabels((4, 3), ("x",), np.array([0]), np.ones((2, 1), dtype=bool))
        labels.save(tmp_path / "l.csv")
        good = (tmp_path / "l.csv").read_text()
        for line in (f"x,{ENDLESS},4,1,1", f"x,-{'9' * 30},,1,1", "x" * 200_000 + ",0,4,1,1"):
            (tmp_path / "l.csv").write_text(good.replace("x,0,4,1,1", line))
            with pytest.raises(ValueError, match="line 2") as refused:
                LengthLabels.load(tmp_path / "l.csv")
            assert len(str(refused.value)) < 600

    @pytest.mark.parametrize("last", [ENDLESS, "99999999999"])
    def test_patterns_of_shards(self, last):
        with pytest.raises(ValueError, match=r"path: .* names over 10,000,000 shards"):
            expand_braces(f"train-{{0..{last}}}.tar")
        assert expand_braces("a{08..10}") == ["a08", "a09", "a10"]

    @pytest.mark.parametrize("label", [ENDLESS, "9" * 30, "9" * 15])
    def test_labels_of_shards(self, tmp_path, label):
        shard_of(tmp_path / "train.tar", label.encode())
        with pytest.raises(ValueError, match="key 'x' has"):
            open_images(tmp_path)

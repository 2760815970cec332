"""Runs and files that are used from another folder than the one they were begun in, or that were cut short."""

import json
import os
import threading

import numpy as np
import pytest
from train_helpers import noise_images, tiny_config, write_folders

from revit_fast.cli import main
from revit_fast.train import run as run_module
from revit_fast.train.checkpoint import load_state
from revit_fast.train.datasets import open_images
from revit_fast.train.distributed import World
from revit_fast.train.labels import FORMAT, LengthLabels
from revit_fast.train.run import read_config, train
from revit_fast.train.trainer import CHECKPOINT, CONFIG, Trainer


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two folders that hold different images under the same relative names; the process stands in the first."""
    for name, seed in (("here", 0), ("there", 5)):
        write_folders(noise_images(24, seed), tmp_path / name / "photos")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("path", ["photos", "./photos", "../here/photos/"])
def test_names_of_images_do_not_depend_on_the_folder(places, path):
    names = [open_images(path).name(i) for i in (0, 23)]
    assert all(name.startswith("/") for name in names)
    assert all(map(os.path.isfile, names))


def test_dots_after_a_link_are_the_systems(places):
    (places / "here" / "link").symlink_to(places / "there" / "photos")
    images, truth = open_images("link/../photos"), open_images(str(places / "there" / "photos"))
    assert np.array_equal(images.image(0), truth.image(0))


def labels_of(images):
    correct = np.ones((3, len(images)), dtype=bool)
    names = tuple(images.name(i) for i in range(len(images)))
    return LengthLabels((4, 3, 2), names, np.zeros(len(images), dtype=np.int64), correct)


def test_labels_are_not_taken_for_other_images_of_the_same_relative_names(places, monkeypatch):
    labels_of(open_images("photos")).save(places / "labels.csv")
    labels = LengthLabels.load(places / "labels.csv")
    assert len(labels.of_images(open_images("photos"))) == 24
    monkeypatch.chdir(places / "there")
    with pytest.raises(ValueError, match="24 of 24 images have no label"):
        labels.of_images(open_images("photos"))
    assert len(labels.of_images(open_images(str(places / "here" / "photos")))) == 24


def test_a_label_file_that_is_cut_short(places):
    path = places / "labels.csv"
    labels_of(open_images("photos")).save(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (b"".join(lines[:-1]), b"".join(lines[:2]), whole[:-3], whole[: len(whole) // 2], whole[:20], b""):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"labels\.csv"):
            LengthLabels.load(path)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"is cut short: it holds 23 of 24 images; make it again"):
        LengthLabels.load(path)
    head = {"format": FORMAT, "grids": [4, 3, 2], "rule": "smallest", "unsolved": "longest"}
    before = (b",".join(line.split(b",")[:-3]) + b"\n" for line in lines[:-1])
    path.write_bytes(b"".join([b"# " + json.dumps(head).encode() + b"\n", *before]))
    assert len(LengthLabels.load(path).names) == 23, "files of versions before do not say how many they hold"


def test_a_run_is_resumed_from_any_folder(places, monkeypatch):
    config = tiny_config(data="photos", held_out_share=0.25, epochs=1, warmup_epochs=0)
    train(config, places / "run")
    assert read_config(places / "run").data == str(places / "here" / "photos")
    monkeypatch.chdir(places / "there")
    train(read_config(places / "run"), places / "run", resume=True)
    with pytest.raises(ValueError, match=rf"resume: the run in .* has data = '{places}/here/photos'"):
        train(config, places / "run", resume=True)


def test_a_run_of_a_version_before_is_resumed_where_it_was_begun(places, monkeypatch):
    config = tiny_config(data="photos", held_out_share=0.25, epochs=1, warmup_epochs=0)
    monkeypatch.setattr(type(config), "resolved", lambda self: self)  # what it did
    train(config, places / "run")
    assert read_config(places / "run").data == "photos"
    monkeypatch.undo()
    monkeypatch.chdir(places / "here")
    train(config, places / "run", resume=True)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{", b"[]"])
def test_files_of_a_run_that_are_cut_short_are_named(places, capsys, content):
    run = places / "run"
    run.mkdir()
    (run / CONFIG).write_bytes(content)
    assert main(["train", "--output", str(run), "--resume"]) == 2
    assert "train.json cannot be read as the configuration of a run" in capsys.readouterr().err
    (run / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors cannot be read as a state .* remove it to start"):
        load_state(run / CHECKPOINT)


def test_an_empty_file_of_class_names_is_named(places):
    import io
    import tarfile

    from PIL import Image

    with tarfile.open(places / "a.tar", "w") as tar:
        for name, data in (("0.png", io.BytesIO()), ("0.cls", io.BytesIO(b"0"))):
            if name.endswith("png"):
                Image.new("RGB", (4, 4)).save(data, "png")
            entry = tarfile.TarInfo(name)
            entry.size = len(data.getvalue())
            data.seek(0)
            tar.addfile(entry, data)
    (places / "classes.txt").write_text("")
    with pytest.raises(ValueError, match=r"classes\.txt is empty; write a class name per line, or remove it"):
        open_images(str(places / "a.tar"))
    (places / "classes.txt").unlink()
    assert open_images(str(places / "a.tar")).classes == ("0",)


class Ranks:
    """Two processes of a run, as threads: `sum` waits for both."""

    def __init__(self):
        self.barrier, self.sent = threading.Barrier(2, timeout=30), [None, None]

    def world(self, rank):
        world = object.__new__(World)
        world.size, world.rank = 2, rank

        def add(values):
            self.sent[rank] = values
            self.barrier.wait()
            return self.sent[0] + self.sent[1]

        world.sum = add
        return world


def told(values):
    """What each of two processes with these values is told."""
    ranks, said = Ranks(), [None, None]

    def check(rank):
        try:
            ranks.world(rank).check_same("choices and images", values[rank])
        except ValueError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_processes_that_stand_in_other_folders_see_that_their_images_differ(places, monkeypatch):
    config = tiny_config(data="photos")
    here = run_module._shared(config.resolved(), open_images("photos"))
    monkeypatch.chdir(places / "there")
    there = run_module._shared(config.resolved(), open_images("photos"))
    for message in told([here, there]):
        assert message.startswith("choices and images: process 1 of 2 has another one than process 0; start all")
    assert told([there, there]) == [None, None]
    assert told([there, run_module._shared(config.with_changes(lr=0.5), open_images("photos"))])[0] is not None


def test_machines_may_have_the_images_at_other_places(places):
    """The same images, mounted elsewhere."""
    (places / "mounted").symlink_to(places / "here" / "photos")
    config = tiny_config(data=str(places / "mounted"))
    other = tiny_config(data=str(places / "here" / "photos"))
    assert told(
        [run_module._shared(config, open_images(config.data)), run_module._shared(other, open_images(other.data))]
    ) == [None, None]


def test_a_single_process_compares_nothing(places, monkeypatch):
    def begin(*arguments):
        raise RuntimeError("begun")

    monkeypatch.setattr(Trainer, "_update", begin)
    monkeypatch.setattr(World, "check_same", lambda *arguments: pytest.fail("it has nobody to compare with"))
    with pytest.raises(RuntimeError, match="begun"):
        train(tiny_config(data="photos", held_out_share=0.25), places / "run")

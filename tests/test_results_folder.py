"""The folder of a long run: which files it reads, which parts are whole, who may write. No cluster is needed."""

import json
import os
import subprocess
import sys
import threading
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import revit_fast as rf
from revit_fast.deploy import ray_dataset
from revit_fast.deploy.ray_dataset import PartWorker, predict_dataset
from revit_fast.deploy.results_folder import Layout, ManifestError, claim, read_records
from revit_fast.io.images import Source

N, PART = 7, 3


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    size = {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_dim": 32}
    model = rf.optimize(rf.ReViT(grids=(3, 2), patch_size=4, num_classes=3, **size).eval())
    return rf.AdaptivePipeline(model, rf.AdaptivePreprocessor.for_model(model, policy="cycle"))


def write_images(folder, seed):
    folder.mkdir(parents=True)
    for i in range(N):
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two folders that hold different images under the same relative names; the process stands in the first."""
    for name, seed in (("here", 0), ("there", 1)):
        write_images(tmp_path / name / "photos", seed)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


NAMES = [f"photos/{i}.png" for i in range(N)]


@pytest.fixture
def run(pipe, places, monkeypatch):
    """`predict_dataset` with workers in this process that stand in another folder; returns the parts it computed."""
    ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: [{"Resources": {"CPU": 2.0}, "Alive": True}])
    monkeypatch.setitem(sys.modules, "ray", ray)
    computed = []

    def compute(rows, pipe, layout, workers, threads, start_timeout_s):
        worker = object.__new__(PartWorker)
        worker.pipe, worker.layout = pipe, layout
        for row in rows:
            home = os.getcwd()
            os.chdir("/")
            try:
                worker._compute(**row)
            finally:
                os.chdir(home)
            computed.append(row["part"])
            yield row["part"]

    monkeypatch.setattr(ray_dataset, "_computed", compute)

    def start(sources=NAMES, output=places / "out", **options):
        computed.clear()
        options = {"part_images": PART, "part_format": "jsonl", "logits": True, **options}
        summary = predict_dataset(pipe, sources, output, **options)
        assert summary.images == len(sources)
        return list(computed)

    return start


def test_workers_read_what_the_run_started_with(run, pipe, places):
    assert run(output="../out") == [0, 1, 2]
    records = list(read_records(places / "out"))
    assert [r["path"] for r in records] == NAMES
    for record, result in zip(records, pipe(NAMES), strict=True):
        assert torch.equal(torch.tensor(record["logits"]), result.logits)


def test_a_run_is_not_continued_with_other_images_of_the_same_names(run, places, monkeypatch):
    run()
    (places / "out" / "part-000001.jsonl").unlink()
    monkeypatch.chdir(places / "there")
    with pytest.raises(
        ManifestError, match=rf"inputs: other names, folders.* in 3 of 3 parts, .*{places}/there/photos/0"
    ):
        run()
    monkeypatch.chdir(places / "here")
    with pytest.warns(UserWarning, match=r"part-000001\.jsonl is missing: part 1 is computed again"):
        assert run() == [1]


@pytest.mark.parametrize("change", ["pixels", "time", "removed", "appeared"])
def test_a_run_is_not_continued_with_files_that_have_changed(run, places, change):
    names = [*NAMES, "photos/late.png"]
    run(names)
    path = places / "here" / "photos" / "4.png"
    if change == "pixels":
        stat = path.stat()
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "removed":
        path.unlink()
    else:
        path.with_name("late.png").write_bytes(path.read_bytes())
    part = 2 if change == "appeared" else 1
    with pytest.raises(ManifestError, match=rf"times of files in 1 of 3 parts, the first from .*/{3 * part}\.png to "):
        run(names)


def test_dots_after_a_link_are_the_systems(run, places):
    """`link/..` is the folder above the link's target, not the one that holds the link."""
    (places / "here" / "link").symlink_to(places / "there" / "photos")
    run(["link/../photos/0.png"])
    (record,) = read_records(places / "out")
    assert record["error"] is None
    run([str(places / "there" / "photos" / "0.png")], output=places / "other")
    (other,) = read_records(places / "other")
    assert record["logits"] == other["logits"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    """What a crash leaves of a file whose size was written before its content."""
    path.write_bytes(bytes(path.stat().st_size))


def shorten(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def as_list(path):
    path.write_text("[]")


PART_FILE, MARK = "part-000001.jsonl", "_done/000001.json"
DAMAGE = [
    *[(PART_FILE, damage) for damage in (cut, empty, zero, shorten, os.unlink)],
    *[(MARK, damage) for damage in (cut, empty, zero, as_list)],
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda value: getattr(value, "__name__", value))
def test_damaged_parts_and_marks_are_named_and_computed_again(run, places, name, damage):
    run()
    before = (places / "out" / PART_FILE).read_text()
    damage(places / "out" / name)
    if name == PART_FILE:
        with pytest.raises(
            ManifestError, match=r"lacks 1 of 3 parts, first part-000001\.jsonl .*; run again to compute"
        ):
            list(read_records(places / "out"))
    said = []
    assert run(on_damage=said.append) == [1]
    (line,) = said
    assert name in line
    assert "part 1 is computed again" in line
    strip = [{**json.loads(text), "ms": 0} for text in before.splitlines()]
    assert strip == [{**r, "ms": 0} for r in list(read_records(places / "out"))[3:6]]
    assert run(on_damage=said.append) == []


def test_the_last_part_is_as_long_as_the_rest(run, places):
    run()
    path = places / "out" / "part-000002.jsonl"
    path.write_text(path.read_text() * 3)
    with pytest.raises(ManifestError, match=r"part-000002\.jsonl has 3 of 1 records"):
        list(read_records(places / "out"))


def test_a_mark_of_a_version_before_has_no_size(run, places):
    run()
    for path in (places / "out" / "_done").iterdir():
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "bytes"}))
    assert run() == []
    shorten(places / "out" / PART_FILE)
    said = []
    assert run(on_damage=said.append) == [1]
    assert "part-000001.jsonl has 2 of 3 records" in said[0]


@pytest.mark.parametrize("damage", [cut, empty])
def test_a_damaged_manifest(run, places, damage):
    """Alone it is what a crash left of the start; beside parts, nothing says which run they are of."""
    run()
    damage(places / "out" / "_manifest.json")
    with pytest.raises(ManifestError, match="parts cannot be told from those of another run: give another directory"):
        run()
    for path in [*(places / "out").glob("part-*"), *(places / "out" / "_done").iterdir()]:
        path.unlink()
    assert run() == [0, 1, 2]


def test_a_start_that_crashed_before_its_manifest(run, places):
    (places / "out" / "_done").mkdir(parents=True)
    assert run() == [0, 1, 2]


def test_a_damaged_count_of_attempts(tmp_path):
    layout = Layout(str(tmp_path), 1, "jsonl", 1, False, (), False)
    (tmp_path / "_done").mkdir()
    assert layout.begin(0) == 0
    (tmp_path / "_done" / "000000.tries").write_text("")
    assert layout.begin(0) == 0
    assert layout.begin(0) == 1


def test_one_run_at_a_time_writes_to_a_folder(run, places, pipe):
    """Of another process, or of this one."""
    locked = import_module("revit_fast.io.locked")
    held = (
        "import sys\nfrom revit_fast.io.locked import alone_in\n"
        "with alone_in(sys.argv[1], '_lock', 'writing results to'):\n"
        "    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", held, str(places / "out")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(FileExistsError, match=r"another process is writing results to .*; wait until it has ended"):
        run()
    other.communicate(b"")
    with locked.alone_in(places / "out", "_lock", "writing results to"):
        failed = []

        def second():
            with pytest.raises(FileExistsError, match="another process is writing"):
                run()
            failed.append(True)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert failed
    assert run() == [0, 1, 2]


@pytest.mark.parametrize("address", ["s3://bucket/out", "gs://bucket/out"])
def test_addresses_are_refused_and_no_folder_of_that_name_is_made(run, places, address):
    with pytest.raises(ValueError, match=f"output: expected a path on a file system .* got the address {address}"):
        run(output=address)
    assert not any(places.joinpath("here").glob("*:*"))


def test_other_files_are_refused_before_a_cluster_is_asked(run, places):
    del sys.modules["ray"].nodes
    (places / "out").write_text("thesis")
    with pytest.raises(ManifestError, match="out is a file; give a directory"):
        run()
    (places / "out").unlink()
    (places / "out").mkdir()
    (places / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ManifestError, match="holds no results of ours"):
        run()
    assert os.listdir(places / "out") == ["thesis.tex"]


def test_an_older_manifest_that_knows_names_alone_is_not_continued(pipe, places):
    layout = Layout(str(places / "out"), PART, "jsonl", 1, False, (), False)
    claim(layout, pipe, [Source(name) for name in NAMES])
    path = places / "out" / "_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["inputs"]["parts"]
    path.write_text(json.dumps(manifest | {"inputs": {**manifest["inputs"], "sha256": "0"}}))
    with pytest.raises(
        ManifestError, match=r"inputs: names without sizes and times of the files, 7 images there, 7 now"
    ):
        claim(layout, pipe, [Source(name) for name in NAMES])

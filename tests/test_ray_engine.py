"""Runs on a Ray cluster of two CPUs on this machine: against the local engine, killed, interrupted, starved."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import revit_fast as rf
from revit_fast.cli import main
from revit_fast.deploy.results_folder import Layout, ManifestError, PartReport, read_records
from revit_fast.io.images import Source

ray = pytest.importorskip("ray", reason='needs Ray: pip install "revit-fast[ray]"')
pytest.importorskip("ray.data", reason='needs Ray Data: pip install "revit-fast[ray]"')

from revit_fast.deploy import ray_dataset  # noqa: E402
from revit_fast.deploy.ray_dataset import EngineError, predict_dataset, reserved_cpus, threads_per_worker  # noqa: E402

MODEL = "deit_tiny_patch16_224"
ROOT = Path(rf.__file__).parents[1]
WAIT_S = 60


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs; workers import the package that is tested."""
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": env}
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of DeiT-Ti whose predictions depend on the image."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = rf.create_model(MODEL).state_dict()
    state = {name: 5 * t if name.endswith(".weight") and t.dim() > 1 else t for name, t in state.items()}
    state = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    path = tmp_path_factory.mktemp("weights") / "revit.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def model(weights):
    return rf.optimize(rf.create_model(MODEL, weights=weights).eval())


@pytest.fixture(scope="module")
def tla(model):
    """An assigner of random weights that gives different grids to different images."""
    torch.manual_seed(1)
    tla = rf.TokenLengthAssigner.for_model(model).eval()
    noise = [np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8) for i in range(20)]
    with torch.no_grad():
        # Every image has about the same logits, and the largest of them would always win.
        tla.network.head.bias -= tla.predict_proba(noise).log().mean(dim=0)
        tla.network.head.weight.mul_(30)
        tla.network.head.bias -= tla.predict_proba(noise).log().mean(dim=0)
    return tla


def pipe_of(model, policy, tla=None):
    prep = rf.AdaptivePreprocessor.for_model(model, tla, policy=policy)
    return rf.AdaptivePipeline(model, prep, token_budget=1000)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Twenty-two files, two of which are no images, and a path that leads nowhere."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(22):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60 + i, 90 - i), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    whole = (folder / "04.png").read_bytes()
    (folder / "04.png").write_bytes(whole[: len(whole) // 2])
    (folder / "17.png").write_bytes(b"not an image")
    return [*(str(path) for path in sorted(folder.iterdir())), str(folder / "nowhere.png")]


def assert_as_local(output, pipe, paths):
    """The records equal the results of one process, bit for bit and in order."""
    records = list(read_records(output))
    results = list(pipe(paths))
    assert [r["index"] for r in records] == list(range(len(paths)))
    assert [r["path"] for r in records] == paths
    for record, result in zip(records, results, strict=True):
        assert (record["grid"], record["tokens"]) == (result.grid, result.n_tokens), record["path"]
        error = None if result.error is None else result.error.removeprefix(f"{result.source}: ")
        assert record["error"] == error
        if error is None:
            assert torch.equal(torch.tensor(record["logits"]), result.logits), record["path"]
            assert [(e["class"], e["probability"]) for e in record["top"]] == [
                (e["label"], e["score"]) for e in result.top(3)
            ]
        else:
            assert record["top"] is None
            assert record["logits"] is None
        if result.probabilities is not None:
            assert list(record["lengths"].values()) == result.probabilities.tolist()
    return records


def layout_of(directory, **options):
    settings = {"part_images": 4, "part_format": "jsonl", "top_k": 1, "logits": False, "grids": (), "has_labels": False}
    return Layout(str(directory), **settings | options)


class TestEqualsTheLocalEngine:
    def test_with_an_assigner_two_workers_on_two_cpus(self, cluster, model, tla, paths, tmp_path):
        """Two workers of one CPU each once took every CPU from the tasks that fed them, and the run hung."""
        pipe = pipe_of(model, "argmax", tla)
        seen = []
        summary = predict_dataset(
            pipe,
            iter(paths),
            tmp_path / "out",
            workers=2,
            part_images=3,
            top_k=3,
            logits=True,
            on_part=lambda s: seen.append(s.n_computed),
        )
        records = assert_as_local(tmp_path / "out", pipe, paths)
        assert len({r["grid"] for r in records} - {None}) > 1, "the assigner must tell the images apart"
        assert [i for i, r in enumerate(records) if r["error"]] == [4, 17, 22]
        assert (summary.images, summary.errors) == (23, 3)
        assert summary.tokens == sum(r["tokens"] or 0 for r in records)
        assert (summary.workers, summary.threads) == (2, 1)
        assert seen == list(range(1, 9))
        done = [json.loads(p.read_text()) for p in sorted((tmp_path / "out" / "_done").iterdir())]
        assert [d["part"] for d in done] == list(range(8)), "nothing but the reports of parts may be left"

    def test_policies_that_go_by_the_place_in_the_stream(self, cluster, model, paths, tmp_path, monkeypatch):
        grids = [model.grids[i * i % 3] for i in range(len(paths))]
        pipe = pipe_of(model, ("fixed", grids))
        monkeypatch.chdir(Path(paths[0]).parent)  # a worker has another working directory
        names = [os.path.basename(path) for path in paths]
        options = {"workers": 1, "part_images": 5, "part_format": "jsonl", "top_k": 3, "logits": True}
        summary = predict_dataset(pipe, names, tmp_path / "out", **options)
        records = assert_as_local(tmp_path / "out", pipe, names)
        assert [r["grid"] for r in records if r["grid"]] == [g for i, g in enumerate(grids) if i not in (4, 17, 22)]
        assert summary.threads == 2

    @pytest.mark.parametrize("policy", ["cycle", "random", ("fixed", [14, 7, 7, 10, 14, 10, 7, 14, 10])])
    def test_a_part_of_a_stream_gives_what_it_gives_in_the_whole(self, model, paths, policy):
        pipe = pipe_of(model, policy)
        whole = list(pipe(paths[:9]))
        bounds = (0, 2, 7, 9)
        parts = [r for a, b in pairwise(bounds) for r in pipe(paths[a:b], first_index=a)]
        assert [r.index for r in parts] == list(range(9))
        assert [r.grid for r in parts] == [r.grid for r in whole]
        assert len({r.grid for r in whole}) > 2
        assert [r.grid for r in pipe(paths[2:7])] != [r.grid for r in parts[2:7]], "places must matter"


class TestFailures:
    def test_a_killed_worker_loses_nothing(self, cluster, model, paths, tmp_path):
        pipe = pipe_of(model, "cycle")
        many = (paths * 7)[:160]
        killed = []

        def kill_first_worker():
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline and not killed:
                for path in (tmp_path / "out" / "_done").glob("*.json"):
                    os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
                    killed.append(len(list(path.parent.glob("*.json"))))
                    break
                time.sleep(0.005)

        killer = threading.Thread(target=kill_first_worker)
        killer.start()
        options = {"workers": 2, "part_images": 4, "top_k": 3, "logits": True}
        summary = predict_dataset(pipe, many, tmp_path / "out", **options)
        killer.join()
        assert killed, "no worker was killed"
        assert killed[0] < 20, f"{killed[0]} of 40 parts were complete: too late to show anything"
        assert summary.n_computed == 40
        assert_as_local(tmp_path / "out", pipe, many)

    def test_an_interrupted_run_is_completed(self, cluster, weights, model, paths, tmp_path, capsys):
        many = (paths * 9)[:200]
        arguments = ["predict", *many, "--engine", "ray", "--address", cluster, "--model", MODEL, "--weights", weights]
        arguments += ["--grid", "mixed", "--output", str(tmp_path / "out"), "--part-images", "5", "--workers", "1"]
        command = [sys.executable, "-m", "revit_fast.cli", *arguments]
        running = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a job in the background
        )
        done = tmp_path / "out" / "_done"
        deadline = time.monotonic() + WAIT_S
        while len(list(done.glob("*.json"))) < 3 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=WAIT_S)
        assert running.returncode == 130, err
        settle(done)
        before = {path.name: path.stat().st_mtime_ns for path in done.glob("*.json")}
        assert 3 <= len(before) < 40, "the run must have been interrupted in the middle"

        with pytest.raises(ManifestError, match=r"lacks \d+ of 40 parts"):
            list(read_records(tmp_path / "out"))
        other = [*arguments[: arguments.index("--grid")], "--grid", "7", *arguments[arguments.index("--grid") + 2 :]]
        assert main(other) == 2
        assert 'policy: "cycle" there, ["fixed", 7] now' in capsys.readouterr().err

        assert main(arguments) == 1  # three paths of the list lead to no image
        err = capsys.readouterr().err
        assert f"{40 - len(before)} of 40 parts computed" in err
        after = {path.name: path.stat().st_mtime_ns for path in done.glob("*.json")}
        assert len(after) == 40
        assert {name: after[name] for name in before} == before, "what was complete must not be computed again"
        records = list(read_records(tmp_path / "out"))
        results = list(pipe_of(model, "cycle")(many))
        assert [(r["path"], r["grid"]) for r in records] == [(r.source, r.grid) for r in results]
        for record, result in zip(records, results, strict=True):
            assert [e["probability"] for e in record["top"] or ()] == [e["score"] for e in result.top(5)]

    def test_a_busy_cluster_is_an_error_and_no_hang(self, cluster, model, paths, tmp_path):
        from ray.util.placement_group import placement_group, remove_placement_group

        others = placement_group([{"CPU": 2}])  # another job's
        ray.get(others.ready())
        try:
            with pytest.raises(EngineError, match=r"they need 0\.5 CPUs each, 0 of the cluster's 2 are free"):
                predict_dataset(pipe_of(model, "cycle"), paths, tmp_path / "out", workers=2, start_timeout_s=2)
        finally:
            remove_placement_group(others)

    def test_more_workers_than_cpus_are_refused_at_once(self, cluster, model, paths, tmp_path):
        pipe = pipe_of(model, "cycle")
        with pytest.raises(EngineError, match="3 workers need one CPU each on a node, the cluster has 2 CPUs"):
            predict_dataset(pipe, paths, tmp_path / "out", workers=3)
        with pytest.raises(EngineError, match=r"2 workers need 2 CPUs \(--threads\) each"):
            predict_dataset(pipe, paths, tmp_path / "out", workers=2, threads=2)
        assert not (tmp_path / "out").exists()

    def test_an_error_of_the_pipeline_ends_the_run_with_its_reason(self, cluster, model, paths, tmp_path):
        pipe = pipe_of(model, ("fixed", [7, 10]))
        with pytest.raises(EngineError, match=r"ValueError: policy: 2 fixed grids, but image \d+ came.*run again"):
            predict_dataset(pipe, paths, tmp_path / "out", workers=1)

    def test_a_part_that_always_kills_its_worker_ends_the_run(self, cluster, model, paths, tmp_path):
        layout = layout_of(tmp_path)
        (tmp_path / "_done").mkdir()
        before = torch.get_num_threads()
        worker = ray_dataset.PartWorker([ray.put(pipe_of(model, "cycle"))], layout, 1)
        torch.set_num_threads(before)
        for _ in range(ray_dataset.MAX_TRIES):  # each begins the part and is killed
            layout.begin(3)
        import pyarrow

        part = {"part": [3], "paths": [paths[:1]], "read": [paths[:1]], "errors": [[""]]}
        (row,) = worker(pyarrow.table(part)).to_pylist()
        assert f"it ended its worker {ray_dataset.MAX_TRIES} times" in row["failure"]
        assert "begins with " + paths[0] in row["failure"]
        layout.clear_leftovers()  # the next run tries again
        (row,) = worker(pyarrow.table(part)).to_pylist()
        assert row["failure"] == ""
        assert layout.report_of(3).images == 1
        assert [p.name for p in (tmp_path / "_done").iterdir()] == ["000003.json"]

    def test_a_folder_that_workers_do_not_share_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ray_dataset, "VISIBLE_TIMEOUT_S", 0.2)
        with pytest.raises(EngineError, match="a directory that every node mounts"):
            ray_dataset._shown(layout_of(tmp_path), 0)


def settle(done):
    """Waits until the workers of a run that ended are gone: no part has been completed for a second."""
    count, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        now = len(list(done.glob("*.json")))
        if now != count:
            count, since = now, time.monotonic()
        time.sleep(0.05)


class TestSharingCpus:
    @pytest.mark.parametrize(
        ("cpus", "workers", "threads"),
        [([2], 1, 2), ([2], 2, 1), ([8], 3, 2), ([8, 8], 2, 8), ([8, 8], 3, 4), ([8, 2], 2, 4), ([1], 1, 1)],
    )
    def test_every_worker_has_its_share(self, cpus, workers, threads):
        assert threads_per_worker(cpus, workers) == threads

    def test_a_part_of_a_cpu_is_no_thread(self):
        with pytest.raises(EngineError, match=r"1 workers need one CPU each on a node, the cluster has 0\.5 CPUs"):
            threads_per_worker([0.5], 1)
        with pytest.raises(EngineError, match="the cluster has 0 CPUs"):
            threads_per_worker([], 1)

    @pytest.mark.parametrize("cpus", [1, 2, 3, 8, 64])
    def test_workers_never_hold_every_cpu(self, cpus):
        for workers in range(1, cpus + 1):
            threads = threads_per_worker([cpus], workers)
            assert threads * workers <= cpus
            assert workers * reserved_cpus(threads) <= cpus - 0.5


class TestTheDirectory:
    def claim(self, directory, pipe, sources=("a", "b"), **options):
        from revit_fast.deploy.results_folder import claim

        claim(layout_of(directory, **options), pipe, [Source(path) for path in sources])

    def test_refuses_what_would_give_other_results(self, model, tla, tmp_path):
        pipe = pipe_of(model, "argmax", tla)
        self.claim(tmp_path, pipe)
        self.claim(tmp_path, pipe)
        other = rf.optimize(model)
        with torch.no_grad():
            other.head.bias[3] += 1e-6
        changed = rf.TokenLengthAssigner.for_model(model).eval()
        cases = {
            "model": {"pipe": pipe_of(other, "argmax", tla)},
            "dtype": {"pipe": pipe_of(rf.optimize(model, torch.int8), "argmax", tla)},
            "assigner": {"pipe": pipe_of(model, "argmax", changed)},
            "policy": {"pipe": pipe.with_policy(("threshold", 0.5))},
            "inputs": {"pipe": pipe, "sources": ("b", "a")},
            "top_k": {"pipe": pipe, "top_k": 2},
            "part_format": {"pipe": pipe, "part_format": "parquet"},
            "part_images": {"pipe": pipe, "part_images": 5},
        }
        for name, case in cases.items():
            with pytest.raises(ManifestError, match=rf"another run \({name}: [^;]* there, [^;]* now\)"):
                self.claim(tmp_path, **case)

    def test_an_older_manifest_may_hold_an_option_that_is_gone(self, model, tmp_path):
        self.claim(tmp_path, pipe_of(model, "cycle"))
        path = tmp_path / "_manifest.json"
        manifest = json.loads(path.read_text())
        manifest["preprocessing"]["exact"] = True
        path.write_text(json.dumps(manifest))
        self.claim(tmp_path, pipe_of(model, "cycle"))

    def test_an_older_manifest_does_not_name_the_dtype(self, model, tmp_path):
        self.claim(tmp_path, pipe_of(model, "cycle"))
        path = tmp_path / "_manifest.json"
        manifest = json.loads(path.read_text())
        assert manifest.pop("dtype") == "float32"
        path.write_text(json.dumps(manifest))
        self.claim(tmp_path, pipe_of(model, "cycle"))
        with pytest.raises(ManifestError, match=r'another run \(dtype: "float32" there, "int8" now\)'):
            self.claim(tmp_path, pipe_of(rf.optimize(model, torch.int8), "cycle"))

    def test_is_not_taken_from_other_files(self, model, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(ManifestError, match="not empty and holds no results of ours"):
            self.claim(tmp_path, pipe_of(model, "cycle"))
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_part_without_its_report_is_not_complete(self, tmp_path):
        layout = layout_of(tmp_path)
        (tmp_path / "_done").mkdir()
        report = PartReport(part=1, images=1, errors=0, tokens=50, seconds=0.1, pid=1, node="n")
        layout.write([{"index": 4}], report)
        assert layout.report_of(1) == report
        assert layout.report_of(0) is None
        layout.part_path(1).unlink()
        assert layout.report_of(1) is None
        layout.part_path(2).write_text("")  # its worker was killed before it said so
        assert layout.report_of(2) is None

    @pytest.mark.parametrize(
        ("directory", "options", "match"),
        [
            ("s3://bucket/out", {}, "output: expected a path"),
            ("out", {"part_format": "csv"}, "part_format: expected one of parquet, jsonl"),
            ("out", {"part_images": 0}, "part_images: expected an int of at least 1, got 0"),
        ],
    )
    def test_refuses_settings_that_cannot_be(self, directory, options, match):
        with pytest.raises(ValueError, match=match):
            layout_of(directory, **options)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ([], "give --output DIR"),
            (["--output", "out", "--format", "csv"], "--part-format"),
            (["--output", "out", "--trace", "t.json"], "--trace"),
        ],
    )
    def test_usage_errors(self, capsys, arguments, match):
        assert main(["predict", "a.png", "--engine", "ray", "--model", MODEL, *arguments]) == 2
        assert match in capsys.readouterr().err

    def test_workers_have_the_dtype_of_the_command(self, cluster, weights, model, paths, tmp_path, capsys):
        arguments = ["predict", *paths[:4], "--engine", "ray", "--address", cluster, "--model", MODEL]
        arguments += ["--weights", weights, "--grid", "7", "--output", str(tmp_path / "out"), "--workers", "1"]
        assert main([*arguments, "--dtype", "int8"]) == 0
        assert "--dtype int8: weights in int8\n" in capsys.readouterr().err
        records = list(read_records(tmp_path / "out"))
        tops = [
            [[e["score"] for e in result.top(5)] for result in pipe_of(m, ("fixed", 7))(paths[:4])]
            for m in (rf.optimize(model, torch.int8), model)
        ]
        assert [[e["probability"] for e in r["top"]] for r in records] == tops[0] != tops[1]
        assert main(arguments) == 2, "these would be other results"
        assert '(dtype: "int8" there, "float32" now)' in capsys.readouterr().err

    def test_paths_only(self, model, tmp_path):
        with pytest.raises(TypeError, match="sources: expected paths, which workers can read, got ndarray"):
            predict_dataset(pipe_of(model, "cycle"), [np.zeros((4, 4, 3), np.uint8)], tmp_path / "out")

    def test_without_ray_says_what_to_install(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray.data", None)
        assert main(["predict", "a.png", "--engine", "ray", "--output", "out", "--model", MODEL]) == 2
        assert 'ray.data is not installed: pip install "revit-fast[ray]"' in capsys.readouterr().err

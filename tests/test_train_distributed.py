"""Training by several processes on gloo, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from train_helpers import tiny_config
from train_ranks import gradients, trainer_of

from revit_fast.train.distributed import World
from revit_fast.train.log import STEPS, read_rows
from revit_fast.train.trainer import CHECKPOINT, FINAL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

TESTS = Path(__file__).parent


def start(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    environment["PYTHONFAULTHANDLER"] = "1"  # a process that aborts says where
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def run_torchrun(n: int, task: str, folder: Path, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    return start([*command, str(TESTS / "train_ranks.py"), task, str(folder), json.dumps(settings)], 240)


def run_forked(*jobs: tuple[int, str, Path, dict]) -> tuple[list[list[int | None]], str]:
    """Exit codes of the processes of every job (number of processes, task, folder, settings), and what they wrote."""
    jobs = [(n, task, str(folder), settings) for n, task, folder, settings in jobs]
    done = start([sys.executable, str(TESTS / "train_ranks.py"), "--forked", json.dumps(jobs)], 280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr[-3000:]


def relative_difference(a: dict, b: dict) -> float:
    """Largest over parameters of ‖a - b‖ / ‖b‖, where b is more than rounding beside the whole gradient."""
    whole = torch.cat([g.double().flatten() for g in b.values()]).norm()
    worst = 0.0
    for name, gradient in b.items():
        difference = (a[name].double() - gradient.double()).norm()
        worst = max(worst, (difference / max(gradient.double().norm(), 1e-3 * whole)).item())
    return worst


LENGTHS = {"mode": "length-parallel"}
GRADIENTS = {
    "float64": (3, LENGTHS | {"dtype": "float64"}),
    "float32": (3, LENGTHS),
    "mixup": (3, LENGTHS | {"dtype": "float64", "augment": {"mixup": 0.8}, "temperature": 4.0}),
    "no distillation": (3, LENGTHS | {"dtype": "float64", "distill_weight": 0.0}),
    "micro-batches": (3, LENGTHS | {"dtype": "float64", "micro_batch": 3, "augment": {"mixup": 0.8}}),
    "groups": (4, LENGTHS | {"dtype": "float64", "grids": [4, 3], "batch_size": 6, "augment": {"preset": "none"}}),
    "packed": (2, {"dtype": "float64", "batch_size": 6, "augment": {"preset": "none"}}),
}
"""Number of processes, and their settings."""
# Not Adam, which makes whole steps of rounding errors.
TRAINING = LENGTHS | {"grids": [4, 3], "epochs": 1, "opt": "sgd", "lr": 0.05}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp("job") for name in (*GRADIENTS, "trained", "died")}


@pytest.fixture(scope="module")
def trained(folders):
    """A run under torchrun to its end, and its last checkpoint."""
    done = run_torchrun(2, "train", folders["trained"], **TRAINING)
    assert done.returncode == 0, done.stderr[-3000:]
    return (folders["trained"] / CHECKPOINT).read_bytes()


@pytest.fixture(scope="module")
def exits(folders, trained):
    """Exit codes of the processes of every other job, which one process starts, and what they wrote."""
    jobs = {name: (n, "gradients", folders[name], settings) for name, (n, settings) in GRADIENTS.items()}
    jobs["trained"] = 2, "resume", folders["trained"], TRAINING
    jobs["died"] = 3, "die", folders["died"], LENGTHS
    codes, written = run_forked(*jobs.values())
    return dict(zip(jobs, codes, strict=True)), written


@pytest.fixture(scope="module")
def parallel_gradients(folders, exits):
    """For every name in `GRADIENTS` the gradients of all its processes."""
    codes, written = exits
    assert not any(any(codes[name]) for name in GRADIENTS), f"{codes}: {written}"
    return {
        name: [torch.load(folders[name] / f"gradients_{rank}.pt", weights_only=True) for rank in range(n)]
        for name, (n, _) in GRADIENTS.items()
    }


@pytest.mark.parametrize("name", ["float64", "float32", "mixup", "no distillation", "micro-batches"])
def test_length_parallel_gradients_are_the_packed_ones(parallel_gradients, name):
    """Three processes with a length each, against one with all of them in a pack."""
    settings = GRADIENTS[name][1] | {"mode": "packed", "micro_batch": None}
    dtype = settings.pop("dtype", "float32")
    packed = gradients(tiny_config(**settings), getattr(torch, dtype))
    for rank, parallel in enumerate(parallel_gradients[name]):
        difference = relative_difference(parallel, packed)
        assert difference <= (1e-10 if dtype == "float64" else 1e-5), f"rank {rank}: {difference:.2e}"
    norms = [g for name, g in packed.items() if name.endswith("norm1.weight")]
    assert all((g.norm(dim=1) > 0).all() for g in norms), "a length had no gradient of its own"


@pytest.mark.parametrize("name", ["groups", "packed"])
def test_groups_of_processes_share_the_images(parallel_gradients, name):
    """The mean over the images of both groups: of two lengths in two processes each, or of one process with all."""
    settings = GRADIENTS[name][1] | {"mode": "packed", "batch_size": 12}
    dtype = getattr(torch, settings.pop("dtype"))
    packed = gradients(tiny_config(**settings), dtype)
    for rank, parallel in enumerate(parallel_gradients[name]):
        assert relative_difference(parallel, packed) <= 1e-10, f"rank {rank}"


def test_a_whole_run_of_two_processes_and_its_resumption(tmp_path, folders, trained, exits):
    """Losses as of the packed run; files as of one process; a second start goes on where the first ended."""
    folder = folders["trained"]
    trainer = trainer_of(tiny_config(**TRAINING | {"mode": "packed"}), World("packed", 2), folder=tmp_path)
    expected = trainer.fit()
    rows, wanted = read_rows(folder / STEPS), read_rows(tmp_path / STEPS)
    assert len(rows) == len(wanted) == 6
    for row, want in zip(rows, wanted, strict=True):
        for column in set(want) - {"images_per_s"}:
            assert row[column] == pytest.approx(want[column], rel=2e-3, abs=1e-4), f"{column} at {want['step']}"
    got = json.loads((folder / "accuracy_1.json").read_text())
    assert got["accuracy"] == pytest.approx(expected.accuracy, abs=1 / 24 + 1e-9)
    assert got["n_images"] == 24
    assert (folder / FINAL).exists()
    codes, written = exits
    assert codes["trained"] == [0, 0], written
    assert (folder / CHECKPOINT).read_bytes() == trained


def test_a_process_that_dies_ends_the_others(folders, exits):
    codes, written = exits
    assert codes["died"] == [1, -signal.SIGKILL, 1], written
    assert "Connection" in written, "the others say why"
    assert not (folders["died"] / FINAL).exists()


def test_processes_that_make_no_whole_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"needs a multiple of 3 processes, one for each length, got 4; start with torc"
    ):
        World("length-parallel", 3)


def test_a_process_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"device: process 0 needs GPU 1, PyTorch sees 1; start as many processes as"):
        World(device="cuda")

"""Training by several processes on gloo, as torchrun starts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from train_helpers import tiny_config
from train_ranks import gradients, trainer_of

from revit_fast.train.distributed import World
from revit_fast.train.log import STEPS, read_rows
from revit_fast.train.trainer import CHECKPOINT, FINAL

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

TESTS = Path(__file__).parent


def run_ranks(n: int, task: str, folder: Path, timeout: float = 240, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command += [str(TESTS / "train_ranks.py"), task, str(folder), json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    environment["PYTHONFAULTHANDLER"] = "1"  # a process that aborts says where
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def assert_done(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr[-3000:]


def relative_difference(a: dict, b: dict) -> float:
    """Largest over parameters of ‖a - b‖ / ‖b‖, where b is more than rounding beside the whole gradient."""
    whole = torch.cat([g.double().flatten() for g in b.values()]).norm()
    worst = 0.0
    for name, gradient in b.items():
        difference = (a[name].double() - gradient.double()).norm()
        worst = max(worst, (difference / max(gradient.double().norm(), 1e-3 * whole)).item())
    return worst


@pytest.mark.parametrize(
    ("dtype", "bound", "settings"),
    [
        ("float64", 1e-10, {}),
        ("float32", 1e-5, {}),
        ("float64", 1e-10, {"augment": {"mixup": 0.8}, "temperature": 4.0}),
        ("float64", 1e-10, {"distill_weight": 0.0}),
        ("float64", 1e-10, {"micro_batch": 3, "augment": {"mixup": 0.8}}),
    ],
    ids=["float64", "float32", "mixup", "no distillation", "micro-batches"],
)
def test_length_parallel_gradients_are_the_packed_ones(tmp_path, dtype, bound, settings):
    """Three processes with a length each, against one with all of them in a pack."""
    assert_done(run_ranks(3, "gradients", tmp_path, mode="length-parallel", dtype=dtype, **settings))
    packed = gradients(tiny_config(**settings | {"micro_batch": None}), getattr(torch, dtype))
    for rank in range(3):
        parallel = torch.load(tmp_path / f"gradients_{rank}.pt", weights_only=True)
        difference = relative_difference(parallel, packed)
        assert difference <= bound, f"rank {rank}: {difference:.2e}"
    norms = [g for name, g in packed.items() if name.endswith("norm1.weight")]
    assert all((g.norm(dim=1) > 0).all() for g in norms), "a length had no gradient of its own"


def test_groups_of_lengths_share_the_images(tmp_path):
    """Four processes are two groups of two lengths: the mean over both groups' images."""
    settings = {"grids": [4, 3], "batch_size": 6, "augment": {"preset": "none"}, "dtype": "float64"}
    assert_done(run_ranks(4, "gradients", tmp_path, mode="length-parallel", **settings))
    parallel = torch.load(tmp_path / "gradients_0.pt", weights_only=True)
    dtype = getattr(torch, settings.pop("dtype"))
    packed = gradients(tiny_config(**settings | {"batch_size": 12}), dtype)
    assert relative_difference(parallel, packed) <= 1e-10


def test_packed_processes_share_the_images(tmp_path):
    settings = {"batch_size": 6, "augment": {"preset": "none"}, "dtype": "float64"}
    assert_done(run_ranks(2, "gradients", tmp_path, **settings))
    parallel = torch.load(tmp_path / "gradients_1.pt", weights_only=True)
    packed = gradients(tiny_config(batch_size=12, augment={"preset": "none"}), torch.float64)
    assert relative_difference(parallel, packed) <= 1e-10


def test_a_whole_run_of_three_processes_and_its_resumption(tmp_path):
    """Losses as of the packed run; files as of one process; a second start goes on where the first ended."""
    # Not Adam, which makes whole steps of rounding errors.
    settings = {"mode": "length-parallel", "epochs": 1, "opt": "sgd", "lr": 0.05}
    assert_done(run_ranks(3, "train", tmp_path, **settings))
    alone = tmp_path / "alone"
    config = tiny_config(**settings | {"mode": "packed"})
    trainer = trainer_of(config, World("packed", 3), folder=alone)
    expected = trainer.fit()
    rows, wanted = read_rows(tmp_path / STEPS), read_rows(alone / STEPS)
    assert len(rows) == len(wanted) == 6
    for row, want in zip(rows, wanted, strict=True):
        for column in set(want) - {"images_per_s"}:
            assert row[column] == pytest.approx(want[column], rel=2e-3, abs=1e-4), f"{column} at {want['step']}"
    got = json.loads((tmp_path / "accuracy_2.json").read_text())
    assert got["accuracy"] == pytest.approx(expected.accuracy, abs=1 / 24 + 1e-9)
    assert got["n_images"] == 24
    assert (tmp_path / FINAL).exists()
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert_done(run_ranks(3, "resume", tmp_path, **settings))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_process_that_dies_ends_the_job(tmp_path):
    begin = time.monotonic()
    done = run_ranks(3, "die", tmp_path, mode="length-parallel", timeout=120)
    assert done.returncode != 0
    assert time.monotonic() - begin < 100
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / FINAL).exists()


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

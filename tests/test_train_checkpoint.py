import os
import subprocess
import sys

import pytest
import torch

from revit_fast.train.checkpoint import load_state, save_state, save_weights


def assert_same(a, b):
    assert type(a) is type(b), f"{type(a)} became {type(b)}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "tensors": {
            "a": shared,
            "b": shared,
            "view": shared.t(),
            "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        },
        "optimizer": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(5)}, 1: {}},
        "numbers": [1, 2.5, True, None, "text", -0.0],
        "dtypes": [torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.float64, torch.int64, torch.bool)],
        "empty": torch.empty(0, 4),
        "precise": 0.1 + 0.2,
    }
    save_state(tmp_path / "state", state)
    assert_same(state, load_state(tmp_path / "state"))


def test_what_is_no_state_value_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"a\.0\.b: a state holds tensors and JSON values, got object"):
        save_state(tmp_path / "state", {"a": [{"b": object()}]})
    assert os.listdir(tmp_path) == []


def test_missing_foreign_and_cut_off_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_state(tmp_path / "none")
    save_weights(tmp_path / "weights", {"a": torch.zeros(3)})
    with pytest.raises(ValueError, match="is no state of a training run"):
        load_state(tmp_path / "weights")
    save_state(tmp_path / "state", {"a": torch.zeros(1000)})
    content = (tmp_path / "state").read_bytes()
    for n in (0, 5, 60, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:n])
        with pytest.raises(ValueError, match="cannot be read as a state"):
            load_state(tmp_path / "cut")


FILL = """
import resource, sys, torch
from pathlib import Path
from revit_fast.train.checkpoint import save_state
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(Path(sys.argv[1]), {"a": torch.ones(100_000)})
except OSError as error:
    print("OSError:", error)
"""


@pytest.mark.processes
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails half way."""
    path = tmp_path / "state"
    save_state(path, {"a": torch.zeros(3)})
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    assert f"OSError: cannot write {path}: " in done.stdout, done.stderr
    assert "the last complete one is kept" in done.stdout
    assert os.listdir(tmp_path) == ["state"]
    assert_same(load_state(path), {"a": torch.zeros(3)})

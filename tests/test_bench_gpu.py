"""`python -m bench.gpu` in full, in Triton's interpreter: it must not fail on its first day on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("triton")


def run(out, *arguments, **environment):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_the_whole_bench_runs_in_the_interpreter(tmp_path):
    done = run(tmp_path, "--device", "interpreter", "--budget-s", "600", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("THESE TIMES MEAN NOTHING") == 3, "before, in the table and after"
    result = json.loads((tmp_path / "gpu-interpreter.json").read_text())
    assert "MEAN NOTHING" in result["warning"]
    rows = result["results"]
    assert {row["group"] for row in rows} == {
        "Attention",
        "TAL-LN",
        "Patch embedding",
        "Whole model",
        "Training step",
    }
    for row in rows:
        if row["candidate"].startswith("ours"):
            assert row["reason"] is None, row
        assert ("median_ms" in row) == (row["reason"] is None), row
    absent = {row["candidate"]: row["reason"] for row in rows if row["reason"]}
    assert "CPU" in absent["torch.nn.attention.varlen"]
    assert sum(result["launches"].values()) > 0
    table = (tmp_path / "gpu-interpreter.md").read_text()
    assert "| forward | torch.nn.attention.varlen | NotImplementedError" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-interpreter.json", "gpu-interpreter.md"]


def test_a_machine_without_a_gpu_is_told_what_to_run(tmp_path):
    done = run(tmp_path, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1 python -m bench.gpu --device interpreter" in done.stderr
    done = run(tmp_path, "--device", "interpreter", TRITON_INTERPRET="0")
    assert "needs TRITON_INTERPRET=1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_results_get_no_time_and_no_ratio(monkeypatch):
    torch = pytest.importorskip("torch")
    from bench.gpu import Bench
    from bench.gpu_cases import Case
    from bench.turns import WallClock

    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    single = x.float()
    bench = Bench(WallClock(), 10, (2, 2))
    bench.ceilings = {"bytes_per_s": 1.0, "flops_per_s": 1.0}

    def broken():
        raise ImportError("not installed\nsecond line")

    candidates = {
        "ours": lambda: lambda turn: single + 1e-3,
        "right": lambda: lambda turn: single,
        "absent": broken,
    }
    case = Case("group", "case", candidates, lambda: (x,), lambda: (single,), n_bytes=400)
    bench.run(case, 1)
    ours, right, absent = bench.rows
    assert ours["reason"].startswith("wrong: output 0: max error 1.0")
    assert "median_ms" not in ours
    assert right["ratio_to_ours"] is None
    assert absent["reason"] == "ImportError: not installed"
    assert bench.failures() == [f"group: case: ours: {ours['reason']}"]
    bench.budget_s = 0
    bench.run(case, 1)
    assert "time budget" in bench.rows[-1]["reason"]

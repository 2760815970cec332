"""`python -m bench.gpu_suite` in Triton's interpreter: it must not fail on its first day on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.beside

ROOT = Path(__file__).parent.parent

pytest.importorskip("triton")

from bench.gpu_choices import CANDIDATES, Override, chosen, entry, tunable  # noqa: E402
from bench.gpu_suite import gpu_tests, tables, tuning  # noqa: E402
from bench.gpu_suite.__main__ import main  # noqa: E402
from bench.gpu_suite.measure import SPENT, Bench, Case  # noqa: E402
from bench.gpu_suite.runner import run_steps  # noqa: E402
from bench.gpu_suite.steps import STEPS, Step  # noqa: E402
from bench.turns import WallClock  # noqa: E402
from revit_fast.kernels import schedules  # noqa: E402
from revit_fast.kernels.launch import TARGETS  # noqa: E402


def run(*arguments, **environment):
    command = [sys.executable, "-m", "bench.gpu_suite", *map(str, arguments)]
    own = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)


def test_a_step_runs_in_the_interpreter(tmp_path):
    done = run("--out", tmp_path, "--device", "interpreter", "--steps", "rows", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "suite.json").read_text())["steps"]
    assert summary.pop("rows")["state"] == "done"
    assert {step["state"] for step in summary.values()} == {"skipped"}
    result = json.loads((tmp_path / "rows.json").read_text())
    assert result["complete"]
    assert "MEAN NOTHING" in result["warning"]
    assert result["failures"] == []
    ours = [row for row in result["results"] if row["candidate"].startswith("ours")]
    assert ours
    assert all(row["reason"] is None and row["max_error"] <= row["allowed_error"] for row in ours)
    page = tmp_path / "page.md"
    page.write_text("\n".join(tables.MARKS))
    assert main(["--docs", str(page), "--results", str(tmp_path)]) == 0
    assert "| rows | done |" in page.read_text()


@pytest.mark.full  # minutes
@pytest.mark.timeout(900)
def test_the_whole_suite_runs_in_the_interpreter(tmp_path):
    out = tmp_path / "results"
    done = run("--out", out, "--device", "interpreter", "--minutes", 5, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.stem for path in out.iterdir()) == sorted([*(step.name for step in STEPS), "suite"])
    summary = json.loads((out / "suite.json").read_text())["steps"]
    assert {name: step["state"] for name, step in summary.items()} == {step.name: "done" for step in STEPS}
    results = {step.name: json.loads((out / f"{step.name}.json").read_text()) for step in STEPS}
    for result in results.values():
        assert result["complete"]
        assert "MEAN NOTHING" in result["warning"]
        assert result["failures"] == []
    assert results["compile"]["compiled"] == results["compile"]["launches"] > 0
    assert [group["counts"] for group in results["tests"]["groups"]] == [{"passed": 2}]
    rows = [row for name in ("model", "attention", "rows", "tuning") for row in results[name]["results"]]
    assert {row["group"] for row in rows} == {"Whole model", "Training step", "Attention", "Rows", "Tuning"}
    for row in rows:
        timed = row["reason"] is None
        assert timed or not row["candidate"].startswith("ours"), row
        assert timed == ("median_ms" in row), row
        assert not timed or row["max_error"] <= row["allowed_error"], row
        assert row["dtype"] == "float32"
    absent = {row["candidate"]: row["reason"] for row in rows if row["reason"]}
    assert "CPU" in absent["torch.nn.attention.varlen"]
    assert absent.keys() >= {"cuDNN SDPA by length", "timm's modules packed, torch varlen"}
    assert {"timm by length", "timm padded and masked"} <= {row["candidate"] for row in rows} - absent.keys()
    assert all("call_median_ms" in row for row in rows if row["group"] == "Whole model" and not row["reason"])
    assert {found["mode"] for found in results["profile"]["profiles"]} == {"graph", "eager"}
    assert len(results["tuning"]["winners"]) == 2

    page = tmp_path / "page.md"
    page.write_text("before\n" + "\n".join(tables.MARKS) + "\nafter\n")
    assert main(["--docs", str(page), "--results", str(out)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{tables.MARKS[0]}\n")
    assert text.endswith(f"{tables.MARKS[1]}\nafter\n")
    assert "MEAN NOTHING" in text
    for step in STEPS:
        assert f"### {step.name.capitalize()}" in text
        assert f"| {step.name} | done |" in text
    assert "tiny, forward: torch.nn.attention.varlen | float32 |  | NotImplementedError" in text


def test_a_machine_without_a_gpu_is_told_what_to_run(tmp_path, monkeypatch, capsys):
    done = run("--out", tmp_path, "--steps", "rows", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    step = json.loads((tmp_path / "suite.json").read_text())["steps"]["rows"]
    assert step["state"] == "failed"
    assert "TRITON_INTERPRET=1 python -m bench.gpu_suite --device interpreter" in "\n".join(step["last_lines"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--device", "interpreter"])
    assert "needs TRITON_INTERPRET=1" in capsys.readouterr().err


def test_the_list_of_steps_fits_a_quarter_of_an_hour(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*(step.name for step in STEPS), "sum"]
    assert sum(step.minutes for step in STEPS) <= 12
    page = (ROOT / "docs" / "gpu.md").read_text()
    for step in STEPS:
        assert f"| {step.name} | {step.minutes} |" in page


PARTWAY = """
import os, subprocess, sys, time

def good(context):
    context.keep(found=1)
    return []

def hang(context):
    context.keep(found=2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    context.keep(child=child.pid)
    print("going to hang", flush=True)
    time.sleep(60)

def crash(context):
    context.keep(found=3)
    os.abort()

def fail(context):
    return ["one thing is wrong"]
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_that_hangs_or_fails_ends_alone_and_what_it_wrote_stays(tmp_path, monkeypatch):
    (tmp_path / "partway.py").write_text(PARTWAY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = ("fail", "crash", "hang", "good", "left out")
    steps = [Step(name, 1.0, f"partway:{name}", "") for name in names]
    out = tmp_path / "results"
    begin = time.monotonic()
    results = run_steps(steps, names[:-1], out, "interpreter", minutes=0.17)
    assert time.monotonic() - begin < 4 * 10.2 + 10
    states = {name: result["state"] for name, result in results.items()}
    assert states == {"fail": "failed", "crash": "failed", "hang": "timed out", "good": "done", "left out": "skipped"}
    assert json.loads((out / "suite.json").read_text())["steps"] == results
    assert "one thing is wrong" in results["fail"]["last_lines"][-1]
    assert results["hang"]["last_lines"][-1] == "going to hang"
    assert 10 < results["hang"]["seconds"] < 20
    found = {path.stem: json.loads(path.read_text()) for path in out.iterdir() if path.stem != "suite"}
    assert [found[name].get("found") for name in names[:-1]] == [None, 3, 2, 1]
    assert {name for name, result in found.items() if result["complete"]} == {"fail", "good"}
    assert not is_running(found["hang"]["child"]), "a process that the step had started"


def test_without_pytest_the_tests_say_that_they_cannot_run(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else found(name))
    (line,) = gpu_tests.run(Kept())
    assert "pytest is not installed" in line


class Kept:
    """A context without a file."""

    on_gpu = False
    device = torch.device("cpu")
    seconds = 100.0

    def require_device(self):
        pass

    def clocks(self):
        return WallClock(), WallClock()

    def say(self, text):
        pass

    def keep(self, **content):
        pass

    def left_s(self):
        return self.seconds


def test_wrong_results_get_no_time_and_no_ratio():
    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    single = x.float()
    context = Kept()
    bench = Bench(context)
    bench.ceilings = {"bytes_per_s": 1.0, "flops_per_s": 1.0}

    def broken():
        raise ImportError("not installed\nsecond line")

    candidates = {
        "ours": lambda: lambda turn: single + 1e-3,
        "right": lambda: lambda turn: single,
        "absent": broken,
    }
    case = Case("group", "case", candidates, lambda: (x,), lambda: (single,), n_bytes=400)
    bench.run_all([lambda: case])
    ours, right, absent = bench.rows
    assert ours["reason"].startswith("wrong: output 0: max error 1.0")
    assert "median_ms" not in ours
    assert right["ratio_to_ours"] is None
    assert absent["reason"] == "ImportError: not installed"
    assert bench.failures() == [f"group: case: ours: {ours['reason']}"]
    context.seconds = 0
    bench.run_all([lambda: case, lambda: 1 / 0])
    assert bench.rows[3]["reason"] == SPENT
    assert bench.failures()[1:] == ["Inputs: case 1: ours: ZeroDivisionError: division by zero"]


@pytest.mark.parametrize("target", ["sm_90", "interpreter"])
def test_an_override_changes_the_schedules_and_is_undone(target):
    chip = TARGETS.get(target, schedules.INTERPRETER)
    for bound, field in tunable(target):
        dtype, head_dim = (torch.bfloat16, bound) if bound else (torch.float32, 64)

        def plan(dtype=dtype, head_dim=head_dim):
            return schedules.forward(chip, head_dim, dtype), schedules.backward(chip, head_dim, dtype, True)

        before, kept = plan(), entry(target, bound)
        for value in CANDIDATES[bound, field]:
            with Override(bound, field, value).applied(target):
                changed = plan()
            assert (changed != before) == (value != getattr(kept, field)), (bound, field, value)
            assert plan() == before
        with chosen(target, bound, field).applied(target):
            assert plan() == before


def test_winners_are_the_fastest_and_means_are_over_lengths():
    facts = {"target": "sm_90", "bound": 64, "field": "grad_q"}

    def row(seqlen, name, ms, ratio):
        return facts | {
            "case": f"L {seqlen}", "seqlen": seqlen, "candidate": name, "median_ms": ms,
            "quartiles_ms": [ms - 0.1, ms + 0.1], "ratio_to_ours": ratio,
        }  # fmt: skip

    rows = [row(577, "ours: 1", 4.0, 1.0), row(577, "2", 1.0, 0.25)]
    rows += [row(1025, "ours: 1", 4.0, 1.0), row(1025, "2", 4.1, 4.0)]
    rows.append(facts | {"case": "L 577", "candidate": "3", "reason": "wrong"})
    first, second = tuning.winners(rows)
    assert (first["fastest"], first["gain"], first["clear"]) == ("2", 4.0, True)
    assert (second["fastest"], second["gain"], second["clear"]) == ("1", 1.0, False)
    assert {mean["value"]: mean["ratio"] for mean in tuning.over_lengths(rows)} == {"1": 1.0, "2": 1.0}

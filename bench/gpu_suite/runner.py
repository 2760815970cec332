"""Runs steps one after another, each in a process of its own with a time limit, and keeps a summary. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.files import write_file
from bench.gpu_suite.steps import Step

LAST_LINES = 40
"""Lines of a step's output that the summary keeps."""

SHARE = 0.9
"""Share of its limit in which a step should begin its last case."""


def environment_of(step: Step, device: str) -> dict[str, str]:
    """The environment of a step's process."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    interpreted = {"TRITON_INTERPRET": "1"} if device == "interpreter" and step.interpreted else {}
    return {**kept, **interpreted, "PYTHONUNBUFFERED": "1"}


def end_group(process: subprocess.Popen) -> None:
    """Kills whatever runs in the process group of a step, such as its workers."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run_step(step: Step, out: Path, device: str, limit_s: float) -> dict:
    """Runs one step and says how it went: state, seconds, last lines of its output."""
    command = [sys.executable, "-m", "bench.gpu_suite.step", step.name, step.function, "--out", str(out)]
    command += ["--device", device, "--until", f"{time.time() + SHARE * limit_s:.1f}"]
    begin = time.monotonic()
    lines: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        env=environment_of(step, device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def read() -> None:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(f"{step.name}: {line}", end="", flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = process.wait(timeout=limit_s)
        state = "done" if status == 0 else "failed"
    except subprocess.TimeoutExpired:
        status, state = None, "timed out"
    finally:
        end_group(process)
        process.wait()
    reader.join(timeout=5)  # a process that left the group may still hold the pipe
    seconds = round(time.monotonic() - begin, 1)
    return {"state": state, "exit_status": status, "seconds": seconds, "last_lines": list(lines)}


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Makes a request to end an exception, so that the running step is ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_steps(
    steps: Sequence[Step], chosen: Sequence[str], out: Path, device: str, minutes: float | None = None
) -> dict[str, dict]:
    """Runs the chosen steps in the order of `steps`, and writes `suite.json` before and after each.

    A step that is not chosen keeps what an earlier run in the same folder said of it, or is "skipped".

    Args:
        steps: all steps.
        chosen: names of those to run.
        out: folder of the results.
        device: "cuda" or "interpreter".
        minutes: limit of each step, in place of the planned minutes.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = out / "suite.json"
    earlier = json.loads(summary.read_text())["steps"] if summary.exists() else {}
    results = {s.name: earlier.get(s.name, {"state": "skipped"}) | {"planned_minutes": s.minutes} for s in steps}

    def keep() -> None:
        write_file(summary, json.dumps({"device": device, "steps": results}, indent=1))

    with ended_by_sigterm():
        for step in steps:
            if step.name not in chosen:
                continue
            limit_s = 60 * (minutes or step.minutes)
            told = {"planned_minutes": step.minutes, "limit_s": limit_s}
            results[step.name] = {"state": "begun", **told}
            (out / f"{step.name}.json").unlink(missing_ok=True)
            keep()
            results[step.name] = run_step(step, out, device, limit_s) | told
            keep()
    return results

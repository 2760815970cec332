"""Tests of ops, graphs and model on the device, several pytest processes at once, since each compiles its kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_suite.outcomes import OUTCOMES
from bench.gpu_suite.step import Context

ROOT = Path(__file__).parent.parent.parent

ONCE_FAILED = "72 or 80 or streaming_causal or strided_views"
REST_OF_ATTENTION = f"not ({ONCE_FAILED})"


@dataclass(frozen=True)
class Group:
    """Tests that run in one process.

    Attributes:
        name: name of the group.
        files: names of the files in `tests/` without "test_".
        select: pytest's expression of the tests to run.
    """

    name: str
    files: tuple[str, ...]
    select: str = ""


GROUPS = (
    Group(
        "failed on the first run: head dimensions 72 and 80, stride 1, streaming causal", ("attention",), ONCE_FAILED
    ),
    Group("model and graphs on the device", ("on_device",)),
    Group("attention: other head dimensions", ("attention",), f"head_dim and {REST_OF_ATTENTION}"),
    Group("attention: everything else", ("attention",), f"not head_dim and {REST_OF_ATTENTION}"),
    Group("norms", ("layer_norm",)),
    Group("tokens", ("tokens",)),
    Group("rotary embeddings", ("rotary",), "(grouped and matches) or (own and gradients) or strides or padding"),
    Group("flash-attn's functions", ("flash_attn_compat",)),
    Group("other backends", ("backends",)),
    Group("graphs: the host's part", ("graphs", "staging")),
)
"""In order of worth; as many run at once as there are cores, up to `AT_ONCE`."""

TINY = (Group("both", ("attention", "on_device"), "may_be_strided or (a_forward and not bfloat and not avg)"),)
AT_ONCE = 9


class Running:
    """The pytest process of a group."""

    def __init__(self, group: Group, folder: Path, device: str) -> None:
        self.group, self.begin, self.seconds = group, time.monotonic(), None
        number = len(list(folder.iterdir()))
        self.outcomes, self.log = folder / f"{number}.jsonl", folder / f"{number}.log"
        self.outcomes.touch()
        command = [sys.executable, "-m", "pytest", f"--device={device}", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-p", "bench.gpu_suite.outcomes", *(f"tests/test_{name}.py" for name in group.files)]
        command += ["-k", group.select] if group.select else []
        environment = {**os.environ, OUTCOMES: str(self.outcomes), "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def finished(self) -> bool:
        if self.seconds is None and self.process.poll() is not None:
            self.seconds = time.monotonic() - self.begin
        return self.seconds is not None

    def result(self) -> dict:
        """Counts, failures with their messages, and what pytest said last if it did not end well."""
        lines = [json.loads(line) for line in self.outcomes.read_text().splitlines()]
        status = self.process.poll()
        state = "passed" if status == 0 else "not finished" if status is None or status < 0 else "failed"
        failed = [line for line in lines if line["outcome"] == "failed"]
        last = [] if status == 0 else self.log.read_text(errors="replace").splitlines()[-15:]
        return {
            "group": self.group.name,
            "state": state,
            "exit_status": status,
            "seconds": self.seconds,
            "counts": Counter(line["outcome"] for line in lines),
            "failed": failed,
            "slowest": sorted(((line["seconds"], line["test"]) for line in lines), reverse=True)[:5],
            "last_lines": last,
        }


def run(context: Context) -> list[str]:
    """The step."""
    if importlib.util.find_spec("pytest") is None:
        return ["the tests cannot run: pytest is not installed here (pip install pytest pytest-timeout hypothesis)"]
    context.require_device()
    device = "cuda" if context.on_gpu else "interpreter"
    waiting = list(GROUPS if context.on_gpu else TINY)
    running: list[Running] = []
    at_once = min(AT_ONCE, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        while waiting or not all(r.finished() for r in running):
            if context.left_s() <= 0:
                break
            while waiting and sum(not r.finished() for r in running) < at_once:
                running.append(Running(waiting.pop(0), Path(folder), device))
            time.sleep(0.5)
            context.keep(groups=[r.result() for r in running])
        for r in running:
            if not r.finished():
                r.process.kill()
                r.process.wait()
        groups = [r.result() for r in running]
    groups += [{"group": group.name, "state": "not begun"} for group in waiting]
    context.keep(groups=groups)
    for group in groups:
        context.say(f"{group['group']}: {group['state']} {dict(group.get('counts', {}))}")
    failures = [f"{line['test']}: {line['reason']}" for group in groups for line in group.get("failed", [])]
    return failures + [f"{g['group']}: {g['state']}" for g in groups if g["state"] != "passed"]

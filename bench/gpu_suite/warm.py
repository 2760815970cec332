"""Compiles kernels on all cores before they are needed, into Triton's cache on disk.

The steps' own calls run with few sequences on CPU tensors, where launches are recorded instead of run. Triton finds a
kernel in its cache by its source, the types and alignments of its arguments, its constants, options and chip, so
compiling a recorded launch serves the real one (`tests/aot/test_warm.py`). Warmed are our kernels of the steps `model`,
`attention`, `rows`, `profile` and `tuning`. Not warmed are those of the tests, whose sizes are many, and those that
TorchInductor makes for peers. Every step's result says in "compilations" what was in the cache and what was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from bench import gpu_launches
from bench.gpu_choices import CANDIDATES, FLOAT32
from bench.gpu_launches import asked_of_compiler
from bench.gpu_suite import attention, model, rows, setting, tuning
from bench.gpu_suite.measure import one_line
from bench.gpu_suite.setting import Setting
from bench.gpu_suite.step import Context, serve_cpu_tensors
from bench.machine_code import compile_launch
from revit_fast.kernels.launch import TARGETS, Launch, record

CUDA = torch.device("cuda")


def _model(s: Setting, target: str) -> None:
    work = model.Work(s)
    for fast in (False, True):
        model.ours(work, fast)(0)
    model.step(work.model, work.model, work.packs[0])


def _attention(s: Setting, target: str) -> None:
    for backward in (False, True):
        attention.case(s, backward, {"ours": attention.peers(s)["ours"]}).candidates["ours"]()(0)


def _rows(s: Setting, target: str) -> None:
    for build in rows.cases_of(s):
        build().candidates["ours"]()(0)


def _tuning(s: Setting, target: str, bound: int, field: str, value: tuple | int | None) -> None:
    for build in tuning.case(s, target, bound, field, (value,)).candidates.values():
        build()(0)


@dataclass(frozen=True)
class Call:
    """A call whose launches are compiled.

    Attributes:
        run: does what a step does, with a setting, the chip's name and `rest`.
        setting: sizes on the CPU.
        rest: further arguments.
    """

    run: Callable[..., None]
    setting: Setting
    rest: tuple = ()

    def launches(self, target: str) -> list[Launch]:
        """What the call would launch on a chip. The Triton kernels must serve CPU tensors, see `serve_cpu_tensors`."""
        with record(target) as launches:
            self.run(self.setting, target, *self.rest)
        return launches


def small(s: Setting, n_sequences: int = 1) -> Setting:
    """The same widths and lengths on the CPU, with few sequences and one block."""
    groups = tuple((n_sequences, n) for _, n in s.groups)
    return replace(s, device=torch.device("cpu"), groups=groups, depth=1, n_sets=1, compiled=False)


def calls(target: str) -> list[Call]:
    """What the later steps call, in their order."""
    models = list(dict.fromkeys(small(replace(s, name="")) for s in setting.models(CUDA)))
    found = [Call(run, s) for s in models for run in (_model, _attention, _rows)]
    found += [Call(_attention, small(s)) for s in setting.attentions(CUDA)]
    for s, bound, field in tuning.settings(CUDA, target):
        found += [Call(_tuning, small(s), (bound, field, value)) for value in CANDIDATES[bound, field]]
    return found


@lru_cache(maxsize=64)
def _launches(call: Call, target: str) -> list[Launch]:
    return call.launches(target)


def _compile(call: Call, target: str, index: int) -> float:
    """Compiles one launch of a call in a worker; returns the seconds that took."""
    launch = _launches(call, target)[index]
    begin = time.monotonic()
    compile_launch(launch, TARGETS[target])
    return time.monotonic() - begin


def target_here() -> tuple[str | None, str]:
    """The chip whose launches can be compiled beforehand, or None and why there is none."""
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    if torch.version.hip or name not in TARGETS:
        return None, f"{name} has no launches of its own: kernels are compiled when they are first called."
    return name, ""


def run(context: Context) -> list[str]:
    """The step; without a GPU it compiles two candidates of the tuning for compute capability 9.0."""
    target = "sm_90"
    if context.on_gpu:
        context.require_device()
        target, why = target_here()
        context.keep(target=target, why=why)
        if target is None:
            return []
    begin = time.monotonic()
    serve_cpu_tensors()
    wanted = calls(target) if context.on_gpu else [c for c in calls(target) if c.rest[:2] == (FLOAT32, "streaming")][:1]
    keys: set[tuple] = set()
    futures: dict[Future, Call] = {}
    seconds: list[float] = []
    failures: list[str] = []

    def keep() -> None:
        counts = {"launches": len(futures), "compiled": len(seconds), "compiler_s": sum(seconds)}
        context.keep(target=target, **counts, wall_s=time.monotonic() - begin)

    with gpu_launches.pool(None if context.on_gpu else 1, serve_cpu_tensors) as pool:
        for call in wanted:
            for index, launch in enumerate(call.launches(target)):
                key = asked_of_compiler(launch)
                if key not in keys:
                    keys.add(key)
                    futures[pool.submit(_compile, call, target, index)] = call
        context.say(f"{len(futures)} launches of {len(wanted)} calls, listed in {time.monotonic() - begin:.1f} s")
        for done in as_completed(futures):
            call = futures[done]
            try:
                seconds.append(done.result())
            except Exception as error:  # a call of the kernel will say so too
                line = f"{call.setting.name} {call.rest}: {one_line(error)}"
                context.say(line)
                failures += [] if call.rest else [line]  # a candidate of the tuning may fail
            if len(seconds) % 20 == 0:
                keep()
    keep()
    return failures

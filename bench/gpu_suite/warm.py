"""Compiles kernels on all cores before they are needed, into Triton's cache on disk.

Triton finds a kernel there by its source, the types and alignments of its arguments, its constants, options and chip,
so compiling a launch recorded on fake tensors serves the real launch (`tests/aot` shows this). Warmed are our
attention, norm and embedding kernels at the sizes of the steps `model`, `attention`, `rows`, `profile` and `tuning`.
Not warmed are the kernels of the tests, whose sizes are many, and those that TorchInductor makes for peers. Every
step's result says in "compilations" what it found in the cache and what it compiled anew.
"""

from __future__ import annotations

import time
from concurrent.futures import as_completed
from itertools import product

import torch

from bench import gpu_launches
from bench.gpu_choices import CANDIDATES, FLOAT32, SEQLENS, Override, is_backward, tunable
from bench.gpu_launches import Case
from bench.gpu_suite import setting
from bench.gpu_suite.measure import one_line
from bench.gpu_suite.step import Context
from revit_fast.kernels.launch import TARGETS

DIRECTIONS = ("fwd", "bwd")


def cases(target: str) -> list[Case]:
    """What the later steps call, in their order."""
    found = []
    for s in setting.models(torch.device("cuda")):
        for direction in DIRECTIONS:
            for n in (n for _, n in s.groups):
                found.append(Case("attention", direction, "bf16", s.head_dim, n, heads=s.heads))
            rows = [Case(op, direction, "bf16", s.channels) for op in ("layer_norm", "patch_embed")]
            found += [*rows, Case("layer_norm", direction, "bf16", s.channels, variant="residual")]
    for s, direction in product(setting.attentions(torch.device("cuda")), DIRECTIONS):
        found.append(Case("attention", direction, "bf16", s.head_dim, s.seqlens[0], heads=s.heads))
    return list(dict.fromkeys(found)) + tuning_cases(target)


def tuning_cases(target: str) -> list[Case]:
    """Every candidate of the tuning, at each length that it matters for."""
    found = []
    for bound, field in tunable(target):
        dtype, head_dim = ("fp32", 64) if bound == FLOAT32 else ("bf16", bound)
        heads = setting.HEADS.get(head_dim, 4)
        for value, seqlen in product(CANDIDATES[bound, field], SEQLENS[field]):
            direction = "bwd" if is_backward(field) else "fwd"
            override = Override(bound, field, value)
            found.append(Case("attention", direction, dtype, head_dim, seqlen, heads=heads, override=override))
    return found


def target_here() -> tuple[str | None, str]:
    """The chip whose launches can be compiled beforehand, or None and why there is none."""
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    if torch.version.hip or name not in TARGETS:
        return None, f"{name} has no launches of its own: kernels are compiled when they are first called"
    return name, ""


def run(context: Context) -> list[str]:
    """The step; without a GPU it compiles two calls for an H200."""
    if context.on_gpu:
        context.require_device()
        target, why = target_here()
        context.keep(target=target, why=why)
        if target is None:
            return []
        wanted = cases(target)
    else:
        target, wanted = "sm_90", [Case("layer_norm", "fwd", "bf16", 384), Case("patch_embed", "fwd", "bf16", 384)]
    begin = time.monotonic()
    compilations = gpu_launches.compilations(wanted, [target])
    context.say(f"{len(compilations)} launches of {len(wanted)} calls, listed in {time.monotonic() - begin:.1f} s")
    seconds: list[float] = []
    failures: list[str] = []

    def keep() -> None:
        context.keep(target=target, launches=len(compilations), compiled=len(seconds), compiler_s=sum(seconds))

    keep()
    with gpu_launches.pool() as pool:
        futures = {pool.submit(gpu_launches.Compilation.warm, c): c for c in compilations}
        for done in as_completed(futures):
            try:
                seconds.append(done.result())
            except Exception as error:  # the kernel's own call will say so too
                override = futures[done].case.override
                line = f"{futures[done]}{f' {override}' if override else ''}: {one_line(error)}"
                context.say(line)
                failures += [] if override else [line]
            if len(seconds) % 20 == 0:
                keep()
    context.keep(wall_s=time.monotonic() - begin)
    keep()
    return failures

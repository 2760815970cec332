"""One call of the model by kernel, eagerly and from its graph, and the host's part of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import gpu_host
from bench.gpu_suite.measure import one_line
from bench.gpu_suite.model import Work, ours
from bench.gpu_suite.setting import Setting, models
from bench.gpu_suite.step import Context


def by_kernel(call: Callable[[], object], on_gpu: bool) -> list[dict]:
    """What one call runs: name, number and µs of every kernel, longest first; without a GPU of every PyTorch op."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in found.key_averages():
        if on_gpu != (event.device_type == DeviceType.CUDA):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key, "count": event.count, "us": us})
    return sorted(rows, key=lambda row: -row["us"])


def profile_of(context: Context, s: Setting, fast: bool) -> dict:
    """The profile of one call after others."""
    run = ours(Work(s), fast)
    for turn in range(3 if context.on_gpu else 1):
        run(turn)
    kernels = by_kernel(lambda: run(3), context.on_gpu)
    total = sum(row["us"] for row in kernels)
    if not total:
        raise RuntimeError("the profiler has seen no kernel")
    for row in kernels:
        row["share"] = row["us"] / total
    return {"model": s.name, "mode": "graph" if fast else "eager", "total_us": total, "kernels": kernels}


def run(context: Context) -> list[str]:
    """The step."""
    context.require_device()
    profiles, failures = [], []
    for s in models(context.device)[:2]:
        for fast in (True, False):
            context.say(f"{s.name}, {'graph' if fast else 'eager'}")
            try:
                profiles.append(profile_of(context, s, fast))
            except Exception as error:  # the next profile may still be had
                failures.append(f"{s.name}: {one_line(error)}")
            context.keep(profiles=profiles)
    context.say("the host's part of a call")
    rounds, device = (40, "cuda") if context.on_gpu else (1, "meta")
    context.keep(host_ms=gpu_host.measure(rounds, device), host_device=device)
    return failures

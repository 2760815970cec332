"""Throughput of the policies of a report, from decoded pixels to logits, all in the same process and rounds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from revit_fast.adaptive.policies import PolicySpec
from revit_fast.environment import cpu_name
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.report import Report, Time

ROUNDS = 7


def measure(
    report: Report,
    pipe: AdaptivePipeline,
    pixels: Sequence[np.ndarray],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """The report with the times of its rows.

    Policies take turns in a different order every round, so that other load on the machine slows all of them alike. A
    first round, which packs weights and warms caches, is not counted. The oracle's time excludes its decisions.

    Args:
        report: report of `evaluate`.
        pipe: pipeline of an optimised model, with the assigner.
        pixels: decoded images, uint8 `[H, W, 3]` or `[H, W]`; the oracle needs the first of the evaluated images.
        rounds: number of rounds that are counted, at least 1.
        clock: function that gives the time in seconds.
    """
    if rounds < 1 or len(pixels) == 0:
        raise ValueError(f"rounds, pixels: expected at least one of each, got {rounds} and {len(pixels)}")
    rows = [row for row in report.rows if row.policy is not None]
    seconds = {row.name: [] for row in rows}
    rng = np.random.default_rng(0)
    for n in range(rounds + 1):
        for i in rng.permutation(len(rows)):
            begin = clock()
            run(pipe, rows[i].policy, pixels)
            if n:
                seconds[rows[i].name].append(clock() - begin)
    longest = np.array(seconds[report.rows[0].name])
    times = {}
    for name, taken in seconds.items():
        rates, ratios = len(pixels) / np.array(taken), longest / np.array(taken)
        low, median, high = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
        low_ratio, ratio, high_ratio = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        times[name] = Time(median, (low, high), ratio, (low_ratio, high_ratio))
    return report.with_times(times, machine(len(pixels), rounds))


def run(pipe: AdaptivePipeline, policy: PolicySpec, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The logits of every image under a policy.

    Raises:
        RuntimeError: if an image has no logits, because the time would not be that of all images.
    """
    return [_logits(result) for result in pipe.with_policy(policy)(pixels)]


def _logits(result) -> np.ndarray:
    if result.error is not None:
        raise RuntimeError(f"timing: {result.error}")
    return result.logits.numpy()


def machine(n_images: int, rounds: int) -> dict[str, Any]:
    """The setup of a measurement: number of images and rounds, processor, threads and versions."""
    threads = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    return {"images": n_images, "rounds": rounds, "cpu": cpu_name(), **threads}

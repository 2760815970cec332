"""Throughput of the policies of a report, from decoded pixels to logits, all in the same process and rounds."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from revit_fast.adaptive.policies import PolicySpec
from revit_fast.environment import cpu_name
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.report import Report, Time

ROUNDS = 7

LEAST_TIMED = 64
"""Least number of images of a round, if there are as many."""


def measure(
    report: Report,
    pipe: AdaptivePipeline,
    pixels: Sequence[np.ndarray],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """The report with the times of its rows, see `rates`. The oracle's time excludes its decisions.

    Args:
        report: report of `evaluate`.
        pipe: see `rates`.
        pixels: see `rates`; the oracle needs the first of the evaluated images.
        rounds: see `rates`.
        clock: see `rates`.
    """
    policies = {row.name: row.policy for row in report.rows if row.policy is not None}
    return report.with_times(*rates(policies, pipe, pixels, rounds=rounds, clock=clock))


def rates(
    policies: Mapping[str, PolicySpec],
    pipe: AdaptivePipeline,
    pixels: Sequence[np.ndarray],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float | None = None,
) -> tuple[dict[str, Time], dict[str, Any]]:
    """Times of policies, by name, and the setup of the measurement.

    Policies take turns in a different order every round, so that other load on the machine slows all of them alike. A
    first round, which packs weights and warms caches, is not counted.

    Args:
        policies: policies by name; the first is the one that ratios are to.
        pipe: pipeline of an optimised model, with the assigner.
        pixels: decoded images, uint8 `[H, W, 3]` or `[H, W]`.
        rounds: number of rounds that are counted, at least 1.
        clock: function that gives the time in seconds.
        seconds: about how long all rounds may take: the first round runs `LEAST_TIMED` images, and later ones as many
            more as the time allows; None: all rounds run all images.
    """
    if rounds < 1 or len(pixels) == 0:
        raise ValueError(f"rounds, pixels: expected at least one of each, got {rounds} and {len(pixels)}")
    names, n_images = list(policies), len(pixels)
    taken = {name: [] for name in names}
    rng = np.random.default_rng(0)
    begun = clock()
    for n in range(rounds + 1):
        some = pixels[: min(n_images, LEAST_TIMED) if n == 0 and seconds is not None else n_images]
        for i in rng.permutation(len(names)):
            begin = clock()
            run(pipe, policies[names[i]], some)
            if n:
                taken[names[i]].append(clock() - begin)
        if n == 0 and seconds is not None:
            a_round = max(clock() - begun, 1e-9) * n_images / len(some)
            n_images = min(n_images, max(LEAST_TIMED, int(n_images * seconds / (rounds * a_round))))
    longest = np.array(taken[names[0]])
    times = {}
    for name, values in taken.items():
        rate, ratios = n_images / np.array(values), longest / np.array(values)
        low, median, high = np.quantile(rate, (0.25, 0.5, 0.75)).tolist()
        low_ratio, ratio, high_ratio = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        times[name] = Time(median, (low, high), ratio, (low_ratio, high_ratio))
    return times, machine(n_images, rounds)


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

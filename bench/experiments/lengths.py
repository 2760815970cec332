"""Experiment 11: the number of lengths, and the cost of training them in parallel."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.experiments import timing
from bench.experiments.base import GRIDS, Lab, median_seconds
from bench.experiments.runs import accuracy_by_length
from bench.experiments.stats import median_interval, paired, spread
from bench.experiments.writing import (
    Panel,
    Series,
    accuracies,
    finding,
    mean_spread,
    number,
    over_seeds,
    percent,
    table,
)

NUMBER, TITLE = 11, "How many lengths"
QUESTION = (
    "What do two to five lengths do to accuracy at each, to the steadiness of training and to its time, and how much "
    "of an update is communication when every length has a process of its own?"
)
PAPER = "several predefined lengths, three in its experiments; all lengths of a batch trained in parallel."
OURS = (
    "the sets of grids; packed training; communication measured by leaving it out: gradients kept to their process, "
    "and the process's own logits in the teacher's place. Three processes of gloo on one machine share its cores, so "
    "that the shares hold for this machine alone."
)

SETS = ((7, 4), GRIDS, (7, 6, 5, 4), (7, 6, 5, 4, 3))
COMMUNICATION_ROUNDS = {"full": 150, "quick": 2}


def name_of(grids: tuple[int, ...] | list[int]) -> str:
    """The name of a set of grids in the results."""
    return ", ".join(map(str, grids))


def measure(lab: Lab) -> dict[str, Any]:
    """Accuracy, gradient norms and time of every set; time of communication."""
    found: dict[str, Any] = {}
    steppers = {}
    for grids in SETS:
        runs = lab.trained(grids=grids)
        norms = [[row["gradient_norm"] for row in run.steps] for run in runs]
        found[name_of(grids)] = {
            "grids": list(grids),
            "accuracy": accuracy_by_length(runs),
            "gradient_norm": [{"median": float(np.median(g)), "max": max(g)} if g else None for g in norms],
            "diverged": [run.diverged is not None for run in runs],
        }
        steppers[name_of(grids)] = timing.stepper(lab.config(lab.seeds[0], grids=grids), lab.source.train)
    for name, seconds in median_seconds(steppers, lab.scale.timed, time.perf_counter).items():
        found[name]["seconds"] = seconds
    lab.say("communication of length-parallel training")
    config = lab.config(lab.seeds[0], mode="length-parallel")
    communication = timing.in_process("communication", config, len(GRIDS), steps=COMMUNICATION_ROUNDS[lab.scale_name])
    return {"sets": found, "communication": {"grids": list(GRIDS), "batch_size": config.batch_size, **communication}}


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    sets, findings, rows = values["sets"], [], []
    every = sorted({g for s in sets.values() for g in s["grids"]}, reverse=True)
    shortest_set = next(iter(sets.values()))
    base = np.median(shortest_set["seconds"])
    for name, s in sets.items():
        by_grid = {g: accuracies([row[i] for row in s["accuracy"]]) for i, g in enumerate(s["grids"])}
        peaks = [None if g is None else g["max"] / g["median"] for g in s["gradient_norm"]]
        rows.append(
            [
                name,
                *(by_grid.get(g, "") for g in every),
                mean_spread(peaks),
                f"{sum(s['diverged'])} of {len(s['diverged'])}",
                number(1e3 * np.median(s["seconds"]), 1),
                number(np.median(s["seconds"]) / base),
            ]
        )
        if s is not shortest_set:
            for g in (every[0], shortest_set["grids"][-1]):
                ours = [row[s["grids"].index(g)] for row in s["accuracy"]]
                theirs = [row[shortest_set["grids"].index(g)] for row in shortest_set["accuracy"]]
                what = f"Accuracy at {g}x{g} with grids {name} against {name_of(shortest_set['grids'])}"
                findings.append(finding(what, paired(ours, theirs)))
    heads = [
        "grids",
        *(f"{g}x{g}, %" for g in every),
        "gradient norm, max / median",
        "diverged",
        "ms an update",
        "ratio",
    ]
    c = values["communication"]
    return [
        "\n".join([*findings, *_communication_findings(c)]),
        table(heads, rows),
        "Time of an update, loading included: median, one set after another taking turns; ratio to the first set.",
        f"### Communication, one process for each of {name_of(c['grids'])}, batches of {c['batch_size']}\n\n"
        + table(
            ["forward and backward of the slowest process", "median ms"],
            [[f"communicating {k}", number(1e3 * float(np.median(v)))] for k, v in c["seconds"].items()],
        ),
        "Without communication the processes need "
        + ", ".join(f"{1e3 * s:.1f} ms at {g}x{g}" for s, g in zip(c["own"], c["grids"], strict=True))
        + f", with {c['threads']} thread(s) each. Compared is the time of the slowest: that faster ones wait for it "
        "at the end is not counted, that all wait for the longest length's logits is.",
    ]


def communication_shares(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Share of a full update's time that each kind of communication adds, for every round: 1 - without / with."""
    both = np.array(seconds["both"])
    return {
        "gradients and logits": (1 - np.array(seconds["none"]) / both).tolist(),
        "gradients": (1 - np.array(seconds["logits"]) / both).tolist(),
        "logits": (1 - np.array(seconds["gradients"]) / both).tolist(),
    }


def _communication_findings(c: dict[str, Any]) -> list[str]:
    lines = []
    for what, shares in communication_shares(c["seconds"]).items():
        found, text = median_interval(shares), f"- Share of {what} in a forward and backward pass: "
        if found is None:
            lines.append(f"{text}{percent(float(np.median(shares)))}, of too few updates to say more.")
            continue
        median, low, high = found
        verdict = "" if low > 0 else "; not told apart from none"
        lines.append(
            f"{text}{percent(median)} (95 % interval of the median {percent(low)} to {percent(high)}, {len(shares)} "
            f"updates{verdict})."
        )
    return lines


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    series, times = [], []
    for name, s in values["sets"].items():
        series.append(over_seeds(name, [g * g for g in s["grids"]], s["accuracy"], 100))
        times.append(1e3 * float(np.median(s["seconds"])))
    names = list(values["sets"])
    return [
        Panel("Accuracy by length", "patch tokens", "test accuracy, %", series),
        Panel("Time of an update", "grids", "ms", [Series("median", names, times, [0.0] * len(times))], "bar"),
        Panel(
            "Communication",
            "left out or not",
            "ms",
            [
                Series(
                    "slowest process",
                    list(values["communication"]["seconds"]),
                    [1e3 * float(np.median(v)) for v in values["communication"]["seconds"].values()],
                    [1e3 * (spread(v).sd or 0.0) for v in values["communication"]["seconds"].values()],
                )
            ],
            "bar",
        ),
    ]

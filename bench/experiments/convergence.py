"""Experiment 9: the effect of TAL-LN on the stability and speed of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bench.experiments.base import BASE, Lab
from bench.experiments.runs import NORMS, Run
from bench.experiments.stats import paired
from bench.experiments.writing import Panel, Series, effect_cell, finding, mean_spread, over_seeds, table

NUMBER, TITLE = 9, "Convergence with TAL-LN and with shared norms"
QUESTION = "Does TAL-LN change how fast and how steadily training converges? (The paper leaves it open.)"
PAPER = "TAL-LN; what it does to convergence is named as an open question."
OURS = (
    "the measures: loss and gradient norm by update, updates to a training accuracy, and the share of short runs (one "
    "epoch, no warm-up) that diverge at learning rates above the recipe's. A run diverges when its loss is no number, "
    "or ends less than 1 % below that of guessing at the longest length."
)

FACTORS = (1, 4, 16, 64)
"""Learning rates of the short runs, as multiples of the recipe's."""


def measure(lab: Lab) -> dict[str, Any]:
    """Curves of the base runs and outcomes of the short runs."""
    curves: dict[str, Any] = {}
    for norms in NORMS:
        runs = lab.trained(norms=norms)
        logs = [run.steps for run in runs]
        curves[norms] = {
            "step": [int(row["step"]) for row in max(logs, key=len)],
            "loss": _columns(logs, "loss"),
            "gradient_norm": _columns(logs, "gradient_norm"),
            "accuracy": [[mean_accuracy(row) for row in log] for log in logs],
            "diverged": [run.diverged is not None for run in runs],
        }
    short = {
        norms: {
            str(f): [_outcome(run) for run in lab.trained(norms=norms, lr=f * BASE["lr"], epochs=1)] for f in FACTORS
        }
        for norms in NORMS
    }
    return {
        "targets": list(lab.scale.targets),
        "log_steps": lab.scale.log_steps,
        "lr": BASE["lr"],
        "curves": curves,
        "short": short,
    }


def _columns(logs: Sequence[Sequence[dict]], name: str) -> list[list[float]]:
    return [[row[name] for row in log] for log in logs]


def mean_accuracy(row: dict[str, float]) -> float:
    """Mean training accuracy over lengths in a line of the log."""
    found = [value for name, value in row.items() if name.startswith("accuracy_")]
    return sum(found) / len(found)


def _outcome(run: Run) -> dict[str, Any]:
    """The last training loss of a run at the longest length, and whether it diverged."""
    # The longest length has no distillation, so that the loss of guessing is log K there.
    last = run.steps[-1][f"loss_{run.config.grids[0]}"] if run.steps else None
    learnt = last is not None and last < 0.99 * math.log(run.n_classes)
    return {"loss": last, "diverged": run.diverged is not None or not learnt}


def first_update(steps: Sequence[int], accuracy: Sequence[float], target: float) -> int | None:
    """The first logged update whose accuracy is at least the target; None if there is none."""
    return next((step for step, value in zip(steps, accuracy, strict=False) if value >= target), None)


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    curves, findings, rows = values["curves"], [], []
    for target in values["targets"]:
        reached = {
            norms: [first_update(c["step"], accuracy, target) for accuracy in c["accuracy"]]
            for norms, c in curves.items()
        }
        effect = paired(reached["tal"], reached["shared"], values["log_steps"])
        cells = [f"{mean_spread(r, digits=0)} ({sum(v is not None for v in r)} of {len(r)})" for r in reached.values()]
        rows.append([f"updates to {100 * target:.0f} % training accuracy", *cells, effect_cell(effect, digits=0)])
        if effect.mean is not None:
            what = f"Updates to {100 * target:.0f} % training accuracy with TAL-LN against shared norms"
            findings.append(finding(what, effect, "updates", 1, 0))
    measures = {
        "last training loss": lambda c: [loss[-1] if loss else None for loss in c["loss"]],
        "median gradient norm": lambda c: [sorted(g)[len(g) // 2] if g else None for g in c["gradient_norm"]],
        "largest gradient norm": lambda c: [max(g, default=None) for g in c["gradient_norm"]],
    }
    for name, of in measures.items():
        found = {norms: of(c) for norms, c in curves.items()}
        effect = paired(found["tal"], found["shared"])
        rows.append([name, *(mean_spread(v, digits=3) for v in found.values()), effect_cell(effect, digits=3)])
        findings.append(
            finding(f"{name.capitalize()} with TAL-LN against shared norms", effect, scale=1, unit="", digits=3)
        )
    short = []
    for factor in values["short"]["tal"]:
        cells = [f"{factor} x {values['lr']:g}"]
        for norms in NORMS:
            outcomes = values["short"][norms][factor]
            cells += [f"{sum(o['diverged'] for o in outcomes)} of {len(outcomes)}"]
            cells += [mean_spread([o["loss"] for o in outcomes], digits=3)]
        short.append(cells)
    total = {norms: sum(o["diverged"] for f in values["short"][norms].values() for o in f) for norms in NORMS}
    n = sum(map(len, values["short"]["tal"].values()))
    return [
        "\n".join(findings),
        table(["", "TAL-LN", "shared", "difference"], rows),
        "In brackets: seeds that reach it. Gradient norms and losses are means of the updates between two lines of "
        "the log.",
        f"Short runs at high learning rates: {total['tal']} of {n} with TAL-LN diverged and {total['shared']} of {n} "
        "with shared norms.\n\n"
        + table(["learning rate", "TAL-LN diverged", "last loss", "shared diverged", "last loss"], short),
    ]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    names = {"tal": "TAL-LN", "shared": "shared"}
    found = []
    for column, label in (("loss", "training loss"), ("gradient_norm", "norm of the gradient")):
        series = []
        for norms, curve in values["curves"].items():
            n = min(map(len, curve[column]))
            mean = over_seeds(names[norms], curve["step"][:n], [row[:n] for row in curve[column]])
            series.append(Series(mean.label, mean.x, mean.y))
        found.append(Panel(f"{label.capitalize()}, mean over seeds", "update", label, series, log_y=True))
    shares = []
    for norms in NORMS:
        short = values["short"][norms]
        y = [sum(o["diverged"] for o in outcomes) / len(outcomes) for outcomes in short.values()]
        shares.append(Series(names[norms], [values["lr"] * float(f) for f in short], y, [0.0] * len(y)))
    return [*found, Panel("Divergence", "learning rate", "share of short runs", shares, log_x=True)]

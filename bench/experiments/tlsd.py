"""Experiment 2: self-distillation, and its temperature."""

from __future__ import annotations

from typing import Any

from bench.experiments.base import GRIDS, Lab
from bench.experiments.runs import accuracy_by_length
from bench.experiments.stats import paired
from bench.experiments.writing import Panel, accuracies, effect_cell, finding, over_seeds, table
from revit_fast.train.config import DISTILL_WEIGHT

NUMBER, TITLE = 2, "TLSD: self-distillation and its temperature"
QUESTION = "Do shorter lengths gain from being taught by the longest, and at which temperature?"
PAPER = "TLSD: the longest length teaches the shorter ones, with a temperature."
OURS = f"the weight of the distillation, {DISTILL_WEIGHT}, the temperatures that are tried, the data."

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
OFF = "off"


def measure(lab: Lab) -> dict[str, Any]:
    """Accuracy `[seed][length]` without TLSD and at every temperature."""
    found = {OFF: lab.trained(distill_weight=0.0)}
    for temperature in TEMPERATURES:
        found[f"{temperature:g}"] = lab.trained(distill_weight=DISTILL_WEIGHT, temperature=temperature)
    return {"grids": list(GRIDS), "accuracy": {name: accuracy_by_length(runs) for name, runs in found.items()}}


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    accuracy, findings = values["accuracy"], []
    heads, rows, differences = ["grid"], [], []
    heads += ["TLSD off" if name == OFF else f"τ = {name}" for name in accuracy]
    for i, grid in enumerate(values["grids"]):
        columns = {name: [row[i] for row in found] for name, found in accuracy.items()}
        rows.append([f"{grid}x{grid}", *map(accuracies, columns.values())])
        effects = {name: paired(found, columns[OFF]) for name, found in columns.items() if name != OFF}
        differences.append([f"{grid}x{grid}", *(effect_cell(effect, 100) for effect in effects.values())])
        findings += [
            finding(f"Accuracy at {grid}x{grid}, τ = {t} against none", effect) for t, effect in effects.items()
        ]
    return [
        "\n".join(findings),
        "Test accuracy in per cent:\n\n" + table(heads, rows),
        "Difference to no distillation in points:\n\n" + table([heads[0], *heads[2:]], differences),
    ]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    x = [f"{g}x{g}" for g in values["grids"]]
    series = [
        over_seeds("TLSD off" if name == OFF else f"τ = {name}", x, found, 100)
        for name, found in values["accuracy"].items()
    ]
    return [Panel("Accuracy by length", "grid", "test accuracy, %", series, "bar")]

"""Experiment 4: an assigner trained on one image set assigns the images of another."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.experiments.base import DECIDING, GRIDS, Lab, assigned, shares_of
from bench.experiments.runs import Run
from bench.experiments.sources import Source, pixels_of
from bench.experiments.stats import Effect, agreement, cohen_kappa, paired
from bench.experiments.writing import Panel, accuracies, effect_cell, finding, mean_spread, over_seeds, table
from revit_fast.adaptive.assigner import TokenLengthAssigner

NUMBER, TITLE = 4, "Cross-dataset: assigners on another image set"
QUESTION = "Does an assigner that was trained on one image set choose lengths that serve a model of another?"
PAPER = "an assigner is trained and used with one set; transfer was not at hand."
OURS = (
    "both directions between two sets. The model is always of the set that is classified; its own assigner or the "
    "other set's chooses its lengths. The other's is also calibrated anew, on unlabelled images of the set that is "
    "classified. Random is what lengths at random with the same shares come to on average. "
    f"{DECIDING}"
)

CHOICES = {
    "own": "its own assigner",
    "other": "the other set's assigner",
    "recalibrated": "the other set's assigner, calibrated anew",
}


def measure(lab: Lab) -> dict[str, Any]:
    """Accuracy and tokens of every choice of lengths, for every seed, in both directions."""
    first, second = lab.source, lab.second_source
    # Both sets get the same number of updates: the smaller set has shorter epochs, and more of them.
    size = lab.config(lab.seeds[0], second).batch_size
    per_epoch = max(len(second.train) // size, 1)
    updates = len(first.train) // lab.config(lab.seeds[0]).batch_size * lab.scale.epochs
    epochs = {first.name: lab.scale.epochs, second.name: max(round(updates / per_epoch), 1)}
    runs = {source.name: lab.trained(source, epochs=epochs[source.name]) for source in (first, second)}
    values: dict[str, Any] = {"grids": list(GRIDS), "epochs": epochs, "directions": {}}
    for target, other in ((first, second), (second, first)):
        found = [
            _of_seed(lab, target, own, lab.assigner(own, target)[0], lab.assigner(theirs, other)[0])
            for own, theirs in zip(runs[target.name], runs[other.name], strict=True)
        ]
        names = {"classified": target.name, "assigner_of": other.name}
        values["directions"][f"{other.name} to {target.name}"] = names | {
            key: [row[key] for row in found] for key in found[0]
        }
    return values


def _of_seed(
    lab: Lab, target: Source, run: Run, own: TokenLengthAssigner, other: TokenLengthAssigner
) -> dict[str, Any]:
    right = lab.predictions(run, target, "test").correct(target.test.labels)
    labels = lab.labels(run, target, "test").labels
    pixels, places, fixed = pixels_of(target.test), np.arange(right.shape[1]), right.mean(axis=1)
    chosen = {"own": assigned(own, pixels), "other": assigned(other, pixels)}
    other.calibrate(pixels_of(target.label))
    chosen["recalibrated"] = assigned(other, pixels)
    shares = {name: shares_of(c) for name, c in chosen.items()}
    return {
        "fixed": fixed.tolist(),
        "accuracy": {name: float(right[c, places].mean()) for name, c in chosen.items()},
        "random": {name: float(np.dot(s, fixed)) for name, s in shares.items()},
        "tokens": {name: float(np.dot(s, np.array(GRIDS) ** 2)) for name, s in shares.items()},
        "agreement": {name: agreement(c, labels) for name, c in chosen.items()},
        "kappa": {name: cohen_kappa(c, labels) for name, c in chosen.items()},
        "shares": shares,
    }


def _column(direction: dict[str, Any], key: str, name: str) -> list[float | None]:
    return [row[name] for row in direction[key]]


def _gain(direction: dict[str, Any], name: str) -> Effect:
    """Gain in accuracy of a choice of lengths over random lengths with the same shares."""
    return paired(_column(direction, "accuracy", name), _column(direction, "random", name))


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    findings, blocks, grids = [], [], values["grids"]
    for direction, d in values["directions"].items():
        for name, what in CHOICES.items():
            findings.append(finding(f"{direction}: accuracy with {what}, against random lengths", _gain(d, name)))
        effect = paired(_column(d, "accuracy", "recalibrated"), _column(d, "accuracy", "own"))
        findings.append(finding(f"{direction}: accuracy with {CHOICES['recalibrated']}, against its own", effect))
        effect = paired(_column(d, "tokens", "other"), _column(d, "tokens", "own"))
        findings.append(
            finding(f"{direction}: tokens that {CHOICES['other']} gives, against its own", effect, "tokens", 1)
        )
        rows = [
            [f"all at {g}x{g}", accuracies([row[i] for row in d["fixed"]]), "", g * g, "", "", ""]
            for i, g in enumerate(grids)
        ]
        for name, what in CHOICES.items():
            shares = " / ".join(accuracies([row[name][i] for row in d["shares"]]) for i in range(len(grids)))
            rows.append(
                [
                    what,
                    accuracies(_column(d, "accuracy", name)),
                    effect_cell(_gain(d, name), 100),
                    mean_spread(_column(d, "tokens", name)),
                    accuracies(_column(d, "agreement", name)),
                    mean_spread(_column(d, "kappa", name)),
                    shares,
                ]
            )
        heads = ["lengths", "accuracy, %", "- random, points", "mean tokens", "agreement with labels, %", "kappa"]
        blocks.append(
            f"### Assigner of {d['assigner_of']}, images and model of {d['classified']}\n\n"
            + table([*heads, "shares of lengths, %"], rows)
        )
    epochs = ", ".join(f"{n} epochs on {name}" for name, n in values["epochs"].items())
    return ["\n".join(findings), *blocks, f"Models are trained for like numbers of updates: {epochs}."]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    found = []
    for direction, d in values["directions"].items():
        names = [f"{g}x{g}" for g in values["grids"]]
        series = [over_seeds(CHOICES[c], names, [row[c] for row in d["shares"]], 100) for c in CHOICES]
        found.append(Panel(direction, "length", "share of test images, %", series, "bar"))
    return found

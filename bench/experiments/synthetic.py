"""Experiment 3: the assigner on images whose sufficient length is known by construction."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.experiments.base import GRIDS, Lab
from bench.experiments.gratings import make_synthetic
from bench.experiments.runs import accuracy_by_length
from bench.experiments.sources import Source, pixels_of
from bench.experiments.stats import agreement, paired
from bench.experiments.writing import Panel, accuracies, finding, over_seeds, table

NUMBER, TITLE = 3, "The assigner on images of known sufficient length"
QUESTION = "Does the assigner find the smallest sufficient length where it is known by construction?"
PAPER = "an assigner learns the smallest length that a model gets right."
OURS = (
    "gratings that can be told apart at one length and at longer ones, and at no shorter one. Assigners are trained "
    "once on the labels that a trained model gives, once on the known lengths."
)

N_CLASSES = 4
EPOCHS = {"full": 10, "quick": 4}
KINDS = {"model": "on the model's labels", "known": "on the known lengths"}


def make_source(lab: Lab) -> Source:
    """Parts of synthetic images, each with its own seed."""
    s = lab.scale
    sizes = {"train": min(s.n_train, 6000), "label": min(s.n_label, 3000), "test": min(s.n_test, 3000)}
    made = {part: make_synthetic(n, GRIDS, 4, i, N_CLASSES) for i, (part, n) in enumerate(sizes.items())}
    images = {part: found[0] for part, found in made.items()}
    return Source("synthetic", **images, lengths={part: found[1] for part, found in made.items()})


def measure(lab: Lab) -> dict[str, Any]:
    """Accuracy of models, of their labels and of assigners; confusion `[known][assigned]` for every seed."""
    source = make_source(lab)
    known = source.lengths["test"]
    # A mirrored grating has the direction of another class.
    runs = lab.trained(source, epochs=EPOCHS[lab.scale_name], augment={"preset": "none"})
    values: dict[str, Any] = {
        "grids": list(GRIDS),
        "n_classes": N_CLASSES,
        "known_shares": (np.bincount(known, minlength=len(GRIDS)) / len(known)).tolist(),
        "model_accuracy": accuracy_by_length(runs),
        "label_accuracy": [agreement(lab.labels(run, source, "test").labels, known) for run in runs],
        "assigner_accuracy": {kind: [] for kind in KINDS},
        "confusion": {kind: [] for kind in KINDS},
    }
    pixels = pixels_of(source.test)
    for run in runs:
        for kind in KINDS:
            tla, _ = lab.assigner(run, source, kind)
            assigned = tla.predict_proba(pixels).argmax(dim=1).numpy()
            values["assigner_accuracy"][kind].append(agreement(assigned, known))
            confusion = np.zeros((len(GRIDS), len(GRIDS)), dtype=int)
            np.add.at(confusion, (known, assigned), 1)
            values["confusion"][kind].append(confusion.tolist())
    return values


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    accuracy, grids = values["assigner_accuracy"], values["grids"]
    chance = max(values["known_shares"])
    names = [f"{g}x{g}" for g in grids]
    findings = []
    for kind, what in KINDS.items():
        effect = paired(accuracy[kind], [chance] * len(accuracy[kind]))
        findings.append(
            finding(f"Accuracy of assigners trained {what} against always the most frequent length", effect)
        )
    findings.append(
        finding("Trained on known lengths against the model's labels", paired(accuracy["known"], accuracy["model"]))
    )
    rows = [[f"model at {n}", accuracies([row[i] for row in values["model_accuracy"]])] for i, n in enumerate(names)]
    rows.append(["the model's labels against the known lengths", accuracies(values["label_accuracy"])])
    rows += [
        [f"assigner trained {what}, against the known lengths", accuracies(accuracy[kind])]
        for kind, what in KINDS.items()
    ]
    blocks = ["\n".join(findings), table(["", "accuracy, %"], rows)]
    blocks.append(
        f"A model guesses among {values['n_classes']} classes where a length does not show the pattern, and is then "
        "right by chance: its labels are shorter than the known lengths by that much at least."
    )
    for kind, what in KINDS.items():
        total = np.sum(values["confusion"][kind], axis=0)
        cells = [[f"known {n}", *row] for n, row in zip(names, total.tolist(), strict=True)]
        blocks.append(f"Assigned by those trained {what}, images of all seeds:\n\n" + table(["", *names], cells))
    return blocks


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    names = [f"{g}x{g}" for g in values["grids"]]
    series = []
    for kind, what in KINDS.items():
        by_seed = [[row[i] / max(sum(row), 1) for i, row in enumerate(table_)] for table_ in values["confusion"][kind]]
        series.append(over_seeds(f"trained {what}", names, by_seed, 100))
    return [Panel("Known lengths that are found", "known length", "share assigned rightly, %", series, "bar")]

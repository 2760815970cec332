"""Experiment 1: separate LayerNorms for every length, or shared ones."""

from __future__ import annotations

from typing import Any

from bench.experiments.base import GRIDS, Lab
from bench.experiments.runs import NORMS, accuracy_by_length
from bench.experiments.stats import paired
from bench.experiments.writing import Panel, accuracies, effect_cell, finding, over_seeds, table
from revit_fast.train.run import build_model

NUMBER, TITLE = 1, "TAL-LN: norms of every length's own, or shared"
QUESTION = "Does accuracy at each token length gain from LayerNorm parameters of that length's own?"
PAPER = "TAL-LN: LayerNorm parameters of every token length's own, all other weights shared."
OURS = "the comparison with shared norms of the same start, order of images and updates, on our data."


def measure(lab: Lab) -> dict[str, Any]:
    """Accuracy `[seed][length]` with both kinds of norms."""
    found = {norms: lab.trained(norms=norms) for norms in NORMS}
    model, _ = build_model(found["tal"][0].config, found["tal"][0].n_classes)
    total = sum(p.numel() for p in model.parameters())
    of_norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    extra = of_norms - of_norms // len(GRIDS)
    return {
        "grids": list(GRIDS),
        "accuracy": {norms: accuracy_by_length(runs) for norms, runs in found.items()},
        "extra_parameters": extra,
        "extra_share": extra / (total - extra),
    }


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    rows, findings = [], []
    for i, grid in enumerate(values["grids"]):
        tal, shared = ([row[i] for row in values["accuracy"][norms]] for norms in NORMS)
        effect = paired(tal, shared)
        rows.append([f"{grid}x{grid}", accuracies(tal), accuracies(shared), effect_cell(effect, 100)])
        findings.append(finding(f"Accuracy at {grid}x{grid} with TAL-LN against shared norms", effect))
    return [
        "\n".join(findings),
        table(["grid", "TAL-LN, %", "shared, %", "difference, points"], rows),
        f"TAL-LN adds {values['extra_parameters']:,} parameters, {100 * values['extra_share']:.2f} % of the model.",
    ]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    x = [f"{g}x{g}" for g in values["grids"]]
    names = {"tal": "TAL-LN", "shared": "shared"}
    series = [over_seeds(names[norms], x, values["accuracy"][norms], 100) for norms in NORMS]
    return [Panel("Accuracy by length", "grid", "test accuracy, %", series, "bar")]

"""Experiment 8: whether images of like complexity get like lengths whatever their category."""

from __future__ import annotations

from typing import Any

import numpy as np

from revit_fast.train.experiments.base import GRIDS, Lab
from revit_fast.train.experiments.complexity import edge_density, entropy, parts_of
from revit_fast.train.experiments.sources import pixels_of
from revit_fast.train.experiments.stats import association
from revit_fast.train.experiments.writing import Panel, accuracies, mean_spread, number, over_seeds, percent, table

NUMBER, TITLE = 8, "Lengths of images of like complexity and different category"
QUESTION = "Are lengths assigned alike to images of like complexity but different category? (The paper leaves it open.)"
PAPER = "the question, which it names as open."
OURS = (
    "complexity as the entropy of grey values and the density of edges. Images are matched by strata of both; "
    "categories are permuted within strata, and the chi-square of category by length, summed over strata, is "
    "compared. A small p says that the category matters beyond these two measures, not why: they do not capture all of "
    "what makes an image hard."
)

PARTS = 5
"""Of the range of either measure; strata are their pairs."""

ALPHA = 0.05
WHAT = {"labels": "labels", "assigned": "lengths that the assigner gives"}


def measure(lab: Lab) -> dict[str, Any]:
    """Shares of lengths by category, and tests with and without matched complexity, for every seed."""
    pixels, categories = pixels_of(lab.source.test), lab.source.test.labels
    bits, edges = entropy(pixels), edge_density(pixels)
    strata = parts_of(bits, PARTS) * PARTS + parts_of(edges, PARTS)
    found: dict[str, dict[str, list]] = {name: {"shares": [], "matched": [], "unmatched": []} for name in WHAT}
    for run in lab.trained():
        tla, _ = lab.assigner(run, lab.source)
        lengths = {
            "labels": lab.labels(run, lab.source, "test").labels,
            "assigned": tla.predict_proba(pixels).argmax(dim=1).numpy(),
        }
        for name, given in lengths.items():
            table_ = np.zeros((len(lab.source.test.classes), len(GRIDS)))
            np.add.at(table_, (categories, given), 1)
            shares = table_ / np.maximum(table_.sum(axis=1, keepdims=True), 1)
            found[name]["shares"].append(shares.tolist())
            options = {"n_permutations": lab.scale.permutations, "seed": run.config.seed}
            found[name]["matched"].append(association(categories, given, strata, **options)._asdict())
            found[name]["unmatched"].append(association(categories, given, **options)._asdict())
    return {
        "grids": list(GRIDS),
        "categories": list(lab.source.test.classes),
        "images": np.bincount(categories, minlength=len(lab.source.test.classes)).tolist(),
        "entropy": [
            float(bits[categories == c].mean()) if (categories == c).any() else None
            for c in range(len(lab.source.test.classes))
        ],
        "edges": [
            float(edges[categories == c].mean()) if (categories == c).any() else None
            for c in range(len(lab.source.test.classes))
        ],
        "strata": len(np.unique(strata)),
        "permutations": lab.scale.permutations,
        "found": found,
    }


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report."""
    findings, blocks = [], []
    grids = values["grids"]
    for name, what in WHAT.items():
        found = values["found"][name]
        p = [test["p"] for test in found["matched"]]
        small = sum(value <= ALPHA for value in p)
        verdict = (
            "the category matters at like complexity with every seed"
            if small == len(p)
            else "no effect of the category is shown with any seed"
            if small == 0
            else f"an effect is shown with {small} of {len(p)} seeds: not established"
        )
        findings.append(f"- {what.capitalize()}: {verdict} (p {', '.join(number(value, 4) for value in p)}).")
        rows = [
            [kind, *(f"{number(t['statistic'], 1)} (p {number(t['p'], 4)})" for t in found[kind])]
            for kind in ("matched", "unmatched")
        ]
        seeds = [f"run {i + 1}" for i in range(len(p))]
        size = mean_spread([test["cramers_v"] for test in found["unmatched"]])
        blocks.append(f"### {what.capitalize()}\n\n" + table(["chi-square", *seeds], rows))
        blocks.append(f"Cramér's V of category and length, complexity not matched: {size}.")
        shares = []
        for c, category in enumerate(values["categories"]):
            cells = [accuracies([row[c][i] for row in found["shares"]]) for i in range(len(grids))]
            shares.append(
                [category, values["images"][c], number(values["entropy"][c]), number(values["edges"][c]), *cells]
            )
        heads = ["category", "images", "entropy, bits", "edge density", *(f"{g}x{g}, %" for g in grids)]
        blocks.append(table(heads, shares))
    note = (
        f"{values['strata']} strata of like complexity; {values['permutations']:,} permutations, so that p is at least "
        f"{number(1 / (values['permutations'] + 1), 4)}; significance at {percent(ALPHA, 0)}. Seeds share their test "
        "images: their tests are not independent."
    )
    return ["\n".join(findings), note, *blocks]


def panels(values: dict[str, Any]) -> list[Panel]:
    """What is drawn."""
    found = []
    for name, what in WHAT.items():
        series = [
            over_seeds(
                f"{g}x{g}",
                values["categories"],
                [[row[c][i] for c in range(len(row))] for row in values["found"][name]["shares"]],
                100,
            )
            for i, g in enumerate(values["grids"])
        ]
        found.append(Panel(what.capitalize(), "category", "share, %", series, "bar"))
    return found

"""Experiment 8: whether images of similar complexity get similar lengths, whatever their category."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.experiments.base import DECIDING, GRIDS, Lab, assigned
from bench.experiments.complexity import edge_density, entropy, parts_of
from bench.experiments.sources import pixels_of
from bench.experiments.stats import association
from bench.experiments.writing import Panel, accuracies, mean_spread, number, over_seeds, percent, table
from revit_fast.train.labels import LengthLabels

NUMBER, TITLE = 8, "Lengths of images of like complexity and different category"
QUESTION = "Are lengths assigned alike to images of like complexity but different category? (The paper leaves it open.)"
PAPER = "the question, which it names as open."
OURS = (
    "complexity as the entropy of grey values and the density of edges. Images are matched by strata of both; "
    "categories are permuted within strata, and the chi-square of category by length, summed over strata, is "
    "compared. A small p says that the category matters beyond these two measures, not why: they do not capture all of "
    f"what makes an image hard. {DECIDING}"
)

PARTS = 5
"""Number of parts of the range of each measure; strata are pairs of parts."""

ALPHA = 0.05
WHAT = {
    "labels": "labels, unsolved images counted as the longest",
    "solved": "labels of the images that some length gets right",
    "assigned": "lengths that the assigner gives",
}


def measure(lab: Lab) -> dict[str, Any]:
    """Shares of lengths by category, and tests with and without matching of complexity, for every seed."""
    pixels, categories = pixels_of(lab.source.test), lab.source.test.labels
    bits, edges = entropy(pixels), edge_density(pixels)
    strata = parts_of(bits, PARTS) * PARTS + parts_of(edges, PARTS)
    found: dict[str, dict[str, list]] = {name: {"shares": [], "matched": [], "unmatched": []} for name in WHAT}
    n_categories = len(lab.source.test.classes)
    for run in lab.trained():
        tla, _ = lab.assigner(run, lab.source)
        predictions = lab.predictions(run, lab.source, "test")
        lengths = {
            "labels": lab.labels(run, lab.source, "test").labels,
            "solved": LengthLabels.of(predictions, lab.source.test, unsolved="drop").labels,
            "assigned": assigned(tla, pixels),
        }
        options = {"n_permutations": lab.scale.permutations, "seed": run.config.seed}
        for name, given in lengths.items():
            kept = np.flatnonzero(given >= 0)
            counts = np.zeros((n_categories, len(GRIDS)))
            np.add.at(counts, (categories[kept], given[kept]), 1)
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            of = found[name]
            of["shares"].append(
                [row.tolist() if n else [None] * len(GRIDS) for row, n in zip(shares, counts.sum(axis=1), strict=True)]
            )
            of["matched"].append(association(categories[kept], given[kept], strata[kept], **options)._asdict())
            of["unmatched"].append(association(categories[kept], given[kept], **options)._asdict())

    def mean_of(values: np.ndarray) -> list[float | None]:
        return [float(values[categories == c].mean()) if (categories == c).any() else None for c in range(n_categories)]

    return {
        "grids": list(GRIDS),
        "categories": list(lab.source.test.classes),
        "images": np.bincount(categories, minlength=n_categories).tolist(),
        "entropy": mean_of(bits),
        "edges": mean_of(edges),
        "strata": len(np.unique(strata)),
        "permutations": lab.scale.permutations,
        "found": found,
    }


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
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
    """Panels of the plot."""
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

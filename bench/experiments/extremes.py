"""Experiment 5: trivially simple and maximally complex images, and where accuracy falls off."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.experiments.base import DECIDING, GRIDS, Lab, assigned, shares_of
from bench.experiments.complexity import complexity, edge_density, entropy, extreme_images, parts_of
from bench.experiments.sources import pixels_of
from bench.experiments.stats import paired
from bench.experiments.writing import (
    Panel,
    accuracies,
    effect_cell,
    finding,
    mean_spread,
    number,
    over_seeds,
    table,
)

NUMBER, TITLE = 5, "Extremes of complexity"
QUESTION = (
    "Which lengths does the assigner give to trivially simple and to maximally complex images, and at which complexity "
    "do the lengths' accuracies fall off?"
)
PAPER = "easy images need fewer tokens."
OURS = (
    "flat images, gradients, dense texture and noise, which have no class; complexity as the mean rank of the entropy "
    f"of grey values and the density of edges; deciles of it among the test images. {DECIDING}"
)

N_EXTREME = {"full": 500, "quick": 16}
DECILES = 10


def measure(lab: Lab) -> dict[str, Any]:
    """Shares of lengths for every kind of images; accuracy and shares by decile."""
    test = pixels_of(lab.source.test)
    kinds = extreme_images(N_EXTREME[lab.scale_name], test[0].shape[0])
    decile = parts_of(complexity(test), DECILES)
    shares: dict[str, list] = {kind: [] for kind in (*kinds, "test")}
    by_decile: dict[str, list] = {"accuracy": [], "shares": []}
    for run in lab.trained():
        tla, _ = lab.assigner(run, lab.source)
        for kind, images in {**kinds, "test": test}.items():
            chosen = assigned(tla, images)
            shares[kind].append(shares_of(chosen))
        correct = lab.predictions(run, lab.source, "test").correct(lab.source.test.labels)
        by_decile["accuracy"].append([_means(right, decile) for right in correct])
        by_decile["shares"].append([_means(chosen == i, decile) for i in range(len(GRIDS))])
    measures = {
        kind: {"entropy": float(entropy(v).mean()), "edges": float(edge_density(v).mean())} for kind, v in kinds.items()
    }
    measures["test"] = {"entropy": float(entropy(test).mean()), "edges": float(edge_density(test).mean())}
    counts = np.bincount(decile, minlength=DECILES).tolist()
    return {"grids": list(GRIDS), "measures": measures, "shares": shares, "deciles": {"images": counts, **by_decile}}


def _means(values: np.ndarray, part: np.ndarray) -> list[float | None]:
    """Mean of the values in every decile; None for an empty one."""
    return [float(values[part == d].mean()) if (part == d).any() else None for d in range(DECILES)]


def mean_tokens(values: dict[str, Any], kind: str) -> list[float]:
    """Mean patch tokens of a kind of images, for every seed."""
    tokens = np.array(values["grids"]) ** 2
    return [float(np.dot(row, tokens)) for row in values["shares"][kind]]


def tokens_by_decile(values: dict[str, Any]) -> list[list[float | None]]:
    """Mean patch tokens that the assigners choose, by decile and seed."""
    grids, rows = values["grids"], values["deciles"]["shares"]

    def tokens(row: list, d: int) -> float | None:
        return None if row[0][d] is None else sum(row[i][d] * g * g for i, g in enumerate(grids))

    return [[tokens(row, d) for row in rows] for d in range(DECILES)]


def loss_by_decile(values: dict[str, Any]) -> list[tuple[list, list]]:
    """Accuracies over seeds at the shortest and at the longest length, for every decile."""
    rows = values["deciles"]["accuracy"]
    return [([row[-1][d] for row in rows], [row[0][d] for row in rows]) for d in range(DECILES)]


def fall_off(values: dict[str, Any]) -> int | None:
    """The first decile from which on, in all deciles, the shortest length is shown to be worse than the longest."""
    effects = [paired(short, long) for short, long in loss_by_decile(values)]
    worse = [effect.shown and effect.mean < 0 for effect in effects]
    first = DECILES
    while first > 0 and worse[first - 1]:
        first -= 1
    return first if first < DECILES else None


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    grids, rows = values["grids"], []
    for kind, shares in values["shares"].items():
        m = values["measures"][kind]
        cells = [accuracies([row[i] for row in shares]) for i in range(len(grids))]
        rows.append([kind, number(m["entropy"]), number(m["edges"]), *cells, mean_spread(mean_tokens(values, kind))])
    findings = [
        finding(
            f"Tokens of {kind} images against test images",
            paired(mean_tokens(values, kind), mean_tokens(values, "test")),
            "tokens",
            1,
        )
        for kind in values["shares"]
        if kind != "test"
    ]
    complex_, simple = (
        np.mean([mean_tokens(values, k) for k in pair], axis=0).tolist()
        for pair in (("texture", "noise"), ("flat", "gradient"))
    )
    findings.insert(0, finding("Tokens of complex images against simple ones", paired(complex_, simple), "tokens", 1))
    by_decile = tokens_by_decile(values)
    findings.append(
        finding(
            "Tokens of the most complex tenth of the test images against the simplest",
            paired(by_decile[-1], by_decile[0]),
            "tokens",
            1,
        )
    )
    first = fall_off(values)
    findings.append(
        "- Where accuracy falls off: the most complex decile does not show the shortest length to be worse than the "
        "longest."
        if first is None
        else f"- Where accuracy falls off: from decile {first + 1} of {DECILES} on, the shortest length is worse than "
        "the longest."
    )
    deciles = []
    for d, (short, long) in enumerate(loss_by_decile(values)):
        cells = [accuracies([row[i][d] for row in values["deciles"]["accuracy"]]) for i in range(len(grids))]
        gap = effect_cell(paired(short, long), 100)
        deciles.append([d + 1, values["deciles"]["images"][d], *cells, gap, mean_spread(by_decile[d])])
    names = [f"{g}x{g}, %" for g in grids]
    return [
        "\n".join(findings),
        "Lengths that the assigner chooses, shares of images:\n\n"
        + table(["images", "entropy, bits", "edge density", *names, "mean tokens"], rows),
        "Accuracy by complexity, decile 1 the simplest:\n\n"
        + table(["decile", "images", *names, "shortest - longest, points", "tokens chosen"], deciles),
    ]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    names = [f"{g}x{g}" for g in values["grids"]]
    kinds = list(values["shares"])
    bars, lines = [], []
    for i, name in enumerate(names):
        by_seed = [[values["shares"][kind][s][i] for kind in kinds] for s in range(len(values["shares"]["test"]))]
        bars.append(over_seeds(name, kinds, by_seed, 100))
        by_decile = [row[i] for row in values["deciles"]["accuracy"]]
        lines.append(over_seeds(name, list(range(1, DECILES + 1)), by_decile, 100))
    by_seed = list(zip(*tokens_by_decile(values), strict=True))
    tokens = over_seeds("assigner", list(range(1, DECILES + 1)), by_seed)
    return [
        Panel("Lengths that are chosen", "images", "share, %", bars, "bar"),
        Panel("Accuracy by complexity", "decile, 1 the simplest", "test accuracy, %", lines),
        Panel("Tokens that are chosen", "decile, 1 the simplest", "mean patch tokens", [tokens]),
    ]

"""Experiment 7: whether labels and assigners are the same with another seed, and whether assigners collapse."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.experiments.base import DECIDING, GRIDS, Lab, assigned, shares_of
from bench.experiments.sources import pixels_of
from bench.experiments.stats import agreement, cohen_kappa, fleiss_kappa
from bench.experiments.writing import Panel, Series, mean_spread, number, percent, table

NUMBER, TITLE = 7, "Stability of labels and assigners across seeds"
QUESTION = (
    "Do models trained with other seeds give the same token-length labels, and do assigners collapse to one length?"
)
PAPER = "the label of an image is the smallest length that is right."
OURS = (
    "the measures: agreement and Cohen's kappa of every two seeds, Fleiss' kappa of all, on test images; an assigner "
    "has collapsed where argmax gives one length to all images though their labels are of several. "
    f"{DECIDING}"
)

WHAT = {"labels": "labels", "assigned": "assigned lengths"}


def measure(lab: Lab) -> dict[str, Any]:
    """Agreement of labels and of assigned lengths over seeds; the choices of every assigner."""
    pixels, found = pixels_of(lab.source.test), {"labels": [], "assigned": []}
    assigners = []
    for run in lab.trained():
        tla, history = lab.assigner(run, lab.source)
        labels = lab.labels(run, lab.source, "test")
        most_probable = tla.predict_proba(pixels).argmax(dim=1).numpy()
        lengths = {"labels": labels.labels, "assigned": assigned(tla, pixels)}
        for name, given in lengths.items():
            found[name].append(given)
        assigners.append(
            {name: shares_of(given) for name, given in lengths.items()}
            | {
                "argmax": shares_of(most_probable),
                "unsolved": labels.unsolved_share,
                "agreement": agreement(*lengths.values()),
                "kappa": cohen_kappa(*lengths.values()),
                "collapsed_in_training": history["collapsed"],
                "collapsed": collapsed(labels.labels, most_probable),
            }
        )
    between = {name: _between(np.stack(ratings)) for name, ratings in found.items()}
    return {"grids": list(GRIDS), "seeds": list(lab.seeds), "between": between, "assigners": assigners}


def collapsed(labels: np.ndarray, given: np.ndarray) -> bool:
    """Whether all images are given one length although their labels differ."""
    return len(np.unique(given)) == 1 and len(np.unique(labels)) > 1


def _between(ratings: np.ndarray) -> dict[str, Any]:
    """Agreement of raters `[n_seeds, N]`."""
    n = range(len(ratings))
    return {
        "agreement": [[agreement(ratings[i], ratings[j]) for j in n] for i in n],
        "cohen": [[cohen_kappa(ratings[i], ratings[j]) for j in n] for i in n],
        "fleiss": fleiss_kappa(ratings),
    }


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    seeds, findings, blocks = values["seeds"], [], []
    for name, what in WHAT.items():
        between = values["between"][name]
        others = [between["agreement"][i][j] for i in range(len(seeds)) for j in range(i)]
        kappa = between["fleiss"]
        if others:
            findings.append(
                f"- Two seeds' {what} agree on {percent(float(np.mean(others)))} of the images (mean over pairs; least "
                f"{percent(min(others))}); Fleiss' kappa {number(kappa)}: 0 is what shares alone would give, 1 "
                "is always."
            )
        rows = [
            [
                f"seed {a}",
                *(
                    f"{percent(between['agreement'][i][j])} ({number(between['cohen'][i][j])})"
                    for j in range(len(seeds))
                ),
            ]
            for i, a in enumerate(seeds)
        ]
        blocks.append(f"Agreement of {what} (Cohen's kappa):\n\n" + table(["", *(f"seed {s}" for s in seeds)], rows))
    assigners = values["assigners"]
    n = sum(a["collapsed"] for a in assigners)
    largest = ", ".join(percent(max(a["argmax"])) for a in assigners)
    findings.append(
        f"- {n} of {len(assigners)} assigners collapsed: by argmax, the most frequent length gets {largest} of the "
        "test images."
    )
    rows = []
    for seed, a in zip(seeds, assigners, strict=True):
        cells = [" / ".join(percent(share) for share in a[name]) for name in WHAT]
        verdict = "yes" if a["collapsed"] else "no"
        rows.append([seed, *cells, percent(a["unsolved"]), percent(a["agreement"]), number(a["kappa"]), verdict])
    grids = " / ".join(f"{g}x{g}" for g in values["grids"])
    heads = ["seed", f"labels, {grids}", f"assigned, {grids}", "unsolved", "agreement", "kappa", "collapsed"]
    mean = mean_spread([a["agreement"] for a in assigners], 100)
    return [
        "\n".join(findings),
        *blocks,
        f"Assigners against the labels of their own model (agreement {mean} %):\n\n" + table(heads, rows),
    ]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    names = [f"{g}x{g}" for g in values["grids"]]
    found = []
    for key, what in WHAT.items():
        series = [
            Series(f"seed {seed}", names, [100 * s for s in a[key]])
            for seed, a in zip(values["seeds"], values["assigners"], strict=True)
        ]
        found.append(Panel(what.capitalize(), "length", "share of test images, %", series, "bar"))
    return found

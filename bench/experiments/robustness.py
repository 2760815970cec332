"""Experiment 10: the effect of self-distillation on robustness."""

from __future__ import annotations

from typing import Any

import torch

from bench.experiments.attacks import CORRUPTIONS, SEVERITIES, accuracy_of, attacked, corrupted, pack_at
from bench.experiments.base import GRIDS, Lab
from bench.experiments.runs import Run
from bench.experiments.sources import pixels_of
from bench.experiments.stats import paired
from bench.experiments.writing import Panel, accuracies, effect_cell, finding, over_seeds, table
from revit_fast.train.config import DISTILL_WEIGHT

NUMBER, TITLE = 10, "Robustness with and without TLSD"
QUESTION = "Does self-distillation change accuracy under corruption and under attack? (The paper leaves it open.)"
PAPER = "TLSD; what it does to robustness is named as an open question."
OURS = (
    "the corruptions (of the source image, before it is resized to a length) and the attacks (white box, on the pixels "
    "that the model sees at that length: FGSM, and PGD from one random start)."
)

VARIANTS = {"TLSD": DISTILL_WEIGHT, "no TLSD": 0.0}
EPSILONS = (1, 2, 4, 8)
"""Bounds of the attacks, in grey levels of 255."""
PGD_STEPS = {"full": 10, "quick": 2}
BATCH = 250


def measure(lab: Lab) -> dict[str, Any]:
    """Accuracy `[seed][length]` of both variants on every kind of images."""
    steps = PGD_STEPS[lab.scale_name]
    images = lab.source.test.subset(range(min(lab.scale.n_attack, len(lab.source.test))))
    pixels, target = pixels_of(images), torch.from_numpy(images.labels)
    changed = {"clean": pixels}
    changed |= {f"{name} {s}": corrupted(pixels, name, s) for name in CORRUPTIONS for s in SEVERITIES}
    accuracy: dict[str, dict[str, list]] = {}
    for variant, weight in VARIANTS.items():
        found: dict[str, list] = {}
        for run in lab.trained(distill_weight=weight):
            for kind, values in _of_run(run, changed, pixels, target, steps).items():
                found.setdefault(kind, []).append(values)
        accuracy[variant] = found
    return {"grids": list(GRIDS), "n_images": len(images), "pgd_steps": steps, "accuracy": accuracy}


def _of_run(run: Run, changed: dict, pixels: list, target: torch.Tensor, steps: int) -> dict[str, list]:
    """Accuracy by length of one model on every kind of images; None for a run that diverged."""
    kinds = [*changed, *(f"{a} {e}" for a in ("FGSM", "PGD") for e in EPSILONS)]
    if run.diverged is not None:
        return {kind: [None] * len(GRIDS) for kind in kinds}
    model = run.model()
    found: dict[str, list] = {kind: [] for kind in kinds}
    for grid in GRIDS:
        for kind, images in changed.items():
            found[kind].append(accuracy_of(model, pack_at(model, images, grid), target))
        for attack, n in (("FGSM", 1), ("PGD", steps)):
            for epsilon in EPSILONS:
                right = 0.0
                for begin in range(0, len(pixels), BATCH):
                    y = target[begin : begin + BATCH]
                    batch = pack_at(model, pixels[begin : begin + BATCH], grid)
                    worse = attacked(model, batch, y, epsilon / 255, n, seed=run.config.seed)
                    right += accuracy_of(model, worse, y) * len(y)
                found[f"{attack} {epsilon}"].append(right / len(pixels))
    return found


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    accuracy, blocks, findings = values["accuracy"], [], []
    groups = {"clean": ["clean"], "corruptions, mean": [], "FGSM, mean": [], "PGD, mean": []}
    for kind in accuracy["TLSD"]:
        if kind != "clean":
            name = kind.split()[0]
            groups["corruptions, mean" if name in CORRUPTIONS else f"{name}, mean"].append(kind)
    for i, grid in enumerate(values["grids"]):
        for name, kinds in groups.items():
            on, off = (_mean_of(accuracy[variant], kinds, i) for variant in VARIANTS)
            findings.append(finding(f"{name} at {grid}x{grid}, TLSD against none", paired(on, off)))
        rows = []
        for kind in accuracy["TLSD"]:
            on, off = ([row[i] for row in accuracy[variant][kind]] for variant in VARIANTS)
            rows.append([kind, accuracies(on), accuracies(off), effect_cell(paired(on, off), 100)])
        blocks.append(f"### {grid}x{grid}\n\n" + table(["images", "TLSD, %", "no TLSD, %", "difference, points"], rows))
    return [
        "\n".join(findings),
        f"Accuracy on {values['n_images']:,} test images. Corruptions by severity; attacks by their bound ε in grey "
        f"levels of 255; PGD makes {values['pgd_steps']} steps.",
        *blocks,
    ]


def _mean_of(found: dict[str, list], kinds: list[str], length: int) -> list[float | None]:
    """Mean over kinds of images, for every seed."""
    by_seed = zip(*([row[length] for row in found[kind]] for kind in kinds), strict=True)
    return [None if None in values else sum(values) / len(values) for values in by_seed]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    found = []
    for attack in ("FGSM", "PGD"):
        series = []
        for variant in VARIANTS:
            of = values["accuracy"][variant]
            kinds = ["clean", *(f"{attack} {e}" for e in EPSILONS)]
            for i in (0, len(values["grids"]) - 1):
                by_seed = [[of[kind][s][i] for kind in kinds] for s in range(len(of["clean"]))]
                label = f"{variant}, {values['grids'][i]}x{values['grids'][i]}"
                series.append(over_seeds(label, [0, *EPSILONS], by_seed, 100))
        found.append(Panel(attack, "ε, grey levels of 255", "accuracy, %", series))
    kinds = [kind for kind in values["accuracy"]["TLSD"] if kind.split()[0] in CORRUPTIONS]
    series = []
    for variant in VARIANTS:
        of = values["accuracy"][variant]
        by_seed = [[of[kind][s][0] for kind in kinds] for s in range(len(of["clean"]))]
        series.append(over_seeds(variant, kinds, by_seed, 100))
    return [
        *found,
        Panel(f"Corruptions at {values['grids'][0]}x{values['grids'][0]}", "", "accuracy, %", series, "bar"),
    ]

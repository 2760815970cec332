"""Experiment 6: the cost of training all lengths, and when inference has saved as much."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.experiments import timing
from bench.experiments.base import BUDGET, DECIDING, GRIDS, Lab, assigned, median_seconds
from bench.experiments.runs import Run, accuracy_by_length
from bench.experiments.sources import pixels_of
from bench.experiments.stats import paired
from bench.experiments.writing import Panel, Series, accuracies, effect_cell, finding, number, percent, table
from revit_fast.streaming.pipeline import pipeline

NUMBER, TITLE = 6, "What training all lengths costs"
QUESTION = "How much time and memory does training at all lengths take, and after how many images has it paid?"
PAPER = "training at all lengths at a time; its own account of the cost was not at hand."
OURS = (
    "packed training; the comparison is with the longest length alone. The assigner's own training and the making of "
    "its labels are not counted. An image costs what the pipeline takes from decoded pixels to logits, the assigner "
    f"included. {DECIDING}"
)


def measure(lab: Lab) -> dict[str, Any]:
    """Time and memory of an update, accuracy, and time of inference."""
    variants = {"all": GRIDS, "longest": GRIDS[:1]}
    runs = {name: lab.trained(grids=grids) for name, grids in variants.items()}
    configs = {name: lab.config(lab.seeds[0], grids=grids) for name, grids in variants.items()}
    steppers = {name: timing.stepper(config, lab.source.train) for name, config in configs.items()}
    seconds = median_seconds(steppers, lab.scale.timed, time.perf_counter)
    lab.say("peak memory")
    peaks = {name: timing.in_process("memory", config, steps=3)["peak_mib"] for name, config in configs.items()}
    updates = len(lab.source.train) // configs["all"].batch_size * configs["all"].epochs
    tla, _ = lab.assigner(runs["all"][0], lab.source)
    adaptive = [_adaptive_accuracy(lab, run) for run in runs["all"]]
    pixels = pixels_of(lab.source.test.subset(range(min(lab.scale.n_attack, len(lab.source.test)))))
    pipe = pipeline(runs["all"][0].model(), tla)
    policies = {"longest": ("fixed", GRIDS[0]), "adaptive": BUDGET}
    chosen = [r.grid for r in pipe.with_policy(BUDGET).assign(pixels)]
    turns = {name: lambda spec=spec: list(pipe.with_policy(spec)(pixels)) for name, spec in policies.items()}
    inference = median_seconds(turns, lab.scale.timed, time.perf_counter)
    return {
        "grids": list(GRIDS),
        "updates": updates,
        "batch_size": configs["all"].batch_size,
        "update_seconds": seconds,
        "peak_mib": peaks,
        "accuracy": {name: accuracy_by_length(found) for name, found in runs.items()},
        "adaptive_accuracy": adaptive,
        "inference_images": len(pixels),
        "inference_seconds": inference,
        "shares": [chosen.count(g) / len(chosen) for g in GRIDS],
    }


def _adaptive_accuracy(lab: Lab, run: Run) -> float:
    """Accuracy of a model on the test images at the lengths that its assigner gives them."""
    tla, _ = lab.assigner(run, lab.source)
    right = lab.predictions(run, lab.source, "test").correct(lab.source.test.labels)
    chosen = assigned(tla, pixels_of(lab.source.test))
    return float(right[chosen, np.arange(len(chosen))].mean())


def break_even(values: dict[str, Any]) -> dict[str, float | None]:
    """The additional seconds of training, the seconds saved per image, and the number of images for break-even.

    The last is None if an image saves nothing.
    """
    update = {name: float(np.median(s)) for name, s in values["update_seconds"].items()}
    image = {name: float(np.median(s)) / values["inference_images"] for name, s in values["inference_seconds"].items()}
    more = (update["all"] - update["longest"]) * values["updates"]
    saved = image["longest"] - image["adaptive"]
    return {"more_s": more, "saved_s": saved, "images": more / saved if saved > 0 else None}


def report(values: dict[str, Any]) -> list[str]:
    """Blocks of the report in Markdown."""
    update = {name: float(np.median(s)) for name, s in values["update_seconds"].items()}
    even, peak = break_even(values), values["peak_mib"]
    ratios = np.array(values["update_seconds"]["all"]) / np.array(values["update_seconds"]["longest"])
    low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    longest = {name: [row[0] for row in found] for name, found in values["accuracy"].items()}
    effect = paired(longest["all"], longest["longest"])
    shares = ", ".join(f"{g}x{g} {percent(s)}" for g, s in zip(values["grids"], values["shares"], strict=True))
    if even["images"] is None:
        verdict = (
            f"- An image takes {-1e6 * even['saved_s']:.1f} µs more than at the longest length: it never pays here."
        )
    else:
        verdict = (
            f"- Training takes {even['more_s']:.1f} s more, an image {1e6 * even['saved_s']:.1f} µs less: break-even "
            f"after {even['images']:,.0f} images."
        )
    rows = [
        [
            name,
            number(1e3 * update[name], 1),
            number(update[name] * values["updates"] / 60),
            number(peak[name], 1),
            accuracies(longest[name]),
        ]
        for name in update
    ]
    inference = {
        n: 1e6 * float(np.median(s)) / values["inference_images"] for n, s in values["inference_seconds"].items()
    }
    return [
        "\n".join(
            [
                f"- An update at all lengths takes {ratio:.2f} times that of the longest alone (quartiles over rounds "
                f"{low:.2f} to {high:.2f}).",
                verdict,
                finding("Accuracy at the longest length, trained at all lengths against alone", effect),
                finding(
                    "Accuracy with the assigner against the longest length of the same models",
                    paired(values["adaptive_accuracy"], longest["all"]),
                ),
            ]
        ),
        table(["trained at", "ms an update", "minutes a run", "peak memory, MiB", "accuracy at the longest, %"], rows),
        f"Accuracy trained at all lengths minus alone: {effect_cell(effect, 100)} points. A run has "
        f"{values['updates']:,} updates of {values['batch_size']} images. Peak memory is what three updates take "
        'beyond the model and the libraries, in a process of their own ("-": the system does not tell).',
        f"Inference of {values['inference_images']:,} images: {inference['longest']:.1f} µs an image at the longest "
        f"length, {inference['adaptive']:.1f} µs with the assigner, which chose {shares}. Medians; "
        "candidates take turns.",
    ]


def panels(values: dict[str, Any]) -> list[Panel]:
    """Panels of the plot."""
    names = list(values["update_seconds"])
    update = [1e3 * float(np.median(values["update_seconds"][name])) for name in names]
    found = [Panel("Time of an update", "trained at", "ms", [Series("median", names, update)], "bar")]
    even = break_even(values)
    if even["images"] is not None:
        x = np.linspace(0, 2 * even["images"], 5)
        more, saved = even["more_s"], even["saved_s"]
        series = [
            Series("saved by inference", x.tolist(), (x * saved).tolist()),
            Series("more training", x.tolist(), [more] * len(x)),
        ]
        found.append(Panel("Break-even", "images classified", "seconds", series))
    return found

"""`revit-fast calibrate`: sets the threshold of a bundle by a budget or by the accuracy that may be lost."""

from __future__ import annotations

import argparse

from revit_fast.cli.arguments import UsageError, add_goal
from revit_fast.cli.labelled import (
    add_data,
    add_output,
    check_place,
    folder_to_write,
    open_both,
    say_unreadable,
    usage_errors,
)
from revit_fast.io.progress import Progress


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "calibrate",
        help="set how many tokens a bundle spends",
        description="Calibrate a bundle's assigner on held-out labelled images, find the threshold that keeps a budget "
        "or an accuracy, and store it as the bundle's policy.",
    )
    add_data(p, "val")
    add_goal(p, required=True)
    add_output(p)
    p.set_defaults(command="calibrate")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast calibrate`; returns 0, or 1 if any image could not be read."""
    import numpy as np

    from revit_fast.adaptive.policies import smallest_sufficient
    from revit_fast.cli.pipelines import optimized
    from revit_fast.streaming.bundle import save_bundle
    from revit_fast.train.assigner import calibrate_on
    from revit_fast.train.checks import check_goal
    from revit_fast.train.evaluate import threshold_for
    from revit_fast.train.labels import predict_lengths

    folder = folder_to_write(args)
    bundle, images = open_both(args)
    model, tla = bundle.model, bundle.tla
    if tla is None:
        raise UsageError(f"{args.bundle} has no assigner yet; make one with `revit-fast train-assigner`")
    check_place(images, "--output", folder)
    with usage_errors(budget="--budget"):
        check_goal(model, args.budget)
    with Progress("images predicted") as progress:
        predictions = predict_lengths(optimized(args, model, "BUNDLE"), images, progress=progress)
    with usage_errors(policy="--budget", drop="--max-drop"):
        places = calibrate_on(tla, images, model, predictions)
        correct, right = (of(images.labels)[:, places] for of in (predictions.correct, predictions.probability))
        threshold = threshold_for(model, tla.calibration, right, args.budget, args.max_drop)
        own = {"classes": bundle.classes, "settings": bundle.settings, "card": bundle.card}
        save_bundle(folder, model, tla, policy=("threshold", threshold), **own)
    chosen = smallest_sufficient(tla.calibration.suffices, threshold)
    accuracy = correct[chosen, np.arange(len(places))].mean()
    tokens = np.array(model.lengths)[chosen].mean()
    print(
        f"{folder}: threshold {threshold:.6g}: on these {len(places)} images {tokens:.1f} patch tokens, accuracy "
        f"{accuracy:.2%} (longest grid: {model.lengths[0]}, {correct[0].mean():.2%})"
    )
    return say_unreadable(images, dict(predictions.unreadable))

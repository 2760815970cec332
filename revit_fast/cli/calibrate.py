"""`revit-fast calibrate`: the threshold of a bundle, by a budget or by the accuracy that may be lost."""

from __future__ import annotations

import argparse

from revit_fast.cli import UsageError, budget, labelled


def drop(text: str) -> float:
    """Percentage points as a share."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 100.0:
        raise argparse.ArgumentTypeError(f"expected percentage points from 0 to 100, such as 0.5, got {text!r}")
    return value / 100


def add_goal(p: argparse.ArgumentParser, required: bool) -> None:
    """`--budget` or `--max-drop`: what the threshold is to keep."""
    goal = p.add_mutually_exclusive_group(required=required)
    goal.add_argument("--budget", type=budget, metavar="N", help="mean patch tokens of an image, or 2.5gmacs")
    goal.add_argument(
        "--max-drop",
        type=drop,
        metavar="POINTS",
        help="of accuracy below the longest grid (as the mean probability of the right class), in percentage points"
        + ("" if required else " (default 0.3)"),
    )


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "calibrate",
        help="set how many tokens a bundle spends",
        description="Calibrate a bundle's assigner on held-out labelled images, find the threshold that keeps a budget "
        "or an accuracy, and store it as the bundle's policy.",
    )
    labelled.add_arguments(p, "val")
    add_goal(p, required=True)
    labelled.add_output(p)
    p.set_defaults(command="calibrate")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast calibrate`; 0, or 1 if any image could not be read."""
    import numpy as np

    from revit_fast.bundle import save_bundle
    from revit_fast.policies import smallest_sufficient
    from revit_fast.train.assigner import calibrate_on
    from revit_fast.train.evaluate import threshold_for
    from revit_fast.train.labels import predict_lengths

    folder = labelled.folder_to_write(args)
    bundle, images = labelled.open_both(args)
    model, tla = bundle.model, bundle.tla
    if tla is None:
        raise UsageError(f"{args.bundle} has no assigner yet; make one with `revit-fast train-assigner`")
    predictions = predict_lengths(model, images, progress=labelled.counter("predicted"))
    with labelled.usage_errors(policy="--budget"):
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
    return labelled.say_unreadable(images, dict(predictions.unreadable))

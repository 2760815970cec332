"""`revit-fast label`: the smallest token length that suffices, for every image of a set."""

from __future__ import annotations

import argparse

from revit_fast.cli.arguments import check_file
from revit_fast.cli.labelled import add_data, add_rules, open_both, say_unreadable, usage_errors
from revit_fast.io.progress import Progress


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "label",
        help="find the smallest sufficient grid of every image",
        description="Run a model on labelled images at every grid and write the smallest that is right. Images that "
        "the model was trained on get grids that are too small.",
    )
    add_data(p, "train")
    add_rules(p)
    p.add_argument("--output", metavar="FILE", required=True, help="CSV file, written all or nothing")
    p.set_defaults(command="label")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast label`; returns 0, or 1 if any image could not be read."""
    from revit_fast.cli.pipelines import optimized
    from revit_fast.train.labels import LengthLabels, predict_lengths

    check_file("--output", args.output)
    bundle, images = open_both(args)
    with Progress("images predicted") as progress:
        predictions = predict_lengths(optimized(args, bundle.model, "BUNDLE"), images, progress=progress)
    labels = LengthLabels.of(predictions, images, args.rule, args.unsolved)
    with usage_errors():
        labels.save(args.output)
    print(labels.summary())
    return say_unreadable(images, predictions.unreadable)

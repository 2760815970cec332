"""`revit-fast train-assigner`: trains an assigner for the model of a bundle."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from revit_fast.cli.arguments import UsageError, positive
from revit_fast.cli.labelled import (
    add_data,
    add_output,
    add_rules,
    check_place,
    folder_to_write,
    open_both,
    say_unreadable,
    usage_errors,
)
from revit_fast.io.names import say
from revit_fast.io.progress import Progress


def _widths(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "train-assigner",
        help="train the assigner of a model",
        description="Train the assigner of a bundle's model on labelled images that the model was not trained on.",
    )
    add_data(p, "val")
    p.add_argument("--labels", metavar="FILE", help="labels that `revit-fast label` wrote (default: made now)")
    add_rules(p)
    p.add_argument(
        "--epochs", type=positive, default=30, metavar="N", help="passes over the images (default %(default)s)"
    )
    p.add_argument(
        "--batch-size", type=positive, default=128, metavar="N", help="images of a step (default %(default)s)"
    )
    p.add_argument("--lr", type=float, default=5e-3, metavar="X", help="learning rate (default %(default)s)")
    p.add_argument("--balanced", action="store_true", help="rare grids count as much as frequent ones")
    p.add_argument("--no-flip", action="store_true", help="do not mirror images")
    p.add_argument(
        "--objective",
        choices=("label", "suffices"),
        default="label",
        help="learn the smallest right grid, or for every grid how far the probability of the right class falls below "
        "that of the longest (default %(default)s)",
    )
    p.add_argument("--thumbnail-px", type=positive, metavar="N", help="side of the thumbnail (default: by the model)")
    p.add_argument("--widths", type=_widths, metavar="N,N", help="channels of the layers (default: by the model)")
    add_output(p)
    p.set_defaults(command="train_assigner")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast train-assigner`; returns 0, or 1 if any image could not be read."""
    import torch

    from revit_fast.adaptive.assigner import TokenLengthAssigner
    from revit_fast.cli.pipelines import optimized
    from revit_fast.streaming.bundle import save_bundle
    from revit_fast.train.assigner import check_choices, train_assigner
    from revit_fast.train.checks import check_lengths
    from revit_fast.train.labels import LengthLabels, predict_lengths
    from revit_fast.train.pace import Pace

    folder = folder_to_write(args)
    bundle, images = open_both(args)
    check_place(images, "--output", folder)
    choices = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    kept = None
    with usage_errors(**{name: f"--{name.replace('_', '-')}" for name in (*choices, "thumbnail_px", "widths")}):
        check_lengths(bundle.model, images)
        check_choices(**choices)
        torch.manual_seed(args.seed)
        tla = TokenLengthAssigner.for_model(bundle.model)
        if args.thumbnail_px or args.widths:
            sizes = {"thumbnail_px": args.thumbnail_px or tla.thumbnail_px, "widths": args.widths or tla.widths}
            tla = TokenLengthAssigner(bundle.model.grids, **sizes)
        if args.labels is not None:
            kept = LengthLabels.load(args.labels)
            if kept.grids != bundle.model.grids:
                raise UsageError(
                    f"--labels: {args.labels} is of grids {kept.grids}, the model has {bundle.model.grids}"
                )
            kept.of_images(images)  # raises an error for images without a label
    code, sufficiency = 0, None
    if kept is None or args.objective == "suffices":
        fast = optimized(args, bundle.model, "BUNDLE")
        with Progress("images predicted") as progress:
            predictions = predict_lengths(fast, images, progress=progress)
        code = say_unreadable(images, predictions.unreadable)
        sufficiency = predictions.sufficiency(images.labels) if args.objective == "suffices" else None
        kept = kept or LengthLabels.of(predictions, images, args.rule, args.unsolved)
    print(kept.summary())

    def show(epoch) -> None:
        print(
            f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, held out {epoch.held_out_loss:.4f}, right labels "
            f"{epoch.held_out_accuracy:.2%}",
            file=sys.stderr,
            flush=True,
        )

    with usage_errors():
        history = train_assigner(
            tla,
            images,
            kept.of_images(images),
            model=bundle.model,
            sufficiency=sufficiency,
            objective=args.objective,
            **choices,
            balanced=args.balanced,
            flip=not args.no_flip,
            seed=args.seed,
            progress=show,
            stage=partial(Pace, partial(say, sys.stderr)),
        )
        own = {"classes": bundle.classes, "settings": bundle.settings, "card": bundle.card}
        save_bundle(folder, bundle.model, tla, policy="argmax", **own)
    best = history.epochs[history.best - 1]
    most = max(history.label_shares)
    print(f"{folder}: epoch {history.best}, {best.held_out_accuracy:.2%} of the held-out labels, {most:.2%} by chance")
    if history.collapsed:
        print("warning: the assigner gives every image the same grid; try --balanced or more images", file=sys.stderr)
    return code

"""`revit-fast worth-it`: says before any training what adaptive lengths could gain."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from revit_fast.cli.arguments import UsageError, add_device, add_threads, positive
from revit_fast.cli.labelled import check_place, check_report_files, sample, say_unreadable, usage_errors
from revit_fast.cli.runs import KeyValues
from revit_fast.io.progress import Progress

if TYPE_CHECKING:
    from revit_fast.models.vit import ReViT
    from revit_fast.train.data import ImageSet

OPTIONS = {"name": "--model", "bundle": "--model", "vit": "--model", "weights": "--weights", "grids": "--grids"}
"""The option that each argument in an error comes from."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "worth-it",
        help="say before a training what adaptive lengths could gain",
        description="Run a trained ViT at every length on a sample of labelled images, and say what the lengths cost, "
        "what a confidence cascade gains without training, and what a perfect choice would gain.",
    )
    p.add_argument("data", metavar="DATA", help="labelled images: folders of classes, idx files, shards, ...")
    p.add_argument("--model", required=True, metavar="DIR|NAME", help="a bundle, or a timm name (then give --weights)")
    p.add_argument("--weights", metavar="FILE", help="weights of that model for the classes of DATA")
    p.add_argument("--model-kwargs", action=KeyValues, nargs="+", metavar="NAME=VALUE", help="as for train")
    p.add_argument(
        "--grids", type=positive, nargs="+", metavar="N", help="patches per side (default: the bundle's, or 14 10 7)"
    )
    p.add_argument("--split", default="val", help="split of DATA that the model has not seen (default %(default)s)")
    p.add_argument(
        "--images", type=positive, default=1000, metavar="N", help="images, drawn at random (default %(default)s)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw (default %(default)s)")
    p.add_argument("--json", metavar="FILE", help="write the report there, all or nothing")
    p.add_argument("--plot", metavar="FILE", help="draw accuracy over cost: .png, .svg or .pdf (needs matplotlib)")
    add_device(p)
    add_threads(p)
    p.set_defaults(command="worth_it")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast worth-it`; returns 0, or 1 if any image could not be read."""
    check_report_files(args)
    from revit_fast.cli.pipelines import compute_device, optimized
    from revit_fast.train.checks import check_lengths
    from revit_fast.train.worth import worth_it

    compute_device(args)
    with usage_errors(**OPTIONS):
        model, images, trained = _open(args)
        check_lengths(model)
    images = sample(images, args.images, args.seed)
    for option in ("json", "plot"):
        if getattr(args, option):
            check_place(images, f"--{option}", getattr(args, option))
    fast = optimized(args, model)
    unreadable: dict[int, str] = {}
    with usage_errors(**OPTIONS):
        with Progress("images predicted") as progress:
            report = worth_it(fast, images, trained=trained, unreadable=unreadable, progress=progress)
        if args.json:
            report.save(args.json)
        if args.plot:
            report.plot(args.plot)
    print(report.table(), end="")
    return say_unreadable(images, unreadable)


def _open(args: argparse.Namespace) -> tuple[ReViT, ImageSet, bool]:
    """The model, the images with its classes, and whether it was trained at all its lengths."""
    from revit_fast.grids import DEFAULT_GRIDS
    from revit_fast.models.folder import read_model
    from revit_fast.models.hub import find_bundle, is_bundle
    from revit_fast.models.vit import ReViT
    from revit_fast.train.config import TrainConfig
    from revit_fast.train.datasets import open_images
    from revit_fast.train.run import NEW_HEAD, build_model

    if is_bundle(args.model):
        folder = find_bundle(args.model)
        model = read_model(folder, ReViT)
        own, classes = model.grids, model.pretrained_cfg["label_names"]
        if args.grids:
            model = read_model(folder, ReViT, {"grids": tuple(args.grids)})
        if args.weights:
            model.load_checkpoint(args.weights)
        return model, open_images(args.data, args.split, classes), set(model.grids) <= set(own)
    if args.weights is None:
        raise UsageError(f"--weights: give those of {args.model}; random weights say nothing")
    images = open_images(args.data, args.split)
    config = TrainConfig(
        data=args.data,
        model=args.model,
        weights=args.weights,
        grids=tuple(args.grids or DEFAULT_GRIDS),
        model_kwargs=args.model_kwargs or {},
    )
    model, head = build_model(config, len(images.classes), images.classes)
    if head.startswith((NEW_HEAD, ", with the head's rows")):
        raise UsageError(
            f"--weights: {args.weights} has no head for the {len(images.classes)} classes of {args.data}; fine-tune "
            "the ViT for them first, or give a model that knows them"
        )
    print(f"{args.model}{head}", file=sys.stderr)
    return model.eval(), images, False

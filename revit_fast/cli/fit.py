"""`revit-fast fit`: makes an adaptive model from labelled images, in one run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from revit_fast.cli.arguments import add_goal
from revit_fast.cli.runs import KeyValues, add_run, configuration, exit_code
from revit_fast.io.atomic import read_json


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast fit`; returns the exit codes of `revit-fast train`."""
    from revit_fast.train.fit import TRAIN, fit
    from revit_fast.train.run import BUNDLE

    folder = Path(args.output)

    def work() -> None:
        config = configuration(args, folder / TRAIN)
        report = fit(config, folder, device=args.device, terminal=sys.stderr, **goal(args, folder))
        print(report.table() if report is not None else f"model: {folder / BUNDLE}", end="")

    return exit_code(args, work)


def goal(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The arguments of `train.fit.fit`: the given ones, else those of the resumed run, which `fit` has saved."""
    from revit_fast.train.fit import GOAL

    given = {n: getattr(args, n) for n in ("assigner", "budget", "max_drop") if getattr(args, n) is not None}
    path, kept = folder / GOAL, {}
    if args.resume and path.is_file():
        try:
            kept = dict(read_json(path))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it, and give the goal again") from error
        if {"budget", "max_drop"} & given.keys():  # a given one replaces the kept one
            kept = {name: value for name, value in kept.items() if name == "assigner"}
    return kept | given


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "fit",
        help="train a model and its assigner in one go",
        description="Train a ReViT and its assigner, find how many tokens its images need, evaluate it, and write a "
        "bundle that predict, serve and revit_fast.load take.",
    )
    add_run(p, "folder for the bundle, the run and the report")
    p.add_argument(
        "--assigner",
        action=KeyValues,
        nargs="+",
        metavar="NAME=VALUE",
        help="arguments of the assigner, such as thumbnail_px=28 'widths=(32, 64, 96)' (default: by the model)",
    )
    add_goal(p, required=False)
    p.set_defaults(command="fit")

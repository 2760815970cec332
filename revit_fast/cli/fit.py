"""`revit-fast fit`: from labelled images to an adaptive model, in one go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from revit_fast.cli import budget
from revit_fast.cli.calibrate import drop
from revit_fast.cli.train import KeyValues, add_run, configuration, exit_code


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast fit`; exit codes as of `revit-fast train`."""
    from revit_fast.train.fit import BUNDLE, TRAIN, fit

    folder = Path(args.output)

    def work() -> None:
        config = configuration(args, folder / TRAIN)
        goal = {"assigner": args.assigner, "budget": args.budget, "max_drop": args.max_drop}
        report = fit(config, folder, device=args.device, terminal=sys.stderr, **goal)
        print(report.table() if report is not None else f"model: {folder / BUNDLE}", end="")

    return exit_code(args, work)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "fit",
        help="train a model and its assigner in one go",
        description="Train a ReViT and its assigner, find how many tokens its images need, evaluate it, and write a "
        "bundle that predict, serve and revit_fast.load take.",
    )
    add_run(p, "for the bundle, the run and the report")
    p.add_argument(
        "--assigner",
        action=KeyValues,
        nargs="+",
        metavar="NAME=VALUE",
        help="arguments of the assigner, such as thumbnail_px=28 'widths=(32, 64, 96)' (default: by the model)",
    )
    goal = p.add_mutually_exclusive_group()
    goal.add_argument("--budget", type=budget, metavar="N", help="mean patch tokens of an image, or 2.5gmacs")
    goal.add_argument(
        "--max-drop",
        type=drop,
        default=0.003,
        metavar="POINTS",
        help="of accuracy below the longest grid, in percentage points (default 0.3)",
    )
    p.set_defaults(command="fit")

"""`revit-fast train`: trains a multi-length ReViT on images."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from revit_fast.cli.runs import add_run, configuration, exit_code


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast train`; returns 0, 1 if training failed, 130 if it was stopped and can be resumed."""
    from revit_fast.train.run import BUNDLE, train

    folder = Path(args.output)

    def work() -> None:
        config = configuration(args, folder)
        accuracy = train(config, folder, device=args.device, resume=args.resume, terminal=sys.stderr)
        shares = dict(zip(map(str, config.grids), accuracy.accuracy, strict=True))
        print(json.dumps({"accuracy": shares, "n_images": accuracy.n_images, "bundle": str(folder / BUNDLE)}))

    return exit_code(args, work)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "train",
        help="train a model at all its token lengths",
        description="Train a ReViT at all its token lengths; under torchrun with several processes.",
    )
    add_run(p, "folder for checkpoints, logs and weights")
    p.set_defaults(command="train")

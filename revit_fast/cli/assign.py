"""`revit-fast assign`: the token grid that each image would get."""

from __future__ import annotations

import argparse

from revit_fast.cli.predict import build_pipeline, report
from revit_fast.cli.report import open_output


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast assign`; 0, or 1 if any image failed."""
    with open_output(args.output) as stream:
        pipe = build_pipeline(args)
        return report(args, stream, pipe, pipe.assign, 0)

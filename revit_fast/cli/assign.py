"""`revit-fast assign`: the token grid that each image would get."""

from __future__ import annotations

import argparse

from revit_fast.cli import UsageError
from revit_fast.cli.predict import build_pipeline, choice_options, open_results, report


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast assign`; 0, or 1 if any image failed."""
    with open_results(args) as stream:
        pipe = build_pipeline(args)
        try:
            pipe.prep.policy.decides_before("assign")
        except ValueError as error:
            raise UsageError.of(error, **choice_options(args)) from error
        return report(args, stream, pipe, pipe.assign, 0)

"""`revit-fast assign`: the token grid that each image would get."""

from __future__ import annotations

import argparse

from revit_fast.cli.arguments import UsageError
from revit_fast.cli.pipelines import build_pipeline, choice_options
from revit_fast.cli.report import open_results, write_results


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast assign`; returns 0, or 1 if any image failed."""
    with open_results(args) as stream:
        pipe = build_pipeline(args)
        try:
            pipe.prep.policy.decides_before("assign runs no model")
        except ValueError as error:
            raise UsageError.of(error, **choice_options(args)) from error
        return write_results(args, stream, pipe, pipe.assign, 0)

"""`revit-fast predict`: classifies image files in packed batches."""

from __future__ import annotations

import argparse
from importlib import import_module

from revit_fast.cli.arguments import UsageError, refuse_cluster_options
from revit_fast.cli.pipelines import build_pipeline, refuse_files_of, warn_of_random_weights
from revit_fast.cli.report import open_results, write_results
from revit_fast.video.checkpoints import is_checkpoint
from revit_fast.video.reader import CLIPS


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast predict`; returns 0, or 1 if any image failed."""
    if is_checkpoint(args.model):
        return import_module("revit_fast.cli.predict_clips").run(args)
    refuse_files_of(CLIPS, args, "a folder of a TimeSformer")
    if args.frames:
        raise UsageError(
            f"--frames: --model {args.model} takes images; leave it out, or give a folder of a TimeSformer"
        )
    if args.engine == "ray":
        return import_module("revit_fast.cli.predict_ray").run_on_cluster(args)
    refuse_cluster_options(args)
    with open_results(args) as stream:
        pipe = build_pipeline(args)
        warn_of_random_weights(args)
        return write_results(args, stream, pipe, pipe.__call__, min(args.top_k, pipe.model.num_classes))

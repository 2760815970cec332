"""`revit-fast predict --engine ray`: classifies image files on a Ray cluster and writes a folder of parts."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from revit_fast.cli.arguments import UsageError
from revit_fast.cli.pipelines import build_pipeline, warn_of_random_weights
from revit_fast.cli.report import say_passed
from revit_fast.deploy.ray_dataset import EngineError, Summary, predict_dataset
from revit_fast.deploy.results_folder import check_directory
from revit_fast.io.finding import PassedOver, find_images
from revit_fast.io.progress import Progress


def run_on_cluster(args: argparse.Namespace) -> int:
    """Runs `revit-fast predict --engine ray`; returns 0, or 1 if any image failed."""
    if args.output is None:
        raise UsageError("--engine ray: give --output DIR, a folder that all workers see")
    if args.format != "table":
        raise UsageError(f"--format {args.format}: --engine ray writes parts, see --part-format parquet or jsonl")
    if args.device != "cpu":
        raise UsageError(f"--device {args.device}: --engine ray computes on the workers' CPUs; leave it out")
    if args.trace:
        raise UsageError("--trace: --engine ray runs in other processes, which keep no trace")
    try:
        check_directory(args.output)
    except ValueError as error:
        raise UsageError.of(error, output="--output") from error
    import_module("ray.data")  # before the model is loaded; if it is missing, main says what to install
    pipe, passed = build_pipeline(args), PassedOver()
    sources = list(find_images(args.paths, passed=passed))
    warn_of_random_weights(args)
    try:
        with Progress("images", len(sources)) as progress:
            summary = predict_dataset(
                pipe,
                sources,
                args.output,
                workers=args.workers,
                threads=args.threads,
                address=args.address,
                part_images=args.part_images,
                part_format=args.part_format,
                top_k=args.top_k,
                on_part=lambda summary: progress(summary.images),
                on_damage=lambda text: progress.say(f"warning: {text}"),
            )
    except (EngineError, FileExistsError, ValueError) as error:
        raise UsageError.of(error, output="--output", workers="--workers", address="--address") from error
    say_passed(passed)
    print(_line(summary), file=sys.stderr)
    return 1 if summary.errors else 0


def _line(summary: Summary) -> str:
    s = summary
    return (
        f"{s.images} images ({s.errors} failed), {s.tokens} tokens; {s.n_computed} of {s.n_parts} parts computed in "
        f"{s.seconds:.1f} s by {s.workers} workers of {s.threads} threads ({s.busy_s:.1f} s of work)"
    )

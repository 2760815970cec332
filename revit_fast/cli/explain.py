"""`revit-fast explain`: a sheet that shows why each image got its tokens."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from revit_fast.cli.arguments import UsageError, check_file
from revit_fast.cli.pipelines import build_pipeline, has_weights, ignore_pillow_warnings, warn_of_random_weights
from revit_fast.cli.report import say_passed
from revit_fast.explain import WRITERS, write
from revit_fast.explain.facts import explain
from revit_fast.explain.png import MAX_IMAGES
from revit_fast.io.finding import PassedOver, Source, find_images


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast explain`; returns 0, or 1 if any image failed."""
    passed = PassedOver()
    sources = list(find_images(args.paths, passed=passed))
    check_output(args.output, sources)
    if Path(args.output).suffix.lower() == ".png":
        import_module("matplotlib")  # if it is missing, main says what to install
    pipe = build_pipeline(args)
    warn_of_random_weights(args, "the sheet shows no classes")
    ignore_pillow_warnings()
    explanations = explain(pipe, sources, top_k=args.top_k if has_weights(args) else 0, attention=args.attention)
    try:
        write(args.output, explanations)
    except ValueError as error:
        raise UsageError(f"--output: {error}") from error
    except OSError as error:
        raise UsageError(f"--output: cannot write {args.output}: {error.strerror}") from error
    failed = [e for e in explanations if e.error is not None]
    for e in failed:
        print(f"error: {e.name}: {e.error}", file=sys.stderr)
    say_passed(passed)
    print(f"{args.output}: {len(explanations)} images ({len(failed)} failed)", file=sys.stderr)
    return 1 if failed else 0


def check_output(path: str, sources: Sequence[Source]) -> None:
    """Raises a usage error, before anything is computed, for a sheet that cannot be written or replaces an image."""
    if Path(path).suffix.lower() not in WRITERS:
        raise UsageError(f"--output: expected a name that ends in {' or '.join(WRITERS)}, got {path!r}")
    check_file("--output", path)
    if Path(path).suffix.lower() == ".png" and len(sources) > MAX_IMAGES:
        raise UsageError(
            f"--output: a PNG holds at most {MAX_IMAGES} images, got {len(sources)}; write .html, or parts"
        )
    if os.path.exists(path) and any(os.path.realpath(path) == os.path.realpath(source.path) for source in sources):
        raise UsageError(f"--output: {path} is one of the images; give another name or folder")

"""`revit-fast predict` with a TimeSformer's folder as --model: classifies clips."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from revit_fast.adaptive.budgets import check_budget
from revit_fast.cli.arguments import BATCH_TOKENS, UsageError, refuse_cluster_options
from revit_fast.cli.pipelines import (
    batch_tokens,
    check_fixed,
    choice_options,
    compute_device,
    policy_of,
    read_labels,
    refuse_files_of,
    say_dtype,
)
from revit_fast.cli.report import open_results, write_results
from revit_fast.io.finding import IMAGES
from revit_fast.models.weights import read_checkpoint
from revit_fast.video.checkpoints import read_folder
from revit_fast.video.pipeline import ClipPipeline, pipeline
from revit_fast.video.reader import CLIPS


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast predict` on clips; returns 0, or 1 if any clip failed."""
    if args.engine != "local":
        raise UsageError(f"--engine {args.engine}: clips are classified in one process; leave it out")
    if args.dtype not in (None, "auto", "float32"):
        raise UsageError(f"--dtype: clips are classified in float32, got {args.dtype}; give float32 or auto")
    refuse_files_of(IMAGES, args, "a ViT's name or a bundle")
    import_module("av")  # if it is missing, main says what to install
    refuse_cluster_options(args)
    with open_results(args) as stream:
        pipe = build_pipeline(args)
        return write_results(args, stream, pipe, pipe.__call__, min(args.top_k, pipe.model.num_classes), CLIPS)


def build_pipeline(args: argparse.Namespace) -> ClipPipeline:
    """The pipeline that the arguments describe; wrong arguments raise a usage error."""
    device = compute_device(args)
    try:
        model, classes = read_folder(args.model)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {error}") from error
    try:
        if args.weights:
            model.load_weights(read_checkpoint(Path(args.weights), model.state_dict()), args.weights)
    except (OSError, ValueError) as error:
        raise UsageError.of(error, "--weights", weights="--weights") from error
    if model.num_classes < 1:
        raise UsageError(f"--model: {args.model} has no classifier to predict with")
    model = model.to(device)
    policy = policy_of(args, longest=model.grids[0])
    check_fixed(args, policy, model.grids)
    labels = read_labels(args.labels, model.num_classes) if args.labels else classes
    options = {"policy": policy, "draft": args.draft, "formats": args.formats}
    options["n_frames"] = args.frames or model.num_frames
    try:
        pipe = pipeline(model, args.assigner, labels=labels, token_budget=args.batch_tokens or BATCH_TOKENS, **options)
        if args.budget is not None:
            check_budget(args.budget, pipe.prep.grids, pipe.prep.macs)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError.of(error, **choice_options(args)) from error
    batch_tokens(args, pipe.prep, pipe.model)
    say_dtype(args, pipe.model)
    return pipe

"""`revit-fast predict`: image files to classes, in packed batches."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TextIO

import torch

import revit_fast
from revit_fast.bundle import Bundle, read_bundle
from revit_fast.cli import UsageError, check_file
from revit_fast.cli.report import (
    FORMATS,
    BarProgress,
    Progress,
    open_output,
    prediction_of,
    write,
)
from revit_fast.hub import is_bundle
from revit_fast.images import IMAGES, Kind, find_images, on_one_line
from revit_fast.packing import DEFAULT_GRIDS
from revit_fast.pipeline import AdaptivePipeline
from revit_fast.policies import PolicySpec
from revit_fast.preprocess import AdaptivePreprocessor
from revit_fast.results import Result
from revit_fast.tla import TokenLengthAssigner
from revit_fast.trace import StageTimes, Trace
from revit_fast.video.checkpoints import is_checkpoint
from revit_fast.video.reader import CLIPS

MAX_WAIT_S = 1.0
"""Files are not waited for: whoever reads results as they come sees them within about this time."""


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast predict`; 0, or 1 if any image failed."""
    if is_checkpoint(args.model):
        return import_module("revit_fast.cli.predict_clips").run(args)
    refuse_files_of(CLIPS, args, "a folder of a TimeSformer")
    if args.frames:
        raise UsageError(
            f"--frames: --model {args.model} takes images; leave it out, or give a folder of a TimeSformer"
        )
    warn_of_random_weights(args)
    if args.engine == "ray":
        return import_module("revit_fast.cli.predict_ray").run_on_cluster(args)
    refuse_cluster_options(args)
    with open_results(args) as stream:
        pipe = build_pipeline(args)
        return report(args, stream, pipe, pipe.__call__, min(args.top_k, pipe.model.num_classes))


def refuse_cluster_options(args: argparse.Namespace) -> None:
    """Raises a usage error for options that mean nothing where everything runs in this process."""
    for name in ("workers", "address"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: everything runs in this process; give --engine ray for a cluster")


def open_results(args: argparse.Namespace) -> AbstractContextManager[TextIO]:
    """Where results go; what could be written neither there nor to --trace is a usage error."""
    if args.trace:
        check_file("--trace", args.trace)
    return open_output(args.output)


def refuse_files_of(kind: Kind, args: argparse.Namespace, wanted_model: str) -> None:
    """Raises a usage error for a path that is called like a file of a kind that the model does not take."""
    taken = CLIPS if kind is IMAGES else IMAGES
    for path in args.paths:
        if kind.has_name(path):
            raise UsageError(
                f"PATH: {path} is {kind.one}, and --model {args.model} takes {taken.many}; a run takes one kind, for "
                f"{kind.many} give --model {wanted_model}"
            )


def has_weights(args: argparse.Namespace) -> bool:
    """Whether the arguments name weights, by themselves or as part of a bundle."""
    return args.weights is not None or is_bundle(args.model)


def warn_of_random_weights(args: argparse.Namespace) -> None:
    """Says that the arguments name no weights."""
    if not has_weights(args):
        print("warning: random weights: predictions are meaningless; give --weights FILE", file=sys.stderr)


def report(
    args: argparse.Namespace,
    stream: TextIO,
    pipe: AdaptivePipeline,
    stage: Callable[..., Iterator[Result]],
    top_k: int,
    kind: Kind = IMAGES,
) -> int:
    """Writes the results of a pipeline's method over the files of the arguments; 0, or 1 if any of them failed."""
    # Pillow warns of large images and odd metadata; what it cannot read becomes an error of that image.
    warnings.filterwarnings("ignore", module="PIL")
    asks_assigner = pipe.prep.policy.needs == "probabilities"
    text = FORMATS[args.format](top_k, pipe.prep.grids if asks_assigner else ())
    times = Trace() if args.trace else StageTimes()
    is_shown = stream.isatty()
    n_files = sum(1 for _ in find_images(args.paths, kind)) if sys.stderr.isatty() else 0
    progress = BarProgress(n_files, kind.many) if sys.stderr.isatty() else Progress(kind.many)
    results = stage(find_images(args.paths, kind), times=times)
    try:
        write(stream, text.header())
        for result in results:
            p = prediction_of(result, top_k)
            with progress.aside() if is_shown else nullcontext():
                write(stream, text.row(p))
            progress.update(p)
            if p.error is not None and not (is_shown and args.format == "table"):
                progress.say(f"error: {on_one_line(p.path)}: {on_one_line(p.error)}")
    finally:
        results.close()
        progress.close()
        write(stream, text.footer())
        progress.say(progress.summary())
        if args.trace:
            times.save(args.trace)
    return 1 if progress.n_errors else 0


def build_pipeline(args: argparse.Namespace, max_wait_s: float = MAX_WAIT_S) -> AdaptivePipeline:
    """The pipeline that the arguments describe; what is wrong with them is a usage error."""
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = load_bundle(args) if is_bundle(args.model) else None
    model = bundle.model if bundle else load_model(args)
    if model.num_classes < 1:
        raise UsageError(f"--model: {args.model} has no classifier to predict with")
    labels = read_labels(args.labels, model.num_classes) if args.labels else bundle and bundle.classes
    prep = build_preprocessor(args, model, bundle)
    try:
        fast = revit_fast.optimize(model)
        return AdaptivePipeline(fast, prep, token_budget=args.batch_tokens, labels=labels, max_wait_s=max_wait_s)
    except ValueError as error:
        raise UsageError.of(error, model="--model") from error


def build_preprocessor(
    args: argparse.Namespace, model: revit_fast.ReViT, bundle: Bundle | None = None
) -> AdaptivePreprocessor:
    """The preprocessor for `model` with the assigner and policy of the arguments, or else those of the bundle."""
    policy = policy_of(args, bundle)
    check_fixed(args, policy, model.grids)
    try:
        assigner = TokenLengthAssigner.load(args.assigner) if args.assigner else bundle and bundle.tla
        options = {"policy": policy, "draft": args.draft}
        return AdaptivePreprocessor.for_model(model, assigner, **options)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError.of(error, **choice_options(args)) from error


def choice_options(args: argparse.Namespace) -> dict[str, str]:
    """The options that the arguments of a preprocessor come from."""
    return {
        "assigner": "--assigner",
        "tla": "--assigner",
        "policy": "--policy" if args.budget is None else "--budget",
    }


def check_fixed(args: argparse.Namespace, policy: PolicySpec, grids: Sequence[int]) -> None:
    """Raises a usage error for one grid of all images that the model does not have."""
    if isinstance(policy, tuple) and policy[0] == "fixed" and policy[1] not in grids:
        option, other = ("--grid", "mixed or ") if args.policy is None else ("--policy: fixed", "")
        raise UsageError(f"{option}: expected {other}one of the model's {list(grids)}, got {policy[1]}")


def policy_of(args: argparse.Namespace, bundle: Bundle | None = None, longest: int = DEFAULT_GRIDS[0]) -> PolicySpec:
    """The policy that --policy, --budget or --grid stand for; by default the assigner's or the bundle's.

    Without an assigner it is the longest grid. A bundle's policy goes with its own assigner.
    """
    given = [name for name in ("policy", "budget", "grid") if getattr(args, name) is not None]
    if len(given) > 1:
        raise UsageError(f"--{given[0]}, --{given[1]}: give one of them")
    if args.budget is not None:
        return "budget", args.budget
    if args.grid is not None:
        return "cycle" if args.grid == "mixed" else ("fixed", args.grid)
    if args.policy is not None:
        return args.policy
    if args.assigner:
        return "argmax"
    return bundle.policy if bundle else ("fixed", longest)


def load_bundle(args: argparse.Namespace) -> Bundle:
    """The bundle that --model names, with the weights of --weights where there are some."""
    try:
        bundle = read_bundle(args.model)
        if args.weights:
            bundle.model.load_checkpoint(args.weights)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError.of(error, "--model", bundle="--model", weights="--weights") from error
    return bundle


def load_model(args: argparse.Namespace) -> revit_fast.ReViT:
    """The model in evaluation mode; what is wrong with its name or weights is a usage error."""
    _, timm = (import_module(package) for package in ("PIL", "timm"))  # where one is missing, main says what to install
    if not timm.is_model(args.model) and os.path.isdir(args.model):
        raise UsageError(f"--model: timm knows no model {args.model!r}; for the folder here, give ./{args.model}")
    try:
        return revit_fast.create_model(args.model, weights=args.weights).eval()
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UsageError.of(error, "--model", name="--model", vit="--model", weights="--weights") from error


def read_labels(path: str, n_classes: int) -> list[str]:
    """One class name per line, in the order of the model's classes."""
    try:
        with open(path, encoding="utf-8") as file:
            labels = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels: cannot read {path}: {error}") from error
    if len(labels) != n_classes:
        raise UsageError(f"--labels: the model has {n_classes} classes, but {path} has {len(labels)} lines")
    return labels

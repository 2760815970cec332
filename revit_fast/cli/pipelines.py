"""Builds the pipeline that the arguments of a command describe."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import torch

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import PolicySpec
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.cli.arguments import UsageError
from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.inference.inference_copy import InferenceCopy, dtype_name
from revit_fast.inference.optimize import OptimizedReViT, optimize
from revit_fast.io.images import IMAGES, Kind
from revit_fast.io.names import read_names
from revit_fast.models.create import create_model
from revit_fast.models.hub import is_bundle
from revit_fast.models.vit import ReViT
from revit_fast.streaming.bundle import Bundle, read_bundle
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.video.reader import CLIPS

MAX_WAIT_S = 1.0
"""Seconds after which a batch runs even if it is not full, so that results appear while files are still read."""


def build_pipeline(args: argparse.Namespace, max_wait_s: float = MAX_WAIT_S) -> AdaptivePipeline:
    """The pipeline that the arguments describe; wrong arguments raise a usage error."""
    import_module("PIL")  # if it is missing, main says what to install
    if args.threads:
        torch.set_num_threads(args.threads)
    bundle = load_bundle(args) if is_bundle(args.model) else None
    model = bundle.model if bundle else load_model(args)
    if model.num_classes < 1:
        raise UsageError(f"--model: {args.model} has no classifier to predict with")
    labels = read_labels(args.labels, model.num_classes) if args.labels else bundle and bundle.classes
    prep = build_preprocessor(args, model, bundle)
    fast = optimized(args, model)
    try:
        return AdaptivePipeline(fast, prep, token_budget=args.batch_tokens, labels=labels, max_wait_s=max_wait_s)
    except ValueError as error:
        raise UsageError.of(error, model="--model") from error


def optimized(args: argparse.Namespace, model: ReViT, option: str = "--model") -> OptimizedReViT:
    """An optimised copy of `model` in the dtype of --dtype.

    Args:
        args: the arguments.
        model: the model.
        option: name of the argument that the model comes from.

    Raises:
        UsageError: if the dtype cannot be served, or the model cannot be optimised.
    """
    dtype = args.dtype if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    try:
        copy = optimize(model, dtype)
    except ValueError as error:
        raise UsageError.of(error, model=option, dtype="--dtype") from error
    say_dtype(args, copy)
    return copy


def say_dtype(args: argparse.Namespace, copy: InferenceCopy) -> None:
    """Says on stderr which weights a copy runs with, if --dtype asks for some."""
    if args.dtype is not None:
        print(f"--dtype {args.dtype}: weights in {dtype_name(copy)}", file=sys.stderr, flush=True)


def build_preprocessor(args: argparse.Namespace, model: ReViT, bundle: Bundle | None = None) -> AdaptivePreprocessor:
    """The preprocessor for `model` with the assigner and policy of the arguments, or else those of the bundle."""
    policy = policy_of(args, bundle)
    check_fixed(args, policy, model.grids)
    try:
        assigner = TokenLengthAssigner.load(args.assigner) if args.assigner else bundle and bundle.tla
        options = {"policy": policy, "draft": args.draft, "formats": args.formats}
        return AdaptivePreprocessor.for_model(model, assigner, **options)
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError.of(error, **choice_options(args)) from error


def choice_options(args: argparse.Namespace) -> dict[str, str]:
    """The options that the arguments of a preprocessor come from."""
    return {
        "assigner": "--assigner",
        "formats": "--formats",
        "tla": "--assigner",
        "policy": "--policy" if args.budget is None else "--budget",
    }


def check_fixed(args: argparse.Namespace, policy: PolicySpec, grids: Sequence[int]) -> None:
    """Raises a usage error for a policy of one fixed grid that the model does not have."""
    if isinstance(policy, tuple) and policy[0] == "fixed" and policy[1] not in grids:
        option, other = ("--grid", "mixed or ") if args.policy is None else ("--policy: fixed", "")
        raise UsageError(f"{option}: expected {other}one of the model's {list(grids)}, got {policy[1]}")


def policy_of(args: argparse.Namespace, bundle: Bundle | None = None, longest: int = DEFAULT_GRIDS[0]) -> PolicySpec:
    """The policy that --policy, --budget or --grid give.

    By default it is argmax with --assigner, else the bundle's policy, else the longest grid.
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
    """The bundle that --model names, with the weights of --weights if given."""
    try:
        bundle = read_bundle(args.model)
        if args.weights:
            bundle.model.load_checkpoint(args.weights)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError.of(error, "--model", bundle="--model", weights="--weights") from error
    return bundle


def load_model(args: argparse.Namespace) -> ReViT:
    """The model in evaluation mode; a wrong name or wrong weights raise a usage error."""
    timm = import_module("timm")  # if it is missing, main says what to install
    if not timm.is_model(args.model) and os.path.isdir(args.model):
        raise UsageError(f"--model: timm knows no model {args.model!r}; for the folder here, give ./{args.model}")
    try:
        return create_model(args.model, weights=args.weights).eval()
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UsageError.of(error, "--model", name="--model", vit="--model", weights="--weights") from error


def read_labels(path: str, n_classes: int) -> list[str]:
    """One class name per line, in the order of the model's classes; see `names.read_names`."""
    try:
        labels = read_names(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--labels: cannot read {path}: {error}") from error
    if len(labels) != n_classes:
        raise UsageError(f"--labels: the model has {n_classes} classes, but {path} has {len(labels)} lines")
    return labels


def refuse_files_of(kind: Kind, args: argparse.Namespace, wanted_model: str) -> None:
    """Raises a usage error if the name of a path shows a kind of file that the model does not take."""
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
    """Warns on stderr if the arguments name no weights."""
    if not has_weights(args):
        print("warning: random weights: predictions are meaningless; give --weights FILE", file=sys.stderr)


def ignore_pillow_warnings() -> None:
    """Silences Pillow, which warns of large images and odd metadata; a file that it cannot read becomes an error."""
    warnings.filterwarnings("ignore", module="PIL")

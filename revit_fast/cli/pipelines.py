"""Builds the pipeline that the arguments of a command describe."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module

import torch

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.budgets import check_budget
from revit_fast.adaptive.policies import PolicySpec
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.cli.arguments import BATCH_TOKENS, UsageError
from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.inference.inference_copy import InferenceCopy, dtype_name
from revit_fast.inference.optimize import OptimizedReViT, optimize
from revit_fast.io.finding import IMAGES, Kind
from revit_fast.io.names import read_names, shortened
from revit_fast.models.classes import class_names
from revit_fast.models.create import create_model, load_with_head
from revit_fast.models.hub import is_bundle
from revit_fast.models.vit import ReViT
from revit_fast.streaming.bundle import Bundle, read_bundle
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.video.reader import CLIPS

MAX_WAIT_S = 1.0
"""Seconds after which a batch runs even if it is not full, so that results appear while files are still read."""


def build_pipeline(
    args: argparse.Namespace, max_wait_s: float = MAX_WAIT_S, *, classifies: bool = True
) -> AdaptivePipeline:
    """The pipeline that the arguments describe; wrong arguments raise a usage error.

    Args:
        args: the arguments.
        max_wait_s: see `AdaptivePipeline`.
        classifies: whether the command needs a model with a classifier.
    """
    import_module("PIL")  # if it is missing, main says what to install
    device = compute_device(args)
    bundle = load_bundle(args) if is_bundle(args.model) else None
    model = bundle.model if bundle else load_model(args)
    if classifies and model.num_classes < 1:
        raise UsageError(f"--model: {args.model} has no classifier to predict with")
    labels = read_labels(args.labels, model.num_classes) if args.labels else class_names(model)
    model = model.to(device)
    prep = build_preprocessor(args, model, bundle)
    token_budget = batch_tokens(args, prep, model)
    fast = optimized(args, model)
    try:
        return AdaptivePipeline(fast, prep, token_budget=token_budget, labels=labels, max_wait_s=max_wait_s)
    except ValueError as error:
        raise UsageError.of(error, model="--model") from error


def compute_device(args: argparse.Namespace) -> torch.device:
    """Sets the number of CPU threads; returns the device of --device, or raises a usage error if it is not there."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return checked_device(args.device)


def checked_device(name: str) -> torch.device:
    """The device of this name; a usage error says what there is instead."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if name == "cpu" or (gpus and name in ("cuda", *gpus)):
        return torch.device(name)
    reason = "there are kernels for CPUs and CUDA GPUs"
    if name.startswith("cuda"):
        reason = f"PyTorch finds {len(gpus) or 'no'} GPU{'s' * (len(gpus) > 1)} here"
    raise UsageError(f"--device: expected {' or '.join(['cpu', *gpus])}, got {shortened(name)}; {reason}")


def optimized(args: argparse.Namespace, model: ReViT, option: str = "--model") -> OptimizedReViT:
    """An optimised copy of `model` on the device of --device, in the dtype of --dtype.

    Args:
        args: the arguments.
        model: the model.
        option: name of the argument that the model comes from.

    Raises:
        UsageError: if the dtype cannot be served there, or the model cannot be optimised.
    """
    device = compute_device(args)
    dtype = args.dtype if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    if model.pos_embed.device.type != device.type:  # commands save the model where it is
        model = deepcopy(model).to(device)
    try:
        copy = optimize(model, dtype)
    except ValueError as error:
        raise UsageError.of(error, model=option, dtype="--dtype") from error
    say_dtype(args, copy)
    return copy


def batch_tokens(args: argparse.Namespace, prep: AdaptivePreprocessor, model: torch.nn.Module) -> int:
    """The tokens of --batch-tokens; a usage error if the longest image that may come does not fit."""
    if args.batch_tokens is None:
        return BATCH_TOKENS
    name, argument = prep.policy.spec if isinstance(prep.policy.spec, tuple) else (prep.policy.spec, None)
    grid = argument if name == "fixed" else prep.grids[0]
    longest = prep.n_patches((grid, grid)) + model.num_prefix_tokens
    if args.batch_tokens < longest:
        raise UsageError(
            f"--batch-tokens: expected at least {longest}, the tokens of one {'clip' if prep.CLIPS else 'image'} at "
            f"grid {grid}, got {args.batch_tokens}"
        )
    return args.batch_tokens


def say_classes(args: argparse.Namespace, n_classes: int, own: int | None) -> None:
    """Says on stderr that the head of --weights has another number of classes than the `own` ones of --model."""
    if n_classes != own:
        instead = "" if own is None else f", instead of the {own} of {args.model}"
        print(f"--weights: {n_classes} classes, as the head of {args.weights}{instead}", file=sys.stderr, flush=True)


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
        prep = AdaptivePreprocessor.for_model(model, assigner, **options)
        if args.budget is not None:
            check_budget(args.budget, prep.grids, prep.macs)
        return prep
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UsageError.of(error, **choice_options(args)) from error


def choice_options(args: argparse.Namespace) -> dict[str, str]:
    """The options that the arguments of a preprocessor come from."""
    return {
        "assigner": "--assigner",
        "budget": "--budget",
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
            own = bundle.model.num_classes
            load_with_head(bundle.model, args.weights)
            say_classes(args, bundle.model.num_classes, own)
            classes = class_names(bundle.model) or range(bundle.model.num_classes)
            bundle = bundle._replace(classes=tuple(map(str, classes)))
    except (ImportError, OSError, ValueError) as error:
        raise UsageError.of(error, "--model", bundle="--model", weights="--weights") from error
    return bundle


def load_model(args: argparse.Namespace) -> ReViT:
    """The model in evaluation mode; a wrong name or wrong weights raise a usage error."""
    timm = import_module("timm")  # if it is missing, main says what to install
    if not timm.is_model(args.model) and os.path.isdir(args.model):
        raise UsageError(f"--model: timm knows no model {args.model!r}; for the folder here, give ./{args.model}")
    try:
        model = create_model(args.model, weights=args.weights).eval()
        if args.weights:
            say_classes(args, model.num_classes, timm.models.get_pretrained_cfg_value(args.model, "num_classes"))
        return model
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


def warn_of_random_weights(args: argparse.Namespace, effect: str = "predictions are meaningless") -> None:
    """Warns on stderr if the arguments name no weights; for a command to call once nothing is left to refuse."""
    if not has_weights(args):
        print(f"warning: random weights: {effect}; give --weights FILE", file=sys.stderr, flush=True)


def ignore_pillow_warnings() -> None:
    """Silences Pillow, which warns of large images and odd metadata; a file that it cannot read becomes an error."""
    warnings.filterwarnings("ignore", module="PIL")

"""Checks before a run of what only its late stages would refuse, after hours: outputs, images, evaluation, bundle."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.budgets import check_budget
from revit_fast.adaptive.policies import Calibration
from revit_fast.io.images import ImageError
from revit_fast.io.names import on_one_line
from revit_fast.models.folder import check_replaceable
from revit_fast.models.macs import forward_macs
from revit_fast.models.vit import ReViT
from revit_fast.train.assigner import LEAST_IMAGES
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ArrayImages, ImageSet
from revit_fast.train.evaluate import threshold_for
from revit_fast.train.labels import predict_lengths

PROBED = 16
"""Number of images of a set of which one must be readable."""

COPIES, COPIES_RESUMED = 5, 2
"""Copies of the weights that a run writes at least: a checkpoint beside the one before it, the best, the last and the
bundle. A resumed run has most of them, and writes a checkpoint beside the one before it."""


def check_outputs(folder: Path, files: Iterable[str], bundle: str) -> None:
    """Raises an error if files or the bundle of a run cannot be written to its folder.

    Raises:
        OSError: for a place where nothing can be written.
        ValueError: if something else has the name of a file or of the bundle.
    """
    check_writable(folder)
    for path in (folder / name for name in files):
        if path.is_dir():
            raise ValueError(f"output: {path} is a folder, and the run writes a file of that name; give another folder")
    check_replaceable(folder / bundle)
    check_writable(folder / bundle)


def check_writable(folder: Path) -> None:
    """Raises an OSError if a folder cannot be made, or nothing can be written to it."""
    there = _existing(folder)
    if not there.is_dir():
        raise NotADirectoryError(f"output: {folder} cannot be made, because {there} is a file; give another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output: nothing can be written to {there}; give another folder")


def check_space(folder: Path, model: ReViT, resumed: bool) -> None:
    """Raises an OSError if a folder's disk has less room than the weights that a run writes take."""
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    needed = n_bytes * (COPIES_RESUMED if resumed else COPIES)
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise OSError(
            f"output: {folder} has {free / 1e6:.0f} MB of free space, and the run writes at least {needed / 1e6:.0f} "
            "MB of weights; make room, or give another folder"
        )


def _existing(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    path = Path(os.path.realpath(path))
    return next(place for place in (path, *path.parents) if place.exists())


def check_outside(images: ImageSet, path: str | os.PathLike, name: str = "output") -> None:
    """Raises a ValueError if a new file or folder at `path` would be taken for one of the set's images or classes."""
    real = os.path.realpath(path)
    if images.folder is not None and Path(real).is_relative_to(os.path.realpath(images.folder)):
        raise ValueError(
            f"{name}: {os.fspath(path)} lies among the classes in {images.folder}, where the next run would take it "
            "for one; give a place outside"
        )


def check_classes(images: ImageSet) -> None:
    """Raises a ValueError unless there are two classes to tell apart."""
    if len(images.classes) < 2:
        raise ValueError(
            f"classes: a model learns to tell at least two apart, and the images have one, {images.classes[0]!r}; give "
            "images of others too"
        )


def updates_per_epoch(config: TrainConfig, n_images: int, n_groups: int) -> int:
    """Number of updates in a pass over the images, each of whole batches.

    Args:
        config: choices of the run.
        n_images: number of images to train on.
        n_groups: number of groups of processes that share them.

    Raises:
        ValueError: if the images do not suffice for one.
    """
    n_batches = n_images // (config.batch_size * n_groups)
    if n_batches < config.grad_accum_steps:
        largest = n_images // (config.grad_accum_steps * n_groups)
        fix = f"a batch_size of at most {largest}" if largest else "a smaller grad_accum_steps, or give more images"
        raise ValueError(
            f"batch_size: {n_images} images give {n_batches} batches of {config.batch_size} in each of {n_groups} "
            f"processes, and an update takes {config.grad_accum_steps}; use smaller batches: {fix}"
        )
    return n_batches // config.grad_accum_steps


def check_readable(images: ImageSet, what: str) -> None:
    """Raises a ValueError if none of the set's first images can be read."""
    reason = ""
    for i in range(min(PROBED, len(images))):
        try:
            images.image(i)
        except ImageError as error:
            reason = reason or f"{on_one_line(images.name(i))}: {error}"
        else:
            return
    raise ValueError(
        f"images: none of the first {min(PROBED, len(images))} {what} can be read, first {reason}; repair them"
    )


def check_lengths(model: ReViT, *sets: ImageSet) -> None:
    """Raises a ValueError if there is nothing to choose for an assigner, or a set is too small to train one."""
    if len(model.grids) < 2:
        raise ValueError(
            f"grids: an assigner chooses between at least two, and the model has {list(model.grids)}; train a model of "
            "more grids, or do without an assigner: `revit-fast train`"
        )
    for images in sets:
        if len(images) < LEAST_IMAGES:
            raise ValueError(
                f"images: an assigner needs at least {LEAST_IMAGES} to train on and {LEAST_IMAGES} held out, got "
                f"{' and '.join(str(len(some)) for some in sets)}; give more, or another held_out_share"
            )


def check_goal(model: ReViT, budget: Mapping[str, float] | None, max_drop: float = 0.0) -> None:
    """Raises a ValueError for a budget that no threshold can keep, or a drop that is no share."""
    if not 0.0 <= max_drop < 1.0:
        raise ValueError(f"max_drop: expected a share of accuracy in [0, 1), got {max_drop}")
    one_image = np.ones((1, len(model.grids)), dtype=np.float32)
    try:
        threshold_for(model, Calibration(1.0, one_image, ()), one_image.T, budget, max_drop)
    except ValueError as error:
        raise ValueError(f"budget: {str(error).removeprefix('policy: ')}") from error
    if budget is not None:
        check_budget(budget, model.grids, [forward_macs(model, n) for n in model.lengths])


def try_assigner(grids: tuple[int, ...], options: Mapping[str, Any]) -> None:
    """Raises a ValueError if an assigner with these options cannot be made, or cannot be run."""
    try:
        tla = TokenLengthAssigner(grids, **options).eval()
        tla.predict_proba([np.zeros((1, 1, 3), dtype=np.uint8)])
    except ModuleNotFoundError:
        raise  # the command line says what to install
    except Exception as error:  # a backbone of timm raises any
        raise ValueError(f"assigner: no assigner can be made with {dict(options)}: {error}") from error


def rehearse_predictions(model: ReViT, settings: Mapping[str, Any] | None = None) -> None:
    """Predicts one black image as evaluations and labels will; raises their errors."""
    classes = list(map(str, range(model.num_classes)))
    predict_lengths(model, ArrayImages([np.zeros((8, 8, 3), dtype=np.uint8)], [0], classes), settings=settings)

"""Runs a whole training from its configuration."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from revit_fast.io.atomic import read_json, remove_leftovers
from revit_fast.io.images import ImageError
from revit_fast.io.locked import alone_in
from revit_fast.io.names import say, shortened
from revit_fast.models.create import create_model
from revit_fast.models.vit import ReViT
from revit_fast.models.weights import named_classes, read_checkpoint
from revit_fast.streaming.bundle import save_bundle
from revit_fast.train.checks import (
    check_classes,
    check_outputs,
    check_outside,
    check_readable,
    check_space,
    rehearse_predictions,
)
from revit_fast.train.config import PATHS, TrainConfig
from revit_fast.train.data import ImageSet, NoSplitError, split_off
from revit_fast.train.datasets import open_images
from revit_fast.train.distributed import World
from revit_fast.train.log import EPOCHS, STEPS
from revit_fast.train.modes import in_training_modes
from revit_fast.train.trainer import BEST, CHECKPOINT, CONFIG, FINAL, Accuracy, Trainer

VALIDATION_SPLIT, TEST_SPLIT = "val", "test"
"""Splits for the evaluation during a training run and after it. If one is missing, the other is used."""

BUNDLE, LOCK = "bundle", "train.lock"

FILES = (CHECKPOINT, FINAL, BEST, CONFIG, STEPS, EPOCHS)
"""Files that a run writes to its folder."""

PIXELS_COMPARED = 8
"""Images of a set by which processes see that all of them have the same set."""

HEAD_PARAMETER = re.compile(r"(aux_)?head(_dist)?\.(weight|bias)$")

NEW_HEAD = ", with a new head"


def open_data(config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """The images to train on and those held out for evaluation.

    Raises:
        FileNotFoundError, ValueError: if the data cannot be read, or lack an evaluation split that is needed.
    """
    images = open_images(config.data, "train")
    if config.held_out_share > 0:
        return split_off(images, config.held_out_share, config.seed)
    try:
        return images, evaluation_images(config.data, images, split=VALIDATION_SPLIT)
    except NoSplitError as error:
        raise NoSplitError(f"{error}; set held_out_share to evaluate on a part of the training images") from error


def evaluation_images(path: str, *training: ImageSet, split: str = TEST_SPLIT) -> ImageSet:
    """Opens an evaluation split.

    Args:
        path: path of the data.
        *training: training images of the same data: the set, or the parts of it that `split_off` gives.
        split: see `datasets.open_images`.

    Raises:
        NoSplitError: if there is no evaluation split, or the data have no splits at all.
    """
    found = open_images(path, split, training[0].classes)
    if is_training(found, *training):
        raise NoSplitError(f"split: {path} has no splits: its images are those of training")
    return found


def is_training(images: ImageSet, *training: ImageSet) -> bool:
    """Whether a set is the training set, given whole or in parts: its first image is the first of a part."""
    return images.name(0) in [part.name(0) for part in training]


def read_config(folder: Path) -> TrainConfig:
    """The configuration of the run in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no training run: there is no {CONFIG} in it")
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise TypeError(f"it holds {shortened(values)}")
        return TrainConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as the configuration of a run: {error}; remove it, and give the run's options again"
        ) from error


def build_model(config: TrainConfig, n_classes: int, classes: Sequence[str] | None = None) -> tuple[ReViT, str]:
    """The model of a run with its initial weights, and in words what became of their head.

    A head follows the names of its classes where the weights name them (`models.weights.named_classes`): a class of the
    same name keeps its row, another gets a new one. Where they name none, a head for as many classes is taken.

    Args:
        config: choices of the run.
        n_classes: number of the images' classes.
        classes: their names.

    Returns:
        The model, and a phrase that follows its name; "" if there is nothing to say.

    Raises:
        ValueError: for an unknown name, an architecture that is not supported, or weights that do not fit.
    """
    model = create_model(config.model, config.grids, num_classes=n_classes, **config.model_kwargs)
    if config.weights is None:
        return model, ""
    path = Path(config.weights)
    state_dict = read_checkpoint(path, model.state_dict())
    own = {name: value.clone() for name, value in model.state_dict().items() if HEAD_PARAMETER.match(name)}
    head = {name: state_dict[name] for name in own if name in state_dict}
    named, text = named_classes(path), ""
    if named is not None and classes is not None and all(len(value) == len(named) for value in head.values()):
        kept = [(i, named.index(name)) for i, name in enumerate(classes) if name in named]
        new, old = (list(places) for places in zip(*kept, strict=True)) if kept else ([], [])
        for name, value in head.items():
            if value.shape[1:] == own[name].shape[1:]:
                own[name][new] = value[old].to(own[name])
        if len(kept) < n_classes or not head:
            text = f", with the head's rows of {len(kept)} of {n_classes} classes" if kept and head else NEW_HEAD
    elif len(head) < len(own) or any(len(value) != n_classes for value in head.values()):
        text = NEW_HEAD
    else:
        own, text = head, ", with the head of the weights, which do not name its classes" if head else ""
    model.load_weights(state_dict | own, config.weights, match_norms=config.match_norms)
    return model, text


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs, and removes files that a killed run had not finished writing.

    Raises:
        FileExistsError, OSError: see `alone_in`.
    """
    with alone_in(folder, LOCK, "training in") as locked:
        if locked:
            remove_leftovers(folder)
        yield


def _shared(config: TrainConfig, *sets: ImageSet) -> list:
    """What all processes of a run must have: choices, labels, and the pixels of a few images of every set.

    Paths may differ among machines, but not what is there.
    """
    shared: list = [config.with_changes(**dict.fromkeys(PATHS, ""))]
    for images in sets:
        shared += [images.classes, hashlib.sha256(images.labels.tobytes()).hexdigest()]
        for i in np.linspace(0, len(images) - 1, PIXELS_COMPARED).astype(int).tolist():
            try:
                shared.append(hashlib.sha256(np.ascontiguousarray(images.image(i))).hexdigest())
            except ImageError as error:
                shared.append(str(error))
    return shared


@in_training_modes
def train(
    config: TrainConfig,
    folder: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    terminal: TextIO | None = None,
    sets: tuple[ImageSet, ImageSet] | None = None,
    check: Callable[[ReViT, ImageSet, ImageSet], None] = lambda model, images, held_out: None,
) -> Accuracy:
    """Trains as configured; writes the files of `Trainer`, and at the end a bundle without an assigner in `bundle/`.

    Args:
        config: choices of the run.
        folder: folder for its files.
        device: "cpu" or "cuda".
        resume: continue from the checkpoint in the folder; without a checkpoint the run starts anew.
        terminal: where progress is printed; None: nowhere.
        sets: images to train on and those held out; None: those that `open_data` gives.
        check: called before the first update with a copy of the model as it will be deployed, the images to train on
            and those held out. It raises what later stages would refuse.

    Returns:
        Accuracy on the held-out images at the end.

    Raises:
        FileExistsError: if the folder holds a run already and `resume` is not set, or another process trains in it.
        ModuleNotFoundError: without safetensors.
        others: see `Trainer.fit`, `open_data`, `build_model` and `checks`: all before the first update, except for what
            only a training can show.
    """
    import_module("safetensors")  # of the checkpoints; timm does without it
    config = config.resolved()
    if not resume and (folder / CHECKPOINT).exists():
        raise FileExistsError(f"{folder} holds a run already; resume it, or give another folder")
    world = World(config.mode, len(config.grids), device)
    with closing(world), ExitStack() as stack:
        images, held_out = sets or open_data(config)
        check_classes(images)
        check_outside(images, folder)
        for some, what in ((images, "training images"), (held_out, "held-out images")):
            check_readable(some, what)
        if world.size > 1:
            world.check_same("choices and images", _shared(config, images, held_out))
        torch.manual_seed(config.seed)
        model, head = build_model(config, len(images.classes), images.classes)
        settings = config.input_settings(model)
        if world.is_first:
            check_outputs(folder, FILES, BUNDLE)
            check_space(folder, model, resumed=(folder / CHECKPOINT).exists())
            stack.enter_context(_alone_in(folder))
        trainer = Trainer(model, images, config, held_out=held_out, folder=folder, world=world, terminal=terminal)
        if resume and (folder / CHECKPOINT).exists():
            trainer.resume()
        deployed = trainer.plain()
        if device == "cpu":  # where evaluation runs an optimised copy
            rehearse_predictions(deployed, settings)
        check(deployed, images, held_out)
        del deployed  # it takes as much memory as the model
        if terminal is not None and world.is_first:
            start = f"from update {trainer.step} of {trainer.n_updates}" if trainer.step else "from the start"
            say(
                terminal,
                f"training {config.model}{head} on {len(images)} images of {len(images.classes)} classes at grids "
                f"{', '.join(map(str, config.grids))}, {config.mode}, {world.size} process(es), {start}",
            )
        accuracy = trainer.fit()
        if world.is_first:
            save_bundle(folder / BUNDLE, trainer.plain(), None, classes=images.classes, settings=settings)
        return accuracy

"""Runs a whole training from its configuration."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TextIO

import torch

from revit_fast.io.atomic import remove_leftovers
from revit_fast.models.create import create_model
from revit_fast.models.vit import ReViT
from revit_fast.models.weights import read_checkpoint
from revit_fast.streaming.bundle import save_bundle
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ImageSet, NoSplitError, split_off
from revit_fast.train.datasets import open_images
from revit_fast.train.distributed import World
from revit_fast.train.modes import in_training_modes
from revit_fast.train.trainer import CHECKPOINT, CONFIG, Accuracy, Trainer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VALIDATION_SPLIT, TEST_SPLIT = "val", "test"
"""Splits for the evaluation during a training run and after it. If one is missing, the other is used."""

BUNDLE, LOCK = "bundle", "train.lock"

HEAD_PARAMETER = re.compile(r"head(_dist)?\.(weight|bias)$")


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
    # The first image of a set is the first of one of its parts.
    if found.name(0) in [part.name(0) for part in training]:
        raise NoSplitError(f"split: {path} has no splits: its images are those of training")
    return found


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
        return TrainConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as the configuration of a run: {error}") from error


def build_model(config: TrainConfig, n_classes: int) -> tuple[ReViT, bool]:
    """The model of a run with its initial weights, and whether its head is new.

    The head is new if the checkpoint has another number of classes, or is one of features alone, without a head.

    Raises:
        ValueError: for an unknown name, an architecture that is not supported, or weights that do not fit.
    """
    model = create_model(config.model, config.grids, num_classes=n_classes, **config.model_kwargs)
    if config.weights is None:
        return model, False
    state_dict = read_checkpoint(Path(config.weights))
    own = {name: value for name, value in model.state_dict().items() if HEAD_PARAMETER.match(name)}
    new_head = any(
        name not in state_dict or state_dict[name].shape[:1] != value.shape[:1] for name, value in own.items()
    )
    if new_head:
        state_dict |= own
    model.load_weights(state_dict, config.weights)
    return model, new_head


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs, and removes files that a killed run had not finished writing.

    Raises:
        FileExistsError: if another process has locked it.
        OSError: if the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        if _lock(file, folder):
            remove_leftovers(folder)
        yield


def _lock(file: TextIO, folder: Path) -> bool:
    """Locks a file; returns False if the system has no locks.

    The system releases the lock however the process ends, and no child process inherits it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            return False
        raise FileExistsError(
            f"another process is training in {folder}; wait until it has ended, or give another folder"
        ) from None
    return True


@in_training_modes
def train(
    config: TrainConfig,
    folder: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    terminal: TextIO | None = None,
) -> Accuracy:
    """Trains as configured; writes the files of `Trainer`, and at the end a bundle without an assigner in `bundle/`.

    Args:
        config: choices of the run.
        folder: folder for its files.
        device: "cpu" or "cuda".
        resume: continue from the checkpoint in the folder; without a checkpoint the run starts anew.
        terminal: where progress is printed; None: nowhere.

    Returns:
        Accuracy on the held-out images at the end.

    Raises:
        FileExistsError: if the folder holds a run already and `resume` is not set, or another process trains in it.
        others: see `Trainer.fit`, `open_data` and `build_model`.
    """
    if not resume and (folder / CHECKPOINT).exists():
        raise FileExistsError(f"{folder} holds a run already; resume it, or give another folder")
    world = World(config.mode, len(config.grids), device)
    with closing(world), ExitStack() as stack:
        images, held_out = open_data(config)
        torch.manual_seed(config.seed)
        model, new_head = build_model(config, len(images.classes))
        settings = config.input_settings(model)
        if world.is_first:
            stack.enter_context(_alone_in(folder))
        trainer = Trainer(model, images, config, held_out=held_out, folder=folder, world=world, terminal=terminal)
        if resume and (folder / CHECKPOINT).exists():
            trainer.resume()
        if terminal is not None and world.is_first:
            start = f"from update {trainer.step} of {trainer.n_updates}" if trainer.step else "from the start"
            head = ", with a new head" if new_head else ""
            print(
                f"training {config.model}{head} on {len(images)} images of {len(images.classes)} classes at grids "
                f"{', '.join(map(str, config.grids))}, {config.mode}, {world.size} process(es), {start}",
                file=terminal,
                flush=True,
            )
        accuracy = trainer.fit()
        if world.is_first:
            save_bundle(folder / BUNDLE, trainer.plain(), None, classes=images.classes, settings=settings)
        return accuracy

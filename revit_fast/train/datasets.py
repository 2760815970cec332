"""Opens labelled images in any supported format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from revit_fast.train import formats, shards
from revit_fast.train.data import ImageSet, check_classes, split_names


def open_images(
    path: str | os.PathLike, split: str = "train", classes: Sequence[str] | None = None, *, others: bool = True
) -> ImageSet:
    """Opens a set of labelled images. The format is recognised from the files.

    - Folders of classes: `path/SPLIT/CLASS/*.jpg` or, if `path` has no splits, `path/CLASS/*.jpg`. The class is the
      name of the folder that holds the image. Classes are in timm's order (by name, with numbers compared by value).
      Links to folders are followed; one that leads to a folder above it is left out, with a warning.
    - idx files, the format of MNIST and Fashion-MNIST, compressed or not.
    - A folder that Hugging Face's `datasets` wrote with `save_to_disk` (needs `pip install datasets`).
    - WebDataset shards: a folder with `*.tar`, or a pattern such as `shards/train-{000..127}.tar` or `shards/*.tar`.
      In a folder, the shards of a split are in a folder SPLIT or are called `SPLIT*.tar`; without such names all shards
      are used. Class names are the lines of `classes.txt` beside them.

    Args:
        path: folder, or pattern of shards. A relative one is resolved here, so that names are those of the same images
            in every folder and process.
        split: "train", or one of the evaluation splits "val", "validation", "valid" and "test"; if it is missing, the
            other evaluation splits are tried. A path without splits is opened for any split.
        classes: class names in the order of their labels, for example those of the training set for its test set. A set
            with its own class names must have the same ones, and its labels are renumbered to this order. A set without
            class names gets these.
        others: whether another split, as described above, is opened where this one is missing.

    Returns:
        The set. Images are decoded on access, except those of idx files, which are held in memory.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        OSError: if a folder cannot be read.
        NoSplitError: if the split is missing.
        ValueError: if the format is not recognised, files are damaged or contradict each other, or labels or classes do
            not match. The message names the file, sample or class.
        ImportError: if `datasets` is needed and not installed.
    """
    path, names = str(Path(path).absolute()), split_names(split) if others else (split,)
    classes = None if classes is None else check_classes(classes)
    if os.path.isdir(path):
        entries = os.listdir(path)
        if any(map(formats.IDX_NAME.match, entries)):
            return formats.open_idx(path, names, classes)
        if "dataset_dict.json" in entries or {"dataset_info.json", "state.json"} <= set(entries):
            return formats.open_saved(path, names, classes)
        found = shards.find_in_folder(path, names)
        return shards.open_shards(found, classes) if found else formats.open_folders(path, names, classes)
    if path.endswith(".tar"):
        return shards.open_shards(shards.find_by_pattern(path), classes)
    if os.path.exists(path):
        raise ValueError(f"path: {path} is a file; give the folder that holds it, or shards that end in .tar")
    raise FileNotFoundError(f"path: nothing is at {path}; give a folder of images or a pattern of shards (*.tar)")

"""Opens labelled images, whatever format they are in."""

from __future__ import annotations

import os
from collections.abc import Sequence

from revit_fast.train import formats, shards
from revit_fast.train.data import ImageSet, check_classes, split_names


def open_images(path: str | os.PathLike, split: str = "train", classes: Sequence[str] | None = None) -> ImageSet:
    """Opens a set of labelled images; its format is recognised from what is there.

    - Folders of classes: `path/SPLIT/CLASS/*.jpg` or, where `path` has no splits, `path/CLASS/*.jpg`; the class is
      the name of the folder that holds the image and classes are in timm's order (by name, numbers in it by value).
    - idx files as MNIST and Fashion-MNIST have them, compressed or not.
    - A folder that Hugging Face's `datasets` wrote with `save_to_disk` (needs `pip install datasets`).
    - WebDataset shards: a folder with `*.tar` (in a folder SPLIT, or called `SPLIT*.tar`, or all of them), or a pattern
      such as `shards/train-{000..127}.tar` or `shards/*.tar`. Class names are the lines of `classes.txt` beside them.

    Args:
        path: folder, or pattern of shards.
        split: "train", or an evaluation split: of "val", "validation", "valid" and "test" the one that is asked for is
            tried first, then the others. A path without splits serves as any of them.
        classes: names in the order of their labels, for instance those of the training set for its test set. A set with
            names of its own must have the same ones; its labels are renumbered to this order. Others are named by it.

    Returns:
        The set; images are decoded when they are asked for, except idx files, which are held in memory.

    Raises:
        FileNotFoundError: where there is nothing at `path`.
        ValueError: where the format is not recognised, the split is missing, files are damaged or contradict each
            other, or labels or classes do not match. The text names the file, sample or class.
        ImportError: where `datasets` is needed and not installed.
    """
    path, names = os.fspath(path), split_names(split)
    classes = None if classes is None else check_classes(classes)
    if os.path.isdir(path):
        entries = os.listdir(path)
        if any(map(formats.IDX_NAME.match, entries)):
            return formats.open_idx(path, split, classes)
        if "dataset_dict.json" in entries or {"dataset_info.json", "state.json"} <= set(entries):
            return formats.open_saved(path, names, classes)
        found = shards.find_in_folder(path, names)
        return shards.open_shards(found, classes) if found else formats.open_folders(path, names, classes)
    if path.endswith(".tar"):
        return shards.open_shards(shards.find_by_pattern(path), classes)
    if os.path.exists(path):
        raise ValueError(f"path: {path} is a file; give the folder that holds it, or shards that end in .tar")
    raise FileNotFoundError(f"path: nothing is at {path}; give a folder of images or a pattern of shards (*.tar)")

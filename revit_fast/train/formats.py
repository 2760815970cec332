"""Readers of the formats that `datasets.open_images` supports."""

from __future__ import annotations

import glob
import gzip
import os
import re
import zlib
from collections.abc import Sequence

import numpy as np

from revit_fast.io.finding import SUFFIXES
from revit_fast.io.folders import walk
from revit_fast.io.images import ImageError, read_rgb
from revit_fast.train.data import (
    EVAL_SPLITS,
    TRAIN_SPLITS,
    ArrayImages,
    ImageSet,
    NoSplitError,
    check_same_classes,
    pick_split,
    renumbered,
)

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

IDX_NAME = re.compile(r"^(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?$")


class FileImages(ImageSet):
    """Images in one file each.

    Args:
        paths: paths of the files.
        labels: see `ImageSet`.
        classes: see `ImageSet`.
        folder: see `ImageSet`.
    """

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str], folder: str | None = None
    ) -> None:
        self.paths, self.folder = list(paths), folder
        super().__init__(labels, classes)

    def image(self, i: int) -> np.ndarray:
        return read_rgb(self.paths[i])

    def name(self, i: int) -> str:
        return self.paths[i]


def _natural_key(name: str) -> list:
    """Sort key for timm's order of classes: by name in lower case, with numbers compared by value."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def open_folders(path: str, names: Sequence[str], classes: tuple[str, ...] | None) -> ImageSet:
    """Opens a set with one folder per class."""
    splits = [name for name in (*TRAIN_SPLITS, *EVAL_SPLITS, names[0]) if _is_split(os.path.join(path, name))]
    root = os.path.join(path, pick_split(splits, names, path)) if splits else path
    files: dict[str, list[str]] = {}
    for folder, subfolders, entries in walk(root):
        found = sorted(name for name in entries if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        if folder == root:
            if not subfolders:
                raise ValueError(
                    f"path: {root} has no folders of classes, idx files, shards (*.tar) or saved Hugging Face data "
                    "set; expected for instance CLASS/*.jpg in it"
                )
            if found:
                raise ValueError(f"path: image {os.path.join(root, found[0])} is in no folder of a class")
        elif found:
            files.setdefault(os.path.basename(folder), []).extend(os.path.join(folder, name) for name in found)
        elif not subfolders:
            if classes is None:
                raise ValueError(
                    f"path: class folder {folder} holds no image ({', '.join(SUFFIXES)}); put images of the class into "
                    "it, or remove it, also from other splits"
                )
            files.setdefault(os.path.basename(folder), [])  # a class of the training set without images in this one
    own = sorted(files, key=lambda name: (_natural_key(name), name))
    if classes is not None:
        check_same_classes(own, classes, root, "for a class without images here, make an empty folder")
    classes = classes or tuple(own)
    labels = np.repeat(np.arange(len(classes)), [len(files[name]) for name in classes])
    return FileImages([file for name in classes for file in files[name]], labels, classes, root)


def _is_split(folder: str) -> bool:
    """Whether a folder named like a split is one: it holds folders of classes. With images in it, it is a class."""
    if not os.path.isdir(folder):
        return False
    with os.scandir(folder) as entries:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
    return any(e.is_dir() for e in entries) and not any(e.name.lower().endswith(SUFFIXES) for e in entries)


def open_idx(path: str, names: Sequence[str], classes: tuple[str, ...] | None) -> ImageSet:
    """Opens a set in the idx files of MNIST."""
    found = [name for name in names if name in (*TRAIN_SPLITS, "test")]
    if not found:
        raise NoSplitError(f"split: idx files hold 'train' and 'test', got {names[0]!r}")
    prefix = "train" if found[0] in TRAIN_SPLITS else "t10k"
    files = {}
    for kind, n_dims in (("images", 3), ("labels", 1)):
        matches = sorted(glob.glob(os.path.join(glob.escape(path), f"{prefix}-{kind}[-.]idx{n_dims}-ubyte*")))
        matches = [file for file in matches if IDX_NAME.match(os.path.basename(file))]
        if not matches:
            raise ValueError(f"split: {path} has no {prefix}-{kind}-idx{n_dims}-ubyte or {prefix}-...-ubyte.gz")
        files[kind] = matches[0]
    images, labels = read_idx(files["images"], 3), read_idx(files["labels"], 1)
    if len(images) != len(labels):
        raise ValueError(
            f"path: {files['images']} has {len(images)} images, but {files['labels']} has {len(labels)} labels"
        )
    own = None
    if "fashion" in os.path.basename(os.path.realpath(path)).lower():
        own = FASHION_MNIST_CLASSES
        labels = renumbered(labels, own, classes, path)
    names = _Numbered(os.path.basename(files["images"]), len(images))
    return ArrayImages(images, labels, classes or own or [str(digit) for digit in range(10)], names)


class _Numbered(Sequence):
    """The names "file[0]", "file[1]", ..., which are made on access and take no memory."""

    def __init__(self, file: str, n: int) -> None:
        self.file, self.n = file, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> str:
        return f"{self.file}[{i}]"


def read_idx(path: str, n_dims: int) -> np.ndarray:
    """The bytes of an idx file with `n_dims` dimensions, which may be compressed.

    Raises:
        ValueError: if the file is not an idx file, is truncated, or is longer than its header says.
    """
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            data = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"path: {path} is truncated or not gzip: {error}; fetch it anew") from error
    header = 4 + 4 * n_dims
    magic = bytes((0, 0, 8, n_dims))
    if len(data) < header or data[:4] != magic:
        raise ValueError(
            f"path: {path} is no idx file of bytes in {n_dims} dimensions: expected it to begin with {magic.hex()} and "
            f"a header of {header} bytes, got {data[:4].hex() or 'nothing'} and {len(data)} bytes"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", n_dims, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        raise ValueError(
            f"path: {path} is {what}: its header says {'x'.join(map(str, shape))}, {expected} bytes, it has {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


class SavedImages(ImageSet):
    """Rows of a Hugging Face data set.

    Args:
        rows: the data set; its only column has the images, not decoded.
        name: name of the data set.
        labels: see `ImageSet`.
        classes: see `ImageSet`.
    """

    def __init__(self, rows, name: str, labels: np.ndarray, classes: Sequence[str]) -> None:
        self._rows, self._name = rows, name
        super().__init__(labels, classes)

    def image(self, i: int) -> np.ndarray:
        (image,) = self._rows[int(i)].values()
        if image is None:
            raise ImageError("this row has no image")
        return read_rgb(image["path"] if image["bytes"] is None else image["bytes"])

    def name(self, i: int) -> str:
        return f"{self._name}[{i}]"


def open_saved(path: str, names: Sequence[str], classes: tuple[str, ...] | None) -> ImageSet:
    """Opens a set that Hugging Face's `datasets` wrote with `save_to_disk`."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ImportError(f"path: {path} is a Hugging Face data set; to read it: pip install datasets") from None
    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"path: {path} is a damaged Hugging Face data set: {error}; save it anew") from error
    if isinstance(saved, datasets.DatasetDict):
        split = pick_split(list(saved), names, path)
        saved, path = saved[split], os.path.join(path, split)
    image, label = (_only_column(saved, kind, path) for kind in (datasets.Image, datasets.ClassLabel))
    own = saved.features[label].names
    labels = saved.select_columns(label).with_format("numpy")[:][label]
    if labels.dtype.kind not in "iu":
        raise ValueError(f"path: rows of {path} have no {label!r}; keep only those that have one")
    rows = saved.select_columns(image).with_format(None).cast_column(image, datasets.Image(decode=False))
    return SavedImages(rows, path, renumbered(labels, own, classes, path), classes or own)


def _only_column(saved, kind: type, path: str) -> str:
    """Name of the only column with a feature type."""
    columns = [name for name, feature in saved.features.items() if isinstance(feature, kind)]
    if len(columns) != 1:
        listed = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in saved.features.items())
        raise ValueError(
            f"path: {path} needs exactly one column of type {kind.__name__}, got {len(columns)} ({listed}); cast or "
            "remove columns and save it anew"
        )
    return columns[0]

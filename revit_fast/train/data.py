"""Sets of labelled images: their interface, classes, splits and folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from revit_fast.io.names import on_one_line

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("val", "validation", "valid")
EVAL_SPLITS = (*VALIDATION_SPLITS, "test")


class NoSplitError(ValueError):
    """The images do not have the requested split."""


class Sample(NamedTuple):
    """One image of a set.

    Attributes:
        image: uint8 `[H, W, 3]` or `[H, W]`.
        label: index into the set's classes.
    """

    image: np.ndarray
    label: int


class ImageSet:
    """Labelled images, accessed by place. Labels are known without decoding any image.

    A set must be picklable, because loaders send it to their workers. Reading an image must not affect another process
    that reads, for example through a shared file offset.

    Args:
        labels: integers `[N]`, each an index into `classes`.
        classes: names of the classes, all different.

    Attributes:
        labels: class of every image, int64 `[N]`.
        classes: names of the classes.
        folder: folder in which every folder counts as a class of the set and every image as one of its images; None
            if there is none.

    Raises:
        ValueError: for an empty set, a repeated class name, or a label out of range; the message names its sample.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    folder: str | None = None

    def __init__(self, labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> None:
        self.classes = check_classes(classes)
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels: expected at least one integer per image, [N], got {labels.dtype} {list(labels.shape)}"
            )
        self.labels = labels.astype(np.int64)
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if wrong.size:
            more = f" (and {wrong.size - 1} more)" if wrong.size > 1 else ""
            raise ValueError(
                f"labels: {on_one_line(self.name(int(wrong[0])))} has label {self.labels[wrong[0]]}{more}, but legal "
                f"are 0 to {len(self.classes) - 1}; correct the label, or name all classes"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Sample:
        if not -len(self) <= i < len(self):
            raise IndexError(f"i: expected a place in a set of {len(self)} images, got {i}")
        i = int(i) % len(self)
        return Sample(self.image(i), int(self.labels[i]))

    def image(self, i: int) -> np.ndarray:
        """Pixels of image `i`, uint8 `[H, W, 3]` or `[H, W]`, upright.

        Raises:
            ImageError: if the image cannot be read; the message gives the reason.
        """
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The name of image `i` in reports; it is unique in the set."""
        return f"image {i}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at `indices`, in that order, with the same classes and names.

        Raises:
            ValueError: for an empty list or a place outside the set.
        """
        return _Subset(self, indices)


class _Subset(ImageSet):
    def __init__(self, images: ImageSet, indices: Sequence[int] | np.ndarray) -> None:
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
            raise ValueError(f"indices: expected a list of at least one place, got {indices.dtype} {indices.shape}")
        if indices.min() < 0 or indices.max() >= len(images):
            wrong = indices[(indices < 0) | (indices >= len(images))][0]
            raise ValueError(f"indices: expected places 0 to {len(images) - 1}, got {wrong}")
        self._images, self._indices, self.folder = images, indices.astype(np.int64), images.folder
        super().__init__(images.labels[self._indices], images.classes)

    def image(self, i: int) -> np.ndarray:
        return self._images.image(int(self._indices[i]))

    def name(self, i: int) -> str:
        return self._images.name(int(self._indices[i]))


class ArrayImages(ImageSet):
    """Images in memory.

    Args:
        images: uint8 array `[N, H, W, 3]` or `[N, H, W]`, or a list of arrays `[H, W, 3]` or `[H, W]` of any sizes.
        labels: integers `[N]`.
        classes: names of the classes.
        names: names of the images; by default "image 0", "image 1", ...

    Raises:
        TypeError, ValueError: for other pixels or counts that differ, and as in `ImageSet`.
    """

    def __init__(
        self,
        images: np.ndarray | Sequence[np.ndarray],
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        names: Sequence[str] | None = None,
    ) -> None:
        whole = isinstance(images, np.ndarray)
        for i, image in enumerate(images[:1] if whole else images):
            what = "images" if whole else f"images[{i}]"
            if getattr(image, "dtype", None) != np.uint8:
                raise TypeError(f"{what}: expected uint8 pixels, got {getattr(image, 'dtype', type(image).__name__)}")
            if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or 0 in image.shape:
                raise ValueError(f"{what}: expected images [H, W, 3] or [H, W], got {list(image.shape)}")
        if len(labels) != len(images):
            raise ValueError(f"labels: expected one per image ({len(images)}), got {len(labels)}")
        if names is not None and len(names) != len(images):
            raise ValueError(f"names: expected one per image ({len(images)}), got {len(names)}")
        self._images, self._names = images, names
        super().__init__(labels, classes)

    def image(self, i: int) -> np.ndarray:
        return self._images[i]

    def name(self, i: int) -> str:
        return super().name(i) if self._names is None else self._names[i]


def check_classes(classes: Sequence[str]) -> tuple[str, ...]:
    """The names of classes as a tuple; raises an error if there are none or a name is repeated."""
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes: expected a sequence of names, got {classes!r}")
    classes = tuple(classes)
    if not classes:
        raise ValueError("classes: expected at least one name, got none")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"classes: every name may come once, got {twice!r} {classes.count(twice)} times")
    return classes


def split_names(split: str) -> tuple[str, ...]:
    """Names to try for a split, the requested one first."""
    if not isinstance(split, str) or not split:
        raise ValueError(f"split: expected a name such as 'train' or 'val', got {split!r}")
    for family in (TRAIN_SPLITS, EVAL_SPLITS):
        if split in family:
            return (split, *(name for name in family if name != split))
    return (split,)


def pick_split(found: Sequence[str], names: Sequence[str], path: str) -> str:
    """The first of `names` that is among the splits found at `path`."""
    for name in names:
        if name in found:
            return name
    raise NoSplitError(f"split: {path} has no split {names[0]!r}; it has {', '.join(map(repr, sorted(found)))}")


def renumbered(labels: np.ndarray, own: Sequence[str], classes: tuple[str, ...] | None, path: str) -> np.ndarray:
    """Labels of a set that has its own class names, as indices into `classes`, which must be the same names."""
    if classes is None or tuple(own) == classes:
        return labels
    check_same_classes(own, classes, path)
    table = np.array([classes.index(name) for name in own])
    legal = (labels >= 0) & (labels < len(own))
    return np.where(legal, table[np.where(legal, labels, 0)], labels)  # ImageSet refuses illegal ones by name


def check_same_classes(own: Sequence[str], classes: tuple[str, ...], path: str, fix: str = "") -> None:
    """Raises an error, which may end with a fix, if a set's class names are not those of `classes`, in any order."""
    unknown = [name for name in own if name not in classes]
    missing = [name for name in classes if name not in own]
    if unknown or missing:
        parts = [f"{_listed(unknown)} not in `classes`"] if unknown else []
        parts += [f"{_listed(missing)} of `classes` not in the set"] if missing else []
        fixes = f"; {fix}" if missing and fix else ""
        raise ValueError(
            f"classes: {path} has other classes: {'; '.join(parts)}; training and test sets share theirs{fixes}"
        )


def _listed(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def split_off(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Holds out a share of a set, with the same share of every class up to one image.

    Args:
        images: the set.
        share: share of the images to hold out, in (0, 1).
        seed: the same seed gives the same split.

    Returns:
        The remaining images and the held-out images, each in the order of the set.

    Raises:
        ValueError: for a share outside (0, 1), or one that leaves either part empty.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share: expected a share in (0, 1), got {share!r}")
    n_held = round(share * len(images))
    if not 0 < n_held < len(images):
        raise ValueError(f"share: {share} of {len(images)} images leaves one part empty; give another share")
    rng = np.random.default_rng(seed)
    by_class = _by_class(images, rng)
    # The places are evenly spaced in the order of classes: every class gives its share, rounded down or up, and the
    # total is exact.
    held = np.zeros(len(images), dtype=bool)
    held[by_class[((np.arange(n_held) + rng.random()) * (len(images) / n_held)).astype(np.int64)]] = True
    return images.subset(np.flatnonzero(~held)), images.subset(np.flatnonzero(held))


def k_folds(images: ImageSet, k: int, seed: int) -> list[np.ndarray]:
    """Splits a set into k parts of similar size, in which every class has the same number of images up to one.

    Args:
        images: the set.
        k: number of parts, 2 to the number of images.
        seed: the same seed gives the same parts.

    Returns:
        int64 places of every part, ascending; each image is in one part.

    Raises:
        ValueError: for another k.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= len(images):
        raise ValueError(f"k: expected an int from 2 to the {len(images)} images, got {k!r}")
    by_class = _by_class(images, np.random.default_rng(seed))
    return [np.sort(by_class[fold::k]) for fold in range(k)]


def _by_class(images: ImageSet, rng: np.random.Generator) -> np.ndarray:
    """Places of all images, class by class, in random order within each class."""
    shuffled = rng.permutation(len(images))
    return shuffled[np.argsort(images.labels[shuffled], kind="stable")]

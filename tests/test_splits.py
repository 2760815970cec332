"""What `fit` uses each split for."""

import re
from pathlib import Path

import numpy as np
import pytest
from train_helpers import noise_images, tiny_config, write_folders

from revit_fast.train import splits
from revit_fast.train.data import NoSplitError
from revit_fast.train.datasets import open_images
from revit_fast.train.splits import open_splits, warn_of_few

COUNTS = {"train": 60, "val": 30, "validation": 27, "test": 24}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    for seed, (split, n) in enumerate(COUNTS.items()):
        write_folders(noise_images(n, seed), root / split)
    return root


CASES = {
    "train val test": ("train 60, val 30, test 24", "60 of train to train on, 30 of val to validate .* 24 of test for"),
    "train validation test": ("train 60, validation 27, test 24", "27 of validation to validate"),
    "train val": ("train 60, val 15, val 15", "15 of val to validate .* 15 of the other half of val for the report"),
    "train test": ("train 54, train 6, test 24", "54 of train to train on, 6 more of it to validate .* 24 of test for"),
    "train": ("train 54, train 6", "no other split for a report"),
    "train val test, 0.25": ("train 45, train 15, test 24", "15 more of it to validate .* 24 of test for the report"),
    "train val, 0.25": ("train 45, train 15, val 30", "15 more of it to validate .* 30 of val for the report"),
}
"""Splits, and an explicit share; then the split and the number of images of every purpose, and what is said of them."""


@pytest.mark.parametrize("present", CASES)
def test_every_split_has_one_purpose(images, tmp_path, present):
    expected, said = CASES[present]
    present, _, share = present.partition(", ")
    for split in present.split():
        (tmp_path / split).symlink_to(images / split)
    found = open_splits(tiny_config(data=str(tmp_path), held_out_share=float(share or 0)))
    names, counts = [], []
    for chosen in (found.images, found.held_out, found.test):
        if chosen is not None:
            own = [chosen.name(i) for i in range(len(chosen))]
            (split,) = {Path(name).relative_to(tmp_path).parts[0] for name in own}
            counts.append(f"{split} {len(own)}")
            assert np.ptp(np.bincount(chosen.labels)) <= 1, "classes have unequal shares"
            names += own
    assert ", ".join(counts) == expected
    assert len(set(names)) == len(names), "an image has two purposes"
    assert re.search(said, found.text)
    again = open_splits(found.config)  # as a resumed run does
    assert again.text == found.text
    assert again.held_out.name(0) == found.held_out.name(0)


def test_images_without_splits_have_no_report(images):
    found = open_splits(tiny_config(data=str(images / "train")))
    assert (len(found.images), len(found.held_out), found.test) == (54, 6, None)


def test_idx_files_have_no_validation_split(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"")
    for split in ("val", "validation", "extra"):
        with pytest.raises(NoSplitError, match=f"idx files hold 'train' and 'test', got '{split}'"):
            open_images(tmp_path, split, others=False)


def test_few_images_are_warned_of():
    assert warn_of_few(splits.FEW_IMAGES) is None
    assert "calibrated on 199 images; below 200, its threshold is uncertain" in warn_of_few(199)

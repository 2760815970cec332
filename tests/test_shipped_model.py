"""The model that the package ships does what its card says."""

import json

import numpy as np
import pytest

import revit_fast as rf
from revit_fast.models.hub import SHIPPED, shipped_names
from revit_fast.streaming.bundle import read_bundle
from revit_fast.train.config import TrainConfig
from revit_fast.train.datasets import open_images

NAME = "fashion-mnist"


@pytest.fixture(scope="module")
def images():
    return open_images(SHIPPED / NAME / "images", "test", read_bundle(NAME).classes)


def test_it_is_shipped_and_small():
    assert NAME in shipped_names()
    weights = sum(path.stat().st_size for path in (SHIPPED / NAME).glob("*.safetensors"))
    assert weights <= 4 << 20
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (SHIPPED / NAME).rglob("*") if path.is_file())


def test_it_classifies_as_its_card_says(images):
    """On 1,000 images accuracies are within four standard errors of those of the whole test set."""
    pipe = rf.load(NAME)
    pixels = [images.image(i) for i in range(len(images))]
    assert len(pixels) == 1000
    card = (SHIPPED / NAME / "README.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if "%" in line and "|" in line
    ]
    stated = {row[0]: row for row in rows}
    policies = {f"fixed {g}x{g}": ("fixed", g) for g in pipe.model.grids}
    policies[f"TLA threshold {pipe.prep.policy.threshold:.6g}"] = pipe.prep.policy
    for name, policy in policies.items():
        results = list(pipe.with_policy(policy)(pixels))
        right = np.mean([int(r.logits.argmax()) == label for r, label in zip(results, images.labels, strict=True)])
        accuracy = float(stated[name][1].rstrip("%")) / 100
        assert abs(right - accuracy) < 4 * (accuracy * (1 - accuracy) / 1000) ** 0.5, name
        shares = [np.mean([r.grid == g for r in results]) for g in pipe.model.grids]
        said = [float(cell.rstrip("%")) / 100 for cell in stated[name][8:11]]
        assert shares == pytest.approx(said, abs=0.065), name


def test_its_recipe_can_be_run_again():
    recipe = json.loads((SHIPPED / NAME / "recipe.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(recipe)
    assert config.grids == rf.load(NAME).model.grids


def test_the_licence_of_its_images_lies_beside_them():
    assert "Copyright (c) 2017 Zalando SE" in (SHIPPED / NAME / "images" / "LICENSE").read_text(encoding="utf-8")

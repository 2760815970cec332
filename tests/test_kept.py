"""Predictions and times that are kept: taken again as long as model, images and settings are the same."""

import os

import numpy as np
import pytest
import torch
from small_models import drawn
from train_helpers import noise_images, write_folders

import revit_fast as rf
from revit_fast.train import kept as kept_module
from revit_fast.train.datasets import open_images
from revit_fast.train.kept import Kept
from revit_fast.train.report import Time


@pytest.fixture
def calls(monkeypatch):
    """Names of the sets that were predicted."""
    made = []
    predict = kept_module.predict_lengths

    def counted(fast, images, **options):
        made.append(len(images))
        return predict(fast, images, **options)

    monkeypatch.setattr(kept_module, "predict_lengths", counted)
    return made


def make_model(seed=0):
    options = dict(grids=(4, 3), patch_size=2, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    model = drawn(rf.ReViT(**options))
    with torch.no_grad():
        model.head.bias[0] += seed
    return model


@pytest.fixture
def data(tmp_path):
    write_folders(noise_images(9), tmp_path / "data")
    return tmp_path / "data"


def test_predictions_are_made_once(tmp_path, data, calls):
    (data / "dark" / "torn.png").write_bytes(b"no image")
    fast, images = rf.optimize(make_model()), open_images(data)
    first = Kept(tmp_path / "kept", fast).predictions("test", images)
    again = Kept(tmp_path / "kept", rf.optimize(make_model())).predictions("test", open_images(data))
    assert calls == [10]
    np.testing.assert_array_equal(first.logits, again.logits)
    assert first.unreadable == again.unreadable
    assert len(again.unreadable) == 1
    assert os.listdir(tmp_path / "kept") == ["test.npz"]


def changed_image(data):
    path = data / "dark" / "0.png"
    path.write_bytes((data / "bright" / "2.png").read_bytes())


def one_more(data):
    (data / "dark" / "more.png").write_bytes((data / "bright" / "2.png").read_bytes())


def other_class(data):
    os.rename(data / "dark" / "0.png", data / "bright" / "0.png")


@pytest.mark.parametrize("change", [changed_image, one_more, other_class])
def test_changed_images_are_predicted_anew(tmp_path, data, calls, change):
    fast = rf.optimize(make_model())
    for _ in range(2):
        Kept(tmp_path / "kept", fast).predictions("test", open_images(data))
    change(data)
    for _ in range(2):
        Kept(tmp_path / "kept", fast).predictions("test", open_images(data))
    assert len(calls) == 2


def other_norm(model):
    model.pretrained_cfg = {"mean": (0.1, 0.1, 0.1)}
    return model


@pytest.mark.parametrize(
    ("model", "settings"),
    [(lambda: make_model(1), None), (make_model, {"crop_pct": 0.5}), (lambda: other_norm(make_model()), None)],
)
def test_another_model_or_setting_predicts_anew(tmp_path, data, calls, model, settings):
    images = open_images(data)
    Kept(tmp_path / "kept", rf.optimize(make_model())).predictions("test", images)
    got = Kept(tmp_path / "kept", rf.optimize(model()), settings).predictions("test", images)
    assert len(calls) == 2
    expected = kept_module.predict_lengths(rf.optimize(model()), images, settings=settings).logits
    np.testing.assert_array_equal(got.logits, expected)


def test_images_in_memory_are_known_by_their_pixels(tmp_path, calls):
    fast = rf.optimize(make_model())
    for seed in (0, 0, 1):
        Kept(tmp_path / "kept", fast).predictions("test", noise_images(6, seed))
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: b"{}"])
def test_a_damaged_file_is_made_anew(tmp_path, data, calls, damage):
    fast, path = rf.optimize(make_model()), tmp_path / "kept" / "test.npz"
    first = Kept(tmp_path / "kept", fast).predictions("test", open_images(data))
    path.write_bytes(damage(path.read_bytes()))
    again = Kept(tmp_path / "kept", fast).predictions("test", open_images(data))
    np.testing.assert_array_equal(first.logits, again.logits)
    assert len(calls) == 2


def test_what_cannot_be_kept_is_said(tmp_path, data):
    (tmp_path / "kept").write_text("a file")
    said = []
    got = Kept(tmp_path / "kept", rf.optimize(make_model()), say=said.append).predictions("test", open_images(data))
    assert got.readable.all()
    assert said[0].startswith("warning: predictions are not kept, and are made again with --resume: ")


def test_an_assigner_is_trained_once(tmp_path, data):
    images, made = open_images(data), []

    def make():
        made.append(1)
        torch.manual_seed(len(made))
        tla = rf.TokenLengthAssigner((4, 3), thumbnail_px=8, widths=(4, 4)).eval()
        tla.calibrate([images.image(i) for i in range(9)], [i % 2 for i in range(9)])
        return tla, np.arange(5)

    def taken(about=("a", 0)):
        return Kept(tmp_path / "kept", rf.optimize(make_model())).assigner(about, (images,), make)

    tla, places = taken()
    again, same = taken()
    assert (len(made), same.tolist()) == (1, places.tolist())
    pixels = [images.image(i) for i in range(9)]
    assert torch.equal(tla.predict_proba(pixels), again.predict_proba(pixels))
    np.testing.assert_array_equal(tla.calibration.suffices, again.calibration.suffices)
    taken(("a", 1))
    other = (tmp_path / "kept" / "assigner.safetensors").read_bytes()
    taken(("a", 0))
    assert len(made) == 3
    (tmp_path / "kept" / "assigner.safetensors").write_bytes(other)  # as if a run had been killed between the files
    taken(("a", 0))
    assert len(made) == 4


def test_times_are_measured_once(tmp_path):
    measured = []

    def measure():
        measured.append(1)
        return {"a": Time(10.0, (9.0, 11.0), 1.0, (0.9, 1.1))}, {"cpu": "one"}

    kept = Kept(tmp_path / "kept", rf.optimize(make_model()))
    first = kept.times([("fixed", 4)], measure)
    assert kept.times([("fixed", 4)], measure) == first
    assert len(measured) == 1
    kept.times([("fixed", 3)], measure)
    assert len(measured) == 2

"""The assigner: fused against the module, batches, calibration, files, sizes."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate
from PIL import Image

import revit_fast as rf
from revit_fast.adaptive.assigner import MAX_SHARE, SIZES, fit_temperature
from revit_fast.adaptive.network import STEM_PATCH, SeparableCNN
from revit_fast.models.macs import forward_macs

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 30 * i + 16, (20 + 7 * i, 90 - 5 * i, 3), dtype=np.uint8) for i in range(9)]
IMAGES[3] = IMAGES[3][..., 0]


def make(**options):
    """An assigner whose every parameter and statistic is drawn at random."""
    generator = torch.Generator().manual_seed(0)
    tla = rf.TokenLengthAssigner(**{"thumbnail_px": 32, "widths": (8, 20, 33)} | options)
    with torch.no_grad():
        for name, tensor in tla.network.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn.abs() + 0.5 if "running_var" in name else drawn / max(tensor[0].numel(), 2) ** 0.5)
    return tla.eval()


@pytest.mark.parametrize("widths", [(8, 20, 33), (16,), (5, 7, 9, 11)])
@pytest.mark.parametrize("thumbnail_px", [16, 36])
def test_fused_is_as_accurate_as_the_module(widths, thumbnail_px):
    tla = make(widths=widths, thumbnail_px=thumbnail_px)
    x = tla.images_of(tla.thumbnails(IMAGES))
    with torch.no_grad():
        truth = copy.deepcopy(tla).double()(x.double())
        assert_as_accurate(tla._logits(tla.thumbnails(IMAGES)), tla(x), truth, "logits")
    torch.testing.assert_close(tla.predict_proba(IMAGES).double(), truth.softmax(1), rtol=1e-4, atol=1e-6)
    assert truth.std(dim=0).max() > 1e-3, "the images are told apart"


def test_thumbnails_are_those_of_pillow():
    tla = make()
    box = (1.5, 2.0, 40.0, 19.0)
    x = tla.images_of(tla.thumbnails(IMAGES[:1], box))
    image = Image.fromarray(IMAGES[0]).resize((32, 32), Image.Resampling.BILINEAR, box=box)
    expected = (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(x[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_thumbnails_are_the_rows_of_a_pack_and_make_none(packs_made, dtype):
    tla = make()
    images = [image for image in IMAGES if image.shape[0] < 128]  # of larger images not every row is read
    boxes = [(1.5, 2.0, 30.25, image.shape[0] - 0.5) for image in images]
    rows = tla.thumbnails(images, boxes, dtype)
    tla.predict_proba(images, boxes)
    tla.entropies(images, boxes)
    tla.calibrate(images)
    assert packs_made == []
    options = {"mean": tla.mean, "std": tla.std, "interpolation": "bilinear", "dtype": dtype}
    assert torch.equal(rows, rf.ops.resize_patchify(images, 32, STEM_PATCH, boxes=boxes, **options).data)


@pytest.mark.parametrize("height", [63, 64, 127, 128, 1001, 3000])
def test_thumbnails_of_large_images_are_near_those_of_all_rows(height):
    tla = make()
    y, x = np.mgrid[0:height, 0:300] / height
    smooth = np.stack([127 + 120 * np.sin(9 * y + 5 * x), 255 * y, 255 * (1 - y)], -1).astype(np.uint8)
    box = (0, 0.1 * height, 300, 0.9 * height)
    pixels = tla.images_of(tla.thumbnails([smooth], box, torch.uint8))[0].permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BILINEAR, box=box))
    step = int(0.8 * height) // 64
    if step < 2:
        np.testing.assert_array_equal(pixels, expected)
    assert np.abs(pixels.astype(int) - expected).max() <= 1 + 255 * max(step, 0) / height


@pytest.mark.parametrize("n", [1, 2, 65])
def test_an_image_alone_and_in_any_batch(n):
    tla = make()
    images = [IMAGES[i % len(IMAGES)] for i in range(n)]
    together = tla.predict_proba(images)
    for i in {0, n // 2, n - 1}:
        assert torch.equal(tla.predict_proba([images[i]])[0], together[i])


def test_changed_parameters_are_noticed():
    tla = make()
    before = tla.predict_proba(IMAGES)
    with torch.no_grad():
        tla.network.head.bias += torch.tensor([1.0, 0.0, -1.0])
    after = tla.predict_proba(IMAGES)
    assert (after[:, 0] > before[:, 0]).all()
    tla.network.norm.running_mean += 1.0
    assert not torch.equal(tla.predict_proba(IMAGES), after)


def test_it_trains():
    torch.manual_seed(0)
    tla = rf.TokenLengthAssigner(grids=(4, 2), thumbnail_px=16, widths=(8, 16))
    flat = [np.full((20, 20, 3), v, np.uint8) for v in range(0, 240, 8)]
    noisy = [np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8) for i in range(30)]
    x = tla.images_of(tla.thumbnails(flat + noisy))
    y = torch.tensor([1] * len(flat) + [0] * len(noisy))
    optimizer = torch.optim.AdamW(tla.parameters(), lr=0.01)
    for _ in range(40):
        loss = F.cross_entropy(tla(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert tla.eval().assign([flat[3], noisy[5]]) == [2, 4]


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        make().train().predict_proba(IMAGES)


class TestAssign:
    def test_policies(self):
        tla = make()
        p = tla.predict_proba(IMAGES)
        assert tla.assign(IMAGES) == [tla.grids[i] for i in p.argmax(1)]
        assert tla.assign(IMAGES[:4], "cycle", first_index=2) == [7, 14, 10, 7]
        flat = np.full((40, 40, 3), 99, np.uint8)
        assert tla.assign([flat, IMAGES[8]], "entropy") == [7, 14]

    def test_boxes(self):
        """What lies outside the box has no say."""
        tla = make()
        painted = IMAGES[0].copy()
        painted[:, 45:] = 0
        box = (0, 0, 40, 20)
        assert torch.equal(tla.predict_proba([painted], box), tla.predict_proba([IMAGES[0]], box))
        assert not torch.equal(tla.predict_proba([painted]), tla.predict_proba([IMAGES[0]]))


class TestCalibration:
    def test_temperature_is_the_best_one(self):
        generator = torch.Generator().manual_seed(1)
        true = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
        for scale in (0.2, 1.0, 4.0):
            assert fit_temperature(scale * true, labels) == pytest.approx(scale, rel=0.1)
        fitted = fit_temperature(3 * true, labels)
        losses = [F.cross_entropy(3 * true / (f * fitted), labels) for f in (0.99, 1.0, 1.01)]
        assert losses[1] == min(losses)

    def test_budget_by_held_out_images(self):
        tla = make()
        images = [np.roll(image, i, axis=0) for i, image in enumerate(IMAGES * 12)]
        with pytest.raises(ValueError, match="calibrate"):
            tla.assign(images, ("budget", 100))
        tla.calibrate(images)
        for budget in (60, 100, 150):
            mean = np.mean([g * g for g in tla.assign(images, ("budget", budget))])
            assert budget - 15 < mean <= budget

    def test_labels_set_the_temperature(self):
        tla = make()
        sharp = tla.calibrate(IMAGES, tla.predict_proba(IMAGES).argmax(1)).temperature
        wrong = tla.calibrate(IMAGES, tla.predict_proba(IMAGES).argmin(1)).temperature
        assert sharp < 1 < wrong
        assert tla.calibrate(IMAGES).temperature == wrong, "without labels it stays"
        assert tla.predict_proba(IMAGES).max() < 0.6

    @pytest.mark.parametrize("labels", [[0, 1], [3] * 9, [-1] * 9])
    def test_bad_labels(self, labels):
        with pytest.raises(ValueError, match=r"labels: expected 9 indices in \[0, 3\)"):
            make().calibrate(IMAGES, labels)

    def test_no_images(self):
        with pytest.raises(ValueError, match="images"):
            make().calibrate([])


class TestFiles:
    def test_round_trip(self, tmp_path):
        tla = make(mean=(0.1, 0.2, 0.3))
        tla.calibrate(IMAGES, [0] * 9)
        tla.save(tmp_path / "tla.safetensors")
        assert [p.name for p in tmp_path.iterdir()] == ["tla.safetensors"]
        read = rf.TokenLengthAssigner.load(tmp_path / "tla.safetensors")
        assert torch.equal(read.predict_proba(IMAGES), tla.predict_proba(IMAGES))
        assert read.assign(IMAGES, ("budget", 90)) == tla.assign(IMAGES, ("budget", 90))
        assert read.calibration.entropies == tla.calibration.entropies
        assert not read.training

    def test_a_timm_backbone(self, tmp_path):
        torch.manual_seed(0)
        tla = rf.TokenLengthAssigner(backbone="test_resnet.r160_in1k", thumbnail_px=64).eval()
        tla.save(tmp_path / "tla.safetensors")
        read = rf.TokenLengthAssigner.load(tmp_path / "tla.safetensors")
        assert read.backbone == "test_resnet.r160_in1k"
        assert torch.equal(read.predict_proba(IMAGES), tla.predict_proba(IMAGES))
        assert tla.predict_proba(IMAGES).shape == (9, 3)

    def test_copies(self):
        tla = make()
        expected = tla.predict_proba(IMAGES)
        for other in (copy.deepcopy(tla), pickle.loads(pickle.dumps(tla))):
            assert torch.equal(other.predict_proba(IMAGES), expected)

    def test_what_is_no_assigner(self, tmp_path):
        from safetensors.torch import save_file

        with pytest.raises(FileNotFoundError, match="absent"):
            rf.TokenLengthAssigner.load(tmp_path / "absent")
        (tmp_path / "text").write_text("hello")
        with pytest.raises(ValueError, match="cannot be read"):
            rf.TokenLengthAssigner.load(tmp_path / "text")
        save_file({"x": torch.zeros(2)}, tmp_path / "other")
        with pytest.raises(ValueError, match=r"not written by TokenLengthAssigner\.save"):
            rf.TokenLengthAssigner.load(tmp_path / "other")
        make().save(tmp_path / "whole")
        torn = (tmp_path / "whole").read_bytes()[:-100]
        (tmp_path / "torn").write_bytes(torn)
        with pytest.raises(ValueError, match="cannot be read"):
            rf.TokenLengthAssigner.load(tmp_path / "torn")

    def test_settings_are_readable(self, tmp_path):
        from safetensors import safe_open

        make().save(tmp_path / "tla.safetensors")
        with safe_open(tmp_path / "tla.safetensors", "pt") as file:
            assert json.loads(file.metadata()["assigner"])["grids"] == [14, 10, 7]


class TestSizes:
    def test_macs_are_counted(self):
        network = SeparableCNN(3, (8, 20, 33))
        counted = 0

        def count(module, inputs, output):
            nonlocal counted
            if isinstance(module, torch.nn.Conv2d):
                counted += output[0].numel() * module.weight[0].numel()
            elif isinstance(module, torch.nn.Linear):
                counted += module.weight.numel()

        for module in network.modules():
            module.register_forward_hook(count)
        network(torch.zeros(1, 3, 36, 36))
        assert network.macs(36) == counted

    @pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_small_patch16_224"])
    def test_sized_to_the_model(self, name):
        model = rf.create_model(name)
        tla = rf.TokenLengthAssigner.for_model(model)
        assert (tla.thumbnail_px, tla.widths) in SIZES
        assert tla.network.macs(tla.thumbnail_px) <= MAX_SHARE * forward_macs(model, 49)

    def test_sized_to_the_model_with_a_timm_backbone(self):
        tla = rf.TokenLengthAssigner.for_model(
            rf.create_model("deit_tiny_patch16_224"), backbone="test_resnet.r160_in1k"
        )
        assert tla.thumbnail_px == SIZES[-1][0], "the smallest, as none is light enough"

    def test_model_macs(self):
        """DeiT-S has 4.60 GMACs at 14x14 tokens, 2.27 at 10x10 and 1.10 at 7x7."""
        model = rf.create_model("deit_small_patch16_224")
        got = [round(forward_macs(model, g * g) / 1e9, 2) for g in (14, 10, 7)]
        assert got == [4.6, 2.27, 1.1]

    def test_bad_thumbnail(self):
        with pytest.raises(ValueError, match=f"multiple of {STEM_PATCH}"):
            rf.TokenLengthAssigner(thumbnail_px=30)

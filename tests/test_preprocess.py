"""The preprocessor: timm's crop, grids by policy, bad arguments."""

import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import revit_fast as rf
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.policies import grey_entropy
from revit_fast.adaptive.preprocess import ENTROPY_PX
from revit_fast.io.images import ImageError
from revit_fast.models.settings import IMAGENET_MEAN, IMAGENET_STD

RNG = np.random.default_rng(0)


def photo(height, width, seed=0):
    """A smooth random image with some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


IMAGES = [photo(60 + i, 100 - 7 * i, i) for i in range(8)]


def timm_pixels(image, image_px, crop_pct, interpolation):
    """timm's evaluation transform before normalisation, uint8 `[H, W, 3]`."""
    options = {"crop_pct": crop_pct, "interpolation": interpolation, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    tensor = create_transform(image_px, **options)(Image.fromarray(image))
    return (tensor.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def our_pixels(image, image_px, crop_pct, interpolation):
    prep = rf.AdaptivePreprocessor(
        grids=(image_px // 4,),
        patch_size=4,
        crop_pct=crop_pct,
        interpolation=interpolation,
        policy="cycle",
        dtype=torch.uint8,
    )
    grid = image_px // 4
    rows = prep([image]).batch.data.view(grid, grid, 4, 4, 3)
    return rows.permute(0, 2, 1, 3, 4).reshape(image_px, image_px, 3).numpy()


class TestCrop:
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    @pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (400, 400), (333, 777), (90, 61), (31, 257)])
    @pytest.mark.parametrize(("image_px", "crop_pct"), [(224, 0.9), (160, 0.875), (112, 1.0)])
    def test_equals_timm(self, height, width, image_px, crop_pct, interpolation):
        """Within one level of 255: the edges of the region are float32, and timm's passes may come in another order.

        How many differ depends on ties: at a scale of 6/11 every 22nd value is an exact half, rounded by the last bit.
        """
        image = photo(height, width)
        ours = our_pixels(image, image_px, crop_pct, interpolation).astype(int)
        theirs = timm_pixels(image, image_px, crop_pct, interpolation).astype(int)
        assert np.abs(ours - theirs).max() <= 1
        assert (ours != theirs).mean() < 0.05

    @pytest.mark.parametrize(("side", "image_px", "crop_pct"), [(448, 224, 1.0), (512, 224, 0.875), (448, 112, 0.875)])
    def test_bit_equal_where_edges_are_exact(self, side, image_px, crop_pct):
        """A region whose edges float32 holds, an image that no order of passes makes a difference to."""
        box = eval_box(side, side, image_px, crop_pct)
        assert all(float(np.float32(edge)) == edge for edge in box)
        image = photo(side, side)
        ours = our_pixels(image, image_px, crop_pct, "bicubic")
        np.testing.assert_array_equal(ours, timm_pixels(image, image_px, crop_pct, "bicubic"))

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 30_000), (30_000, 2), (1, 500), (3000, 4000)])
    @pytest.mark.parametrize("crop_pct", [0.5, 0.9, 1.0])
    def test_within_the_image(self, height, width, crop_pct):
        left, upper, right, lower = eval_box(height, width, 224, crop_pct)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        side = 224 / math.floor(224 / crop_pct) * min(height, width)
        assert right - left == pytest.approx(side, rel=0.01)
        assert lower - upper == pytest.approx(side, rel=0.01)
        batch, _ = rf.AdaptivePreprocessor(policy=("fixed", 7), crop_pct=crop_pct)(
            [np.full((height, width, 3), 128, np.uint8)]
        )
        grey = (128 / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        torch.testing.assert_close(batch.data.view(-1, 3), grey.expand(49 * 256, 3))


class TestCall:
    def test_every_kind_of_source(self, tmp_path):
        Image.fromarray(IMAGES[0]).save(tmp_path / "x.png")
        encoded = (tmp_path / "x.png").read_bytes()
        sources = [tmp_path / "x.png", str(tmp_path / "x.png"), encoded, Image.fromarray(IMAGES[0]), IMAGES[0]]
        batch, grids = rf.AdaptivePreprocessor(policy=("fixed", 7))(sources)
        assert grids == [7] * 5
        assert batch.grids == ((7, 7),) * 5
        rows = batch.split()
        assert all(torch.equal(row, rows[0]) for row in rows)

    def test_an_image_is_the_same_alone_and_in_any_batch(self):
        torch.manual_seed(0)  # an assigner that tells the images apart
        tla = rf.TokenLengthAssigner(thumbnail_px=16, widths=(8, 8)).eval()
        tla.calibrate(IMAGES)
        prep = rf.AdaptivePreprocessor(tla, policy=("budget", 125))
        batch, grids = prep(IMAGES)
        assert len(set(grids)) > 1
        for i, image in enumerate(IMAGES):
            alone = prep([image])
            assert alone.grids == [grids[i]]
            assert torch.equal(alone.batch.data, batch.split()[i])

    def test_the_assigner_sees_what_the_model_sees(self):
        """What the crop leaves out has no say."""
        tla = rf.TokenLengthAssigner(thumbnail_px=16, widths=(8, 8)).eval()
        prep = rf.AdaptivePreprocessor(tla)
        image = photo(100, 300)
        painted = image.copy()
        painted[:, :60] = painted[:, -60:] = 0
        seen = [prep.assign([x]).probabilities for x in (image, painted)]
        np.testing.assert_array_equal(*seen)
        painted[:, 150:] = 0
        assert not np.array_equal(prep.assign([painted]).probabilities, seen[0])

    def test_places_in_the_stream(self):
        prep = rf.AdaptivePreprocessor(policy="cycle")
        assert prep.assign(IMAGES[:3]).grids == [14, 10, 7]
        assert prep.assign(IMAGES[:3], [7, 0, 2]).grids == [10, 14, 7]

    def test_entropy_without_an_assigner(self):
        flat = np.full((50, 40, 3), 7, np.uint8)
        noise = RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)
        assert rf.AdaptivePreprocessor(policy="entropy")([flat, noise]).grids == [7, 14]

    def test_entropy_is_that_of_a_bilinear_thumbnail_and_makes_no_pack(self, packs_made):
        prep = rf.AdaptivePreprocessor(policy="entropy")
        entropy = prep.assign(IMAGES).entropy
        assert packs_made == []
        options = {"boxes": prep.seen(IMAGES), "interpolation": "bilinear", "dtype": torch.uint8}
        rows = rf.ops.resize_patchify(IMAGES, ENTROPY_PX, ENTROPY_PX, **options).data
        np.testing.assert_array_equal(entropy, grey_entropy(rows.view(len(IMAGES), -1, 3).numpy()))

    def test_a_bad_image_is_named(self, tmp_path):
        prep = rf.AdaptivePreprocessor(policy="cycle")
        with pytest.raises(ImageError, match=r"images\[1\], .*absent.png: no such file"):
            prep([IMAGES[0], tmp_path / "absent.png"])
        with pytest.raises(TypeError, match="wrap it"):
            prep("x.png")

    @pytest.mark.parametrize("exact", [True, False])
    def test_a_pickle_with_the_old_option_exact_works(self, exact):
        prep = rf.AdaptivePreprocessor(policy="cycle")
        expected = prep(IMAGES).batch.data
        prep.options["exact"] = exact
        loaded = pickle.loads(pickle.dumps(prep))
        assert "exact" not in loaded.options
        assert torch.equal(loaded(IMAGES).batch.data, expected)


class TestPack:
    @pytest.mark.parametrize("aspect", ["crop", "keep"])
    def test_sides_and_grids_are_the_same(self, aspect):
        prep = rf.AdaptivePreprocessor(policy="cycle", aspect=aspect)
        sides = [prep.grids[i % 3] for i in range(len(IMAGES))]
        expected = prep.pack(IMAGES, sides)
        grids = [prep.grid_hw(image, side) for image, side in zip(IMAGES, sides, strict=True)]
        mixed = [grid if i % 2 else side for i, (grid, side) in enumerate(zip(grids, sides, strict=True))]
        for given in (grids, mixed, np.array(sides)):
            batch = prep.pack(IMAGES, given)
            assert batch.grids == expected.grids == tuple(grids)
            assert batch.lengths == expected.lengths == (196, 100, 49)
            assert torch.equal(batch.data, expected.data)
        assert [prep.n_patches(grid) for grid in grids] == list(expected.seqlens)

    def test_nothing_is_worked_out_again(self, monkeypatch):
        prep = rf.AdaptivePreprocessor(policy="cycle", aspect="keep")
        grids = [prep.grid_hw(image, 7) for image in IMAGES]
        monkeypatch.setattr(prep, "grid_hw", None)
        assert prep.pack(IMAGES, grids).grids == tuple(grids)

    def test_a_grid_that_no_crop_has(self):
        prep = rf.AdaptivePreprocessor(policy="cycle")
        with pytest.raises(ValueError, match=r'grids: images are cropped to squares \(aspect="crop"\), got .* 7x10'):
            prep.pack(IMAGES[:2], [7, (7, 10)])
        with pytest.raises(ValueError, match="shorter"):
            prep.pack(IMAGES[:2], [7])


class TestCalibration:
    def test_on_what_the_model_sees(self):
        """The budget is that of the grids which the same images then get."""
        images = [photo(90, 300, i) for i in range(60)]
        tla = rf.TokenLengthAssigner(thumbnail_px=16, widths=(8, 8)).eval()
        prep = rf.AdaptivePreprocessor(tla)
        prep.calibrate(images)
        for budget in (60, 110, 160):
            grids = prep.with_policy(("budget", budget)).assign(images).grids
            assert budget - 5 < np.mean([g * g for g in grids]) <= budget

    def test_a_budget_follows_its_images(self):
        images = [photo(50, 60, i) for i in range(30)]
        tla = rf.TokenLengthAssigner(thumbnail_px=16, widths=(8, 8)).eval()
        tla.calibrate(images[:2])
        prep = rf.AdaptivePreprocessor(tla, policy=("budget", 120))
        before = prep.policy.threshold
        prep.calibrate(images)
        assert prep.policy.threshold != before

    def test_without_an_assigner(self):
        with pytest.raises(ValueError, match="no assigner"):
            rf.AdaptivePreprocessor(policy="cycle").calibrate(IMAGES)


class TestForModel:
    def test_settings_come_from_the_model(self):
        model = rf.create_model("deit_tiny_patch16_224", grids=(12, 6))
        config = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 1.0, "interpolation": "bilinear"}
        model.pretrained_cfg = config
        prep = rf.AdaptivePreprocessor.for_model(model, policy="cycle")
        assert prep.grids == (12, 6)
        assert prep.crop_pct == 1.0
        assert prep.options["interpolation"] == "bilinear"
        white = np.full((99, 98, 3), 255, np.uint8)
        expected = (1 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
        rows = prep([white]).batch.data
        torch.testing.assert_close(rows.view(-1, 3), expected.expand(144 * 256, 3))
        assert rf.AdaptivePreprocessor.for_model(model, policy="cycle", crop_pct=0.5).crop_pct == 0.5

    def test_drafts_keep_what_the_largest_grid_needs(self):
        prep = rf.AdaptivePreprocessor(policy=("fixed", 7), draft=True)
        assert prep.draft_px == math.floor(224 / 0.9)
        assert rf.AdaptivePreprocessor(policy=("fixed", 7)).draft_px is None


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"policy": "argmax"}, ValueError, "needs an assigner"),
        ({"policy": "best"}, ValueError, "argmax"),
        ({"policy": "cycle", "crop_pct": 0.0}, ValueError, "crop_pct"),
        ({"policy": "cycle", "crop_pct": 1.1}, ValueError, "crop_pct"),
        ({"policy": "cycle", "grids": (7, 10)}, ValueError, "decreasing"),
        ({"tla": rf.TokenLengthAssigner((8, 4)).eval(), "grids": (14, 7)}, ValueError, r"\(8, 4\).*\(14, 7\)"),
        ({"tla": SimpleNamespace(grids=(14, 7))}, TypeError, "SimpleNamespace"),
        ({"tla": rf.TokenLengthAssigner().eval(), "policy": ("budget", 100)}, ValueError, "calibrate"),
    ],
)
def test_bad_arguments(options, error, said):
    with pytest.raises(error, match=said):
        rf.AdaptivePreprocessor(**options)

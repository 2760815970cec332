"""Loaders: the same batch whatever prepares it, the same image at every grid, timm's augmentation, bad images."""

import pickle
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import revit_fast as rf
from revit_fast.io.images import ImageError
from revit_fast.ops import resize_patchify
from revit_fast.train import augment as augmentation
from revit_fast.train.augment import Augmenter, Draws
from revit_fast.train.config import Augment
from revit_fast.train.data import ArrayImages, ImageSet
from revit_fast.train.loader import EvalLoader, TrainLoader, UnreadableError

GRIDS, PATCH, PX = (4, 3, 2), 4, 16
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
SETTINGS = {"grids": GRIDS, "patch_size": PATCH, "batch_size": 4, "mean": MEAN, "std": STD}

RECIPES = {
    "none": Augment.none(),
    "light": Augment.light(),
    "light and mixed": Augment.light(re_prob=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1),
    "deit": Augment(),
    "jitter": Augment(auto_augment=None, color_jitter=0.4, mixup=0.0),
    "rkrr": Augment.none(crop="rkrr", scale=(0.7, 1.0), ratio=(0.9, 1.1), auto_augment="augmix-m3-w2"),
}


def image_set(n=22, sizes=(11, 40), classes=5):
    """Colour and grey images of odd sizes."""
    rng = np.random.default_rng(7)
    images = [rng.integers(0, 256, (*rng.integers(*sizes, 2), 3), dtype=np.uint8) for _ in range(n)]
    images = [image[..., 0] if i % 5 == 4 else image for i, image in enumerate(images)]
    return ArrayImages(images, rng.integers(0, classes, n), [f"class {c}" for c in range(classes)])


class Damaged(ImageSet):
    """A set of which some images cannot be read."""

    def __init__(self, images, bad):
        self.images, self.bad = images, frozenset(bad)
        super().__init__(images.labels, images.classes)

    def image(self, i):
        if i in self.bad:
            raise ImageError(f"torn {i}")
        return self.images.image(i)

    def name(self, i):
        return f"photo {i}"


def train(images=None, augment="light", **changes):
    recipe = RECIPES[augment] if isinstance(augment, str) else augment
    return TrainLoader(images or image_set(), **{**SETTINGS, "augment": recipe} | changes)


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for b, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one.images.data, other.images.data), f"rows of batch {b}"
        assert one.images.seqlens == other.images.seqlens
        assert one.images.grids == other.images.grids
        assert torch.equal(one.images.cu_seqlens, other.images.cu_seqlens)
        assert torch.equal(one.images.tiles, other.images.tiles)
        assert one.target.dtype == other.target.dtype
        assert torch.equal(one.target, other.target), f"targets of batch {b}"
        assert torch.equal(one.index, other.index), f"images of batch {b}"
        assert one.unreadable == other.unreadable


def longest_pixels(batch):
    """uint8 `[B, PX, PX, 3]` of a batch of uint8 rows, its longest view first."""
    n, grid, p = len(batch.index), GRIDS[0], PATCH
    rows = batch.images.data[: n * grid * grid]
    return rows.view(n, grid, grid, p, p, 3).transpose(2, 3).reshape(n, grid * p, grid * p, 3)


class TestDeterminism:
    @pytest.mark.parametrize("augment", RECIPES)
    def test_resumed_epoch(self, augment):
        full = list(train(augment=augment).epoch(3))
        assert len(full) == 5
        for k in (0, 1, 4, 5):
            assert_same(train(augment=augment).epoch(3, first_batch=k), full[k:])
        loader = train(augment=augment)
        list(loader.epoch(0))
        assert_same(loader.epoch(3), full)

    @pytest.mark.parametrize("augment", ["light and mixed", "deit"])
    def test_workers(self, augment):
        images = Damaged(image_set(), {3, 11})
        full = list(train(images, augment, max_unreadable=0.5).epoch(2))
        assert_same(train(images, augment, max_unreadable=0.5, workers=2).epoch(2), full)
        assert_same(train(images, augment, max_unreadable=0.5, workers=2).epoch(2, 3), full[3:])
        assert_same(train(images, augment, max_unreadable=0.5, workers=1).epoch(2, 5), [])

    @pytest.mark.parametrize("augment", ["light and mixed", "deit"])
    def test_ranks_share_the_batches(self, augment):
        """Together the ranks prepare what one process prepares, batch by batch."""
        full = list(train(augment=augment, batch_size=3).epoch(1))
        ranks = [list(train(augment=augment, batch_size=3, rank=r, world_size=2).epoch(1)) for r in range(2)]
        assert [len(batches) for batches in ranks] == [3, 3]
        assert_same([batch for pair in zip(*ranks, strict=True) for batch in pair], full[:6])
        index = torch.cat([batch.index for batches in ranks for batch in batches]).tolist()
        assert len(set(index)) == len(index) == 18

    @pytest.mark.parametrize(("n", "world", "sizes"), [(22, 1, [[4, 4, 4, 4, 4, 2]]), (22, 2, [[4, 4, 3], [4, 4, 3]])])
    def test_all_images_without_drop_last(self, n, world, sizes):
        ranks = [list(train(drop_last=False, rank=r, world_size=world).epoch(0)) for r in range(world)]
        assert [[len(batch.index) for batch in batches] for batches in ranks] == sizes
        assert all(len(train(drop_last=False, rank=r, world_size=world)) == len(sizes[r]) for r in range(world))
        assert sorted(i for batches in ranks for batch in batches for i in batch.index.tolist()) == list(range(n))

    def test_fewer_images_left_than_ranks(self):
        images = image_set(13)
        ranks = [list(train(images, drop_last=False, rank=r, world_size=3).epoch(0)) for r in range(3)]
        assert [len(batches) for batches in ranks] == [1, 1, 1]

    def test_an_image_does_not_depend_on_its_batch(self):
        images = image_set()
        for augment in ("light", "deit", "jitter"):
            recipe = RECIPES[augment]
            recipe = recipe if not recipe.mixes else replace(recipe, mixup=0.0, cutmix=0.0)
            views = [{}, {}]
            for found, size in zip(views, (1, 11), strict=True):
                for batch in train(images, recipe, batch_size=size, dtype=torch.uint8).epoch(4):
                    found |= dict(zip(batch.index.tolist(), longest_pixels(batch), strict=True))
            assert all(torch.equal(views[0][i], views[1][i]) for i in range(22))

    def test_what_differs(self):
        def first(seed=0, epoch=0):
            return next(train(seed=seed).epoch(epoch))

        assert not torch.equal(first().index, first(epoch=1).index)
        assert not torch.equal(first().index, first(seed=1).index)
        one, two = (Draws.of_epoch(0, epoch, 50) for epoch in (0, 1))
        assert not (one.uniforms == two.uniforms).any()
        assert len(np.unique(one.seeds)) == 150
        assert np.array_equal(one.at([3, 7]).seeds, Draws.of_epoch(0, 0, 8).at([3, 7]).seeds), "whatever the set's size"

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("augment", ["light and mixed", "deit"])
    def test_global_generators_are_untouched(self, augment, workers):
        def states():
            return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

        before = states()
        loader = train(augment=augment, workers=workers)
        assert states() == before
        for _ in loader.epoch(0):
            assert states() == before
        assert len(loader) == 5

    def test_global_generators_come_back_after_an_error(self):
        python, numpy, torch_ = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

        def fail():
            with augmentation.borrowed_generators():
                augmentation._seed_generators(np.array([1, 2, 3], dtype=np.uint32))
                raise RuntimeError("of a transform")

        with pytest.raises(RuntimeError, match="of a transform"):
            fail()
        assert random.getstate() == python
        assert np.random.get_state()[1].tolist() == numpy
        assert torch.equal(torch.get_rng_state(), torch_)

    def test_global_generators_have_no_influence(self):
        full = list(train(augment="deit").epoch(0))
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        assert_same(train(augment="deit").epoch(0), full)

    def test_to_other_processes(self):
        """Where processes are not forked, a loader is pickled."""
        loader = train(augment="deit")
        assert_same(pickle.loads(pickle.dumps(loader)).epoch(0), loader.epoch(0))


class TestViews:
    @pytest.mark.parametrize("augment", RECIPES)
    def test_all_are_the_same_image(self, augment):
        """Every view is `resize_patchify` of the one augmented image, mixtures included."""
        pixels = list(train(augment=augment, dtype=torch.uint8, views=[0]).epoch(0))
        for batch, raw in zip(train(augment=augment).epoch(0), pixels, strict=True):
            longest = list(longest_pixels(raw))
            sizes = [grid * PATCH for grid in GRIDS for _ in longest]
            expected = resize_patchify(longest * 3, sizes, PATCH, mean=MEAN, std=STD)
            assert torch.equal(batch.images.data, expected.data)
            assert batch.images.seqlens == expected.seqlens
            assert batch.images.lengths == (16, 9, 4)
            assert batch.images.length_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
            assert torch.equal(batch.target, raw.target)

    def test_a_batch_is_one_pack(self, packs_made):
        loader = train()
        packs_made.clear()
        next(iter(loader.epoch(0)))
        assert packs_made == [3 * 4], "views of 4 images are made from rows alone"

    def test_views_of_one_process(self):
        """Length-parallel ranks: each its own view of the same images."""
        full = list(train(augment="deit").epoch(0))
        for views in ((0,), (1,), (2,), (0, 2)):
            for batch, whole in zip(train(augment="deit", views=views).epoch(0), full, strict=True):
                rows = whole.images.split()
                expected = [rows[4 * view + i] for view in views for i in range(4)]
                assert torch.equal(batch.images.data, torch.cat(expected))
                assert batch.images.length_index.tolist() == [view for view in views for _ in range(4)]
                assert torch.equal(batch.target, whole.target)

    @pytest.mark.parametrize(("n_images", "counts"), [(1, [1] * 7), (3, [3, 2, 2]), (4, [4, 3]), (7, [7]), (9, [7])])
    def test_parts(self, n_images, counts):
        [whole] = train(Damaged(image_set(8), {3}), "deit", batch_size=8, max_unreadable=0.5).epoch(0)
        parts = whole.parts(n_images)
        assert [len(part.target) for part in parts] == counts
        assert torch.equal(torch.cat([part.target for part in parts]), whole.target)
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
        assert [part.unreadable for part in parts] == [whole.unreadable] + [[]] * (len(parts) - 1)
        rows, begin = whole.images.split(), 0
        for part in parts:
            n = len(part.target)
            expected = [rows[7 * view + i] for view in range(3) for i in range(begin, begin + n)]
            assert torch.equal(part.images.data, torch.cat(expected))
            assert part.images.lengths == whole.images.lengths
            assert part.images.length_index.tolist() == [view for view in range(3) for _ in range(n)]
            begin += n

    def test_bilinear(self):
        one, other = (next(train(augment="none", interpolation=name).epoch(0)) for name in ("bilinear", "bicubic"))
        assert not torch.equal(one.images.data, other.images.data)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
    def test_dtype(self, dtype):
        batch = next(train(dtype=dtype).epoch(0))
        assert batch.images.data.dtype == dtype
        assert (batch.images.normalization is not None) == (dtype == torch.uint8)


class TestAugmentation:
    def test_none_is_evaluation(self):
        images = image_set()
        [whole] = EvalLoader(images, **SETTINGS | {"batch_size": 22})
        rows = whole.images.split()
        for batch in train(images, "none").epoch(0):
            assert batch.target.tolist() == images.labels[batch.index].tolist()
            for i, row in zip(batch.index.tolist(), batch.images.split()[:4], strict=True):
                assert torch.equal(row, rows[i]), "the longest view"

    def test_light_is_a_window_of_the_padded_image(self):
        """Every place of the window and both directions occur, and nothing else."""
        images = image_set(300, sizes=(PX, PX + 1))
        seen = set()
        for batch in train(images, Augment.light(pad=2), dtype=torch.uint8, batch_size=50).epoch(0):
            for i, view in zip(batch.index.tolist(), longest_pixels(batch).numpy(), strict=True):
                image = images.image(i)
                image = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
                padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
                places = [
                    (top, left, flip)
                    for top in range(5)
                    for left in range(5)
                    for flip in (1, -1)
                    if np.array_equal(padded[top : top + PX, left : left + PX][:, ::flip], view)
                ]
                assert len(places) == 1
                seen.add(places[0])
        assert len(seen) == 50

    def test_flip_probability(self):
        images = ArrayImages(
            np.arange(PX, dtype=np.uint8)[None, None, :].repeat(2000, 0).repeat(PX, 1), [0] * 2000, ["a"]
        )
        for p in (0.0, 0.3, 1.0):
            [batch] = train(images, Augment.none(hflip=p), dtype=torch.uint8, batch_size=2000, views=[0]).epoch(0)
            flipped = (longest_pixels(batch)[:, 0, 0, 0] == PX - 1).float().mean().item()
            assert flipped == pytest.approx(p, abs=0.05 if 0 < p < 1 else 0)

    def test_crop_and_jitter_are_timm_s(self):
        """The same as timm's own transform with the generators seeded alike."""
        create_transform = pytest.importorskip("timm.data").create_transform
        images = image_set()
        recipe = Augment.none(crop="rrc", hflip=0.5, color_jitter=0.4)
        theirs = create_transform(PX, is_training=True, interpolation="bicubic", color_jitter=0.4, use_prefetcher=True)
        draws = Draws.of_epoch(5, 2, len(images))
        for batch in train(images, recipe, seed=5, dtype=torch.uint8).epoch(2):
            for i, view in zip(batch.index.tolist(), longest_pixels(batch), strict=True):
                with augmentation.borrowed_generators():
                    python, numpy, generator = map(int, draws.seeds[i])
                    random.seed(python)
                    np.random.seed(numpy)
                    torch.manual_seed(generator)
                    expected = theirs(Image.fromarray(images.image(i)).convert("RGB"))
                assert torch.equal(view, expected.permute(1, 2, 0))

    @pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "rand-m0", "original", "v0", "augmix-m10"])
    def test_policies_run_at_full_strength(self, policy):
        images = image_set(200)
        for batch in train(images, Augment(auto_augment=policy), batch_size=20).epoch(0):
            assert batch.images.data.isfinite().all()

    def test_posterize_without_bits_is_black(self):
        auto_augment = pytest.importorskip("timm.data.auto_augment")
        image = Image.fromarray(image_set().image(0))
        assert not np.asarray(augmentation._posterized(auto_augment.posterize, image, 0)).any()
        posterized = np.asarray(augmentation._posterized(auto_augment.posterize, image, 3))
        assert np.array_equal(posterized, np.asarray(image) & 0b11100000)

    @pytest.mark.parametrize("mode", ["const", "pixel", "rand"])
    def test_erasing(self, mode):
        """A rectangle of the image, timm's values of normalised pixels turned into pixels."""
        images = ArrayImages(np.full((300, PX, PX), 255, np.uint8), [0] * 300, ["a"])
        recipe = Augment.none(re_prob=0.5, re_mode=mode)
        [batch] = train(images, recipe, batch_size=300, dtype=torch.uint8, mean=(0.1, 0.2, 0.3)).epoch(0)
        views = longest_pixels(batch).numpy().astype(int)
        erased = [np.argwhere((view != 255).any(-1)) for view in views]
        hit = [(view, places) for view, places in zip(views, erased, strict=True) if len(places)]
        assert 0.4 < len(hit) / 300 < 0.6
        values = []
        for view, places in hit:
            (top, left), (bottom, right) = places.min(0), places.max(0) + 1
            assert 0.01 < (bottom - top) * (right - left) / PX**2 < 0.4
            values.append(view[top:bottom, left:right].reshape(-1, 3))
        values = np.concatenate(values)
        if mode == "const":
            assert (values == np.rint(255 * np.array((0.1, 0.2, 0.3)))).all()
        else:
            assert values.std() > 20
            # "rand" draws one colour for a whole rectangle, so its median is of 150 colours only.
            off = np.abs(np.median(values, axis=0) - 255 * np.array((0.1, 0.2, 0.3))).max()
            assert off < (10 if mode == "pixel" else 30)

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"crop": "centre"}, "crop: expected one of 'rrc'"),
            ({"re_mode": "noise"}, "re_mode: expected 'pixel'"),
            ({"pad": -1}, "pad: expected a number of pixels"),
            ({"hflip": 1.5}, r"hflip: expected a probability in \[0, 1\], got 1.5"),
            ({"re_prob": float("nan")}, "re_prob: expected a probability"),
            ({"smoothing": 1.0}, r"smoothing: expected a share in \[0, 1\)"),
            ({"mixup": -0.1}, "mixup: expected a finite number"),
            ({"cutmix": float("inf")}, "cutmix: expected a finite number"),
            ({"scale": (0.5, 0.1)}, "scale: expected"),
            ({"ratio": (0.0, 1.0)}, "ratio: expected"),
        ],
    )
    def test_bad_recipes(self, fields, text):
        with pytest.raises(ValueError, match=text):
            Augment(**fields)

    @pytest.mark.parametrize("policy", ["random", "rand-m9-quick1", "augmix-q1"])
    def test_unknown_policy(self, policy):
        with pytest.raises(ValueError, match=f"auto_augment: timm does not know '{policy}'"):
            train(augment=Augment(auto_augment=policy))


class TestMixture:
    @pytest.fixture
    def black_and_white(self):
        labels = np.arange(40) % 2
        return ArrayImages(
            np.repeat(labels * 255, PX * PX).astype(np.uint8).reshape(-1, PX, PX), labels, ["black", "white"]
        )

    @pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
    @pytest.mark.parametrize("batch_size", [8, 5])
    def test_pixels_are_mixed_as_targets_say(self, black_and_white, mixup, cutmix, batch_size):
        recipe = Augment.none(mixup=mixup, cutmix=cutmix)
        options = {"mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": batch_size}
        shares = []
        for batch in (batch for epoch in range(6) for batch in train(black_and_white, recipe, **options).epoch(epoch)):
            assert batch.target.dtype == torch.float32
            assert batch.target.shape == (batch_size, 2)
            torch.testing.assert_close(batch.target.sum(1), torch.ones(batch_size))
            for k, rows in enumerate(batch.images.split()):
                white = batch.target[k % batch_size, 1].item()
                if cutmix == 0:
                    # One value everywhere, rounded to eight bits, at every view.
                    assert (rows - white).abs().max() < 0.51 / 255
                else:
                    # Resizing blurs the edge of the inserted region, but keeps what it covers.
                    assert rows.mean().item() == pytest.approx(white, abs=0.51 / 255 if k < batch_size else 0.04)
            shares += batch.target[:, 1].tolist()
        assert sum(0.05 < share < 0.95 for share in shares) > 20

    def test_cutmix_inserts_a_region(self, black_and_white):
        recipe = Augment.none(cutmix=1.0)
        for batch in train(black_and_white, recipe, dtype=torch.uint8).epoch(0):
            assert set(longest_pixels(batch).unique().tolist()) <= {0, 255}

    def test_the_partner_is_of_the_same_batch(self, black_and_white):
        """Where an image is mixed, it is with the one at the mirrored place."""
        for batch in train(black_and_white, Augment.none(mixup=0.8)).epoch(0):
            labels = torch.from_numpy(black_and_white.labels[batch.index])
            same = labels == labels.flip(0)
            assert torch.equal(batch.target[same].max(1).values, torch.ones(int(same.sum())))

    def test_smoothing(self, black_and_white):
        batch = next(train(black_and_white, Augment.none(smoothing=0.2)).epoch(0))
        expected = 0.1 + 0.8 * torch.nn.functional.one_hot(torch.from_numpy(black_and_white.labels[batch.index]), 2)
        torch.testing.assert_close(batch.target, expected)

    def test_one_image(self, black_and_white):
        batch = next(train(black_and_white, Augment.none(mixup=0.8, cutmix=1.0), batch_size=1).epoch(0))
        assert batch.target.max() == 1

    def test_probability(self, black_and_white):
        loader = train(black_and_white, Augment.none(mixup=5.0, mix_prob=0.3), batch_size=2, views=[2])
        mixed = [
            bool((b.target.max(1).values < 1).any())
            for epoch in range(30)
            for b in loader.epoch(epoch)
            if len(set(black_and_white.labels[b.index].tolist())) == 2
        ]
        assert 0.2 < np.mean(mixed) < 0.4


class TestUnreadable:
    def test_left_out_and_listed(self):
        images = image_set()
        bad = {3, 11, 12}
        full = list(train(images).epoch(0))
        loader = train(Damaged(images, bad), max_unreadable=0.2)
        left_out = []
        for batch, whole in zip(loader.epoch(0), full, strict=True):
            kept = [k for k, i in enumerate(whole.index.tolist()) if i not in bad]
            assert batch.index.tolist() == whole.index[kept].tolist()
            assert batch.target.tolist() == whole.target[kept].tolist()
            rows = whole.images.split()
            assert torch.equal(batch.images.data, torch.cat([rows[4 * v + k] for v in range(3) for k in kept]))
            left_out += batch.unreadable
        assert dict(left_out) == loader.unreadable
        assert set(left_out) <= {(f"photo {i}", f"torn {i}") for i in bad}

    def test_mixed_batches_of_odd_size(self):
        for batch in train(Damaged(image_set(), {3, 11}), "deit", max_unreadable=0.2).epoch(0):
            assert batch.target.shape == (len(batch.index), 5)
            assert len(batch.images) == 3 * len(batch.index)

    @pytest.mark.parametrize(
        ("share", "n_bad", "fails"),
        [(0.0, 1, True), (0.0, 0, False), (0.04, 1, True), (0.05, 1, False), (0.1, 3, True)],
    )
    @pytest.mark.parametrize("workers", [0, 2])
    def test_limit(self, share, n_bad, fails, workers):
        loader = train(Damaged(image_set(20), range(n_bad)), max_unreadable=share, workers=workers)
        if not fails:
            for epoch in range(3):
                list(loader.epoch(epoch))
            assert len(loader.unreadable) == n_bad, "each counts once"
            return
        with pytest.raises(UnreadableError, match=rf"images: {n_bad} cannot be read, .*photo \d: torn \d"):
            list(loader.epoch(0))

    def test_error_lists_the_first(self):
        loader = train(Damaged(image_set(20), range(12)), max_unreadable=0.5, batch_size=20)
        with pytest.raises(
            UnreadableError, match=r"12 cannot be read, more than max_unreadable allows \(10 .*and 7 more"
        ):
            list(loader.epoch(0))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_batch_without_images(self, workers):
        loader = train(Damaged(image_set(), range(22)), max_unreadable=1.0, workers=workers)
        with pytest.raises(UnreadableError, match=r"none of the 4 images of batch 0 of epoch 0 .*photo \d+: torn"):
            list(loader.epoch(0))


class TestEval:
    @pytest.mark.parametrize("crop_pct", [1.0, 0.9])
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_as_the_preprocessor_packs(self, crop_pct, interpolation):
        images = image_set()
        options = {"mean": MEAN, "std": STD, "crop_pct": crop_pct, "interpolation": interpolation}
        prep = rf.AdaptivePreprocessor(grids=GRIDS, patch_size=PATCH, policy=("fixed", 4), **options)
        loader = EvalLoader(images, grids=GRIDS, patch_size=PATCH, batch_size=8, **options)
        batches = list(loader)
        assert [len(batch.index) for batch in batches] == [8, 8, 6]
        assert len(loader) == 3
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(22))
        assert torch.cat([batch.target for batch in batches]).tolist() == images.labels.tolist()
        for batch in batches:
            rows = iter(batch.images)
            assert batch.images.lengths == (16, 9, 4)
            for grid in GRIDS:
                for i in batch.index.tolist():
                    assert torch.equal(next(rows), prep.pack([images.image(i)], [grid]).data)
        assert_same(EvalLoader(images, grids=GRIDS, patch_size=PATCH, batch_size=8, workers=2, **options), batches)
        assert_same(loader, batches)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_unreadable(self, workers):
        loader = EvalLoader(Damaged(image_set(), {0, 1, 2, 3, 9}), **SETTINGS, max_unreadable=0.3, workers=workers)
        batches = list(loader)
        assert torch.cat([batch.index for batch in batches]).tolist() == [4, 5, 6, 7, 8, *range(10, 22)]
        assert [batch.unreadable for batch in batches] == [[], [("photo 9", "torn 9")], [], [], []]
        assert list(loader.unreadable) == [f"photo {i}" for i in (0, 1, 2, 3, 9)], "also of a batch without images"
        with pytest.raises(UnreadableError, match=r"4 cannot be read, .*photo 0: torn 0"):
            list(EvalLoader(Damaged(image_set(), {0, 1, 2, 3, 9}), **SETTINGS))

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"batch_size": 0}, "batch_size: expected an int of 1"),
            ({"workers": -1}, "workers: expected an int of 0"),
            ({"crop_pct": 0.0}, "crop_pct: expected a share"),
            ({"grids": (2, 3)}, "grids: expected strictly decreasing"),
            ({"std": (0, 1, 1)}, "std: must not be zero"),
            ({"interpolation": "nearest"}, "interpolation: expected"),
            ({"patch_size": 0}, "patch_size: expected"),
            ({"max_unreadable": 2}, "max_unreadable: expected a share"),
        ],
    )
    def test_bad_arguments(self, changes, text):
        with pytest.raises(ValueError, match=text):
            EvalLoader(image_set(), **SETTINGS | changes)


class TestArguments:
    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"batch_size": 0}, "batch_size: expected an int of 1 or more, got 0"),
            ({"batch_size": 23}, "batch_size: 22 images give no batch of 23 on 1 ranks; .* or drop_last=False"),
            ({"seed": -1}, "seed: expected an int of 0 or more"),
            ({"workers": 1.5}, "workers: expected an int"),
            ({"rank": 2, "world_size": 2}, "rank: expected 0 to 1 for world_size 2, got 2"),
            ({"world_size": 0}, "world_size: expected an int of 1"),
            ({"views": [0, 3]}, r"views: .*0 to 2, got \(0, 3\)"),
            ({"views": [1, 0]}, "views: expected ascending"),
            ({"views": []}, "views: expected ascending"),
            ({"grids": (3, 3)}, "grids: expected strictly decreasing"),
            ({"patch_size": 0}, "patch_size: expected"),
            ({"mean": (0, 0)}, "mean: expected three"),
            ({"std": (0, 1, 1)}, "std: must not be zero"),
            ({"interpolation": "nearest"}, "interpolation: expected 'bicubic' or 'bilinear'"),
            ({"max_unreadable": -0.1}, r"max_unreadable: expected a share in \[0, 1\], got -0.1"),
        ],
    )
    def test_bad_arguments(self, changes, text):
        with pytest.raises(ValueError, match=text):
            train(**changes)

    def test_bad_augment(self):
        with pytest.raises(TypeError, match="augment: expected an Augment"):
            TrainLoader(image_set(), **SETTINGS, augment=None)

    def test_bad_epochs(self):
        """At once, not when the first batch is asked for."""
        with pytest.raises(ValueError, match="epoch: expected an int of 0 or more, got -1"):
            train().epoch(-1)
        with pytest.raises(ValueError, match="first_batch: expected 0 to 5, the batches of an epoch, got 6"):
            train().epoch(0, 6)

    def test_without_timm(self, monkeypatch):
        for module in ("transforms_factory", "mixup", "random_erasing"):
            monkeypatch.setitem(sys.modules, f"timm.data.{module}", None)
        assert next(train(augment="light").epoch(0)).images.data.isfinite().all()
        for recipe in (Augment(), Augment.light(re_prob=0.1), Augment.light(mixup=1.0), Augment.none(smoothing=0.1)):
            with pytest.raises(ImportError, match=r'augment: it needs timm: pip install "revit-fast\[train\]"'):
                train(augment=recipe)


def test_longest_views_stand_alone():
    """`Augmenter` is usable without a loader."""
    images = image_set()
    options = {"image_px": PX, "n_classes": 5, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    views = Augmenter(Augment(), **options).views([images.image(i) for i in range(3)], Draws.of_epoch(0, 0, 3))
    assert views.shape == (3, PX, PX, 3)
    assert views.dtype == torch.uint8

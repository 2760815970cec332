"""Images in their own proportions: timm's NaFlexVit and its choice of grids, in packs without padding."""

import numpy as np
import pytest
import timm
import torch
from helpers import only_on, randn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import check, drawn, make_model
from timm.data.naflex_transforms import get_image_size_for_seq
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

import revit_fast as rf
from revit_fast.explain import explain
from revit_fast.layers.positions import MAX_EXTRA_GRIDS, PositionTables, Resampling
from revit_fast.ops import _library
from revit_fast.packing import PackedBatch

PATCH = 4
TOLERANCE = 2e-5  # of the largest logit
# Taller, wider, square as the stored grid and not, smaller and larger than it, a single patch.
GRIDS = [(5, 9), (9, 5), (7, 7), (14, 14), (3, 17), (1, 1), (6, 5), (2, 12), (20, 4)]
KINDS = {
    "learned": {},
    "learned, aspect kept": {"pos_embed_ar_preserving": True},
    "learned, oblong": {"pos_embed_grid_size": (5, 9)},
    "learned, oblong, aspect kept": {"pos_embed_grid_size": (5, 9), "pos_embed_ar_preserving": True},
    "factorized": {"pos_embed": "factorized"},
    "factorized, aspect kept": {"pos_embed": "factorized", "pos_embed_ar_preserving": True},
    "class token, norm before": {"class_token": True, "global_pool": "token", "pre_norm": True},
    "convolution": {"embed_proj_type": "conv"},
    "channels first": {"patchify_channels_last": False},
}
# Linear embeddings take patches; a convolution takes images, one grid at a time.
PATCHED = [kind for kind in KINDS if kind != "convolution"]

pytestmark = only_on("cpu", reason="compares with timm on the CPU")


def naflex(kind, seed=0):
    """A small model with the options of timm's naflexvit_*_gap, every parameter drawn at random."""
    options = {"global_pool": "avg", "fc_norm": True, "reg_tokens": 2, "init_values": 0.5, **KINDS[kind]}
    if options["global_pool"] == "token":
        options["fc_norm"] = False
    options = {"pos_embed_grid_size": (7, 7), **options}
    config = NaFlexVitCfg(patch_size=PATCH, embed_dim=48, depth=3, num_heads=3, **options)
    torch.manual_seed(seed)
    model = NaFlexVit(config, num_classes=40).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
            else:
                parameter.add_((1.0 if "pos_embed" in name else 0.3) * noise)
    return model


def images_of(grids):
    return [randn(3, PATCH * h, PATCH * w, seed=i) for i, (h, w) in enumerate(grids)]


def collated(images, channels_last=True):
    """Images as timm's collator hands them on: patches padded to the longest, their coordinates, which are real."""
    grids = [(image.shape[1] // PATCH, image.shape[2] // PATCH) for image in images]
    n = max(h * w for h, w in grids)
    patches = torch.zeros(len(images), n, PATCH * PATCH * 3)
    coord = torch.zeros(len(images), n, 2, dtype=torch.long)
    valid = torch.zeros(len(images), n, dtype=torch.bool)
    for b, (image, (h, w)) in enumerate(zip(images, grids, strict=True)):
        cut = image.reshape(3, h, PATCH, w, PATCH)
        order = (1, 3, 2, 4, 0) if channels_last else (1, 3, 0, 2, 4)
        patches[b, : h * w] = cut.permute(order).reshape(h * w, -1)
        coord[b, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[b, : h * w] = True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class TestModel:
    @torch.inference_mode()
    @pytest.mark.parametrize("kind", PATCHED)
    def test_a_mixed_pack_equals_timms_padded_batch(self, kind):
        vit = naflex(kind)
        model = rf.ReViT.from_timm(vit)
        images = images_of(GRIDS)
        expected = vit(collated(images, vit.embeds.channels_last))
        assert expected.std() > 0.1
        assert relative(model(images), expected) <= TOLERANCE
        each = torch.cat([vit(collated([image], vit.embeds.channels_last)) for image in images])
        ours = torch.cat([model(image[None]) for image in images])
        assert ((ours - each).abs().amax(1) / each.abs().amax(1)).max() <= TOLERANCE

    @torch.inference_mode()
    def test_convolution_embedding(self):
        vit = naflex("convolution")
        model = rf.ReViT.from_timm(vit)
        images = images_of(GRIDS)
        assert relative(model(images), torch.cat([vit(image[None]) for image in images])) <= TOLERANCE

    @torch.inference_mode()
    @pytest.mark.parametrize("kind", ["learned, aspect kept", "factorized"])
    def test_an_image_does_not_see_its_neighbours(self, kind):
        model = rf.ReViT.from_timm(naflex(kind))
        images = images_of(GRIDS)
        packed = model(images)
        for order in ([8, 5, 3, 1, 0, 2, 4, 7, 6], [2], [1, 1, 1]):
            assert relative(model([images[i] for i in order]), packed[order]) <= 1e-5

    @torch.inference_mode()
    @pytest.mark.parametrize("kind", PATCHED)
    @pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built")
    def test_optimised_copy(self, kind):
        model = rf.ReViT.from_timm(naflex(kind))
        fast, images = rf.optimize(model), images_of(GRIDS)
        check(fast, model, images * 3)
        packed = fast(images)
        for order in ([8, 5, 3, 1, 0, 2, 4, 7, 6], [2], [4, 4]):
            assert torch.equal(fast([images[i] for i in order]), packed[order])

    @pytest.mark.parametrize("kind", ["learned, oblong, aspect kept", "factorized, aspect kept"])
    def test_gradients_equal_timms_in_float64(self, kind):
        vit = naflex(kind).double()
        model = rf.ReViT.from_timm(vit)
        images = [image.double() for image in images_of(GRIDS[:4])]
        for m, x in ((vit, collated(images)), (model, images)):
            x = x if m is model else {**x, "patches": collated(images)["patches"].double()}
            m(x).square().sum().backward()
        theirs = vit.embeds.pos_embed
        if theirs is None:
            theirs = torch.cat([vit.embeds.pos_embed_y.grad, vit.embeds.pos_embed_x.grad], dim=1)
        else:
            theirs = theirs.grad.flatten(1, 2)
        # timm resamples in float32 whatever the dtype.
        assert relative(model.pos_embed.grad, theirs) <= 1e-5

    @torch.inference_mode()
    def test_norms_are_those_of_the_nearest_length(self):
        model = rf.ReViT.from_timm(naflex("factorized"), grids=(9, 6, 3))
        batch = PackedBatch.from_images(images_of(GRIDS), PATCH, lengths=model.lengths)
        counts = [h * w for h, w in GRIDS]
        assert batch.length_index.tolist() == [min(range(3), key=lambda i: abs(model.lengths[i] - n)) for n in counts]
        images = images_of(GRIDS)
        before = model(images)
        model.fc_norm.weight[1].mul_(2.0)
        changed = (model(images) - before).abs().amax(1) > 0
        assert changed.tolist() == (batch.length_index == 1).tolist()

    def test_config_and_compiled_code_keep_the_resampling(self):
        model = rf.ReViT.from_timm(naflex("factorized, aspect kept"))
        again = rf.ReViT.from_config(model.config)
        again.load_state_dict(model.state_dict())
        x = torch.stack(images_of([(5, 9), (5, 9)]))
        with torch.no_grad():
            assert torch.equal(again.eval()(x), model(x))
            assert relative(torch.compile(model, backend="eager", fullgraph=True)(x), model(x)) <= TOLERANCE

    @pytest.mark.parametrize(
        "options",
        [
            {"global_pool": "map"},
            {"rope_type": "axial", "rope_grid_indexing": "xy"},
            {"rope_type": "dinov3", "rope_rotate_half": True, "pos_embed": "none"},
            {"pos_embed_interp_mode": "bilinear"},
            {"pos_embed_antialias": False},
            {"pos_embed_align_corners": True, "pos_embed_antialias": False},
            {"qk_norm": True},
        ],
        ids=str,
    )
    def test_further_options_are_timms(self, options):
        options = {"global_pool": "avg", "patch_size": PATCH, **options}
        vit = NaFlexVit(NaFlexVitCfg(embed_dim=48, depth=1, num_heads=3, **options), num_classes=3)
        drawn(vit, 0.2)
        model = rf.ReViT.from_timm(vit)
        for grid in (GRIDS[0], (5, 3)):
            x = torch.stack(images_of([grid, grid]))
            with torch.no_grad():
                assert relative(model(x), vit(x)) <= TOLERANCE

    @pytest.mark.parametrize(
        ("options", "feature"),
        [
            ({"pos_embed_use_grid_sample": True}, "pos_embed_use_grid_sample"),
            ({"patch_size": (4, 8)}, r"non-square patches \(4, 8\)"),
            ({"patch_drop_rate": 0.1}, "patch_drop_rate"),
        ],
    )
    def test_other_options_are_refused_by_name(self, options, feature):
        options = {"global_pool": "avg", "patch_size": PATCH, **options}
        vit = NaFlexVit(NaFlexVitCfg(embed_dim=48, depth=1, num_heads=3, **options), num_classes=3)
        with pytest.raises(ValueError, match=feature):
            rf.ReViT.from_timm(vit)

    def test_timms_own_architectures(self):
        for name in ("gap", "par_gap", "parfac_gap"):
            vit = timm.create_model(f"naflexvit_base_patch16_{name}", depth=1, embed_dim=48, num_heads=3)
            assert rf.ReViT.from_timm(vit).base_grid == (16, 16)
        model = rf.create_model("naflexvit_base_patch16_parfac_gap", grids=(24, 12), depth=1, embed_dim=48, num_heads=3)
        assert model.resampling == Resampling((16, 16), factorized=True, keep_aspect=True)


class TestPositions:
    @pytest.mark.parametrize("options", [{}, {"keep_aspect": True}, {"factorized": True}])
    def test_tables_grow_with_the_grids_and_stay_as_they_were(self, options):
        resampling = Resampling((5, 4), **options)
        tables = PositionTables(resampling, [(3, 3)])
        stored = randn(1, 1 + resampling.n_stored, 8)
        few = tables.known
        before = tables.table(few, stored, 1)
        grids = [(h, w) for h in range(1, 8) for w in range(1, 8)]
        many = tables.learn(grids)
        after = tables.table(many, stored, 1)
        assert torch.equal(after[: len(before)], before)
        assert tables.table(many, stored, 1) is after
        assert torch.equal(tables.table(few, stored, 1)[: len(before)], before), "a call under way keeps its rows"
        offsets = many.first_rows(grids)
        for (h, w), begin in zip(grids, offsets, strict=True):
            expected = resampling.resampled(stored[0, 1:].double(), (h, w)).float()
            torch.testing.assert_close(after[begin : begin + h * w], expected, rtol=1e-5, atol=1e-6)
        stored += 1.0
        assert not torch.equal(tables.table(many, stored, 1), after)

    def test_stored_grid_stays_as_it_is(self):
        for options in ({}, {"keep_aspect": True}, {"factorized": True}):
            resampling = Resampling((5, 4), **options)
            stored = randn(resampling.n_stored, 8)
            table = resampling.resampled(stored, (5, 4))
            assert table.shape == (20, 8)
            if not options.get("factorized"):
                assert torch.equal(table, stored)

    def test_budgets_meet_fewer_grids_than_are_remembered(self):
        """Photographs up to 4:1 under the budgets of the default grids: none is forgotten and built again."""
        sides = np.geomspace(1, 4, 400)
        grids = {
            rf.aspect_grid(*size, budget)
            for ratio in sides
            for size in ((1000, round(1000 * ratio)), (round(1000 * ratio), 1000))
            for budget in (196, 100, 49)
        }
        assert len(grids) <= MAX_EXTRA_GRIDS


class TestAspectGrid:
    @settings(max_examples=500, deadline=None)
    @given(
        height=st.integers(1, 5000),
        width=st.integers(1, 5000),
        max_tokens=st.integers(1, 1500),
        patch_size=st.sampled_from([1, 7, 14, 16, 32]),
        max_ratio=st.sampled_from([None, 0.3, 1.0, 2.0]),
    )
    @example(height=1, width=5000, max_tokens=16, patch_size=16, max_ratio=None)
    @example(height=224, width=224, max_tokens=196, patch_size=16, max_ratio=None)
    @example(height=1, width=1, max_tokens=1024, patch_size=16, max_ratio=None)
    def test_choice_is_timms(self, height, width, max_tokens, patch_size, max_ratio):
        _, (h, w) = get_image_size_for_seq((height, width), patch_size, max_tokens, max_ratio=max_ratio)
        grid = rf.aspect_grid(height, width, max_tokens, patch_size, max_ratio)
        assert grid == (h // patch_size, w // patch_size)
        assert grid[0] * grid[1] <= max_tokens

    def test_proportions(self):
        assert rf.aspect_grid(480, 480, 196) == (14, 14)
        assert rf.aspect_grid(480, 960, 196) == (10, 19)
        assert rf.aspect_grid(960, 480, 196) == (19, 10)
        assert rf.aspect_grid(32, 48, 196, max_ratio=1.0) == (2, 3)

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ((0, 5, 10), "height"),
            ((5, -1, 10), "width"),
            ((5, 5, 0), "max_tokens"),
            ((5, 5, 10, 0), "patch_size"),
            ((5, 5, 10, 16, 0.0), "max_ratio"),
            ((1, 10**9, 4), "height, width: 1x1000000000 pixels cannot"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, name):
        with pytest.raises(ValueError, match=f"^{name}"):
            rf.aspect_grid(*arguments)


class TestPreprocessor:
    def photographs(self):
        generator = np.random.default_rng(0)
        return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in [(60, 90), (90, 41), (64, 64)]]

    def test_whole_images_are_resized_as_pillow_does(self):
        photographs = self.photographs()
        prep = rf.AdaptivePreprocessor(
            grids=(6, 4), patch_size=8, aspect="keep", policy=("fixed", 6), dtype=torch.uint8
        )
        batch, grids = prep(photographs)
        assert grids == [6, 6, 6]
        assert batch.grids == tuple(rf.aspect_grid(*image.shape[:2], 36, 8) for image in photographs)
        assert batch.grids[:2] == ((5, 7), (9, 4))
        assert batch.lengths == (36, 16)
        for image, (h, w), rows in zip(photographs, batch.grids, batch.split(), strict=True):
            resized = Image.fromarray(image).resize((8 * w, 8 * h), Image.Resampling.BICUBIC)
            expected = torch.from_numpy(np.array(resized)).view(h, 8, w, 8, 3).permute(0, 2, 1, 3, 4)
            assert torch.equal(rows, expected.reshape(h * w, -1))

    def test_pipeline_counts_the_tokens_that_run(self):
        model = make_model(grids=(6, 4), patch_size=8)
        photographs = self.photographs()
        kept = rf.pipeline(model, policy="cycle", aspect="keep", token_budget=60)
        results = list(kept(photographs))
        for result, image in zip(results, photographs, strict=True):
            h, w = rf.aspect_grid(*image.shape[:2], result.grid**2, 8)
            assert result.error is None
            assert result.n_tokens == h * w + 1 <= result.grid**2 + 1
        alone = [
            next(iter(rf.pipeline(model, policy=("fixed", r.grid), aspect="keep")([image])))
            for r, image in zip(results, photographs, strict=True)
        ]
        assert all(torch.equal(a.logits, r.logits) for a, r in zip(alone, results, strict=True))
        cropped = list(rf.pipeline(model, policy="cycle")(photographs))
        assert relative(cropped[0].logits, results[0].logits) > 1e-3

    def test_assigner_looks_at_whole_images(self):
        tla = rf.TokenLengthAssigner(grids=(6, 4)).eval()
        prep = rf.AdaptivePreprocessor(tla, patch_size=8, aspect="keep")
        assert prep.seen(self.photographs()) == [(0, 0, 90, 60), (0, 0, 41, 90), (0, 0, 64, 64)]
        assert prep.draft_px is None
        assert rf.AdaptivePreprocessor(tla, patch_size=8, aspect="keep", draft=True).draft_px == 48

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match=r'aspect: expected "crop" or "keep", got \'stretch\''):
            rf.AdaptivePreprocessor(grids=(6, 4), aspect="stretch", policy=("fixed", 6))
        pipe = rf.pipeline(make_model(), aspect="keep")
        with pytest.raises(ValueError, match="square grids"):
            explain(pipe, self.photographs())

"""ReViT models made by timm: equal to timm's own with the same weights, and fit for whatever timm does with a model."""

import copy
import importlib
import importlib.util
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from helpers import full_if, randn
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import create_feature_extractor, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import revit_fast as rf
from revit_fast import timm_models
from revit_fast.layers import TALLayerNorm
from revit_fast.models.timm_blocks import plain_names

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# One of each kind: (ours, timm's, classes asked for).
PAIRS = [
    ("revit_tiny_patch16_224", "vit_tiny_patch16_224", 7),
    ("revit_small_patch16_384", "vit_small_patch16_384", 7),
    ("revit_tiny_distilled_patch16_224", "deit_tiny_distilled_patch16_224", 7),
    ("revit_small_patch14_dinov2", "vit_small_patch14_dinov2", 7),
    ("revit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2", 7),
    ("revit_small_plus_patch16_dinov3", "vit_small_plus_patch16_dinov3", 7),
    ("revit_base_patch14_eva02", "eva02_base_patch14_224", 7),
    ("revit_base_patch16_siglip", "vit_base_patch16_siglip_224", 7),
]
NAMES = [ours for ours, _, _ in PAIRS]
OF_TIMM = [  # the others: test_lvvit.py
    full_if((name in timm_models.COUNTERPARTS and name not in NAMES) or "_large_" in name or "384" in name, name)
    for name in timm_models.VARIANTS
    if "lvvit" not in name
]
TOLERANCE = 2e-5  # of the largest value, as in test_model.py


def counterpart(name):
    """timm's model of the same architecture and data settings."""
    if name in timm_models.COUNTERPARTS:
        return timm_models.COUNTERPARTS[name]
    return name.replace("revit_", "deit_" if "distilled" in name else "vit_")


def small(name="revit_tiny_patch16_224", **kwargs):
    return timm.create_model(name, **{**SMALL, "num_classes": 7, **kwargs}).eval()


def lively(model, seed=0):
    """Every parameter drawn at random, so that no branch is negligible and no two classes alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def image(side, n=2, channels=3):
    return randn(n, channels, side, side, seed=side)


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def plain(tmp_path):
    """A timm ViT with 5 classes and the file of its weights."""
    vit = lively(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=5, dynamic_img_size=True))
    path = tmp_path / "plain.safetensors"
    save_file(vit.state_dict(), path)
    return vit, path


def test_all_are_listed():
    names = timm.list_models("revit*")
    assert sorted(names) == sorted(timm_models.VARIANTS)
    assert len(names) == 35
    for pattern, n in {"revit_*_dinov3": 6, "revit_*_eva02": 4, "revit_*_siglip": 4}.items():
        assert len(timm.list_models(pattern)) == n
    assert timm.list_models("revit*", pretrained=True) == []
    assert all(timm.is_model(name) and name in timm_models.__all__ for name in names)
    assert timm.list_models("revit*", module="timm_models") == names


@pytest.mark.parametrize("name", OF_TIMM)
def test_architecture_and_default_cfg_are_those_of_timms_model(name):
    model = timm.create_model(name, device="meta")
    vit = timm.create_model(counterpart(name), device="meta")
    ours = model.state_dict()
    theirs = plain_names(vit.state_dict(), ours)
    assert ours.keys() - {"_extra_state"} == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].shape == ((3, *value.shape) if "norm" in key else value.shape), key
    assert model.blocks[0].norm1.eps == vit.blocks[0].norm1.eps
    assert model.blocks[0].attn.num_heads == vit.blocks[0].attn.num_heads
    assert model.spec == rf.ReViT.from_timm(vit, grids=model.grids).spec

    cfg, their_cfg = model.default_cfg, vit.default_cfg
    assert cfg is model.pretrained_cfg
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes", "pool_size", "classifier"):
        assert cfg[key] == their_cfg[key], key
    assert cfg["architecture"] == name
    assert not cfg["fixed_input_size"]
    assert not any(cfg.get(source) for source in ("url", "file", "hf_hub_id"))
    assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
    classifiers = cfg["classifier"] if isinstance(cfg["classifier"], tuple) else (cfg["classifier"],)
    for classifier in classifiers:
        assert f"{classifier}.weight" in ours or not cfg["num_classes"]
        model.get_submodule(classifier)
    side = cfg["input_size"][1] // model.patch_size
    assert model.base_grid == (side, side) == model.patch_embed.grid_size
    assert model.grids[0] == side
    assert model.grids == {14: (14, 10, 7), 16: (16, 12, 8), 24: (24, 17, 12), 37: (37, 26, 18)}[side]


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_any_size_goes_forward(name):
    model = small(name)
    _, side, _ = model.default_cfg["input_size"]
    p = model.patch_size
    for height, width in [(side, side), (model.grids[1] * p, model.grids[1] * p), (3 * p, 5 * p)]:
        x = randn(2, 3, height, width)
        features = model.forward_features(x)
        assert features.shape == (2, height // p * (width // p) + model.num_prefix_tokens, 48)
        logits = model(x)
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()
        assert relative(model.forward_head(features), logits) <= TOLERANCE
    mixed = model([randn(3, g * p, g * p, seed=g) for g in model.grids])
    assert mixed.shape == (3, 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = lively(small(name, img_size=28 * 8)).train()
    model([randn(3, g * model.patch_size, g * model.patch_size, seed=g) for g in model.grids]).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        rows = parameter.grad if "norm" in key else parameter.grad[None]
        assert (rows.flatten(1).abs().sum(1) > 0).all(), key


@torch.inference_mode()
@pytest.mark.parametrize(("name", "theirs", "num_classes"), PAIRS)
def test_equals_timm_from_its_checkpoint(name, theirs, num_classes, tmp_path):
    arguments = {**SMALL, "num_classes": num_classes}
    vit = lively(timm.create_model(theirs, **arguments, dynamic_img_size=True))
    path = tmp_path / "vit.pth"
    torch.save(vit.state_dict(), path)
    model = timm.create_model(name, **arguments, checkpoint_path=str(path)).eval()
    for grid in model.grids:
        x = image(grid * model.patch_size)
        expected = vit(x)
        assert expected.std() > 0.1
        assert relative(model(x), expected) <= TOLERANCE, grid
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    assert relative(pre_logits, vit.forward_head(vit.forward_features(x), pre_logits=True)) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if name in timm_models.COUNTERPARTS])
def test_a_pipeline_with_an_assigner_serves_the_counterparts(name):
    """At the grid that the assigner gives, an image's logits are those of the model."""
    torch.manual_seed(0)
    model = lively(small(name, grids=(4, 3, 2)))
    tla = rf.TokenLengthAssigner(model.grids, thumbnail_px=16, widths=(8, 8)).eval()
    pipe = rf.pipeline(model, tla, policy="argmax")
    pixels = (255 * torch.rand(5, 3, 60, 80, generator=torch.Generator().manual_seed(1))).byte()
    images = [image.permute(1, 2, 0).contiguous().numpy() for image in pixels]
    found = list(pipe(images))
    assert [r.error for r in found] == [None] * 5
    for image, result in zip(images, found, strict=True):
        batch = pipe.prep.pack([image], [(result.grid, result.grid)])
        assert relative(result.logits, model(batch)[0].detach()) <= TOLERANCE


class TestCheckpoints:
    def test_pretrained_of_the_counterpart_from_a_file(self, tmp_path):
        """Of another size and other classes, and with the names of EVA's parts."""
        for name in ("revit_small_patch16_dinov3", "revit_base_patch14_eva02", "revit_base_patch16_siglip"):
            vit = lively(timm.create_model(counterpart(name), **SMALL, num_classes=5))
            save_file(vit.state_dict(), tmp_path / "vit.safetensors")
            overlay = {"file": str(tmp_path / "vit.safetensors"), "num_classes": 5}
            arguments = {**SMALL, "pretrained": True, "pretrained_cfg_overlay": overlay, "img_size": 112}
            model = timm.create_model(name, **arguments, num_classes=0).eval()
            theirs = timm.create_model(counterpart(name), **arguments, num_classes=0).eval()
            assert relative(model(image(112)), theirs(image(112))) <= TOLERANCE, name
            own = timm.create_model(name, **SMALL, num_classes=5, checkpoint_path=str(tmp_path / "vit.safetensors"))
            side = own.default_cfg["input_size"][1]
            assert relative(own.eval()(image(side)), vit(image(side))) <= TOLERANCE, name

    def test_another_grid_is_resampled(self, plain):
        vit, path = plain
        model = timm.create_model(
            "revit_tiny_patch16_224", **SMALL, num_classes=5, img_size=(96, 160), checkpoint_path=path
        ).eval()
        assert model.base_grid == (6, 10)
        x = randn(2, 3, 96, 160)
        assert relative(model(x), vit(x)) <= TOLERANCE

    def test_a_head_for_other_classes_is_left_with_a_warning(self, plain):
        vit, path = plain
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match=r"head: the checkpoint's \(5, 48\) is for other classes than .* 3"):
            model = timm.create_model("revit_tiny_patch16_224", **SMALL, num_classes=3, checkpoint_path=path).eval()
        torch.manual_seed(0)
        fresh = timm.create_model("revit_tiny_patch16_224", **SMALL, num_classes=3)
        assert torch.equal(model.head.weight, fresh.head.weight)
        x = image(224)
        assert relative(model.forward_features(x), vit.forward_features(x)) <= TOLERANCE
        with pytest.warns(UserWarning, match="head"):
            headless = timm.create_model("revit_tiny_patch16_224", **SMALL, num_classes=0, checkpoint_path=path)
        assert relative(headless.eval()(x), vit.forward_head(vit.forward_features(x), pre_logits=True)) <= TOLERANCE

    def test_its_own_comes_back_bitwise(self, tmp_path):
        model = lively(small(img_size=96))
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pth")
        for name in ("own.safetensors", "own.pth"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                again = small(img_size=96, checkpoint_path=tmp_path / name)
            assert torch.equal(again(image(96)), model(image(96)))
        longer = small(checkpoint_path=tmp_path / "own.pth", grids=(14, 6, 4))
        assert model.grids == (6, 4, 3)
        assert torch.equal(longer.blocks[1].norm1.weight, model.blocks[1].norm1.weight[[0, 0, 1]])

    def test_load_checkpoint_of_an_existing_model(self, plain):
        vit, path = plain
        model = small(num_classes=5)
        before = vit.state_dict()
        result = load_checkpoint(model, str(path))
        assert not result.missing_keys
        assert not result.unexpected_keys
        model.load_state_dict(before)
        assert before["norm.weight"].dim() == 1, "the caller's state dict was changed"
        assert relative(model(image(112)), vit(image(112))) <= TOLERANCE

    def test_what_does_not_fit_is_an_error(self, plain, tmp_path):
        _, path = plain
        with pytest.raises(RuntimeError, match=r"blocks\.2\.norm1\.weight"):
            timm.create_model("revit_tiny_patch16_224", **{**SMALL, "depth": 3}, num_classes=5, checkpoint_path=path)
        with pytest.raises(RuntimeError, match=r"size mismatch for patch_embed\.proj\.weight"):
            small(num_classes=5, patch_size=14, img_size=224, checkpoint_path=path)
        with pytest.raises(FileNotFoundError):
            small(checkpoint_path=tmp_path / "none.pth")

    def test_pretrained_from_a_file_is_adapted_as_by_timm(self, plain):
        """Other channels, classes, size and patches, the way timm's own ViT takes them."""
        _, path = plain
        arguments = {
            **SMALL,
            "pretrained": True,
            "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5},
            "in_chans": 1,
            "num_classes": 0,
            "img_size": 112,
        }
        for extra in ({}, {"patch_size": 14}):
            model = timm.create_model("revit_tiny_patch16_224", **arguments, **extra).eval()
            theirs = timm.create_model("vit_tiny_patch16_224", **arguments, **extra).eval()
            x = image(112, channels=1)
            assert relative(model(x), theirs(x)) <= TOLERANCE

    def test_pretrained_from_a_file_of_its_own_with_an_oblong_grid(self, tmp_path):
        model = lively(small(img_size=(112, 448)))  # as many patches as 224 x 224
        torch.save(model.state_dict(), tmp_path / "own.pth")
        overlay = {"file": str(tmp_path / "own.pth"), "num_classes": 7}
        again = small(img_size=(112, 448), pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(again.pos_embed, model.pos_embed)
        assert torch.equal(again(image(112)), model(image(112)))

    def test_original_dinov2_files(self, tmp_path):
        """Names of the original repository, whose class token has a position embedding beside the registers."""
        vit = lively(timm.create_model("vit_small_patch14_reg4_dinov2", **SMALL))
        weights = {k.replace("reg_token", "register_tokens"): v for k, v in vit.state_dict().items()}
        weights["mask_token"] = torch.zeros(1, 48)
        weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), weights["pos_embed"]], dim=1)
        torch.save(weights, tmp_path / "dinov2.pth")
        overlay = {"file": str(tmp_path / "dinov2.pth")}
        model = timm.create_model(
            "revit_small_patch14_reg4_dinov2", **SMALL, pretrained=True, pretrained_cfg_overlay=overlay
        ).eval()
        assert relative(model(image(518, 1)), vit(image(518, 1))) <= TOLERANCE

    def test_pretrained_without_a_file_is_an_error(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist for revit_tiny_patch16_224"):
            small(pretrained=True)


class TestArguments:
    def test_sizes_scale_the_grids(self):
        cases = [
            ({"img_size": 384}, (24, 24), (24, 17, 12)),
            ({"img_size": (160, 320)}, (10, 20), (14, 10, 7)),
            ({"img_size": 112, "grids": (7, 3)}, (7, 7), (7, 3)),
            ({"grids": (12, 6)}, (14, 14), (12, 6)),
            ({"img_size": 32}, (2, 2), (2, 1)),
            ({"patch_size": 8}, (28, 28), (28, 20, 14)),
        ]
        for arguments, base_grid, grids in cases:
            model = small(**arguments)
            assert (model.base_grid, model.grids) == (base_grid, grids), arguments
            assert model.blocks[0].norm1.weight.shape[0] == len(grids)
        assert small("revit_small_patch14_dinov2", img_size=224).grids == (16, 11, 8)

    def test_drop_rates_arrive(self):
        model = small(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, drop_path_rate=0.4, depth=3)
        assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
        assert {block.attn.proj_drop.p for block in model.blocks} == {block.mlp.drop.p for block in model.blocks}
        assert model.blocks[0].mlp.drop.p == 0.3
        assert [block.drop_path1.drop_prob for block in model.blocks] == pytest.approx([0.0, 0.2, 0.4])

    @torch.inference_mode()
    def test_others_mean_what_they_mean_to_timm(self):
        cases = [
            {"global_pool": "avg"},
            {"global_pool": "avg", "class_token": False},
            {"global_pool": ""},
            {"mlp_ratio": 2.0, "init_values": 0.1, "qkv_bias": False},
            {"pre_norm": True, "final_norm": False},
            {"fc_norm": True, "reg_tokens": 2, "act_layer": "silu"},
            {"act_layer": "quick_gelu"},
            {"in_chans": 5, "patch_size": (8, 8), "img_size": 64},
        ]
        for arguments in cases:
            vit = lively(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=7, **arguments))
            model = small(**arguments, dynamic_img_size=True, attn_drop_rate=0.0)
            model.load_state_dict(vit.state_dict())
            x = image(arguments.get("img_size", 224), channels=model.in_chans)
            assert relative(model(x), vit(x)) <= TOLERANCE, arguments
            assert relative(model.forward_head(model.forward_features(x)), vit(x)) <= TOLERANCE, arguments

    def test_overlay_and_data_config(self):
        model = small(pretrained_cfg_overlay={"input_size": (3, 160, 160), "crop_pct": 0.8, "mean": (0.1, 0.2, 0.3)})
        config = resolve_data_config({}, model=model)
        assert config["input_size"] == (3, 160, 160)
        assert config["crop_pct"] == 0.8
        assert config["mean"] == (0.1, 0.2, 0.3)
        assert config["std"] == (0.5, 0.5, 0.5)
        x = create_transform(**config)(Image.new("RGB", (200, 180)))
        assert model(x[None]).shape == (1, 7)

    def test_device_and_dtype(self):
        model = small(device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
        filled = small(device="meta").to_empty(device="cpu")
        source = lively(small())
        filled.load_state_dict(source.state_dict())
        assert torch.equal(filled(image(96)), source(image(96)))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"img_size": 225}, ValueError, "img_size: expected positive multiples of the patch size 16, got 225x225"),
            ({"grids": (7, 14)}, ValueError, "grids: expected strictly decreasing"),
            ({"attn_drop_rate": 0.1}, ValueError, "attn_drop_rate: not supported"),
            ({"patch_drop_rate": 0.1}, ValueError, "patch_drop_rate: not supported"),
            ({"qk_norm": True}, ValueError, "qk_norm: not supported"),
            ({"global_pool": "map"}, ValueError, "needs an attention pool"),
            ({"class_token": False}, ValueError, "global_pool: .* class token"),
            ({"patch_size": (16, 8)}, ValueError, "patch_size: expected square"),
            ({"norm_layer": torch.nn.LayerNorm}, ValueError, "norm_layer: expected"),
            ({"grid": (14, 7)}, TypeError, "grid"),
            ({"features_only": True, "feature_cls": "hook"}, ValueError, 'feature_cls: expected "getter" or "fx"'),
            ({"features_only": True, "out_indices": (0, 9)}, ValueError, "indices: expected blocks of a model with 2"),
        ],
    )
    def test_errors_name_the_argument(self, arguments, error, message):
        with pytest.raises(error, match=message):
            small(**arguments)

    def test_a_distilled_model_pools_its_tokens(self):
        for pool in ("avg", ""):
            with pytest.raises(ValueError, match="global_pool: a distilled model"):
                small("revit_tiny_distilled_patch16_224", global_pool=pool)


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_classifier_is_taken_off_and_put_back(name):
    """As in timm's own test of every model."""
    model = small(name)
    distilled = "distilled" in name
    x = image(10 * model.patch_size)
    features = model.forward_features(x)
    assert all(head.out_features == 7 for head in (model.get_classifier() if distilled else [model.get_classifier()]))
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert relative(model(x), model.forward_head(features, pre_logits=True)) <= TOLERANCE
    model.reset_classifier(9)
    assert model(x).shape == (2, 9)
    assert model.num_classes == 9
    assert model.config["num_classes"] == 9
    assert small(name, num_classes=0)(x).shape == (2, 48)
    if not distilled:
        model.reset_classifier(0, "")
        for unpooled in (model, small(name, num_classes=0, global_pool="")):
            features = unpooled.forward_features(x)
            if unpooled.spec.head.norm_pooled:  # as timm's EVA: the norm is the head's, without pooling too
                features = unpooled.forward_head(features, pre_logits=True)
            assert torch.equal(unpooled(x), features)


class TestFeatures:
    @torch.inference_mode()
    @pytest.mark.parametrize("name", NAMES)
    def test_intermediates_are_what_the_blocks_return(self, name):
        model = lively(small(name))
        streams = []
        handles = [b.register_forward_hook(lambda _, __, pair: streams.append(sum(pair))) for b in model.blocks]
        x = image(4 * model.patch_size)
        features, maps = model.forward_intermediates(x)
        for handle in handles:
            handle.remove()
        n_prefix = model.num_prefix_tokens
        for stream, feature_map in zip(streams, maps, strict=True):
            patches = stream.view(2, -1, 48)[:, n_prefix:]
            assert torch.equal(feature_map, patches.transpose(1, 2).reshape(2, 48, 4, 4))
        assert torch.equal(features, model.forward_features(x))
        pairs = model.forward_intermediates(x, [1], return_prefix_tokens=True, intermediates_only=True)
        assert torch.equal(pairs[0][1], streams[1].view(2, -1, 48)[:, :n_prefix])

    @torch.inference_mode()
    @pytest.mark.parametrize("extractor", ["getter", "fx"])
    def test_equal_timms(self, plain, extractor):
        _, path = plain
        overlay = {"file": str(path), "num_classes": 5}
        arguments = {**SMALL, "pretrained": True, "pretrained_cfg_overlay": overlay, "features_only": True}
        arguments |= {"feature_cls": extractor, "dynamic_img_size": True}
        for indices in [(0,), (0, -1), 1, [1]]:
            ours = timm.create_model("revit_tiny_patch16_224", **arguments, out_indices=indices).eval()
            theirs = timm.create_model("vit_tiny_patch16_224", **arguments, out_indices=indices).eval()
            assert ours.feature_info.channels() == theirs.feature_info.channels()
            assert ours.feature_info.reduction() == theirs.feature_info.reduction()
            assert "num_classes" not in ours.default_cfg
            for x in (image(224), image(112)):
                for a, b in zip(ours(x), theirs(x), strict=True):
                    assert relative(a, b) <= TOLERANCE

    @pytest.mark.parametrize("name", NAMES)
    def test_extractor_keeps_only_what_it_needs(self, name):
        extractor = small(name, depth=4, features_only=True, out_indices=(0, 2)).train()
        p = extractor.model.patch_size
        assert len(extractor.model.blocks) == 3
        outputs = extractor([randn(3, g * p, g * p, seed=g) for g in extractor.model.grids])
        assert [tuple(m.shape) for m in outputs[1]] == [(48, g, g) for g in extractor.model.grids]
        sum(m.square().sum() for maps in outputs for m in maps).backward()
        assert [k for k, p in extractor.named_parameters() if p.grad is None] == []

    def test_pruned_model_has_its_own_configuration(self):
        model = small(depth=4, drop_path_rate=0.3, global_pool="avg")
        assert model.prune_intermediate_layers([-2, 0], prune_norm=True) == [0, 2]
        again = rf.ReViT.from_config(model.config)
        assert again.state_dict().keys() == model.state_dict().keys()
        rates = [[b.drop_path1.drop_prob for b in m.blocks] for m in (again, model)]
        assert rates[0] == pytest.approx(rates[1])
        kept = small(depth=3)
        kept.prune_intermediate_layers(1, prune_head=False)
        assert kept(image(32)).shape == (2, 7)
        assert isinstance(kept.norm, TALLayerNorm)

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [(name, {}) for name in NAMES]
        + [("revit_tiny_patch16_224", {"global_pool": pool}) for pool in ("avg", "")]
        + [("revit_tiny_patch16_224", {"global_pool": "", "fc_norm": True, "pre_norm": True})],
    )
    def test_graph_runs_the_whole_model_at_any_size(self, name, arguments):
        model = lively(small(name, **arguments))
        result = "truediv" if "distilled" in name else "head"  # the mean of both heads
        graph = create_feature_extractor(model, {"blocks.0": "first", "blocks.1": "last", result: "logits"})
        for grid in model.grids[1:]:
            x = image(grid * model.patch_size)
            outputs = graph(x)
            expected = model(x)
            assert relative(outputs["logits"].view_as(expected), expected) <= TOLERANCE
            maps = model.forward_intermediates(x, intermediates_only=True)
            for key, feature_map in zip(("first", "last"), maps, strict=True):
                patches = outputs[key][:, model.num_prefix_tokens :].transpose(1, 2)
                assert relative(patches.reshape(feature_map.shape), feature_map) <= TOLERANCE

    def test_graph_has_the_models_gradients(self):
        model = lively(small()).train()
        graph = create_feature_extractor(model, ["head"]).train()
        x = image(96)
        graph(x)["head"].square().sum().backward()
        traced = {k: p.grad.clone() for k, p in model.named_parameters()}
        model.zero_grad()
        model(x).square().sum().backward()
        for key, parameter in model.named_parameters():
            assert relative(traced[key], parameter.grad) <= 1e-4, key


class TestTraining:
    def test_norms_biases_and_tokens_do_not_decay(self):
        for name in NAMES:
            model = small(name)
            optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
            decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
            for key, parameter in model.named_parameters():
                exempt = "norm" in key or key.endswith(("bias", "gamma", "token", "pos_embed"))
                assert (id(parameter) in decayed) != exempt, key
            assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))

    def test_layer_decay_follows_the_blocks(self):
        model = small("revit_small_patch14_reg4_dinov2", depth=3)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
        scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        by_part = {}
        for key, parameter in model.named_parameters():
            part = ".".join(key.split(".")[:2]) if key.startswith("blocks") else key.split(".")[0]
            by_part.setdefault(part, set()).add(scale[id(parameter)])
        assert all(len(scales) == 1 for scales in by_part.values())
        first, second, last = (by_part[f"blocks.{i}"].pop() for i in range(3))
        (head,) = by_part["head"]
        assert first < second < last < head == 1.0
        assert second / first == last / second == 2.0
        for part in ("patch_embed", "cls_token", "reg_token", "pos_embed"):
            assert by_part[part] == {first / 2}
        assert by_part["norm"] == {last}

    def test_a_step_with_ema_checkpointing_and_channels_last(self):
        torch.manual_seed(0)
        model = small(drop_path_rate=0.1).train().to(memory_format=torch.channels_last)
        model.set_grad_checkpointing()
        ema = ModelEmaV3(model, decay=0.9)
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9)
        before = copy.deepcopy(model)
        x = image(96).contiguous(memory_format=torch.channels_last)
        torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        optimizer.step()
        ema.update(model)
        moved = (model.head.weight - before.head.weight).detach()
        assert moved.abs().max() > 0
        assert torch.allclose(ema.module.head.weight, before.head.weight + 0.1 * moved, atol=1e-7)
        model.eval()
        assert relative(model(x), model(x.contiguous())) <= TOLERANCE
        assert relative(ema.eval()(x), model(x)) > 0

    def test_copies_keep_taking_plain_checkpoints(self, plain, tmp_path):
        vit, _ = plain
        model = small(num_classes=5)
        torch.save(model, tmp_path / "model.pt")
        copies = {
            "deepcopy": copy.deepcopy(model),
            "pickle": pickle.loads(pickle.dumps(model)),
            "torch.load": torch.load(tmp_path / "model.pt", weights_only=False),
            "optimize": rf.optimize(model),
            "optimize, deepcopy": copy.deepcopy(rf.optimize(model)),
        }
        x = image(112)
        for how, other in copies.items():
            other.load_state_dict(vit.state_dict())
            assert relative(other(x), vit(x)) <= TOLERANCE, how
        assert relative(model(x), vit(x)) > 1e-2, "a copy loaded into the model it was made of"

    def test_local_folder(self, tmp_path):
        from timm.models import save_for_hf

        model = lively(small(img_size=96, grids=(6, 3)))
        save_for_hf(model, tmp_path, model_args={**SMALL, "img_size": 96, "grids": [6, 3]}, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert again.grids == (6, 3)
        assert torch.equal(again(image(96)), model(image(96)))


@torch.inference_mode()
@pytest.mark.parametrize("arguments", [{"global_pool": ""}, {"global_pool": "", "fc_norm": True}])
def test_optimised_copy_without_pooling(arguments):
    model = lively(small(**arguments))
    fast = rf.optimize(model)
    x = image(96)
    assert model(x).shape == (2, 37, 7)
    assert relative(fast(x), model(x)) <= TOLERANCE
    assert relative(fast([*x]), model(x).flatten(0, 1)) <= TOLERANCE


class TestImport:
    def test_again_and_after_timms_registry_was_loaded_anew(self):
        registry = sys.modules["timm.models._registry"]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            importlib.reload(timm_models)
            entries = dict(registry._model_entrypoints)
            for name in timm_models.VARIANTS:
                del registry._model_entrypoints[name]
            assert timm.list_models("revit*") == []
            importlib.reload(timm_models)
        assert [str(warning.message) for warning in seen] == []
        assert registry._model_entrypoints.keys() == entries.keys()
        assert small().num_classes == 7

    def test_a_name_that_another_package_took_is_warned_of(self, monkeypatch):
        registry = sys.modules["timm.models._registry"]
        monkeypatch.setitem(registry._model_to_module, "revit_tiny_patch16_224", "others")
        monkeypatch.setitem(registry._module_to_models, "others", {"revit_tiny_patch16_224"})
        registry._module_to_models["timm_models"].discard("revit_tiny_patch16_224")
        with pytest.warns(UserWarning, match="Overwriting revit_tiny_patch16_224 "):
            importlib.reload(timm_models)

    def test_without_timm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        spec = importlib.util.spec_from_file_location("without_timm", Path(timm_models.__file__))
        with pytest.raises(ImportError, match=r'pip install "revit-fast\[timm\]"'):
            spec.loader.exec_module(importlib.util.module_from_spec(spec))

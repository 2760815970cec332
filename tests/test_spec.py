"""One description of a ViT, many readers: each agrees with the plain definition, whatever the blocks are."""

import itertools
import json
import pickle
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import dense_vit
import pytest
import torch
from helpers import full, full_if, randn
from mutations import assert_copies_follow
from small_models import drawn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import revit_fast as rf
from revit_fast.layers.mlp import ACTIVATIONS, Activation
from revit_fast.models.keywords import BLOCK_KEYWORDS, keywords_of, spec_of
from revit_fast.models.macs import spec_macs
from revit_fast.models.spec import Block, Mlp

GRIDS, PATCH = (4, 3, 2), 2
KERNEL_ACTS = tuple(ACTIVATIONS)
OTHER_ACTS = (
    Activation("LeakyReLU", (("negative_slope", 0.5),)),
    Activation("Hardtanh", (("min_val", -0.1), ("max_val", 0.1))),
    Activation("Tanh"),
)
SIDES = [(4, 4), (2, 2), (3, 5), (1, 1), (3, 3)]


def random_spec(seed, acts=KERNEL_ACTS, plain=True):
    """A spec in which every field is drawn, blocks apart from one another.

    Args:
        seed: seed.
        acts: the activations.
        plain: whether to leave out rotary embeddings, gates, and the norms beyond those of a plain ViT.
    """
    draw = random.Random(seed)
    depth, dim = draw.randint(0, 3), draw.choice([8, 20, 24])
    eps = lambda: draw.choice([0.0, 1e-6, 1e-5, 1e-3])  # noqa: E731
    norm_layer = lambda: draw.choice(["layer", "rms"])  # noqa: E731
    cls = draw.random() < 0.7
    dist = cls and draw.random() < 0.2
    aux = cls and not dist and draw.random() < 0.2
    pools = ["token"] if dist or aux else ["token", "avg", "token_avg", ""] if cls else ["avg", ""]
    pool = draw.choice(pools)
    rope, maybe_norm = None, lambda: draw.choice([None, {"kind": norm_layer(), "eps": eps()}])
    if not plain:
        pool = draw.choice([pool, pool, "map"]) if pool != "" and not (dist or aux) else pool
        kind = draw.choice(["axial", "axial", "mixed", "interleaved"])
        rope = {
            "kind": kind,
            "temperature": draw.choice([10.0, 100.0, 10000.0]),
            "coords": draw.choice(["index", "centered"]) if kind == "axial" else "index",
            "order": draw.choice(["ij", "xy"]),
            "offset": draw.choice([0.0, 1.0]),
            "reference": draw.choice([None, (4, 3)]),
            "normalize": draw.choice(["separate", "min", "max"]),
            "half": draw.random() < 0.5,
            "sections": draw.choice([(1, 1), (2, 1)]),
        }
    heads = draw.choice([2, 4])

    def beyond():
        own = draw.choice([1, 2, 4]) if rope["kind"] != "mixed" else heads
        return {
            "num_heads": own,
            "num_kv_heads": draw.choice([None, 1]) if rope["kind"] != "mixed" else None,
            "head_dim": 8,
            "qk_norm": maybe_norm(),
            "attn_norm": maybe_norm(),
            "gated_attn": draw.random() < 0.5,
            "gated_mlp": draw.random() < 0.5,
            "mlp_norm": maybe_norm(),
        }

    def block():
        init, divisor = draw.choice([(None, 1.0), (0.3, 1.0), (None, 2.0)])
        return {
            "num_heads": draw.randint(1, 4),
            "head_dim": draw.choice([3, 8, 10, 17]),
            "attn_scale": draw.choice([None, 0.2]),
            "qkv_bias": draw.choice([True, False, "qv"]),
            "proj_bias": draw.random() < 0.5,
            "hidden_dim": draw.choice([7, 16, 40]),
            "act_layer": draw.choice(acts),
            "mlp_bias": draw.random() < 0.5,
            "norm1_eps": eps(),
            "norm2_eps": eps(),
            "norm1_layer": norm_layer(),
            "norm2_layer": norm_layer(),
            "init_values": init,
            "residual_scale": divisor,
            "attn_only_scale": draw.random() < 0.3,
            **({} if plain else beyond()),
        }

    learned = draw.random() < 0.8
    return spec_of(
        grids=GRIDS,
        base_grid=draw.choice([None, (3, 5)]),
        patch_size=PATCH,
        in_chans=draw.choice([1, 3]),
        num_classes=draw.choice([0, 5]) if not aux else 5,
        global_pool=pool,
        embed_dim=dim,
        depth=depth,
        blocks=[block() for _ in range(depth)],
        class_token=cls,
        distilled=dist,
        reg_tokens=draw.choice([0, 2]),
        no_embed_class=draw.random() < 0.4,
        patch_bias=draw.random() < 0.5,
        aux_head=aux,
        pre_norm=draw.random() < 0.5,
        final_norm=draw.random() < 0.8,
        fc_norm=draw.random() < 0.5 if pool == "avg" else False,
        pool_include_prefix=draw.random() < 0.3,
        norm_pre_eps=eps(),
        norm_eps=eps(),
        norm_pre_layer=norm_layer(),
        final_norm_layer=norm_layer(),
        abs_pos_embed=learned,
        pos_interpolation=draw.choice(["bicubic", "bilinear"]),
        pos_antialias=(antialias := draw.random() < 0.5),
        pos_align_corners=not antialias and draw.random() < 0.5,
        rope=rope,
        patch_norm=None if plain else maybe_norm(),
        attn_pool={"heads": 2, "mlp": beyond_mlp(draw, plain, maybe_norm)} if pool == "map" else None,
    )


def beyond_mlp(draw, plain, maybe_norm):
    """The MLP of an attention pool."""
    mlp = {"hidden": draw.choice([7, 16]), "act": draw.choice(KERNEL_ACTS)}
    return mlp if plain else mlp | {"gated": draw.random() < 0.5, "norm": maybe_norm()}


def images_for(spec, seed=0):
    return [randn(spec.embed.in_chans, PATCH * h, PATCH * w, seed=seed + i) for i, (h, w) in enumerate(SIDES)]


def rows_of(model, images):
    """Logits of every image, of all its tokens one after another without pooling."""
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "beyond"])
@pytest.mark.parametrize("seed", [full_if(seed >= 20, seed) for seed in range(40)])
class TestRandomSpecs:
    def test_module_is_the_definition(self, seed, plain):
        spec = random_spec(seed, KERNEL_ACTS + OTHER_ACTS, plain)
        model = drawn(rf.ReViT(spec)).double()
        images = [image.double() for image in images_for(spec)]
        truth = [dense_vit.logits(spec, model.state_dict(), image) for image in images]
        truth = torch.cat(truth) if not spec.head.pool else torch.stack(truth)
        assert (rows_of(model, images) - truth).abs().max() <= 1e-10 * truth.abs().max()

    def test_optimized_copy_is_the_module(self, seed, plain):
        spec = random_spec(seed, plain=plain)
        model = drawn(rf.ReViT(spec))
        images = images_for(spec)
        expected, fast = rows_of(model, images), rf.optimize(model)
        assert (rows_of(fast, images) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
        for image, alone in zip(images, [rows_of(fast, [image]) for image in images], strict=True):
            together = rows_of(fast, [*images, image])[-len(alone) :]
            assert torch.equal(alone, together), "an image's bits do not depend on its pack"

    def test_files_hold_it(self, seed, plain):
        spec = random_spec(seed, KERNEL_ACTS + OTHER_ACTS, plain)
        keywords = json.loads(json.dumps(keywords_of(spec)))
        assert spec_of(**keywords) == spec
        assert rf.ReViT.from_config(keywords).spec == spec
        assert pickle.loads(pickle.dumps(spec)) == spec

    def test_multiply_adds_are_those_that_are_counted(self, seed, plain):
        spec = random_spec(seed, plain=plain)
        state = rf.ReViT(spec).state_dict()
        image = randn(spec.embed.in_chans, PATCH * 3, PATCH * 5)
        with FlopCounterMode(display=False) as counter:
            dense_vit.logits(spec, state, image)
        assert counter.get_total_flops() == 2 * spec_macs(spec, 15)


def test_saved_and_loaded(tmp_path):
    model = drawn(rf.ReViT(random_spec(3)))
    model.save_pretrained(tmp_path / "m")
    again = rf.ReViT.from_pretrained(tmp_path / "m")
    assert again.spec == model.spec
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", json.loads((Path(__file__).parent / "configs" / "before_specs.json").read_text()))
def test_configs_of_before_give_the_same_model(kind):
    """Written by the code that had no specs, for models of every kind."""
    written = json.loads((Path(__file__).parent / "configs" / "before_specs.json").read_text())[kind]
    model = rf.ReViT.from_config(written["config"])
    assert {name: list(p.shape) for name, p in model.named_parameters()} == written["parameters"]
    for name, value in written["config"].items():
        if value is not None:  # defaults are said now
            assert model.config[name] == value, name


def test_models_of_layer_norms_are_written_as_before():
    """A release that has no other norm reads their files."""
    config = keywords_of(spec_of(embed_dim=8, num_heads=2, depth=2, pre_norm=True))
    assert not any(name.startswith("norm") and name.endswith("layer") for name in config)
    for name, path in (("norm_pre_layer", "embed"), ("final_norm_layer", "head")):
        spec = spec_of(embed_dim=8, num_heads=2, depth=2, pre_norm=True, **{name: "rms"})
        assert keywords_of(spec) == config | {name: "rms"}
        assert getattr(spec, path).norm.kind == "rms"


def test_rms_norms_have_a_weight_alone():
    model = rf.ReViT(embed_dim=8, num_heads=2, depth=2, norm_layer="rms", blocks=[{}, {"norm1_layer": "layer"}])
    norms = {name for name, _ in model.named_parameters() if ".norm" in name or name.startswith("norm")}
    in_blocks = {"0.norm1.weight", "0.norm2.weight", "1.norm1.weight", "1.norm1.bias", "1.norm2.weight"}
    assert norms == {"norm.weight", *(f"blocks.{name}" for name in in_blocks)}
    assert norms <= model.no_weight_decay()
    assert all(
        torch.equal(p, torch.ones_like(p)) for n, p in model.named_parameters() if n in norms and "bias" not in n
    )
    plain = {name: p[0] if name in norms else p for name, p in drawn(model).state_dict().items()}
    converted = model.convert_state_dict(plain)
    assert all(converted[name].shape == p.shape for name, p in model.named_parameters())


class TestKeywords:
    def test_a_spec_comes_alone(self):
        with pytest.raises(TypeError, match="spec: expected it alone, got depth too"):
            rf.ReViT(spec_of(embed_dim=8, num_heads=2), depth=3)
        with pytest.raises(TypeError, match="gears"):
            rf.ReViT(gears=3)

    def test_blocks_are_checked(self):
        with pytest.raises(ValueError, match="blocks: expected one entry for each of 2 blocks, got 1"):
            spec_of(depth=2, blocks=[{}])
        with pytest.raises(TypeError, match=f"blocks: unknown depth; an entry may hold {BLOCK_KEYWORDS[0]}"):
            spec_of(depth=1, blocks=[{"depth": 3}])

    def test_a_head_of_several_blocks(self):
        assert rf.ReViT(embed_dim=8, num_heads=2, depth=2).num_heads == 2
        with pytest.raises(ValueError, match=r"num_heads: the blocks have \[1, 2\] heads"):
            _ = rf.ReViT(embed_dim=8, num_heads=2, depth=2, blocks=[{}, {"num_heads": 1}]).num_heads

    def test_reset_and_prune_are_in_the_spec(self):
        model = rf.ReViT(embed_dim=8, num_heads=2, depth=3, drop_path_rate=0.2, grids=GRIDS, patch_size=PATCH)
        model.reset_classifier(7, "avg")
        assert (model.spec.head.classes, model.spec.head.pool) == (7, "avg")
        model.prune_intermediate_layers([1])
        assert len(model.spec.blocks) == 2
        assert model.spec.blocks[1].drop_path == 0.1
        again = rf.ReViT(model.spec)
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]


MUTATED = {
    "plain": {},
    "many fields": {
        "reg_tokens": 1,
        "pre_norm": True,
        "init_values": 0.3,
        "act_layer": "gelu_tanh",
        "global_pool": "avg",
        "drop_rate": 0.3,
        "proj_drop_rate": 0.3,
        "drop_path_rate": 0.3,
    },
    "stem": {"stem_chans": 8, "residual_scale": 2.0, "aux_head": True, "patch_size": 4},
    "rms": {"norm_layer": "rms", "pre_norm": True, "global_pool": "avg", "blocks": [{}, {"norm2_layer": "layer"}]},
}


@pytest.mark.parametrize("left_out", [full(None), "blocks.0"])
class TestMutations:
    """Whatever is changed: where the model's result changes, the optimised copy's does too, or it is refused."""

    @pytest.fixture
    def model(self, options):
        arguments = {"grids": GRIDS, "patch_size": PATCH, "num_classes": 5, "embed_dim": 8, "depth": 2, "num_heads": 2}
        return drawn(rf.ReViT(**{**arguments, "hidden_dim": 12, **options}))

    @pytest.fixture
    def images(self, model):
        sides = [(4, 4), (2, 2), (3, 3)]
        return [randn(3, model.patch_size * h, model.patch_size * w, seed=i) for i, (h, w) in enumerate(sides)]

    @pytest.mark.parametrize(
        "options", [o if name in ("stem", "rms") else full(o) for name, o in MUTATED.items()], ids=MUTATED
    )
    def test_before_and_after_the_first_call(self, model, images, left_out):
        assert_copies_follow(model, rf.optimize, images, left_out=left_out)

    @pytest.mark.parametrize(
        "options", [o if name == "many fields" else full(o) for name, o in MUTATED.items()], ids=MUTATED
    )
    def test_a_copy_that_calls_modules_follows_all(self, model, images, left_out):
        optimize = partial(rf.optimize, engine="modules")
        assert_copies_follow(model, optimize, images, refuses=False, left_out=left_out)


def test_spec_refuses_what_cannot_be():
    spec = spec_of(embed_dim=8, num_heads=2, depth=1)
    with pytest.raises(ValueError, match='global_pool: expected "token", "avg"'):
        replace(spec, head=replace(spec.head, pool="max"))
    with pytest.raises(ValueError, match='"token" needs a class token'):
        replace(spec, embed=replace(spec.embed, prefix=replace(spec.embed.prefix, cls=False)))
    with pytest.raises(ValueError, match="residual_scale: expected a positive divisor, got 0"):
        spec_of(residual_scale=0)
    with pytest.raises(ValueError, match='norm_layer: expected "layer" or "rms", got \'batch\''):
        spec_of(norm_layer="batch")


def test_every_block_may_have_another_activation():
    """One block for every activation that kernels have, in the order of `ACTIVATIONS`."""
    spec = spec_of(grids=GRIDS, patch_size=PATCH, num_classes=5, embed_dim=24, depth=0, num_heads=3)
    attn = spec_of(embed_dim=24, num_heads=3, depth=1).blocks[0].attn
    blocks = tuple(Block(attn, Mlp(16, Activation(name))) for name in ACTIVATIONS)
    model = drawn(rf.ReViT(replace(spec, blocks=blocks)))
    images = images_for(model.spec)
    torch.testing.assert_close(rows_of(rf.optimize(model), images), rows_of(model, images), atol=1e-4, rtol=1e-4)
    for a, b in itertools.combinations(ACTIVATIONS.values(), 2):
        x = torch.linspace(-3, 3, 50)
        assert not torch.allclose(a()(x), b()(x), atol=1e-6), "two names for one activation"


def test_modules_are_the_spec_s(monkeypatch):
    model = rf.ReViT(random_spec(5))
    assert [type(block.mlp.act) for block in model.blocks] == [type(b.mlp.act.build()) for b in model.spec.blocks]
    assert isinstance(rf.ReViT(spec_of(embed_dim=8, num_heads=2, act_layer=nn.SiLU)).blocks[0].mlp.act, nn.SiLU)

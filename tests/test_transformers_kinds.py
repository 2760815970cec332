"""DINOv3, SigLIP, SigLIP 2 and CLIP of transformers, built small: model, optimised copies and gradients are theirs."""

import inspect
import math

import pytest
import torch
from helpers import randn
from torch import nn

import revit_fast as rf
from revit_fast.models.from_transformers import KINDS, config_from_transformers
from revit_fast.models.timm_blocks import plain_names
from revit_fast.models.transformers_weights import state_dict_from_transformers

pytestmark = pytest.mark.beside

transformers = pytest.importorskip("transformers")

from test_transformers_import import MODELS as PLAIN  # noqa: E402  (it imports transformers)

GRIDS = (5, 4, 3)
P = 4
TOLERANCE = 2e-5
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "patch_size": P}
IMAGE = {"image_size": 5 * P}
NAFLEX = {"num_patches": 25}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
MODELS = {
    "dinov3": ("DINOv3ViTModel", {"num_register_tokens": 3}),
    "dinov3_gated": ("DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False}),
    "dinov3_biased": ("DINOv3ViTModel", {"key_bias": True, "rope_theta": 30.0, "image_size": 21, "num_channels": 1}),
    "dinov3_unbiased": ("DINOv3ViTModel", {"query_bias": False, "value_bias": False, "proj_bias": False}),
    "siglip": ("SiglipVisionModel", IMAGE),
    "siglip_headless": ("SiglipVisionModel", {**IMAGE, "vision_use_head": False}),
    "siglip_both": ("SiglipModel", {**IMAGE, "num_attention_heads": 4}),
    "siglip_classifier": ("SiglipForImageClassification", IMAGE),
    "siglip2": ("Siglip2VisionModel", NAFLEX),
    "siglip2_headless": ("Siglip2VisionModel", {**NAFLEX, "vision_use_head": False}),
    "siglip2_both": ("Siglip2Model", NAFLEX),
    "siglip2_classifier": ("Siglip2ForImageClassification", NAFLEX),
    "clip": ("CLIPVisionModel", IMAGE),
    "clip_projected": ("CLIPVisionModelWithProjection", {**IMAGE, "projection_dim": 6, "hidden_act": "gelu"}),
    "clip_both": ("CLIPModel", IMAGE),
    "clip_classifier": ("CLIPForImageClassification", IMAGE),
}
"""(class, configuration of its part for images)."""

SIDES = [(5, 5), (3, 3), (6, 6), (4, 2), (2, 7)]


def make(key, **options):
    """A model with a value in every parameter that moves the output; attention by SDPA: eager's softmax is float32."""
    kind, arguments = MODELS[key]
    model_class = getattr(transformers, kind)
    arguments = {**SMALL, **arguments, **options}
    if "Vision" in kind or "DINO" in kind:
        config = model_class.config_class(**arguments, attn_implementation="sdpa")
    else:
        both = {"vision_config": arguments, "text_config": TEXT, "num_labels": 7, "projection_dim": 6}
        config = model_class.config_class(**both, attn_implementation="sdpa")
    model = model_class(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if ("norm" in name and name.endswith("weight")) or "layer_scale" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            elif p.dim() > 1 and name.endswith("weight") and "position" not in name:
                p.copy_(0.9 * noise / math.sqrt(p[0].numel()))
            else:
                p.add_(noise, alpha=0.4)
    return model.eval()


def images_of(vit, grid, batch=2, dtype=torch.float32):
    config = getattr(vit.config, "vision_config", vit.config)
    return randn(batch, config.num_channels, grid[0] * P, grid[1] * P, dtype=dtype, seed=sum(grid))


def padded(images, n):
    """What `Siglip2ImageProcessor` returns for images of whole patches."""
    grids = [(image.shape[1] // P, image.shape[2] // P) for image in images]
    cut = [image.unflatten(1, (-1, P)).unflatten(3, (-1, P)).permute(1, 3, 2, 4, 0) for image in images]
    rows = [patches.reshape(h * w, -1) for patches, (h, w) in zip(cut, grids, strict=True)]
    values = torch.stack([nn.functional.pad(r, (0, 0, 0, n - len(r)), value=7.0) for r in rows])
    mask = torch.tensor([[int(i < h * w) for i in range(n)] for h, w in grids])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def interpolates(vit):
    """Whether the model's positions can be resampled; those of version 4's `CLIPForImageClassification` cannot."""
    parameters = inspect.signature(vit.forward).parameters
    return "interpolate_pos_encoding" in parameters or parameters.get("kwargs") is not None


def sides_of(vit):
    return SIDES if type(vit).__name__.startswith(("DINO", "Siglip2")) or interpolates(vit) else SIDES[:1]


def outputs_of(vit, images):
    """(what the model gives for an image, its `last_hidden_state`) of transformers; the former None without a head."""
    kind = type(vit).__name__
    if kind.startswith("Siglip2"):
        inputs = padded(images, images.shape[2] * images.shape[3] // P**2) if torch.is_tensor(images) else images
    else:
        inputs = {"pixel_values": images}
        if not kind.startswith("DINO") and interpolates(vit):
            inputs["interpolate_pos_encoding"] = True
    if "Classification" in kind:
        return vit(**inputs).logits, None
    if kind in ("SiglipModel", "Siglip2Model", "CLIPModel"):
        found = vit.get_image_features(**inputs)
        return (found if torch.is_tensor(found) else found.pooler_output), None
    found = vit(**inputs)
    return (found.image_embeds if "Projection" in kind else found.pooler_output), found.last_hidden_state


def off(a, b):
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def copies_of(model):
    """The optimised copies: over packed weights, and fused."""
    return [rf.optimize(model, engine="modules"), rf.optimize(model, engine="fused")]


@pytest.fixture(params=MODELS, scope="module")
def kind(request):
    vit = make(request.param)
    return request.param, vit, rf.ReViT.from_transformers(vit, grids=GRIDS)


def test_every_class_is_tested():
    assert {kind for kind, _ in (*MODELS.values(), *PLAIN.values())} == set(KINDS)


def test_model_and_optimized_copies_are_theirs(kind):
    _, vit, model = kind
    copies = copies_of(model)
    for grid in sides_of(vit):
        images = images_of(vit, grid)
        with torch.no_grad():
            pooled, tokens = outputs_of(vit, images)
            pooled = tokens if pooled is None else pooled
            assert pooled.std() > 0.1
            for ours in (model, *copies):
                assert off(ours(images), pooled) <= TOLERANCE
                if tokens is not None:
                    assert off(ours.forward_features(images), tokens) <= TOLERANCE


def test_the_comparison_sees_what_it_compares(kind):
    """Without a block or a rotary embedding, transformers' own output is another."""
    key, vit, _ = kind
    images = images_of(vit, sides_of(vit)[-1])

    def moved(module, forward):
        before = outputs_of(vit, images)
        module.forward = forward
        try:
            return max(off(a, b) for a, b in zip(outputs_of(vit, images), before, strict=True) if a is not None)
        finally:
            del module.forward

    modules = dict(vit.named_modules())
    block = next(m for name, m in modules.items() if name.endswith(("layer.1", "layers.1")) and "text" not in name)
    calls = block.forward

    def left_out(x, *args, **options):
        found = calls(x, *args, **options)
        return (x, *found[1:]) if isinstance(found, tuple) else x

    with torch.no_grad():
        assert moved(block, left_out) > 1e-2
        if key.startswith("dinov3"):
            rope = modules["rope_embeddings"]
            tables = rope.forward
            assert moved(rope, lambda x: tuple(map(torch.zeros_like, tables(x)))) > 1e-2


def wide(vit):
    """A model in float64 whose rotary tables and positions of the stored grid are so too; transformers rounds them."""
    for module in vit.modules():
        if hasattr(module, "resize_positional_embeddings"):
            module.resize_positional_embeddings = lambda stored, shapes, max_length: stored.flatten(0, 1)
    rope = dict(vit.named_modules()).get("rope_embeddings")
    if rope is None:
        return vit

    def tables(images):
        sides = images.shape[2] // P, images.shape[3] // P
        lines = [(2 * ((torch.arange(n, dtype=torch.float32) + 0.5) / n) - 1).double() for n in sides]
        steps = torch.arange(0, 1, 4 / rope.head_dim, dtype=torch.float32)
        angle = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 1)[:, :, None]
        angle = (2 * math.pi * angle / (rope.base**steps).double()).flatten(1).tile(2)
        return angle.cos(), angle.sin()

    rope.forward = tables
    return vit


def test_gradients_in_float64_are_theirs(kind):
    key = kind[0]
    if key.endswith("both"):
        pytest.skip("its part for images is that of another class")
    vit = make(key).double()
    model = rf.ReViT.from_transformers(vit, grids=GRIDS)
    wide(vit)
    theirs, ours = (images_of(vit, (5, 5), dtype=torch.float64).requires_grad_() for _ in range(2))
    pooled, tokens = outputs_of(vit, theirs)
    (tokens if pooled is None else pooled).square().sum().backward()
    model(ours).square().sum().backward()
    assert off(ours.grad, theirs.grad) <= 1e-10
    grads = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
    config = config_from_transformers(make(key)) | {
        "no_embed_class": False
    }  # gradients are not added as the tokens are
    expected = state_dict_from_transformers(grads, config)
    expected = plain_names(expected, [name for name, _ in model.named_parameters()])
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, p in model.named_parameters():
        if not p.requires_grad:  # the bias of a projection
            assert p.grad is None
            assert not expected.pop(name).any()
            continue
        grad = p.grad.sum(dim=0) if model.norm_parameter.search(name) else p.grad  # the other lengths' rows are zero
        assert (grad - expected.pop(name)).abs().max() <= 1e-10 * largest, name
    assert not expected


class TestNaFlex:
    MIXED = ((5, 5), (2, 7), (1, 9), (6, 3), (1, 1))

    @pytest.mark.parametrize("key", ["siglip2", "siglip2_classifier"])
    def test_a_mixed_batch_is_theirs_and_each_image_alone(self, key):
        vit = make(key)
        model = rf.ReViT.from_transformers(vit, grids=GRIDS)
        images = [images_of(vit, grid)[0] for grid in self.MIXED]
        inputs = padded(images, 30)
        with torch.no_grad():
            expected = outputs_of(vit, inputs)[0]
            batch = rf.PackedBatch.from_naflex(**inputs)
            assert batch.grids == self.MIXED
            assert batch.data.shape == (25 + 14 + 9 + 18 + 1, P * P * 3)
            for ours in (model, *copies_of(model)):
                assert off(ours(batch), expected) <= TOLERANCE
                assert off(ours(images), expected) <= TOLERANCE
            for fast in copies_of(model):
                together = fast(batch)
                for i, image in enumerate(images):
                    assert torch.equal(fast(rf.PackedBatch.from_naflex(**padded([image], 28)))[0], together[i])
                    assert torch.equal(fast([image])[0], together[i])

    def test_photographs_through_the_processor(self):
        import numpy as np
        from PIL import Image

        generator = np.random.default_rng(0)
        photographs = [
            Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((60, 90), (41, 13))
        ]
        processor = transformers.Siglip2ImageProcessor(patch_size=P, max_num_patches=30)
        inputs = processor(images=photographs, return_tensors="pt")
        vit = make("siglip2")
        model = rf.ReViT.from_transformers(vit, grids=GRIDS, processor=processor)
        assert model.pretrained_cfg["crop_pct"] == 1.0
        assert model.pretrained_cfg["interpolation"] == "bilinear"
        with torch.no_grad():
            ours = model(rf.PackedBatch.from_naflex(**inputs))
            assert off(ours, vit(**inputs).pooler_output) <= TOLERANCE


class TestFolder:
    @pytest.mark.parametrize("key", ["dinov3", "siglip2_both", "clip_projected"])
    def test_is_the_model(self, key, tmp_path):
        vit = make(key)
        vit.save_pretrained(tmp_path)
        transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=30).save_pretrained(tmp_path)
        loaded, given = (rf.ReViT.from_transformers(source, grids=GRIDS) for source in (str(tmp_path), vit))
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), given.parameters(), strict=True))
        assert loaded.pretrained_cfg["crop_pct"] == 0.75
        assert "crop_pct" not in given.pretrained_cfg
        own = rf.ReViT.from_transformers(tmp_path, processor=transformers.ViTImageProcessor())
        assert own.pretrained_cfg["crop_pct"] == 1.0

    def test_dtype_is_that_of_the_file(self, tmp_path):
        make("clip").bfloat16().save_pretrained(tmp_path)
        assert rf.ReViT.from_transformers(tmp_path).pos_embed.dtype == torch.bfloat16

    def test_missing_weights_are_refused(self, tmp_path):
        from safetensors.torch import load_file, save_file

        make("siglip").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        weights = load_file(file)
        save_file({n: w for n, w in weights.items() if "probe" not in n}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights of SiglipVisionModel: .*head\.probe"):
            rf.ReViT.from_transformers(tmp_path)

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            (
                None,
                FileNotFoundError,
                "vit: there is no .*config.json; give a folder that transformers' save_pretrained",
            ),
            ("{}", ValueError, r"names no class of transformers \(architectures\); .*ReViT.from_pretrained"),
            (
                '{"architectures": ["BeitModel"]}',
                ValueError,
                "the class BeitModel in .*config.json .supported: ViTModel",
            ),
        ],
    )
    def test_other_folders_are_refused_by_name(self, content, error, message, tmp_path):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(error, match=message):
            rf.ReViT.from_transformers(tmp_path)


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("dinov3", {"value_bias": False}, r"query_bias=True, key_bias=False, value_bias=False\) is not supported"),
        ("dinov3", {"drop_path_rate": 0.1}, "drop_path_rate=0.1"),
        ("dinov3", {"hidden_act": "mish"}, r"hidden_act='mish' \(supported: gelu, "),
        ("siglip", {"attention_dropout": 0.1}, r"attention_dropout=0.1 \(load the model with attention_dropout=0"),
        ("clip_both", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("siglip2", {"num_patches": 24}, r"num_patches=24 \(no square\)"),
        ("clip", {"image_size": 22}, r"image_size=22x22 \(no multiple of patch_size=4\)"),
    ],
)
def test_other_configurations_are_refused_by_name(key, options, message):
    kind, arguments = MODELS[key]
    arguments = {**SMALL, **arguments, **options}
    config_class = getattr(transformers, kind).config_class
    both = kind == "CLIPModel"
    config = config_class(vision_config=arguments, text_config=TEXT) if both else config_class(**arguments)
    vit = getattr(transformers, kind)(config)
    with pytest.raises(ValueError, match=f"vit: .*{message}"):
        rf.ReViT.from_transformers(vit, grids=GRIDS)


def test_changed_modules_and_other_classes_are_refused():
    vit = make("siglip")
    tower = getattr(vit, "vision_model", vit)
    tower.head.mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"vit: .*head.mlp is Identity instead of SiglipMLP"):
        rf.ReViT.from_transformers(vit)
    vit = make("dinov3")
    vit.classifier = nn.Linear(32, 3)  # its forward does not call it
    with pytest.raises(ValueError, match="classifier was added"):
        rf.ReViT.from_transformers(vit)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    with pytest.raises(ValueError, match=r"vit: the class .*CLIPTextModel \(supported: "):
        rf.ReViT.from_transformers(text)


@pytest.mark.parametrize("key", ["siglip", "clip_projected", "dinov3"])
def test_frozen_parameters_stay_frozen(key):
    vit = make(key).requires_grad_(False)
    assert not [n for n, p in rf.ReViT.from_transformers(vit).named_parameters() if p.requires_grad]
    trained = {
        "siglip": "head.attention.in_proj_bias",
        "clip_projected": "visual_projection",
        "dinov3": "1.attention.v_proj",
    }
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(trained[key] in name)
    ours = [n for n, p in rf.ReViT.from_transformers(vit).named_parameters() if p.requires_grad]
    assert (
        ours
        == {
            "siglip": ["attn_pool.q.bias", "attn_pool.kv.bias"],
            "clip_projected": ["head.weight"],
            "dinov3": ["blocks.1.attn.v_bias", "blocks.1.attn.qkv.weight"],
        }[key]
    )


@pytest.mark.parametrize("key", ["dinov3_gated", "siglip2", "clip_classifier"])
def test_saved_and_loaded(key, tmp_path):
    vit = make(key)
    model = rf.ReViT.from_transformers(vit, grids=GRIDS)
    model.save_pretrained(tmp_path / "m")
    again = rf.ReViT.from_pretrained(tmp_path / "m")
    assert again.spec == model.spec
    with torch.no_grad():
        assert torch.equal(again(images_of(vit, (4, 2))), model(images_of(vit, (4, 2))))


def test_class_names_of_a_classifier_of_both_parts():
    vit = make("siglip2_classifier")
    vit.config.id2label = {i: f"animal {i}" for i in range(7)}
    assert rf.ReViT.from_transformers(vit).pretrained_cfg["label_names"] == tuple(f"animal {i}" for i in range(7))
    assert rf.ReViT.from_transformers(make("clip_both")).pretrained_cfg == {"label_names": None}


@pytest.mark.skipif(transformers.__version__ < "5", reason="version 4 does not say what a class takes")
def test_coverage_tells_taken_classes_from_others(tmp_path):
    from bench import coverage

    names = ["ViTModel", "CLIPModel", "BertModel", "BeitForImageClassification", "Siglip2ForImageClassification"]
    found = coverage.class_coverage(names)
    assert found == {
        "AutoModelForImageClassification": {coverage.OTHER: names[3:4], coverage.TAKEN: names[4:]},
        "AutoModel": {coverage.TAKEN: names[:1]},
        "AutoModel, images and more": {coverage.TAKEN: names[1:2]},
    }
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- transformers: begin -->\nold\n<!-- transformers: end -->\nafter\n")
    coverage.write_table(page, "transformers", coverage.class_table_of(found))
    assert page.read_text().splitlines() == [
        "before",
        "<!-- transformers: begin -->",
        "| transformers | taken | refused |",
        "| --- | --- | --- |",
        "| `AutoModel` | 1 of 1: `ViTModel` | – |",
        "| `AutoModel`, images and more | 1 of 1: `CLIPModel` | – |",
        "| `AutoModelForImageClassification` | 1 of 2: `Siglip2ForImageClassification` | another class: "
        "`BeitForImageClassification` |",
        "<!-- transformers: end -->",
        "after",
    ]


def test_the_bench_finds_its_candidates_right():
    naflex = pytest.importorskip("bench.naflex", exc_type=ImportError)
    rows = naflex.measure(depth=1, rounds=1, threads=torch.get_num_threads())
    assert [row["right"] for row in rows] == [True, True, True]
    assert rows[0]["error"] < 1e-5 < rows[1]["error"], "the error tells the precision"
    assert all(row["of_peak"] > 0 for row in rows)

"""Models of transformers with random weights beside the ReViT that is made of them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randn

import revit_fast as rf
from revit_fast.models.from_transformers import config_from_transformers
from revit_fast.models.timm_blocks import plain_names
from revit_fast.models.transformers_weights import state_dict_from_transformers

pytestmark = pytest.mark.beside

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
interpolate = F.interpolate
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 40, "patch_size": 8}
MODELS = {
    "vit": ("ViTForImageClassification", {"intermediate_size": 100, "num_labels": 7}),
    "vit_features": ("ViTModel", {"intermediate_size": 72}),
    "vit_no_qkv_bias": ("ViTForImageClassification", {"qkv_bias": False, "num_labels": 3}),
    "vit_wide": ("ViTForImageClassification", {"hidden_size": 60, "num_attention_heads": 3, "image_size": (24, 56)}),
    "vit_one_patch": ("ViTForImageClassification", {"image_size": 7, "patch_size": 7, "num_channels": 1}),
    "deit": ("DeiTForImageClassification", {"num_labels": 7, "hidden_act": "gelu_pytorch_tanh"}),
    "deit_teacher": (
        "DeiTForImageClassificationWithTeacher",
        {"num_labels": 7, "image_size": 72, "hidden_act": "relu"},
    ),
    "dinov2": ("Dinov2ForImageClassification", {"num_labels": 7, "patch_size": 14, "image_size": 70}),
    "dinov2_features": ("Dinov2Model", {"mlp_ratio": 3, "layerscale_value": 0.0}),
    "dinov2_no_mask": ("Dinov2Model", {"use_mask_token": False, "hidden_act": "silu", "qkv_bias": False}),
    "dinov2_gated": ("Dinov2ForImageClassification", {"num_labels": 7, "use_swiglu_ffn": True}),
    "registers_gated": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "registers": ("Dinov2WithRegistersForImageClassification", {"num_labels": 7, "num_register_tokens": 3}),
    "registers_features": ("Dinov2WithRegistersModel", {"image_size": 88}),
}
"""(class, configuration): odd and non-square grids, one patch, heads of 12 and 20 channels, every class there is."""


def make(key, **options):
    """A model with weights that keep every branch alive; attention by SDPA, as eager's softmax is always float32."""
    kind, arguments = MODELS[key]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**SMALL, **arguments, **options}, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def images_of(vit, batch=2, sides=None, dtype=torch.float32):
    size = sides or vit.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return randn(batch, vit.config.num_channels, height, width, dtype=dtype)


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def result_of(vit, x, **options):
    """Logits, or all tokens of a model without classifier."""
    output = vit(x, **options)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def result_of_ours(model, x):
    return model(x) if model.num_classes else model.forward_features(x)


def grids_for(vit):
    """Configured grids: the longest nearest to the model's own."""
    size = vit.config.image_size
    longest = max(size // vit.config.patch_size if isinstance(size, int) else 5, 1)
    return tuple(dict.fromkeys(max(1, longest - i) for i in range(3)))


@pytest.mark.parametrize("key", MODELS)
def test_equals_it_at_its_own_grid(key):
    vit = make(key)
    model = rf.ReViT.from_transformers(vit, grids=grids_for(vit))
    x = images_of(vit)
    with torch.no_grad():
        theirs = result_of(vit, x)
        assert theirs.std() > 0.1
        assert (result_of_ours(model, x) - theirs).abs().max() <= TOLERANCE
        if not model.num_classes:
            assert (model(x) - theirs[:, 0]).abs().max() <= TOLERANCE
        fast = rf.optimize(model, engine="fused")
        assert (fast(x) - model(x)).abs().max() <= TOLERANCE
        packed = model([x[0], x[1, :, :, : 2 * model.patch_size], x[1]])
        assert (packed[[0, 2]] - model(x)).abs().max() <= TOLERANCE


# transformers resamples tables of square grids only.
@pytest.mark.parametrize("key", [key for key in MODELS if key not in ("vit_wide", "vit_one_patch")])
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 7), (11, 2)])
def test_equals_it_at_other_grids(key, grid, monkeypatch):
    """transformers antialiases positions of DINOv2 with registers alone; the other way, results are others."""
    vit = make(key)
    model = rf.ReViT.from_transformers(vit, grids=grids_for(vit))
    x = images_of(vit, sides=[model.patch_size * n for n in grid])
    options = {} if key.startswith(("dinov2", "registers")) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        ours = result_of_ours(model, x)
        assert (ours - result_of(vit, x, **options)).abs().max() <= TOLERANCE
        if grid == (3, 7):
            antialiased = key.startswith("registers")
            monkeypatch.setattr(
                F, "interpolate", lambda *args, **kw: interpolate(*args, **kw | {"antialias": not antialiased})
            )
            assert (ours - result_of(vit, x, **options)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("key", ["vit", "deit", "deit_teacher", "dinov2", "registers"])
def test_gradients_in_float64(key):
    """Of every weight and of the image; the parts of a fused weight side by side."""
    vit = make(key).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(1 + 1e-9)  # no value that float32 could hold
    model = rf.ReViT.from_transformers(vit, grids=grids_for(vit))
    assert model.pos_embed.dtype == torch.float64
    x, y = (images_of(vit, dtype=torch.float64).requires_grad_() for _ in range(2))
    weights = randn(2, model.num_classes, dtype=torch.float64)
    (result_of(vit, x) * weights).sum().backward()
    (model(y) * weights).sum().backward()
    assert relative(y.grad, x.grad) <= 1e-10
    theirs = {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}
    config = config_from_transformers(vit) | {"no_embed_class": False}  # gradients are not added as the tokens are
    expected = state_dict_from_transformers(theirs, config)
    expected = plain_names(expected, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        gradient = expected.pop(name)
        if name == "pos_embed" and model.no_embed_class:
            gradient = gradient[:, 1:]
        used = parameter.grad[0] if gradient.dim() < parameter.dim() else parameter.grad  # norms of the longest length
        assert relative(used, gradient) <= 1e-10, name
        if gradient.dim() < parameter.dim():
            assert not parameter.grad[1:].any(), name
    assert not expected


def test_training_mode_dtype_and_weights_are_its_own():
    vit = make("dinov2").train().bfloat16()
    model = rf.ReViT.from_transformers(vit, grids=(5, 4))
    assert model.training
    assert model.pos_embed.dtype == torch.bfloat16
    with torch.no_grad():
        model.head.weight.zero_()
        model.cls_token.zero_()
    assert vit.classifier.weight.abs().sum() > 0
    assert vit.dinov2.embeddings.cls_token.abs().sum() > 0


def test_it_can_be_saved_with_labels_and_preprocessing(tmp_path):
    names = {0: "cat", 1: "dog", 2: "tree"}
    vit = make("vit", num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    processor = transformers.DeiTImageProcessor()
    rf.ReViT.from_transformers(vit, grids=(5, 4, 3), processor=processor).save_pretrained(tmp_path / "m")
    pipe = rf.load(tmp_path / "m")
    assert pipe.classes == tuple(names.values())
    assert pipe.prep.crop_pct == 0.875
    assert pipe.prep.options["mean"] == [0.5, 0.5, 0.5]
    unnamed = rf.ReViT.from_transformers(make("vit"), grids=(5, 4, 3))
    assert unnamed.pretrained_cfg == {"label_names": None}


class TestProcessor:
    def settings(self, processor):
        return rf.ReViT.from_transformers(make("vit"), grids=(5, 4), processor=processor).pretrained_cfg

    def test_of_vit_deit_and_dinov2(self):
        imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        dino = transformers.BitImageProcessor(size={"shortest_edge": 256}, resample=3, **imagenet)
        expected = [
            (transformers.ViTImageProcessor(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1.0, "bilinear"),
            (transformers.DeiTImageProcessor(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224 / 256, "bicubic"),
            (dino, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224 / 256, "bicubic"),
        ]
        for processor, *values in expected:
            settings = self.settings(processor)
            assert [settings[name] for name in ("mean", "std", "crop_pct", "interpolation")] == values
            assert self.settings(processor.to_dict()) == settings

    def test_without_normalisation(self):
        settings = self.settings(transformers.ViTImageProcessor(do_normalize=False))
        assert (settings["mean"], settings["std"]) == ((0.0,) * 3, (1.0,) * 3)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"do_resize": False}, "do_resize=False"),
            ({"do_rescale": False}, "do_rescale=False"),
            ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078.*expected 1/255"),
            ({"resample": 1}, r"resample=.*expected 2 \(bilinear\) or 3 \(bicubic\)"),
            ({"image_mean": None}, "image_mean=None; expected 3 numbers"),
            ({"image_std": [0.5]}, r"image_std=\[0.5\]; expected 3 numbers"),
            ({"size": {"height": 224, "width": 192}}, "size=.*expected equal height and width, or shortest_edge"),
            ({"size": {"longest_edge": 224}}, "size=.*expected equal height"),
            ({"crop_size": None}, "crop_size=.*expected equal height"),
            ({"crop_size": 300}, "a crop_size of 300 px beyond the size of 256 px"),
        ],
    )
    def test_refuses_by_name(self, changes, message):
        settings = transformers.DeiTImageProcessor().to_dict() | changes
        with pytest.raises(ValueError, match=f"processor: {message}.* is not supported"):
            self.settings(settings)

    def test_refuses_other_things(self):
        with pytest.raises(TypeError, match=r"processor: expected an image processor of .*got int"):
            self.settings(224)


class TestRefused:
    @pytest.mark.parametrize(
        ("key", "options", "feature"),
        [
            ("vit", {"hidden_act": "gelu_10"}, r"hidden_act='gelu_10' \(supported: gelu, "),
            (
                "vit",
                {"hidden_dropout_prob": 0.1},
                r"hidden_dropout_prob=0.1 \(load the model with hidden_dropout_prob=0",
            ),
            ("deit", {"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob=0.1"),
            ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate=0.1"),
            ("vit", {"patch_size": (8, 4)}, r"non-square patches \(patch_size=\(8, 4\)\)"),
            ("vit", {"image_size": 42}, r"image_size=42x42 \(no multiple of patch_size=8\)"),
        ],
    )
    def test_by_name(self, key, options, feature):
        with pytest.raises(ValueError, match=f"vit: {feature}.* is not supported by ReViT"):
            rf.ReViT.from_transformers(make(key, **options))

    def test_other_classes(self):
        with pytest.raises(TypeError, match=r"vit: expected a model of transformers, one of ViTModel, .*got Linear"):
            rf.ReViT.from_transformers(torch.nn.Linear(2, 2))
        config = make("vit").config
        with pytest.raises(ValueError, match=r"vit: the class .*ViTForMaskedImageModeling \(supported: ViTModel, "):
            rf.ReViT.from_transformers(transformers.ViTForMaskedImageModeling(config))

        class ViTModel(transformers.ViTModel):
            pass

        with pytest.raises(ValueError, match=r"vit: the class test_transformers_import.ViTModel .* not supported"):
            rf.ReViT.from_transformers(ViTModel(config))

    def test_changed_modules(self):
        vit = make("vit")
        vit.classifier = torch.nn.Linear(48, 9)
        model = rf.ReViT.from_transformers(vit, grids=(5, 4))
        assert model.num_classes == 9, "a plain linear head of another size is taken"
        assert torch.equal(model.head.weight, vit.classifier.weight)
        assert model.pretrained_cfg["label_names"] is None

        def refused(change, message):
            vit = make("vit")
            change(vit)
            with pytest.raises(ValueError, match=message):
                rf.ReViT.from_transformers(vit, grids=(5, 4))

        def linears(vit):
            return [(name, m) for name, m in vit.named_modules() if isinstance(m, torch.nn.Linear)]

        def adapted(vit):
            name, layer = linears(vit)[3]
            parent, _, child = name.rpartition(".")
            setattr(vit.get_submodule(parent), child, torch.nn.Sequential(layer))

        refused(
            lambda m: setattr(m, "classifier", torch.nn.Sequential(m.classifier)),
            "vit: .*classifier is Sequential instead of Linear",
        )
        refused(adapted, "vit: .* is Sequential instead of Linear")
        refused(lambda m: linears(m)[2][1].register_forward_hook(print), "vit: .* has a forward hook")
        refused(lambda m: torch.nn.utils.parametrizations.weight_norm(linears(m)[1][1]), "vit: .* is parametrised")
        norm = next(name for name, m in make("vit").named_modules() if isinstance(m, torch.nn.LayerNorm))
        refused(lambda m: setattr(m.get_submodule(norm), "eps", 0.5), f"{norm}.eps is 0.5 instead of")

    def test_frozen_parameters_stay_frozen(self):
        vit = make("vit").requires_grad_(False)
        vit.classifier.requires_grad_(True)
        trained = [n for n, p in rf.ReViT.from_transformers(vit, grids=(5, 4)).named_parameters() if p.requires_grad]
        assert trained == ["head.weight", "head.bias"]

    def test_grids(self):
        with pytest.raises(ValueError, match="grids: expected strictly decreasing"):
            rf.ReViT.from_transformers(make("vit"), grids=(3, 5))

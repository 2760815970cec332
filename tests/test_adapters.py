"""What people put around a model's layers acts in every block, forward and backward, as it does in timm's model."""

import copy
import re
import warnings
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from helpers import full_if, randn
from torch import nn
from torch.nn.utils import parametrizations, prune

import revit_fast as rf

LAYERS = [
    "patch_embed.proj",
    *(f"blocks.{i}.{name}" for i in (0, -1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
]


def make_vit(**options):
    torch.manual_seed(0)
    arguments = dict(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, dynamic_img_size=True
    )
    vit = timm.models.VisionTransformer(**{**arguments, **options})
    for parameter in vit.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return vit.eval().double()


def both():
    vit = make_vit()
    return vit, rf.ReViT.from_timm(vit, grids=(4, 2)).eval()


def place(model, name):
    """(parent, attribute) of a layer; block -1 is the last."""
    parent, _, child = name.replace("blocks.-1", f"blocks.{len(model.blocks) - 1}").rpartition(".")
    return model.get_submodule(parent), child


class LoRA(nn.Module):
    """A low-rank adapter beside a frozen layer (arXiv 2106.09685), without attributes of the layer."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(1)
        self.base = base.requires_grad_(False)
        if isinstance(base, nn.Conv2d):
            self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, bias=False)
            self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        else:
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.to(next(base.parameters()).dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapter(parent, child):
    setattr(parent, child, LoRA(getattr(parent, child)))


def hook(parent, child):
    getattr(parent, child).register_forward_hook(lambda module, args, output: output * 1.5 + 0.1)


def pruned(parent, child):
    prune.l1_unstructured(getattr(parent, child), "weight", amount=0.5)


def normed(parent, child):
    layer = parametrizations.weight_norm(getattr(parent, child))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.3)


def normed_by_hook(parent, child):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(getattr(parent, child))
    with torch.no_grad():
        layer.weight_g.mul_(1.3)


CHANGES = [adapter, hook, pruned, normed, normed_by_hook]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("layer", [full_if(layer.startswith("blocks.0"), layer) for layer in LAYERS])
def test_acts_as_in_timm(layer, change):
    """Logits, and a gradient on every parameter, after three steps of training too."""
    vit, model = both()
    x = randn(3, 3, 32, 32).double()
    plain = model(x).detach()
    for m in (vit, model):
        change(*place(m, layer))
    assert (model(x) - plain).abs().max() > 1e-3, "it must do something"
    torch.testing.assert_close(model(x), vit(x), atol=1e-9, rtol=1e-9)
    steps = []
    for m in (vit, model):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        without = [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
        assert without == [], f"no gradient: {without}"
        steps.append(m(x).detach())
    torch.testing.assert_close(steps[1], steps[0], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("layer", LAYERS)
def test_optimize_refuses_it_by_name(layer, change):
    _, model = both()
    change(*place(model.float(), layer))
    name = layer.replace("blocks.-1", "blocks.2").replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"model: {name}[ .]"):
        rf.optimize(model)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("layer", [full_if(layer.startswith("blocks.0"), layer) for layer in LAYERS])
def test_a_copy_that_calls_modules_serves_it(layer, change):
    _, model = both()
    model.float()
    x = randn(3, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        change(*place(model, layer))
        fast = rf.optimize(model, engine="modules")
        assert (model(x) - plain).abs().max() > 1e-3, "it must do something"
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fast.forward_features(x), model.forward_features(x), atol=1e-4, rtol=1e-4)


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    x = randn(2, 3, 32, 32).double()
    adapted = []
    for model in both():
        torch.manual_seed(1)
        names = ["qkv", "proj", "fc1", "fc2"]  # proj is attention's and the patch embedding's
        config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        adapted.append(peft.get_peft_model(model, config).double())
    theirs, ours = adapted
    ours.load_state_dict({n: t for n, t in theirs.state_dict().items() if "lora" in n}, strict=False)
    for model in adapted:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        trained = {n: p.grad is not None for n, p in model.named_parameters() if p.requires_grad}
        assert all(trained.values())
        assert len(trained) == 2 * (4 * 3 + 1)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match=r"model: patch_embed\.proj is peft\..*Conv2d instead of torch\.nn"):
        rf.optimize(ours.base_model.model.float())
    fast, x = rf.optimize(ours.base_model.model, engine="modules"), x.float()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), ours(x), atol=1e-4, rtol=1e-4)
            for model in (fast, ours.base_model.model):
                model.blocks[1].attn.qkv.lora_A["default"].weight.mul_(3)


COMMON = re.compile(r"(mlp\.drop\d?|mlp\.norm|attn\.(norm|attn_drop|[qk]_norm)|patch_embed\.norm|patch_drop|blocks)$")
"""Modules that timm's model has and ours has not, or under another name."""


def test_hooks_fire_on_every_module_that_they_fire_on_in_timm():
    x, fired = randn(2, 3, 32, 32).double(), []
    for model in both():
        names = set()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *args, name=name, names=names: names.add(name))
        model(x)
        fired.append({name for name in names if not COMMON.search(name)})
    assert fired[1] >= fired[0]
    assert len(fired[0]) > 30


class Clipped(nn.Module):
    """Around a norm, whatever it is called with."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        out = self.base(*args, **kwargs)
        return (out[0].relu(), *out[1:]) if isinstance(out, tuple) else out.relu()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("norm_pre", {"pre_norm": True}),
        ("norm", {}),
        ("fc_norm", {"global_pool": "avg", "class_token": False}),
        ("blocks.1.norm1", {}),
        ("blocks.2.norm2", {}),
    ],
)
def test_what_is_put_around_a_norm_acts(name, options):
    vit = make_vit(**options)
    model = rf.ReViT.from_timm(vit, grids=(4, 2)).eval()
    x = randn(2, 3, 32, 32).double()
    plain = vit(x)
    for m in (vit, model):
        parent, child = place(m, name)
        setattr(parent, child, Clipped(getattr(parent, child)))
    assert (vit(x) - plain).abs().max() > 1e-6
    torch.testing.assert_close(model(x), vit(x), atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match=rf"model: {name.replace('.', '[.]')} is Clipped.*engine=.modules"):
        rf.optimize(model.float())
    x = x.float()
    with torch.no_grad():
        torch.testing.assert_close(rf.optimize(model, engine="modules")(x), model(x), atol=1e-4, rtol=1e-4)


def test_packs_and_uint8_rows_reach_an_adapter():
    _, model = both()
    adapter(model.patch_embed, "proj")
    images = [torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8) for _ in range(3)]
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    sizes = [(32, 32), (16, 16), (24, 8)]
    floats = rf.ops.resize_patchify(images, sizes, 8, **options)
    raw = rf.ops.resize_patchify(images, sizes, 8, **options, dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model(raw), model(floats.with_data(floats.data.double())), atol=1e-5, rtol=1e-5)


def test_dynamic_quantization_runs():
    _, model = both()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)
        x = randn(2, 3, 32, 32)
        assert (quantized(x) - model(x)).abs().max() < 0.2 * model(x).abs().max()


class TestMemoryLayout:
    def test_is_timms(self, tmp_path):
        vit, model = both()
        assert all(p.is_contiguous() for p in model.parameters())
        assert [p.stride() for n, p in model.named_parameters() if "norm" not in n] == [
            p.stride() for n, p in vit.named_parameters() if "norm" not in n
        ]
        safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")

    def test_optimizers_that_flatten(self):
        _, model = both()
        x = randn(2, 3, 32, 32).double()

        def closure():
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        first = closure().item()
        torch.optim.LBFGS(model.parameters(), max_iter=3).step(closure)
        assert closure().item() < first
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector * 0, model.parameters())
        assert not any(p.any() for p in model.parameters())


class TestImport:
    """timm's result, or a refusal by name."""

    @staticmethod
    def same(vit):
        x = randn(2, 3, 32, 32).double()
        model = rf.ReViT.from_timm(vit.eval(), grids=(4, 2)).eval()
        torch.testing.assert_close(model(x), vit(x), atol=1e-9, rtol=1e-9)
        return model

    @pytest.mark.parametrize(
        "act",
        [
            partial(nn.LeakyReLU, negative_slope=0.5),
            partial(nn.Hardtanh, min_val=-0.1, max_val=0.1),
            partial(nn.GELU, approximate="tanh"),
            nn.Softplus,
            nn.Hardswish,
            timm.layers.QuickGELU,
            timm.layers.GELUTanh,
        ],
        ids=str,
    )
    def test_activations_with_arguments(self, act):
        self.same(make_vit(act_layer=act))

    def test_blocks_that_differ(self):
        vit = make_vit(proj_drop_rate=0.1, drop_path_rate=0.2, init_values=0.5)
        vit.blocks[1].mlp.act = nn.ReLU()
        attn = vit.blocks[1].attn
        attn.num_heads, attn.head_dim, attn.scale = 4, 8, 8**-0.5
        vit.blocks[2].mlp.fc1, vit.blocks[2].mlp.fc2 = nn.Linear(32, 20).double(), nn.Linear(20, 32).double()
        vit.blocks[0].norm2.eps = 1e-3
        vit.norm.eps = 1e-2
        model = self.same(vit)
        assert [block.drop_path for block in model.spec.blocks] == pytest.approx([0, 0.1, 0.2])
        x = randn(2, 3, 32, 32)
        torch.testing.assert_close(rf.optimize(model.float())(x), model(x), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        ("norm", "eps"),
        [
            (timm.layers.RmsNorm, 1e-6),
            (partial(timm.layers.RmsNorm, eps=1e-3), 1e-3),
            (nn.RMSNorm, torch.finfo(torch.float64).eps),
        ],
        ids=["timm's", "another eps", "torch's"],
    )
    def test_rms_norms(self, norm, eps):
        vit = make_vit(norm_layer=norm, pre_norm=True)
        for name, parameter in vit.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=1.0)
        norms = self.same(vit).spec.blocks[0].norm1
        assert (norms.kind, norms.eps) == ("rms", eps)

    def test_norms_of_both_kinds(self):
        vit = make_vit(global_pool="avg", class_token=False)
        vit.blocks[1].norm1, vit.blocks[2].norm2 = timm.layers.RmsNorm(32, eps=0.1), nn.RMSNorm(32, eps=0.2)
        vit.fc_norm = timm.layers.RmsNormFp32(32)
        vit = vit.float()
        model = rf.ReViT.from_timm(vit, grids=(4, 2)).eval()
        x = randn(2, 3, 32, 32)
        for ours in (model, rf.optimize(model)):
            torch.testing.assert_close(ours(x), vit(x), atol=1e-5, rtol=1e-5)

    def test_a_replaced_head(self):
        vit = make_vit()
        vit.head = nn.Linear(32, 7).double()
        assert self.same(vit).num_classes == 7
        vit.head = nn.Identity()
        assert self.same(vit).num_classes == 0

    def test_requires_grad_is_kept(self):
        vit = make_vit().requires_grad_(False)
        vit.head.requires_grad_(True)
        vit.blocks[1].norm1.bias.requires_grad_(True)
        trained = {n for n, p in rf.ReViT.from_timm(vit, grids=(4, 2)).named_parameters() if p.requires_grad}
        assert trained == {"head.weight", "head.bias", "blocks.1.norm1.bias"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.register_forward_hook(print), "VisionTransformer has a forward hook"),
            (lambda v: v.blocks[1].attn.register_forward_pre_hook(print), r"blocks\.1\.attn has a forward hook"),
            (lambda v: adapter(v.blocks[2].mlp, "fc1"), r"blocks\.2\.mlp\.fc1 is LoRA instead of Linear"),
            (lambda v: adapter(v.blocks[2].attn, "proj"), r"blocks\.2\.attn\.proj is LoRA instead of Linear"),
            (lambda v: normed(v.blocks[0].attn, "qkv"), r"blocks\.0\.attn\.qkv is parametrised"),
            (lambda v: normed_by_hook(v.blocks[0].attn, "qkv"), r"blocks\.0\.attn\.qkv has a forward hook"),
            (lambda v: pruned(v.blocks[0].mlp, "fc2"), r"blocks\.0\.mlp\.fc2 has a forward hook"),
            (lambda v: setattr(v, "head", nn.Sequential(v.head)), "head is Sequential instead of Linear"),
            (lambda v: setattr(v, "head", nn.Linear(64, 5)), "a head of other channels"),
            (lambda v: setattr(v.blocks[1].mlp, "act", nn.PReLU()), r"activation PReLU \(blocks\.1\.mlp\.act\)"),
            (lambda v: setattr(v.blocks[1].attn, "scale", 0.5), r"a scale of 0\.5 .*blocks\.1\.attn"),
            (lambda v: setattr(v.blocks[1], "norm1", nn.Identity()), r"a block without norm \(blocks\.1\)"),
            (
                lambda v: setattr(v.blocks[1].drop_path1, "forward", lambda x: x * 0),
                r"blocks\.1\.drop_path1 has a method",
            ),
            (lambda v: setattr(v.patch_embed.proj, "padding", (1, 1)), "padding, dilation or groups"),
            (lambda v: setattr(v, "norm", timm.layers.SimpleNorm(32)), r"LayerNorm and RMSNorm \(norm is SimpleNorm\)"),
            (lambda v: setattr(v, "norm", nn.RMSNorm(32, 1e-6, False)), r"a norm without weight \(norm\)"),
            (lambda v: setattr(v, "norm", nn.LayerNorm(32, bias=False)), r"a norm without weight or bias \(norm\)"),
        ],
    )
    def test_what_would_be_left_out_is_refused_by_name(self, change, message):
        vit = make_vit()
        change(vit)
        with pytest.raises(ValueError, match=f"vit: .*{message}"):
            rf.ReViT.from_timm(vit, grids=(4, 2))

    @pytest.mark.parametrize(
        "name", ["ParallelScalingBlock", "ParallelThingsBlock", "ResPostBlock", "DiffParallelScalingBlock"]
    )
    def test_other_blocks_are_refused_by_name(self, name):
        kind = getattr(timm.models.vision_transformer, name)
        with pytest.raises(ValueError, match=rf"vit: blocks of type {name} \(blocks\.0\) is not supported"):
            rf.ReViT.from_timm(make_vit(block_fn=kind), grids=(4, 2))

    def test_hybrids_are_refused_by_name(self):
        vit = timm.create_model("vit_small_r26_s32_224", depth=1)
        with pytest.raises(ValueError, match=r"vit: a patch embedding of type HybridEmbed is not"):
            rf.ReViT.from_timm(vit, grids=(4, 2))


def test_deep_copies_of_adapted_models():
    _, model = both()
    adapter(model.blocks[-1].attn, "qkv")
    x = randn(1, 3, 32, 32).double()
    assert torch.equal(copy.deepcopy(model)(x), model(x))

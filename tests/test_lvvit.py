"""LV-ViT against its definition (arXiv 2104.10858), written out here in plain PyTorch for images of one size."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import only_on, randn
from small_models import images_of
from timm.optim import create_optimizer_v2
from torch import nn
from torch._dynamo.testing import CompileCounter

import revit_fast as rf
import revit_fast.timm_models
from revit_fast.inference import cuda_graphs, fusable
from revit_fast.layers import ResidualScale, sequence_max
from revit_fast.models import lvvit
from revit_fast.models.lvvit import from_lvvit_state_dict
from revit_fast.models.macs import forward_macs
from revit_fast.ops import _library
from revit_fast.packing import PackedBatch, cumulative

PATCH = 8
GRIDS = (6, 4, 2)
MIX = [4, 6, 2, (3, 5), 2, 6]
SMALL = {
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 3,
    "stem_chans": 8,
    "patch_size": PATCH,
    "num_classes": 40,
    "img_size": 48,
}
TOLERANCE = 2e-5  # of the largest logit, in float32
NEEDS_ENGINE = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built")

pytestmark = only_on("cpu", reason="compares with plain PyTorch on the CPU")


class Stem(nn.Module):
    """Official names: three convolutions with batch norm and ReLU, then the projection of patches."""

    def __init__(self, patch_size, stem_chans, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_chans, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chans)
        self.conv2 = nn.Conv2d(stem_chans, stem_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_chans)
        self.conv3 = nn.Conv2d(stem_chans, stem_chans, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_chans)
        self.proj = nn.Conv2d(stem_chans, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        n_images, n_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n_images, n_tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n_images, n_tokens, dim))


class Block(nn.Module):
    def __init__(self, dim, num_heads, skip_lam):
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(dim, 3 * dim)
        self.mlp.fc2 = nn.Linear(3 * dim, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) / self.skip_lam
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))) / self.skip_lam


class LVViT(nn.Module):
    """The reference: images `[B, 3, H, W]`; position embeddings of another grid by bicubic antialiased resampling."""

    def __init__(self, dim=24, depth=3, num_heads=3, skip_lam=2.0, stem_chans=8, side=6, classes=40, patch=PATCH):
        super().__init__()
        self.side = side
        self.patch_embed = Stem(patch, stem_chans, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, side * side + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, skip_lam) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.aux_head = nn.Linear(dim, classes)

    def tokens(self, images):
        patches = self.patch_embed(images)
        grid = [side // (2 * self.patch_embed.proj.stride[0]) for side in images.shape[2:]]
        table = self.pos_embed[:, 1:]
        if grid != [self.side, self.side]:
            maps = table.transpose(1, 2).unflatten(2, (self.side, self.side))
            table = F.interpolate(maps, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        x = x + torch.cat([self.pos_embed[:, :1], table], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images, token_labels=False):
        x = self.tokens(images)
        logits = self.head(x[:, 0])
        return logits + 0.5 * self.aux_head(x[:, 1:]).max(1)[0] if token_labels else logits


def lively(model, seed=0):
    """Random weights that keep activations of order one, batch norms with averages of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.dim() >= 2 and "embed" not in name.split(".")[-1] and "token" not in name:
                value.copy_(1.5 * noise / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.copy_(0.3 * noise + ("norm" in name or "bn" in name) * name.endswith("weight"))
    return model.eval()


def pair(dtype=torch.float32, aux_head=False, **options):
    """The reference and a ReViT with its weights."""
    plain = lively(LVViT(**options)).to(dtype)
    heads, scale = options.get("num_heads", 3), options.get("skip_lam", 2.0)
    model = from_lvvit_state_dict(plain.state_dict(), GRIDS, num_heads=heads, residual_scale=scale, aux_head=aux_head)
    return plain, model


def pixels(grids, dtype=torch.float32):
    return [image.to(dtype) for image in images_of(grids, PATCH)]


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.inference_mode()
@pytest.mark.parametrize("aux_head", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, TOLERANCE)])
def test_equals_the_definition_at_every_grid_and_in_a_mixed_pack(dtype, tolerance, aux_head):
    plain, model = pair(dtype, aux_head)
    images = pixels([*MIX, (1, 1), (7, 3)], dtype)
    expected = torch.cat([plain(image[None], aux_head) for image in images])
    assert expected.std() > 0.1
    assert relative(model(images), expected) <= tolerance
    assert relative(torch.cat([model(image[None]) for image in images]), expected) <= tolerance
    packed = PackedBatch.from_images(images, PATCH, lengths=model.lengths)
    assert relative(model(packed), expected) <= tolerance
    assert relative(model.forward_head(model.forward_features(images)), expected) <= tolerance
    features = model.forward_features(images[1][None])
    assert relative(features, plain.tokens(images[1][None])) <= tolerance


def test_token_label_head_changes_the_result_and_only_where_asked_for():
    plain, model = pair()
    _, labelled = pair(aux_head=True)
    images = pixels(MIX)
    with torch.no_grad():
        assert relative(labelled(images), model(images)) > 0.05
    assert model.aux_head is None
    assert "aux_head.weight" not in model.state_dict()
    assert labelled.state_dict().keys() - {"_extra_state"} == plain.state_dict().keys()


@torch.inference_mode()
def test_an_image_does_not_see_its_neighbours():
    _, model = pair()
    images = pixels(MIX)
    packed = model(images)
    for order in ([5, 3, 1, 0, 2, 4], [2], [1, 1, 1]):
        assert relative(model([images[i] for i in order]), packed[order]) <= 1e-5


@torch.inference_mode()
def test_norms_of_each_length_are_used():
    plain, model = pair()
    generator = torch.Generator().manual_seed(1)
    norms = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "norm" in name}
    for parameter in norms.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    images, wanted = pixels([2, 6, 4, (3, 5)]), [2, 0, 1, 1]
    expected = []
    for image, index in zip(images, wanted, strict=True):
        carrier = copy.deepcopy(plain)
        carrier.load_state_dict({**plain.state_dict(), **{name: p[index] for name, p in norms.items()}})
        expected.append(carrier(image[None]))
    assert relative(model(images), torch.cat(expected)) <= TOLERANCE


@torch.inference_mode()
def test_uint8_rows_are_normalised_before_the_stem():
    """The zeros that pad an image are those of normalised pixels: a mean folded into a convolution would miss that."""
    _, model = pair()
    generator = torch.Generator().manual_seed(0)
    photographs = [torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8) for _ in range(3)]
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "lengths": model.lengths}
    sizes = [(48, 48), (32, 32), (16, 40)]
    rows = rf.ops.resize_patchify(photographs, sizes, PATCH, **options)
    raw = rf.ops.resize_patchify(photographs, sizes, PATCH, **options, dtype=torch.uint8)
    assert raw.normalization is not None
    assert relative(model(raw), model(rows)) <= 1e-6
    if _library.HAS_EXTENSION:
        assert relative(rf.optimize(model)(raw), model(rows)) <= TOLERANCE


@torch.inference_mode()
def test_padding_rows_and_empty_images_change_nothing():
    _, model = pair(aux_head=True)
    batch = PackedBatch.from_images(pixels(MIX), PATCH, lengths=model.lengths)
    padded = PackedBatch.from_rows(
        torch.cat([batch.data, torch.full((9, batch.data.shape[1]), torch.nan)]),
        [*batch.seqlens[:2], 0, *batch.seqlens[2:]],
        grids=[*batch.grids[:2], (0, 0), *batch.grids[2:]],
        lengths=model.lengths,
    )
    logits = model(padded)
    # Not bitwise: PyTorch's products of other row counts may add in another order.
    torch.testing.assert_close(torch.cat([logits[:2], logits[3:]]), model(batch), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(logits).all()


class TestTraining:
    def test_gradients_equal_those_of_the_definition(self):
        """Batch statistics of each grid's images, as a dense model has them for a batch of that grid."""
        plain, model = (m.train() for m in pair(torch.float64, aux_head=True))
        by_grid = {grid: pixels([grid] * 2, torch.float64) for grid in (6, 4, (3, 5))}
        loss = sum(plain(torch.stack(images), True).square().sum() for images in by_grid.values())
        loss.backward()
        mixed = [image for images in zip(*by_grid.values(), strict=True) for image in images]  # grids in turn
        ours = model(mixed).square().sum()
        torch.testing.assert_close(ours, loss, rtol=1e-10, atol=0)
        ours.backward()
        for name, parameter in plain.named_parameters():
            gradient = model.get_parameter(name).grad
            if "norm" in name:
                gradient = gradient.sum(0)
            assert relative(gradient, parameter.grad) <= 1e-9, name
        for name, buffer in plain.named_buffers():  # running averages, updated once for each grid
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)

    def test_a_step_lowers_the_loss_and_checkpointing_gives_the_same_gradients(self):
        _, model = pair()
        model.train()
        other = copy.deepcopy(model)
        other.set_grad_checkpointing()
        images, target = pixels(MIX), torch.arange(6)
        losses = []
        for m in (model, other):
            losses.append(F.cross_entropy(m(images), target))
            losses[-1].backward()
        for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
        torch.optim.SGD(model.parameters(), 1e-3).step()
        assert F.cross_entropy(model(images), target) < losses[0]

    def test_drop_path_and_residual_scale(self):
        model = lvvit.lvvit_s(GRIDS, patch_size=PATCH, embed_dim=24, depth=2, num_heads=3, drop_path_rate=0.5)
        assert [block.drop_path1.drop_prob for block in model.blocks] == [0.0, 0.5]
        assert all(type(block.ls2) is ResidualScale and block.ls2.divisor == 2.0 for block in model.blocks)

    def test_autocast(self):
        _, model = pair()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels(MIX))
        assert relative(logits.float(), model(pixels(MIX))) <= 0.05


@NEEDS_ENGINE
class TestOptimized:
    @torch.inference_mode()
    @pytest.mark.parametrize("aux_head", [False, True])
    def test_equals_the_definition(self, isa, aux_head):
        plain, model = pair(aux_head=aux_head)
        fast = rf.optimize(model)
        images = pixels(MIX * 2)
        truth = plain.double()
        expected = torch.cat([truth(image[None].double(), aux_head) for image in images])
        assert relative(fast(images).double(), expected) <= TOLERANCE
        assert relative(fast(torch.stack(pixels([4, 4]))), model(torch.stack(pixels([4, 4])))) <= TOLERANCE
        assert relative(fast.forward_features(images).data, model.forward_features(images).data) <= TOLERANCE
        assert fast._packed.value is not None

    @torch.inference_mode()
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
    def test_bitwise_alone_and_in_any_pack(self, isa, dtype):
        fast = rf.optimize(pair(aux_head=True)[1], dtype)
        images = pixels([*MIX, (5, 3), 4])
        packed = fast(images)
        for order in ([5, 3, 1, 0, 2, 4, 7, 6], [2], [0], [1, 1, 1], [4, 6]):
            assert torch.equal(fast([images[i] for i in order]), packed[order])

    @torch.no_grad()
    def test_changed_stem_is_folded_again(self):
        _, model = pair()
        fast, images = rf.optimize(model), pixels(MIX)
        before = fast(images)
        for name in ("patch_embed.bn2.running_mean", "patch_embed.conv1.weight"):
            for m in (model, fast):
                m.state_dict()[name].mul_(1.5)
            assert relative(fast(images), before) > 1e-3
            assert relative(fast(images), model(images)) <= TOLERANCE

    def test_what_would_not_run_is_refused_by_name(self):
        _, model = pair()
        hooked = copy.deepcopy(model)
        hooked.patch_embed.conv2.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=r"patch_embed\.conv2 has a forward hook"):
            rf.optimize(hooked)
        model.patch_embed.bn3 = nn.GroupNorm(2, 8)
        with pytest.raises(ValueError, match=r"patch_embed\.bn3 is GroupNorm"):
            fusable.check_fusable(model)

    @torch.inference_mode()
    def test_buckets_of_graphs_take_the_features(self, monkeypatch):
        monkeypatch.setitem(cuda_graphs.BACKENDS, "cpu", cuda_graphs.DirectCalls)
        _, model = pair(aux_head=True)
        fast = rf.optimize(model, max_rows=256)
        for grids in (MIX, [6, 2], MIX * 3):
            images = pixels(grids)
            assert relative(fast(images), model(images)) <= TOLERANCE
        assert fast._graphs.value.n_captures >= 1


class TestInterface:
    def test_architectures(self):
        """Parameters in millions as published."""
        for make, parameters in ((lvvit.lvvit_s, 26), (lvvit.lvvit_m, 56), (lvvit.lvvit_l, 150)):
            with torch.device("meta"):
                model = make((14,), aux_head=True)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.03)
            assert model.config["stem_chans"] == (128 if make is lvvit.lvvit_l else 64)
            again = rf.ReViT.from_config({**model.config, "depth": 1})
            assert again.blocks[0].ls1.divisor == model.blocks[0].ls1.divisor
        with torch.device("meta"):
            tiny = lvvit.lvvit_t((14,))
        assert sum(p.numel() for p in tiny.parameters()) / 1e6 == pytest.approx(8.5, rel=0.03)

    def test_widths_of_official_models_need_no_hints(self):
        plain = lively(LVViT(dim=384, depth=1, num_heads=6, side=3, classes=5, patch=4))
        model = from_lvvit_state_dict(plain.state_dict(), (3, 2))
        assert (model.num_heads, model.blocks[0].ls1.divisor, model.patch_size) == (6, 2.0, 4)
        x = randn(2, 3, 12, 12)
        with torch.no_grad():
            assert relative(model(x), plain(x)) <= TOLERANCE

    def test_what_is_not_known_is_asked_for(self):
        weights = LVViT().state_dict()
        with pytest.raises(ValueError, match=r"num_heads: not known for 24 channels .* give num_heads="):
            from_lvvit_state_dict(weights)
        with pytest.raises(ValueError, match="num_heads: expected a divisor of the attention's 24 channels, got 5"):
            from_lvvit_state_dict(weights, num_heads=5, residual_scale=2)
        del weights["aux_head.weight"]
        with pytest.raises(ValueError, match=r"aux_head\.weight missing"):
            from_lvvit_state_dict(weights, num_heads=3, residual_scale=2, aux_head=True)
        with pytest.raises(ValueError, match=r"patch_embed\.conv1\.weight missing"):
            from_lvvit_state_dict({k: v for k, v in weights.items() if "conv1" not in k})
        del weights["blocks.1.norm2.bias"]
        with pytest.raises(ValueError, match=r"missing: blocks\.1\.norm2\.bias"):
            from_lvvit_state_dict(weights, num_heads=3, residual_scale=2)

    def test_options_that_exclude_each_other(self):
        with pytest.raises(ValueError, match="residual_scale: expected a positive divisor, got 0"):
            rf.ReViT(residual_scale=0)
        with pytest.raises(ValueError, match="residual_scale: LayerScale"):
            rf.ReViT(residual_scale=2.0, init_values=0.1)
        with pytest.raises(ValueError, match=r"patch_size: .* even P, got 7"):
            rf.ReViT(patch_size=7, stem_chans=8)
        with pytest.raises(ValueError, match=r'aux_head: .* use global_pool="token"'):
            rf.ReViT(aux_head=True, global_pool="avg")
        _, model = pair(aux_head=True)
        with pytest.raises(ValueError, match="aux_head"):
            model.reset_classifier(3, "avg")

    def test_reset_classifier_and_pruning_take_the_token_label_head_along(self):
        _, model = pair(aux_head=True)
        model.reset_classifier(5)
        assert model.aux_head.out_features == 5
        assert model(pixels([4, 2])).shape == (2, 5)
        model.reset_classifier(0)
        assert model(pixels([4, 2])).shape == (2, 24)
        model.prune_intermediate_layers([0])
        assert rf.ReViT.from_config(model.config).load_state_dict(model.state_dict())

    def test_checkpoint_of_the_official_names_and_a_bundle(self, tmp_path):
        plain, model = pair()
        torch.save(plain.state_dict(), tmp_path / "lvvit.pth")
        other = rf.ReViT.from_config(model.config)
        other.load_checkpoint(tmp_path / "lvvit.pth")
        rf.save_bundle(tmp_path / "bundle", other, None, classes=map(str, range(40)))
        image = pixels([6])
        with torch.no_grad():
            assert torch.equal(other.eval()(image), model(image))
            loaded = rf.load(tmp_path / "bundle", optimize=False).model
            assert torch.equal(loaded(image), model(image))

    def test_cost_counts_stem_and_token_labels(self):
        """LV-ViT-S at 224 px: the convolutions' multiply-adds at 112 px beside a plain ViT's of the same shape."""
        with torch.device("meta"):
            model = lvvit.lvvit_s()
            plain = lvvit.lvvit_s(stem_chans=None)
            labelled = lvvit.lvvit_s(aux_head=True)
        stem = 112 * 112 * (7 * 7 * 3 * 64 + 2 * 3 * 3 * 64 * 64) + 196 * (8 * 8 * 64 - 16 * 16 * 3) * 384
        assert forward_macs(model, 196) - forward_macs(plain, 196) == stem
        assert forward_macs(labelled, 196) - forward_macs(model, 196) == 196 * 384 * 1000

    @pytest.mark.beside
    def test_compiled(self):
        _, model = pair()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = torch.stack(pixels([4, 4]))
        with torch.no_grad():
            assert relative(compiled(x), model(x)) <= TOLERANCE
        counter.clear()
        torch._dynamo.reset()
        packs = torch.compile(model, backend=counter)
        with torch.no_grad():
            for grids in ([4, 6], [6, 4], [4, 2, 6], [2, 2, 4], [6, 6, 4, 2]):
                batch = PackedBatch.from_images(pixels(grids), PATCH, lengths=model.lengths)
                assert relative(packs(batch), model(batch)) <= TOLERANCE


class TestTimm:
    """The registered models; timm has no LV-ViT to compare with."""

    def small(self, **kwargs):
        return timm.create_model("revit_lvvit_s", **{**SMALL, **kwargs}).eval()

    @pytest.mark.parametrize("size", ["s", "m", "l"])
    def test_architecture_and_default_cfg(self, size):
        model = timm.create_model(f"revit_lvvit_{size}", device="meta")
        with torch.device("meta"):
            ours = getattr(lvvit, f"lvvit_{size}")()
        assert model.config == ours.config
        cfg = model.default_cfg
        assert cfg["crop_pct"] == ours.pretrained_cfg["crop_pct"] == (0.9 if size == "s" else 1.0)
        assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
        assert cfg["mean"] == (0.485, 0.456, 0.406)
        assert rf.AdaptivePreprocessor.for_model(ours, policy=("fixed", 14)).crop_pct == cfg["crop_pct"]

    @torch.inference_mode()
    def test_official_checkpoint(self, tmp_path):
        plain = lively(LVViT(depth=2))
        torch.save(plain.state_dict(), tmp_path / "lvvit.pth")
        model = self.small(checkpoint_path=str(tmp_path / "lvvit.pth"))
        labelled = self.small(checkpoint_path=str(tmp_path / "lvvit.pth"), aux_head=True)
        x = torch.stack(pixels([4, 4]))
        assert relative(model(x), plain(x)) <= TOLERANCE
        assert relative(labelled(x), plain(x, True)) <= TOLERANCE
        overlay = {"file": str(tmp_path / "lvvit.pth"), "num_classes": 40}
        model = self.small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, img_size=32)
        plain.patch_embed.conv1.weight = nn.Parameter(plain.patch_embed.conv1.weight.sum(1, keepdim=True))
        plain.pos_embed = nn.Parameter(model.pos_embed.clone())
        plain.side = 4
        assert relative(model(x[:, :1]), plain(x[:, :1])) <= TOLERANCE

    @torch.inference_mode()
    @pytest.mark.parametrize("how", ["getter", "fx"])
    def test_features(self, how):
        model = self.small()
        extractor = timm.create_model(
            "revit_lvvit_s", **SMALL, features_only=True, feature_cls=how, out_indices=(0, 1)
        ).eval()
        prefix = {"getter": "model.", "fx": "graph_module."}[how]
        own = extractor.state_dict()
        weights = {prefix + name: value for name, value in model.state_dict().items()}
        extractor.load_state_dict({name: value for name, value in weights.items() if name in own})
        x = torch.stack(pixels([4, 4]))
        maps = extractor(x)
        expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        for ours, theirs in zip(maps, expected, strict=True):
            theirs = theirs if how == "getter" else theirs.flatten(2).transpose(1, 2)
            assert relative(ours if how == "getter" else ours[:, 1:], theirs) <= TOLERANCE

    def test_layer_decay_and_gradients(self):
        model = self.small(aux_head=True).train()
        optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
        decays = {
            id(p): (group["weight_decay"], group["lr_scale"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        stem = decays[id(model.patch_embed.conv1.weight)]
        assert stem[0] == 0.05
        assert stem[1] == min(scale for _, scale in decays.values())
        assert decays[id(model.patch_embed.bn1.weight)][0] == 0.0
        model(pixels([6, 4, 2])).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sequence_max_is_that_of_each_sequence():
    x = randn(12, 5, dtype=torch.float64).requires_grad_()
    seqlens, skip = (4, 0, 1, 2, 3), 1  # then two rows of padding
    out = sequence_max(x, cumulative(seqlens), skip)
    starts = [0, 4, 4, 5, 7]
    expected = [
        x[s + skip : s + n].amax(0) if n > skip else torch.zeros(5) for s, n in zip(starts, seqlens, strict=True)
    ]
    assert torch.equal(out, torch.stack(expected).to(out.dtype))
    assert torch.autograd.gradcheck(lambda t: sequence_max(t, cumulative(seqlens), skip), x)

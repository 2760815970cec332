"""ReViT against timm: the same numbers image by image, alone and in a mixed pack; timm's interface; compilation."""

import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from helpers import assert_as_accurate, full_if, randn
from timm.layers import LayerNorm
from timm.optim import param_groups_weight_decay
from torch._dynamo.testing import CompileCounter

import revit_fast as rf
from revit_fast import PackedBatch, ReViT
from revit_fast.layers.positions import MAX_EXTRA_GRIDS

# (timm name, arguments): plain ViT and DeiT in three sizes, two prefix tokens and two heads, LayerScale with registers
# and another patch size, mean pooling with and without a class token, a model without qkv bias.
MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", {}),
    "deit_small": ("deit_small_patch16_224", {}),
    "deit_base": ("deit_base_patch16_224", {}),
    "deit_small_distilled": ("deit_small_distilled_patch16_224", {}),
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {"img_size": 224, "num_classes": 7, "depth": 6}),
    "avg_no_class": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "depth": 4}),
    "avg_class_no_embed": ("vit_tiny_patch16_224", {"global_pool": "avg", "no_embed_class": True, "depth": 4}),
    "no_qkv_bias_layer_scale": ("vit_tiny_patch16_224", {"qkv_bias": False, "init_values": 0.1, "depth": 4}),
    "pre_norm": ("vit_base_patch16_clip_224", {"depth": 2}),
}
TOLERANCE = (
    2e-5  # of the largest logit: float32 products of DeiT's widths differ by about 2e-6 between summation orders
)


def lively(vit: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that keep activations of order one through the whole depth, so that no branch is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and "embed" not in name and "token" not in name:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise)
    return vit.eval()


def make_vit(key: str, **extra) -> torch.nn.Module:
    name, arguments = MODELS[key]
    return lively(timm.create_model(name, dynamic_img_size=True, **{**arguments, **extra}))


@pytest.fixture(scope="module")
def tiny() -> tuple[torch.nn.Module, ReViT]:
    vit = make_vit("deit_tiny", depth=3, num_classes=11)
    return vit, ReViT.from_timm(vit)


def images_of(grids, patch_size=16, seed=0):
    grids = [(g, g) if isinstance(g, int) else g for g in grids]
    return [randn(3, h * patch_size, w * patch_size, seed=seed + i) for i, (h, w) in enumerate(grids)]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.inference_mode()
@pytest.mark.parametrize("key", [full_if(key in ("deit_small", "deit_base"), key) for key in MODELS])
def test_equals_timm_at_every_grid_and_in_a_mixed_pack(key):
    vit = make_vit(key)
    model = ReViT.from_timm(vit)
    mixed, expected = [], []
    for grid in (14, 10, 7):
        x = torch.stack(images_of([grid, grid], model.patch_size, seed=grid))
        theirs = vit(x)
        assert theirs.std() > 0.1, "activations are trivially small: the comparison would prove nothing"
        assert relative(model(x), theirs) <= TOLERANCE
        mixed += [*x]
        expected += [*theirs]
    order = [4, 0, 2, 5, 1, 3]
    ours = model([mixed[i] for i in order])
    assert relative(ours, torch.stack([expected[i] for i in order])) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("key", ["deit_tiny", "deit_small_distilled", "avg_no_class"])
def test_tal_layer_norm_takes_each_length_parameters(key):
    """With norms drawn at random per length, every image equals the timm model that carries its length's norms."""
    vit = make_vit(key, depth=3)
    model = ReViT.from_timm(vit)
    generator = torch.Generator().manual_seed(1)
    norms = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "norm" in name}
    assert len(norms) == 2 * (2 * 3 + 1)
    for parameter in norms.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs = []
    for index in range(3):
        carrier = copy.deepcopy(vit)
        carrier.load_state_dict({**vit.state_dict(), **{name: p[index] for name, p in norms.items()}})
        theirs.append(carrier)
    images = images_of([7, 14, 10, 7, (12, 12), (13, 12), (8, 9), (3, 5)])
    # 144 patches are nearer to 100, 156 to 196; 72 and 15 to 49.
    wanted = [2, 0, 1, 2, 1, 0, 2, 2]
    expected = torch.cat([theirs[index](x[None]) for x, index in zip(images, wanted, strict=True)])
    assert relative(model(images), expected) <= TOLERANCE
    alone = torch.cat([model(x[None]) for x in images])
    assert relative(alone, expected) <= TOLERANCE


@torch.inference_mode()
def test_an_image_does_not_see_its_neighbours(tiny):
    _, model = tiny
    images = images_of([14, 7, 10, 7, 14, (9, 5)])
    packed = model(images)
    for order in ([5, 3, 1, 0, 2, 4], [2], [1, 1, 1]):
        assert relative(model([images[i] for i in order]), packed[order]) <= 1e-5


@torch.inference_mode()
def test_non_square_grids_equal_timm(tiny):
    vit, model = tiny
    for grid in [(9, 12), (12, 9), (1, 1), (20, 3)]:
        x = torch.stack(images_of([grid, grid]))
        assert relative(model(x), vit(x)) <= TOLERANCE


def test_padding_rows_change_nothing_even_when_they_hold_nan(tiny):
    _, model = tiny
    batch = model.pack(images_of([7, 10]))
    padded = PackedBatch.from_rows(
        torch.cat([batch.data, torch.full((37, 768), torch.nan)]), batch.seqlens, lengths=model.lengths
    )
    with torch.inference_mode():
        assert relative(model(padded), model(batch)) <= 1e-5
    model.zero_grad()
    model(padded).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@torch.inference_mode()
def test_an_empty_sequence_harms_no_other(tiny):
    _, model = tiny
    images = images_of([7, 10])
    rows = model.pack(images).split()
    batch = PackedBatch.from_list([rows[0], rows[0][:0], rows[1], rows[0][:0]], lengths=model.lengths)
    logits = model(batch)
    assert torch.isfinite(logits).all()
    assert relative(logits[[0, 2]], model(images)) <= 1e-5


@torch.inference_mode()
def test_a_pack_made_for_other_lengths_is_read_by_this_models(tiny):
    _, model = tiny
    images = images_of([14, 10, 7])
    batch = PackedBatch.from_images(images, 16, lengths=(400, 4))
    assert torch.equal(model(batch), model(images))


@torch.inference_mode()
def test_uint8_rows_with_folded_normalization(tiny):
    _, model = tiny
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = [torch.randint(0, 256, x.shape, dtype=torch.uint8) for x in images_of([14, 7])]
    normalised = [(x / 255 - mean[:, None, None]) / std[:, None, None] for x in pixels]
    raw = PackedBatch.from_images(pixels, 16, lengths=model.lengths)
    folded = replace(raw, normalization=torch.stack([mean, std]))
    assert relative(model(folded), model(normalised)) <= TOLERANCE
    with pytest.raises(ValueError, match="uint8 rows need a normalization"):
        model(raw)


@torch.inference_mode()
def test_features_head_and_intermediates_have_timm_meaning(tiny):
    vit, model = tiny
    x = torch.stack(images_of([10, 10]))
    assert relative(model.forward_features(x), vit.forward_features(x)) <= TOLERANCE
    assert relative(model.forward_head(model.forward_features(x)), vit(x)) <= TOLERANCE
    features = model.forward_features(x)
    assert (
        relative(model.forward_head(features, pre_logits=True), vit.forward_head(features, pre_logits=True))
        <= TOLERANCE
    )
    for arguments in ({"indices": 2, "norm": True}, {"indices": [0, -1], "output_fmt": "NLC", "stop_early": True}):
        ours, maps = model.forward_intermediates(x, **arguments)
        theirs, their_maps = vit.forward_intermediates(x, **arguments)
        assert relative(ours, theirs) <= TOLERANCE
        assert len(maps) == len(their_maps)
        for a, b in zip(maps, their_maps, strict=True):
            assert relative(a, b) <= TOLERANCE
    pairs = model.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
    their_pairs = vit.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
    assert relative(pairs[0][1], their_pairs[0][1]) <= TOLERANCE


@torch.inference_mode()
def test_features_of_a_mixed_batch_stay_packed(tiny):
    vit, model = tiny
    images = images_of([14, (5, 9), 7])
    tokens = model.forward_features(images)
    assert tokens.n_prefix == 1
    for x, part in zip(images, tokens.split(), strict=True):
        assert relative(part, vit.forward_features(x[None])[0]) <= TOLERANCE
    assert relative(model.forward_head(tokens), torch.cat([vit(x[None]) for x in images])) <= TOLERANCE
    (maps,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    for x, feature_map in zip(images, maps, strict=True):
        (theirs,) = vit.forward_intermediates(x[None], 1, norm=True, intermediates_only=True)
        assert relative(feature_map, theirs[0]) <= TOLERANCE


@pytest.mark.parametrize("key", ["deit_tiny", "avg_no_class", "no_qkv_bias_layer_scale"])
def test_gradients_equal_timm_in_float64(key):
    vit = make_vit(key, depth=2, num_classes=5).double().train()
    model = ReViT.from_timm(vit)
    images = [x.double() for x in images_of([14, 7])]
    for x in images:
        vit(x[None]).square().sum().backward()
    model(images).square().sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in vit.named_parameters():
        grad = ours[name].grad
        grad = grad.sum(0) if grad.dim() == parameter.dim() + 1 else grad  # the lengths share timm's norm
        # timm resamples position embeddings in float32
        assert relative(grad, parameter.grad) <= 1e-6, name


def test_checkpointing_gives_the_same_gradients(tiny):
    _, model = tiny
    plain, recomputed = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    recomputed.set_grad_checkpointing()
    for m in (plain, recomputed):
        m(images_of([10, 7])).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_state_dict_has_timm_keys_and_a_length_axis(tiny):
    vit, model = tiny
    theirs, ours = vit.state_dict(), model.state_dict()
    assert ours.keys() - {"_extra_state"} == theirs.keys()
    for name, value in theirs.items():
        expected = (3, *value.shape) if "norm" in name else value.shape
        assert ours[name].shape == expected, name


def test_norms_and_tokens_are_kept_from_decay(tiny):
    _, model = tiny
    no_decay, decay = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(p) for p in decay["params"]}
    for name, parameter in model.named_parameters():
        exempt = "norm" in name or name in ("pos_embed", "cls_token") or name.endswith("bias")
        assert (id(parameter) not in decayed) == exempt, name
    assert len(no_decay["params"]) + len(decay["params"]) == len(list(model.parameters()))


def test_extra_parameters_stay_below_one_percent():
    vit = timm.create_model("deit_small_patch16_224")
    model = ReViT.from_timm(vit)
    plain, ours = (sum(p.numel() for p in m.parameters()) for m in (vit, model))
    assert 1 < ours / plain < 1.01


def test_distilled_training_returns_both_logits():
    vit = make_vit("deit_small_distilled", depth=1, num_classes=4).train()
    model = ReViT.from_timm(vit)
    x = torch.stack(images_of([14]))
    for m in (vit, model):
        m.set_distilled_training(True)
    for ours, theirs in zip(model(x), vit(x), strict=True):
        assert relative(ours, theirs) <= TOLERANCE


def test_drop_path_drops_whole_sequences():
    from revit_fast.layers import DropPath
    from revit_fast.packing import cumulative

    layout = rf.packing.Layout(cumulative([3, 0, 2, 4]), torch.zeros(4, dtype=torch.int32), None)
    drop = DropPath(0.5).train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(64):
        kept = drop(torch.ones(9, 2), layout)
        parts = [kept[0:3], kept[3:5], kept[5:9]]
        assert all(part.unique().numel() == 1 for part in parts)
        seen.add(tuple(part[0, 0].item() for part in parts))
    assert seen == {(a, b, c) for a in (0.0, 2.0) for b in (0.0, 2.0) for c in (0.0, 2.0)}
    assert torch.equal(drop.eval()(torch.ones(9, 2), layout), torch.ones(9, 2))


@torch.inference_mode()
def test_reset_classifier(tiny):
    model = copy.deepcopy(tiny[1])
    model.reset_classifier(5)
    assert model(images_of([7])).shape == (1, 5)
    model.reset_classifier(0, "avg")
    features = model.forward_features(images_of([7]))
    expected = features.data[1:].mean(0, keepdim=True)  # the norm stays before the pooling, as in timm
    assert relative(model(images_of([7])), expected) <= TOLERANCE
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(5, "max")


def test_class_token_and_mean_side_by_side():
    """What the head reads is `[class token, mean of the patch tokens]`, in every way through the model."""
    torch.manual_seed(0)
    arguments = {"grids": (4, 3), "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3, "reg_tokens": 2}
    model = lively(ReViT(num_classes=5, global_pool="token_avg", **arguments)).double()
    assert model.head_hidden_size == model.head.in_features == 48
    images = [x.double() for x in images_of([4, (3, 5), 3, 4], patch_size=2)]
    expected = []
    for tokens in model.forward_features(images).split():
        expected.append(model.head(torch.cat([tokens[0], tokens[3:].mean(0)])))
    expected = torch.stack(expected)
    assert relative(model(images), expected) <= 1e-12
    assert relative(model.forward_head(model.forward_features(images)), expected) <= 1e-12
    x = torch.stack([images[0], images[3]])
    assert relative(model(x), expected[[0, 3]]) <= 1e-12
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 48)
    given, own = (
        torch.autograd.grad(logits.square().sum(), list(model.parameters()), retain_graph=True)
        for logits in (model(images), expected)
    )
    assert max(relative(a, b) for a, b in zip(given, own, strict=True) if b.any()) <= 1e-10
    model.reset_classifier(7, "avg")
    assert model.head.in_features == 24
    model.reset_classifier(7, "token_avg")
    assert model(x).shape == (2, 7)
    for options, message in (({"class_token": False}, "needs a class token"), ({"fc_norm": True}, "set fc_norm=False")):
        with pytest.raises(ValueError, match=f'global_pool: "token_avg" .*{message}'):
            ReViT(global_pool="token_avg", **arguments | options)
    with pytest.raises(ValueError, match="fc_norm"):
        ReViT(global_pool="avg", **arguments).reset_classifier(7, "token_avg")


@torch.inference_mode()
def test_position_table_follows_writes(tiny):
    vit, model = (copy.deepcopy(m) for m in tiny)
    x = torch.stack(images_of([7]))
    model(x)
    for m in (vit, model):
        m.pos_embed.data.mul_(-2.0)  # through .data: no version counter sees it
    assert relative(model(x), vit(x)) <= TOLERANCE
    for m in (vit, model):
        m.load_state_dict({**m.state_dict(), "pos_embed": m.pos_embed + 1.0})
    assert relative(model(x), vit(x)) <= TOLERANCE


@torch.inference_mode()
def test_many_grids_are_forgotten_but_still_right(tiny):
    vit, model = tiny[0], copy.deepcopy(tiny[1])
    for first in range(1, 160, 10):
        model(images_of([(1, width) for width in range(first, first + 10)]))
    assert len(model._positions.known.first_row) <= 3 + MAX_EXTRA_GRIDS
    for grid in (14, (1, 3), (1, 160)):
        x = torch.stack(images_of([grid]))
        assert relative(model(x), vit(x)) <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_timm(tiny, dtype):
    vit, model = (copy.deepcopy(m).to(dtype) for m in tiny)
    images = [x.to(dtype) for x in images_of([14, 10, 7, 7])]
    exact = copy.deepcopy(tiny[1]).double()([x.double() for x in images])
    theirs = torch.cat([vit(x[None]) for x in images]).double()
    ours = model(images).double()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@torch.inference_mode()
def test_copies_and_pickles_give_the_same_results(tiny):
    _, model = tiny
    images = images_of([10, (3, 4)])
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


def test_from_timm_copies_the_weights(tiny):
    vit, _ = tiny
    model = ReViT.from_timm(vit)
    with torch.no_grad():
        model.head.weight.zero_()
    assert vit.head.weight.abs().sum() > 0


def test_from_timm_keeps_float64():
    vit = make_vit("deit_tiny", depth=1, num_classes=5).double()
    with torch.no_grad():
        vit.head.weight.mul_(1 + 1e-9)  # no values that float32 could hold
    assert torch.equal(ReViT.from_timm(vit).head.weight, vit.head.weight)


@pytest.mark.parametrize(
    ("arguments", "feature"),
    [
        ({"attn_drop_rate": 0.1}, "attn_drop_rate=0.1"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"norm_layer": "simplenorm"}, "LayerNorm and RMSNorm"),
        ({"mlp_layer": timm.layers.GluMlp}, "gate_last"),
        ({"mlp_layer": timm.layers.GatedMlp}, "GatedMlp"),
        ({"patch_size": (16, 8)}, "non-square patches"),
    ],
)
def test_from_timm_refuses_by_name(arguments, feature):
    vit = timm.models.vision_transformer.VisionTransformer(embed_dim=64, depth=1, num_heads=2, **arguments)
    with pytest.raises(ValueError, match=f"vit: .*{feature}.* not supported"):
        ReViT.from_timm(vit)


def test_from_timm_refuses_other_models():
    with pytest.raises(TypeError, match="vit: expected a timm VisionTransformer, Eva or NaFlexVit, got Linear"):
        ReViT.from_timm(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="vit: expected a timm VisionTransformer, Eva or NaFlexVit, got str"):
        ReViT.from_timm("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="grids: expected strictly decreasing"):
        ReViT.from_timm(make_vit("deit_tiny", depth=1), grids=(7, 14))


def test_bad_inputs_are_named(tiny):
    _, model = tiny
    cases = [
        (randn(3, 224, 224), ValueError, "x: expected shape"),
        (randn(1, 3, 224, 225), ValueError, "multiples of the patch size 16, got 224x225"),
        (randn(1, 4, 224, 224), ValueError, "x: expected 3 channels first, got 4"),
        ([randn(1, 224, 224)], ValueError, r"images\[0\]: expected 3 channels first, got 1"),
        (PackedBatch.from_list([randn(4, 192)]), ValueError, r"x: expected patch rows \[T, 768\]"),
        ([], ValueError, "images: expected at least one"),
        ([randn(3, 16, 16), "x"], TypeError, r"images\[1\]: expected a tensor"),
        ("photo.jpg", TypeError, r"images\[0\]"),
        (7, TypeError, "x: expected a tensor"),
        (PackedBatch.from_list([randn(6, 768)]), ValueError, "no grids"),
        (PackedBatch.from_list([randn(5, 768)], n_prefix=1), ValueError, "n_prefix"),
        (PackedBatch.from_list([randn(4, 768)]).to("meta"), ValueError, "batch is on meta"),
    ]
    for x, error, message in cases:
        with pytest.raises(error, match=message):
            model(x)


class TestCompiled:
    """The eager graph is what the compiler must take whole; inductor's arithmetic is checked once."""

    def test_random_mixes_compile_at_most_three_times(self, tiny):
        _, model = tiny
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            for _ in range(20):
                size = int(torch.randint(1, 9, (1,), generator=generator))
                grids = [(14, 10, 7)[i] for i in torch.randint(0, 3, (size,), generator=generator)]
                batch = model.pack(images_of(grids, seed=size))
                assert relative(compiled(batch), model(batch)) <= 1e-5
        assert counter.frame_count <= 3, f"{counter.frame_count} compilations for 20 mixes"

    @pytest.mark.beside
    def test_inductor_gives_the_same_logits_and_gradients(self):
        vit = make_vit("deit_tiny", depth=1, num_classes=5)  # every block compiles alike
        vit.blocks[0].norm2 = timm.layers.RmsNorm(vit.embed_dim)
        model = ReViT.from_timm(vit)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        x = torch.stack(images_of([10, 10]))
        with torch.inference_mode():
            for inputs in (model.pack(images_of([14, 7, 10])), model.pack(images_of([7, 7])), x):
                assert relative(compiled(inputs), model(inputs)) <= TOLERANCE
        batch = model.pack(images_of([10, 14, 7, 7]))
        padding = torch.full((9, 768), torch.nan)
        padded = PackedBatch.from_rows(torch.cat([batch.data, padding]), batch.seqlens, lengths=model.lengths)
        compiled(padded).square().sum().backward()
        compiled_grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(batch).square().sum().backward()
        for ours, parameter in zip(compiled_grads, model.parameters(), strict=True):
            assert relative(ours, parameter.grad) <= 1e-4

    def test_an_unknown_grid_is_an_error_not_a_wrong_answer(self, tiny):
        model = copy.deepcopy(tiny[1])
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        batch = model.pack(images_of([14, (5, 6)]))
        with pytest.raises(RuntimeError, match=r"^x: a compiled model met a grid .* call the model itself once"):
            compiled(batch)
        model(batch)
        with torch.inference_mode():
            assert relative(compiled(batch), model(batch)) <= 1e-5


def test_layer_norm_class_of_timm_is_accepted():
    vit = timm.models.vision_transformer.VisionTransformer(embed_dim=64, depth=1, num_heads=2, norm_layer=LayerNorm)
    assert ReViT.from_timm(vit).blocks[0].norm1.eps == vit.blocks[0].norm1.eps


def test_autocast_keeps_the_residual_stream_in_float32():
    """As accurate as timm's model under the same autocast, forward and backward."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10).eval()
    model = ReViT.from_timm(vit, grids=(4, 3, 2))
    x = torch.randn(4, 3, 64, 64)
    truth = vit.double()(x.double())
    truth.square().sum().backward()
    gradient = vit.blocks[0].attn.qkv.weight.grad.clone()
    vit.float().zero_grad()
    results = []
    for net in (model, vit):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(x)
        logits.float().square().sum().backward()
        results.append((logits.float(), net.blocks[0].attn.qkv.weight.grad))
    (ours, our_gradient), (timms, timms_gradient) = results
    assert_as_accurate(ours, timms, truth, "logits")
    assert_as_accurate(our_gradient, timms_gradient, gradient, "gradient")
    features = []
    model.blocks[1].register_forward_hook(lambda module, inputs, outputs: features.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert features == [torch.float32]

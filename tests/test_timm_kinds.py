"""Every kind of ViT of timm that `from_timm` takes, built small: model, optimised copy and gradients are timm's."""

import math
from functools import partial

import pytest
import torch
from helpers import full
from torch import nn

import revit_fast as rf
from revit_fast.models.timm_blocks import plain_names

timm = pytest.importorskip("timm")

GRIDS = (5, 4, 3)
SIDES = [(3, 3), (5, 5), (4, 2)]

KINDS = {
    # EVA-02: split projections with biases of queries and values, SwiGLU with a norm, stretched coordinates, fc_norm
    "eva02_base_patch14_224": {},
    "eva02_base_patch16_clip_224": {},  # and a norm before attention's projection
    "eva02_tiny_patch14_224": {},  # packed SwiGLU
    "eva_giant_patch14_224": {},  # no rotary embedding
    "vit_small_patch16_dinov3": {},  # no positions, centred coordinates, halves
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": (None, 1)},  # grouped keys, norms of queries, one LayerScale
    "vit_small_patch16_rope_224": {},  # the column first
    "vit_small_patch16_rope_mixed_ape_224": {},  # learned frequencies beside positions
    "vit_pe_core_base_patch16_224": {},  # offset coordinates, norm before the blocks, attention pool over all tokens
    "vit_pe_spatial_tiny_patch16_512": {},  # no final norm
    "vit_base_patch16_siglip_224": {},  # attention pool, no prefix tokens
    "vit_so150m_patch16_reg4_map_256": {},  # attention pool without its prefix tokens
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_giant_patch14_reg4_dinov2": {},
    "aimv2_1b_patch14_224": {},  # norm of the patches, RMSNorms, SwiGLU without biases
    "beit3_base_patch16_224": {},  # norms inside attention and MLP
    "naflexvit_base_patch16_siglip": {},  # bilinear positions
    "naflexvit_base_patch16_radio_v3": {},  # without antialiasing, corners aligned
    "naflexvit_base_patch16_par_gap": {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
}


def lively(model):
    """The model with a value in every parameter that moves the output: LayerScale begins at 1e-5."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and name.endswith("weight"):
                p.normal_(std=0.7 / math.sqrt(p[0].numel()), generator=generator)
            elif "gamma" in name or ("norm" in name and name.endswith("weight")):
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.4)
    return model.eval()


def built(name, **options):
    naflex = name.startswith("naflex")
    # timm resamples a NaFlexVit's positions in float32, also in float64: not at the grid that they are stored for.
    size = {"pos_embed_grid_size": (3, 3)} if naflex else {"img_size": 48, "dynamic_img_size": True}
    return lively(timm.create_model(name, embed_dim=32, depth=2, num_heads=2, num_classes=6, **size, **options))


def images_of(vit, grid, dtype=torch.float32):
    p = (vit.patch_embed if hasattr(vit, "patch_embed") else vit.embeds).patch_size[0]
    generator = torch.Generator().manual_seed(grid[0])
    return torch.randn(2, 3, grid[0] * p, grid[1] * p, dtype=dtype, generator=generator)


def off(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.fixture(params=KINDS, scope="module")
def kind(request):
    vit = built(request.param, **KINDS[request.param])
    return vit, rf.ReViT.from_timm(vit, grids=GRIDS).eval()


def test_model_and_optimized_copy_are_timms(kind):
    vit, model = kind
    fast = rf.optimize(model, engine="fused")
    for grid in SIDES:
        images = images_of(vit, grid)
        with torch.no_grad():
            expected = vit(images)
            assert off(model(images), expected) <= 2e-5
            assert off(fast(images), expected) <= 2e-5


def test_the_comparison_sees_what_it_compares(kind):
    """Without rotary embedding, or without a block, timm's own output is another."""
    vit, _ = kind
    images = images_of(vit, SIDES[1])
    with torch.no_grad():
        expected, block = vit(images), vit.blocks[1]
        try:
            vit.blocks[1] = nn.Identity()
            block.forward, forward = (lambda x, **options: x), block.forward
            vit.blocks[1] = block
            assert off(vit(images), expected) > 1e-2
        finally:
            block.forward = forward
        rope = getattr(vit, "rope", None)
        if rope is not None:
            embed, rope.get_embed = rope.get_embed, lambda *args, **options: torch.zeros_like(embed(*args, **options))
            try:
                assert off(vit(images), expected) > 1e-2
            finally:
                del rope.get_embed


def test_packs_of_all_grids_are_single_images(kind):
    vit, model = kind
    images = [images_of(vit, grid)[0] for grid in SIDES]
    with torch.no_grad():
        together = model(images)
        for image, row in zip(images, together, strict=True):
            assert off(row, vit(image[None])[0]) <= 2e-5
        fast = rf.optimize(model)
        assert all(torch.equal(fast([image])[0], row) for image, row in zip(images, fast(images), strict=True))


def wide(vit):
    """A model of timm in float64 with its rotary tables in float64 too."""
    rope = getattr(vit, "rope", None)
    if rope is None:
        return vit
    if type(rope).__name__ != "RotaryEmbeddingMixed":
        rope.get_embed = partial(rope.get_embed, dtype=torch.float64)
        return vit

    def get_embed(shape, dtype=None):  # timm computes these in float32
        rows, columns = (torch.arange(n, dtype=torch.float64) for n in shape)
        angle = columns.repeat(shape[0])[:, None] * rope.freqs[0].unsqueeze(-2)
        angle = angle + rows.repeat_interleave(shape[1])[:, None] * rope.freqs[1].unsqueeze(-2)
        return torch.cat([t.repeat_interleave(2, -1) for t in (angle.sin(), angle.cos())], dim=-1)

    rope.get_embed = get_embed
    return vit


def test_gradients_in_float64_are_timms(kind):
    name = next(n for n in KINDS if kind[0].default_cfg["architecture"] == n)
    vit = built(name, **KINDS[name]).double()
    model = rf.ReViT.from_timm(vit, grids=GRIDS).eval()
    wide(vit)
    images = images_of(vit, (3, 3), torch.float64).requires_grad_()
    ours = images.detach().clone().requires_grad_()
    vit(images).square().sum().backward()
    model(ours).square().sum().backward()
    assert off(ours.grad, images.grad) <= 1e-10
    theirs = {n: p.grad for n, p in vit.named_parameters() if p.grad is not None}
    if name.startswith("naflex"):
        return  # its embedding has other names; the images' gradient passes through all of it
    theirs = plain_names(theirs, [n for n, _ in model.named_parameters()])
    largest = max(float(g.abs().max()) for g in theirs.values())
    for n, p in model.named_parameters():
        grad = p.grad.sum(dim=0) if model.norm_parameter.search(n) else p.grad  # the other lengths' rows are zero
        assert (grad - theirs.pop(n)).abs().max() <= 1e-10 * largest, n
    assert not theirs


def test_attention_maps_are_timms(kind):
    """timm's maps are the input of `attn_drop`, where attention is not fused."""
    vit, model = kind
    images, seen = images_of(vit, SIDES[0]), []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            vit(images)
    finally:
        for block in vit.blocks:
            block.attn.fused_attn = True
            block.attn.attn_drop._forward_pre_hooks.clear()
    for ours, theirs in zip(model.attention_maps(images, [0, 1]), seen, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


def test_saved_and_loaded(kind, tmp_path):
    vit, model = kind
    model.save_pretrained(tmp_path / "m")
    again = rf.ReViT.from_pretrained(tmp_path / "m").eval()
    assert again.spec == model.spec
    images = images_of(vit, SIDES[0])
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_weights_of_timm_load_into_a_new_model(kind, tmp_path):
    vit, model = kind
    if hasattr(vit, "embeds"):
        pytest.skip("a NaFlexVit's weights do not say how its patches lie")
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    fresh = rf.ReViT(model.spec).eval()
    fresh.load_checkpoint(tmp_path / "w.pth")
    images = images_of(vit, SIDES[0])
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("beit_base_patch16_224", "got Beit"),
        ("eva02_enormous_patch14_clip_224", "blocks of type EvaBlockPostNorm"),
        ("vit_base_patch16_rpn_224", "blocks of type ResPostBlock"),
        ("vit_base_patch16_xp_224", "blocks of type ParallelScalingBlock"),
        ("vit_base_patch16_18x2_224", "blocks of type ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "attention of type DiffAttention"),
        ("vit_base_r26_s32_224", "a patch embedding of type HybridEmbed"),
    ],
)
def test_other_architectures_are_refused_by_name(name, feature):
    with torch.device("meta"):
        vit = timm.create_model(name, depth=1)
    with pytest.raises((TypeError, ValueError), match=feature):
        rf.ReViT.from_timm(vit)


class TestRope:
    def test_coordinates_are_augmented_in_training_alone(self):
        vit = built("vit_base_patch16_sapiens2", num_kv_heads=(None, 1), rope_rescale_coords=2.0)
        model = rf.ReViT.from_timm(vit, grids=GRIDS)
        images = images_of(vit, SIDES[0])
        with torch.no_grad():
            model.eval()
            assert torch.equal(model(images), model(images))
            model.train()
            assert off(model(images), model(images)) > 1e-3

    def test_frequencies_keep_float32_in_a_model_of_16_bits(self):
        model = rf.ReViT.from_timm(built("vit_small_patch16_dinov3"), grids=GRIDS).bfloat16().eval()
        (rotation, *_) = model._rotations(model._inputs([torch.randn(3, 80, 64).bfloat16()]))
        assert rotation.cos.dtype == torch.float32

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rope": {"kind": "spiral"}}, "rope: expected kind to be one of axial, mixed, interleaved, got 'spiral'"),
            ({"rope": {}, "head_dim": 6}, "rope: expected heads of one size, a multiple of 4 channels, got \\[6\\]"),
            (
                {"rope": {"kind": "mixed"}, "num_kv_heads": 1},
                "rope: mixed frequencies need blocks of equally many heads",
            ),
            ({"num_kv_heads": 3}, "kv_heads: expected a divisor of 2 heads, got 3"),
            ({"qkv_bias": "kv"}, "qkv_bias: expected True, False or \"qv\", got 'kv'"),
            ({"global_pool": "map"}, 'global_pool: "map" needs an attention pool'),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            rf.ReViT(embed_dim=16, depth=1, num_heads=2, **options)


@pytest.mark.parametrize("name", [full("vit_pe_core_base_patch16_224"), "vit_small_plus_patch16_dinov3"])
def test_exported_programs_are_the_model(name):
    from revit_fast.deploy.export import export_packed, export_single

    vit = built(name)
    model = rf.ReViT.from_timm(vit, grids=GRIDS).eval()
    images = images_of(vit, (4, 4))
    with torch.no_grad():
        expected = model(images)
        assert off(export_single(model, 4).module()(images), expected) <= 2e-5
        batch = model.pack(images)
        assert off(export_packed(model).module()(batch.data, batch.grid_hw), expected) <= 2e-5

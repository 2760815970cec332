"""Attention maps equal the definition in float64, timm's own weights, and what every optimised copy serves."""

import dense_vit
import pytest
import timm
import torch
from small_models import GRIDS, MIX, PATCH, images_of, make_model
from test_spec import images_for, random_spec

import revit_fast as rf
from revit_fast.models.lvvit import lvvit_t
from revit_fast.packing import PackedBatch
from revit_fast.video.model import TimeSformer

COPIES = {
    "model": lambda model: model,
    "fused": rf.optimize,
    "modules": lambda model: rf.optimize(model, engine="modules"),
    "without weights": lambda model: rf.optimize(model, keep_weights=False),
}
copies = pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)


def truth_of(model, images):
    """Per image, the maps of every block in float64."""
    found = []
    for image in images:
        maps = []
        dense_vit.logits(model.spec, {n: t.double() for n, t in model.state_dict().items()}, image.double(), maps)
        found.append(maps)
    return found


def difference(maps, truth):
    assert [m.shape for m in maps] == [t.shape for t in truth]
    return max((m.double() - t).abs().max().item() for m, t in zip(maps, truth, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_of_random_architectures(seed):
    """RMSNorms, scales, prefix tokens, LayerScale, blocks that differ: mixed sizes in one pack."""
    model = rf.ReViT(random_spec(seed)).eval()
    if not model.blocks:
        with pytest.raises(ValueError, match="block: this model has no blocks"):
            model.attention_maps(images_for(model.spec))
        return
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = images_for(model.spec)
    truth = [list(maps) for maps in zip(*truth_of(model, images), strict=True)]
    blocks = list(range(len(truth)))
    for copy in (model, rf.optimize(model), rf.optimize(model, engine="modules")):
        for maps, expected in zip(copy.attention_maps(images, blocks), truth, strict=True):
            assert difference(maps, expected) < 1e-5


@copies
def test_equal_those_of_timm(copy):
    vit = timm.create_model("test_vit", img_size=160, dynamic_img_size=True).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.normal_(std=0.1)
    fast, seen = copy(rf.ReViT.from_timm(vit, grids=(10, 7, 5))), []
    for block in vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, _, result: seen.append(result.detach()))
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        vit(x)
    assert max(float(m.std()) for m in seen) > 1e-3, "they are not uniform"
    found = fast.attention_maps(x, [*range(len(seen))])
    assert difference(found, seen) < 1e-5
    assert torch.equal(fast.attention_maps(x), found[-1])


@copies
def test_shapes_follow_the_input(copy):
    model, images = make_model(distilled=True, reg_tokens=2), images_of(MIX)
    fast, n = copy(model), [4 + a * b for a, b in ((g, g) if isinstance(g, int) else g for g in MIX)]
    maps = fast.attention_maps(images)
    assert [m.shape for m in maps] == [(3, k, k) for k in n]
    assert difference(maps, [maps[-1] for maps in truth_of(model, images)]) < 1e-5
    packed = fast.attention_maps(PackedBatch.from_images(images, PATCH, lengths=model.lengths))
    assert all(torch.equal(a, b) for a, b in zip(maps, packed, strict=True))
    x = torch.stack([images[0], images[0]])
    assert fast.attention_maps(x).shape == (2, 3, n[0], n[0])
    assert torch.allclose(fast.attention_maps(x)[1], maps[0], atol=1e-6)
    assert fast.attention_maps(x[:0]).shape == (0, 3, n[0], n[0])
    assert fast.class_attention(x[:0]).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_class_attention_is_a_grid(options):
    model, images = make_model(**options), images_of(MIX)
    n_prefix = model.num_prefix_tokens
    for grid, m, image in zip(MIX, model.class_attention(images, 0), images, strict=True):
        (whole,) = model.attention_maps([image], 0)
        row = whole[:, 0] if model.has_class_token else whole[:, n_prefix:].mean(1)
        assert torch.allclose(m.flatten(1), row[:, n_prefix:], atol=1e-6)
        assert m.shape[1:] == ((grid, grid) if isinstance(grid, int) else grid)
        assert torch.allclose(model.class_attention(image[None], 0)[0], m, atol=1e-6)


def test_of_lvvit_with_its_stem():
    model = lvvit_t(GRIDS, base_grid=(6, 6), depth=2, num_classes=5).eval()
    x = torch.randn(1, 3, 96, 96)
    maps, fast = model.attention_maps(x), rf.optimize(model).attention_maps(x)
    assert maps.shape == (1, 4, 37, 37)
    assert torch.allclose(maps.sum(-1), torch.ones(1))
    assert torch.allclose(maps, fast, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.int8, 0.05)])
@pytest.mark.parametrize("keep", [True, False])
def test_a_copy_shows_the_weights_that_it_serves(dtype, bound, keep):
    model, images = make_model(), images_of(MIX)
    (*truth,) = (maps[-1] for maps in truth_of(model, images))
    copy = rf.optimize(model, dtype, keep_weights=keep)
    found = copy.attention_maps(images)
    assert {m.dtype for m in found} == {torch.float32}
    assert 1e-5 < difference(found, truth) < bound, "of the rounded weights, not of the model's"


def test_dtypes():
    model, images = make_model(), images_of([4, 2])
    truth = [maps[-1] for maps in truth_of(model, images)]
    with torch.autocast("cpu", torch.bfloat16):
        found = model.attention_maps(images)
    assert {m.dtype for m in found} == {torch.float32}
    assert difference(found, truth) < 0.02
    sums = torch.cat([m.sum(-1).flatten() for m in found])
    assert (sums - 1).abs().max() < 1e-6, "the softmax itself is not rounded"
    found = model.double().attention_maps([image.double() for image in images])
    assert {m.dtype for m in found} == {torch.float64}
    assert not found[0].requires_grad
    assert difference(found, truth) < 1e-12


@pytest.mark.parametrize(
    ("block", "error", "said"),
    [
        (2, ValueError, "expected an int, or a list of them, from -2 to 1, got 2"),
        ([0, -3], ValueError, r"from -2 to 1, got \[0, -3\]"),
        ([], TypeError, r"got \[\]"),
        (True, TypeError, "got True"),
        ("last", TypeError, "got 'last'"),
    ],
)
def test_blocks_that_are_none(block, error, said):
    with pytest.raises(error, match=f"block: .*{said}"):
        make_model().attention_maps(images_of([4]), block)


def test_class_attention_is_of_one_block():
    with pytest.raises(TypeError, match=r"block: expected an int from -2 to 1, got \[0, 1\]"):
        make_model().class_attention(images_of([4]), [0, 1])


def test_clips_are_refused_by_name():
    model = TimeSformer(base_grid=(3, 3), num_frames=3, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(NotImplementedError, match="attention_maps: a ReViT has them; a TimeSformer attends over time"):
        model.attention_maps(torch.zeros(1, 3, 3, 12, 12))

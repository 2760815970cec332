"""`optimize` on the CPU: the fused forward pass against timm and the eager model."""

import copy
import pickle
import resource
import threading

import pytest
import timm
import torch
from helpers import assert_as_accurate, fewer_if_emulated, full, only_on, randn
from small_models import MIX, check, drawn, images_of, make_model
from torch import nn

import revit_fast as rf
from revit_fast.inference import fusable
from revit_fast.inference.inference_copy import dtype_name
from revit_fast.ops import _library
from revit_fast.ops.linear import cpu_multiplies_bf16
from revit_fast.packing import PackedBatch

NARROW_PRODUCTS = "dtype"
pytestmark = [
    only_on("cpu", reason="about the fused CPU engine"),
    pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built"),
]


def ran_fused(fast) -> bool:
    return fast._packed.value is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False, "pool_include_prefix": True, "fc_norm": False},
        {"global_pool": ""},
        {"global_pool": "token_avg", "reg_tokens": 2},
        {"distilled": True},
        {"distilled": True, "reg_tokens": 2},
        {"reg_tokens": 4, "init_values": 0.1, "no_embed_class": True},
        {"pre_norm": True, "fc_norm": True},
        {"norm_layer": "rms", "pre_norm": True, "fc_norm": True, "norm_pre_layer": "layer"},
        {"final_norm": False, "num_classes": 0},
        {"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "patch_bias": False},
        {"act_layer": nn.SiLU},
        {"act_layer": "quick_gelu"},
        {"depth": 0},
        {"depth": 1, "head_dim": 5},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_equals_the_eager_model(isa, options):
    model = make_model(**options)
    fast = rf.optimize(model)
    check(fast, model, images_of(MIX * 6))  # of a few logits the largest error would be a matter of luck
    with torch.no_grad():
        for grids in ([6], [2] * 40, [(1, 1)] * 7):
            torch.testing.assert_close(fast(images_of(grids)), model(images_of(grids)), rtol=1e-5, atol=2e-6)
    assert ran_fused(fast)


def test_blocks_with_activations_and_eps_of_their_own_equal_the_eager_model(isa):
    blocks = [
        {"act_layer": "relu", "norm1_eps": 0.5, "norm2_eps": 1e-3},
        {"act_layer": timm.layers.QuickGELU, "norm1_eps": 1e-5, "norm2_eps": 0.1},
        {"act_layer": nn.GELU, "norm1_eps": 2.0, "norm2_eps": 1e-12},
    ]
    model = make_model(depth=3, pre_norm=True, norm_pre_eps=1e-6, norm_eps=0.2, blocks=blocks)
    fast = rf.optimize(model)
    check(fast, model, images_of(MIX * 6))
    assert ran_fused(fast)


def test_every_form_of_input(isa):
    model = make_model()
    fast = rf.optimize(model)
    x = torch.stack(images_of([6, 6]))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        assert torch.equal(fast(list(x)), fast(x))
        assert torch.equal(fast(model.pack(list(x))), fast(x))
        padded = PackedBatch.from_rows(torch.cat([model.pack(x).data, torch.full((3, 12), torch.nan)]), [36, 36])
        assert torch.equal(fast(padded), fast(x))
        other_lengths = PackedBatch.from_rows(model.pack(x).data, [36, 36], lengths=(36, 9))
        assert torch.equal(fast(other_lengths), fast(x))
        assert fast(PackedBatch.from_rows(torch.empty(0, 12), [])).shape == (0, 40)
        empty = PackedBatch.from_rows(randn(40, 12), [36, 0, 4], grids=[(6, 6), (0, 3), (2, 2)], lengths=model.lengths)
        torch.testing.assert_close(fast(empty), model(empty))
    with torch.inference_mode():
        assert torch.equal(fast(x), fast(x.clone()))
    assert not fast(x).requires_grad


def test_the_default_device_has_no_say():
    model, images = make_model(), images_of([(1, 6), 5, 2])
    fast = rf.optimize(model)
    with torch.device("meta"), torch.no_grad():
        there, eager = fast(images), model(images)
    assert torch.equal(there, fast(images))
    torch.testing.assert_close(there, eager, rtol=1e-5, atol=2e-6)


def test_features_equal_the_eager_models(isa):
    model = make_model(reg_tokens=2)
    fast = rf.optimize(model)
    x = torch.stack(images_of([4, 4]))
    with torch.no_grad():
        torch.testing.assert_close(fast.forward_features(x), model.forward_features(x))
        packed, expected = (m.forward_features(images_of(MIX)) for m in (fast, model))
        torch.testing.assert_close(packed.data, expected.data)
        assert packed.seqlens == expected.seqlens
        torch.testing.assert_close(fast.forward_head(packed), fast(images_of(MIX)))
        maps = fast.forward_intermediates(x, indices=1, intermediates_only=True)[0]
        torch.testing.assert_close(maps, model.forward_intermediates(x, indices=1, intermediates_only=True)[0])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "norm"),
    [(torch.float32, None), full(torch.int8, None), (torch.bfloat16, "rmsnorm"), (torch.int8, "rmsnorm")],
)
def test_bitwise_alone_and_in_any_pack(isa, dtype, norm):
    size = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
    vit = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, norm_layer=norm, **size)
    fast = rf.optimize(drawn(rf.ReViT.from_timm(vit), 0.05), dtype)
    images = images_of([14, 7, 10, 7, (9, 5), 14], patch=16)
    packed = fast(images)
    for order in fewer_if_emulated(isa, [4, 3, 1, 0, 2, 5], [2], [1, 1, 1], [0, 5]):
        assert torch.equal(fast([images[i] for i in order]), packed[order])


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_random_norms_per_length_equal_the_timm_model_that_carries_them(name):
    """Max logit error at most twice that of timm in float32, both against timm in float64."""
    vit = timm.create_model(name, depth=3, img_size=224, num_classes=10, dynamic_img_size=True).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in vit.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.2 / max(parameter.shape[-1], 20) ** 0.5))
    patch = vit.patch_embed.patch_size[0]
    model = rf.ReViT.from_timm(vit)
    norms = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "norm" in n}
    for parameter in norms.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    fast, carriers = rf.optimize(model), []
    for index in range(3):
        carrier = copy.deepcopy(vit)
        carrier.load_state_dict({**vit.state_dict(), **{n: p[index] for n, p in norms.items()}})
        carriers.append(carrier)
    images = images_of([7, 14, 10, 7, (12, 12), (13, 12), (8, 9), (3, 5)], patch)
    lengths = [2, 0, 1, 2, 1, 0, 2, 2]  # 144 patches are nearer to 100, 156 to 196; 72 and 15 to 49
    same = torch.cat([carriers[i](x[None]) for x, i in zip(images, lengths, strict=True)])
    doubles = [copy.deepcopy(carrier).double() for carrier in carriers]
    truth = torch.cat([doubles[i](x[None].double()) for x, i in zip(images, lengths, strict=True)])
    assert_as_accurate(fast(images), same, truth, "mixed pack")
    assert torch.equal(torch.cat([fast(x[None]) for x in images]), fast(images))


def test_auto_takes_bfloat16_where_it_is_multiplied(isa):
    for engine in ("fused", "modules"):
        fast = rf.optimize(make_model(), "auto", engine=engine)
        assert fast.dtype_used == (torch.bfloat16 if cpu_multiplies_bf16() else torch.float32)
        assert fast(images_of(MIX)).dtype == fast.dtype_used
    assert rf.optimize(make_model(), torch.int8).dtype_used == torch.int8
    with pytest.raises(TypeError, match=r"torch\.int8 or \"auto\", got 'fast'"):
        rf.optimize(make_model(), "fast")


def test_the_dtype_that_is_used_has_a_name(monkeypatch):
    model = make_model()
    assert dtype_name(model) == dtype_name(rf.optimize(model)) == "float32"
    assert dtype_name(rf.optimize(model, torch.bfloat16, engine="modules")) == "bfloat16"
    assert dtype_name(nn.Identity()) == "unknown"
    fast = rf.optimize(model, torch.int8)
    assert dtype_name(fast) == "int8"
    monkeypatch.setattr(_library, "HAS_EXTENSION", False)
    assert dtype_name(fast) == "float32", "there is nothing to run int8 weights with"


def test_bfloat16_rounds_less_than_the_eager_model(isa):
    """Against the float64 model with the rounded weights. The eager bfloat16 model rounds every activation.

    Where weights are widened, float32's error and the rounding of the output remain.
    """
    model = make_model()
    fast = rf.optimize(model, torch.bfloat16)
    assert fast(images_of(MIX)).dtype == torch.bfloat16
    assert fast.pos_embed.dtype == torch.bfloat16
    with torch.no_grad():
        rounded = copy.deepcopy(model).bfloat16()
        truth = copy.deepcopy(rounded).double()([x.double() for x in images_of(MIX)])
        error = (fast(images_of(MIX)).double() - truth).abs().max()
        eager = (rounded([x.bfloat16() for x in images_of(MIX)]).double() - truth).abs().max()
    assert error < eager
    if not cpu_multiplies_bf16():
        # Half a unit in the last place of bfloat16 is at most 2^-8 of the value; and float32's error.
        assert error <= truth.abs().max() * 2**-8 + 1e-4


def test_int8_blocks_in_a_float32_copy(isa):
    """Rounding to integers is seen in the logits, and small. That it is the right rounding, test_vit_forward holds."""
    model = make_model(embed_dim=96, num_heads=3, hidden_dim=384)
    fast, plain = rf.optimize(model, torch.int8), rf.optimize(model)
    logits, expected = fast(images_of(MIX)), plain(images_of(MIX))
    assert fast.pos_embed.dtype == logits.dtype == torch.float32
    weights = fast._packed.value.weights
    assert weights.embed.panels.dtype == torch.float32
    assert {part.panels.dtype for b in weights.blocks for part in (b.qkv, b.proj, b.fc1, b.fc2)} == {torch.int8}
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert 1e-6 < difference < 0.1
    tokens = (m.forward_features(images_of(MIX)).data for m in (fast, plain))
    assert not torch.equal(*tokens)


def test_int8_survives_copies_and_is_given_up_by_name(isa):
    model = make_model()
    fast = rf.optimize(model, torch.int8)
    expected = fast(images_of(MIX))
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), rf.optimize(fast)):
        assert not ran_fused(other)
        assert torch.equal(other(images_of(MIX)), expected)
    plain = rf.optimize(model)(images_of(MIX))
    assert torch.equal(rf.optimize(fast, torch.float32)(images_of(MIX)), plain)
    assert not torch.equal(plain, expected)
    assert torch.equal(rf.optimize(model.double(), torch.int8)(images_of(MIX)), expected)


def test_int8_is_refused_elsewhere_than_on_a_cpu():
    model = make_model()
    with pytest.raises(ValueError, match=r"dtype: torch\.int8 is served on the CPU only, and the model is on meta"):
        rf.optimize(copy.deepcopy(model).to("meta"), torch.int8)
    fast = rf.optimize(model, torch.int8).to("meta")
    with pytest.raises(ValueError, match=r"torch\.int8 is served on the CPU only"):
        fast(images_of(MIX))


def test_pixels_are_normalised_by_the_embedding(isa):
    model = make_model()
    fast = rf.optimize(model)
    rows = torch.randint(0, 256, (40, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for shift in (0.0, 0.1, 0.0):
        normalization = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.1]]) + shift
        batch = PackedBatch.from_rows(rows, [36, 4], lengths=model.lengths, normalization=normalization)
        check(fast, model, batch)


def test_threads_may_call_one_model_at_a_time(isa):
    model = make_model(embed_dim=48, num_heads=3)
    fast = rf.optimize(model)
    batches = [images_of(grids, seed=i) for i, grids in enumerate((MIX, [6] * 9, [2], [(3, 7)] * 5))]
    fresh = rf.optimize(model)
    expected = [fresh(batch) for batch in batches]
    failures = []

    def call(i):
        for _ in range(20):
            if not torch.equal(fast(batches[i]), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("change", ["in place", "load", "dtype", "head", "replaced", "position"])
def test_changed_parameters_are_packed_again(change):
    model = make_model()
    fast = rf.optimize(model)
    x = images_of(MIX)
    before = fast(x)
    for m in (model, fast):
        if change == "in place":
            m.blocks[1].mlp.fc1.weight.detach().mul_(2)
        elif change == "load":
            m.load_state_dict({name: 0.5 * value for name, value in make_model().state_dict().items()})
        elif change == "dtype":
            m.bfloat16()
        elif change == "head":
            torch.manual_seed(1)
            m.reset_classifier(3)
        elif change == "replaced":
            m.blocks[0].attn.proj.weight = nn.Parameter(randn(24, 24))
        else:
            m.pos_embed.detach().add_(1)
    after = fast(x)
    if change == "dtype":
        assert after.dtype == torch.bfloat16
    else:
        check(fast, model, x)
        assert after.shape != before.shape or not torch.equal(after, before)


def test_another_instruction_set_packs_again():
    fast = rf.optimize(make_model())
    before = _library.cpu_isa()
    results = []
    try:
        for isa in _library.cpu_isas():
            torch.ops.revit_fast.select_cpu_isa(isa)
            results.append(fast(images_of(MIX)))
    finally:
        torch.ops.revit_fast.select_cpu_isa(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_copies_pickles_and_the_source():
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    fast = rf.optimize(model)
    assert model.training
    assert not fast.training
    expected = fast(images_of(MIX))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert fast.state_dict().keys() == before.keys()
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), rf.optimize(fast)):
        assert not ran_fused(other), "packed weights belong to this machine"
        assert torch.equal(other(images_of(MIX)), expected)


def test_a_warm_call_faults_no_pages_in():
    fast = rf.optimize(make_model(embed_dim=192, num_heads=3, hidden_dim=768))
    batch = fast.pack(images_of([6] * 60))
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        fast(batch)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # Its activations are about 10 MB, 2,600 pages.
    assert sorted(faults)[len(faults) // 2] <= 8, faults


def test_compiled_code_and_float64_run_the_models_own():
    model = make_model()
    fast = rf.optimize(model.double())
    with torch.no_grad():
        assert torch.equal(fast([x.double() for x in images_of(MIX)]), model([x.double() for x in images_of(MIX)]))
    assert not ran_fused(fast)
    fast = rf.optimize(model.float())
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.stack(images_of([6, 6]))), fast(torch.stack(images_of([6, 6]))))


def test_what_cannot_be_fused_is_refused_by_name():
    def refused(change, message):
        model = make_model()
        change(model)
        with pytest.raises(ValueError, match=message):
            rf.optimize(model)

    refused(lambda m: m.blocks[1].attn.register_forward_hook(print), r"blocks\.1\.attn has a forward hook.*remove it")
    refused(lambda m: m.patch_embed.proj.register_forward_pre_hook(print), r"patch_embed\.proj has a forward hook")
    refused(
        lambda m: setattr(m.blocks[0].mlp, "act", nn.Hardswish()), r"blocks\.0\.mlp\.act is Hardswish instead of GELU"
    )
    refused(lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()), r"blocks\.1\.mlp\.act is ReLU instead of GELU")
    refused(
        lambda m: setattr(m.blocks[0].mlp, "fc2", nn.Sequential(m.blocks[0].mlp.fc2)),
        r"blocks\.0\.mlp\.fc2 is Sequential instead of Linear.*merge it into plain layers",
    )
    with pytest.raises(ValueError, match=r"dtype: float16 is not served on the CPU; use torch\.bfloat16"):
        rf.optimize(make_model(), torch.float16)
    fast = rf.optimize(make_model())
    fast.blocks[0].norm1.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1 has a forward hook"):
        fast(images_of(MIX))


def test_a_head_of_another_kind_is_called():
    model = make_model()
    model.head = nn.Sequential(nn.Linear(24, 7), nn.Tanh())
    fast = rf.optimize(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(images_of(MIX)), model(images_of(MIX)))


def test_bad_inputs_are_named():
    fast = rf.optimize(make_model())
    with pytest.raises(ValueError, match="batch is on meta"):
        fast(PackedBatch.from_list([randn(4, 12)]).to("meta"))
    with pytest.raises(ValueError, match=r"patch rows \[T, 12\]"):
        fast(PackedBatch.from_list([randn(4, 16)]))
    with pytest.raises(ValueError, match="x: expected 3 channels first, got 4"):
        fast(torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="n_prefix > 0"):
        fast(fast.forward_features(images_of(MIX)))


def test_without_the_extension_the_copy_runs_eagerly(monkeypatch):
    monkeypatch.setattr(_library, "HAS_EXTENSION", False)
    model = make_model()
    fast = rf.optimize(model)
    assert not fusable.serves(fast)
    with torch.no_grad():
        assert torch.equal(fast(images_of(MIX)), model(images_of(MIX)))


def test_an_engine_that_calls_modules(isa):
    model = make_model(act_layer=nn.Softsign)
    model.blocks[1].attn.register_forward_hook(lambda module, args, output: output * 1.5)
    x = torch.stack(images_of([6, 6]))
    with pytest.raises(ValueError, match=r'or optimize\(model, engine="modules"\), which calls every module'):
        rf.optimize(model)
    fast = rf.optimize(model, engine="modules")
    check(fast, model, images_of(MIX * 6))
    with torch.no_grad():
        torch.testing.assert_close(fast.forward_features(x), model.forward_features(x))
        packed = fast.forward_features(images_of(MIX))
        torch.testing.assert_close(fast.forward_head(packed), fast(images_of(MIX)))
        maps = fast.forward_intermediates(x, indices=1, intermediates_only=True)[0]
        torch.testing.assert_close(maps, model.forward_intermediates(x, indices=1, intermediates_only=True)[0])
    assert all(block.attn.proj._packed.value for block in fast.blocks)
    assert not fast(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(fast(x), fast(x.clone()))
    for i, image in enumerate(images_of(MIX)):
        assert torch.equal(fast([image])[0], fast(images_of(MIX))[i]), "the same bits in every batch"


def test_engines_are_made_of_each_other():
    model = make_model()
    fused, modular = rf.optimize(model), rf.optimize(model, engine="modules")
    x, expected = images_of(MIX), rf.optimize(model)(images_of(MIX))
    assert torch.equal(rf.optimize(modular)(x), expected)
    assert torch.equal(rf.optimize(fused, engine="modules")(x), modular(x))
    assert torch.equal(rf.optimize(modular, engine="modules")(x), modular(x))
    assert torch.equal(pickle.loads(pickle.dumps(modular))(x), modular(x))
    narrow = rf.optimize(model, torch.bfloat16, engine="modules")
    assert narrow(x).dtype == torch.bfloat16
    assert (narrow(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_engines_are_named():
    with pytest.raises(ValueError, match=r"engine: expected 'fused' or 'modules', got 'eager'"):
        rf.optimize(make_model(), engine="eager")
    with pytest.raises(ValueError, match='dtype: engine="modules" has no int8 weights; use engine="fused"'):
        rf.optimize(make_model(), torch.int8, engine="modules")
    with pytest.raises(TypeError, match=r"model: expected a revit_fast\.ReViT, got Mine"):
        rf.optimize(type("Mine", (rf.ReViT,), {})(depth=1, embed_dim=8, num_heads=2), engine="modules")

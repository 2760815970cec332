"""TimeSformer on packed clips: Hugging Face's results and gradients, clips of any shapes in one pack, errors."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import assert_as_accurate, full, only_on, randn
from mutations import assert_copies_follow
from small_models import drawn
from torch.nn.utils import parametrize, prune
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from revit_fast import ops
from revit_fast.layers import TALLayerNorm
from revit_fast.packing import PackedBatch
from revit_fast.video import PackedClips, TimeSformer, optimize

pytestmark = only_on("cpu", reason="the model's ops have tests of their own on every device")

# Several heads, odd sizes: head_dim 5 and 8, grids of 3 to 7, patches of 4 to 16 px, 3 to 5 frames.
CONFIGS = {
    "divided": dict(image_size=20, patch_size=4, num_frames=3, hidden_size=24, num_attention_heads=3),
    "odd": dict(image_size=35, patch_size=5, num_frames=5, hidden_size=35, num_attention_heads=7),
    "large patch, no bias": dict(
        image_size=48, patch_size=16, num_frames=4, hidden_size=32, num_attention_heads=4, qkv_bias=False
    ),
    "joint": dict(
        image_size=20,
        patch_size=4,
        num_frames=3,
        hidden_size=24,
        num_attention_heads=3,
        attention_type="joint_space_time",
    ),
    "tanh, wide": dict(
        image_size=12,
        patch_size=4,
        num_frames=3,
        hidden_size=16,
        num_attention_heads=2,
        hidden_act="gelu_new",
        intermediate_size=1024,
    ),
}
MIX = [(5, 3), (3, 5), ((2, 4), 1), (5, 4), (3, 3)]
"""Grids and frame counts of a pack."""


def hf_model(name="divided", kind="TimesformerForVideoClassification", **options):
    transformers = pytest.importorskip("transformers")
    config = dict(num_hidden_layers=2, intermediate_size=40, num_labels=7) | CONFIGS[name] | options
    model = getattr(transformers, kind)(transformers.TimesformerConfig(**config))
    return drawn(model, scale=0.2)


def clips_of(shapes, patch=4, seed=0, dtype=torch.float32):
    sides = [((g, g) if isinstance(g, int) else g, n) for g, n in shapes]
    return [randn(n, 3, patch * h, patch * w, seed=seed + i, dtype=dtype) for i, ((h, w), n) in enumerate(sides)]


def make_model(**options):
    arguments = dict(
        grids=(5, 3), base_grid=(5, 5), num_frames=3, patch_size=4, num_classes=7, embed_dim=24, depth=2, num_heads=3
    )
    return drawn(TimeSformer(**arguments | options))


def hf_clips(hf, n=2, dtype=torch.float32):
    config = hf.config
    return randn(n, config.num_frames, 3, config.image_size, config.image_size, dtype=dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    hf = hf_model(name)
    x = hf_clips(hf)
    ours = TimeSformer.from_transformers(hf)
    with torch.no_grad():
        expected = hf(x).logits
        got = ours(x)
    assert expected.abs().max() > 0.1
    assert (got - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(name):
    hf = hf_model(name, "TimesformerModel")
    x = hf_clips(hf, n=3)
    ours = TimeSformer.from_transformers(hf)
    with torch.no_grad():
        expected = hf(x).last_hidden_state
        got = ours.forward_features(x)
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 2e-5
        assert (ours(x) - expected[:, 0]).abs().max() <= 2e-5, "without a head, the class tokens"


def test_grids_of_transformers_hold_at_every_configured_length():
    hf = hf_model()
    x = hf_clips(hf)
    several = TimeSformer.from_transformers(hf, grids=(7, 5, 3))
    with torch.no_grad():
        assert (several(x) - hf(x).logits).abs().max() <= 2e-5


@pytest.mark.parametrize("n_frames", [1, 2, 5, 7])
def test_time_embeddings_of_other_frame_counts_are_those_of_transformers(n_frames):
    """Hugging Face's embedding resizes them; its blocks, which do not, are given that frame count."""
    hf = hf_model()
    ours = TimeSformer.from_transformers(hf)
    hf.config.num_frames = n_frames
    x = randn(2, n_frames, 3, 20, 20)
    with torch.no_grad():
        assert (ours(x) - hf(x).logits).abs().max() <= 2e-5


def test_positions_of_another_grid_are_timms():
    timm = pytest.importorskip("timm")
    hf = hf_model("divided")
    ours = TimeSformer.from_transformers(hf)
    smaller = hf_model("divided", image_size=12)
    state = hf.state_dict()
    name = "timesformer.embeddings.position_embeddings"
    state[name] = timm.layers.resample_abs_pos_embed(state[name], new_size=[3, 3], num_prefix_tokens=1)
    smaller.load_state_dict(state)
    x = randn(2, 3, 3, 12, 12)
    with torch.no_grad():
        assert (ours(x) - smaller(x).logits).abs().max() <= 2e-5


@pytest.mark.parametrize("name", ["divided", "odd", "joint", "large patch, no bias"])
def test_gradients_are_those_of_transformers(name):
    hf = hf_model(name).double()
    x = hf_clips(hf, dtype=torch.float64)
    ours = TimeSformer.from_transformers(hf)
    factor = randn(2, 7, dtype=torch.float64, seed=9)
    (hf(x).logits * factor).sum().backward()
    (ours(x) * factor).sum().backward()
    reference = TimeSformer.from_transformers(hf)
    reference.load_weights({n: p.grad for n, p in hf.named_parameters()}, "gradients")
    expected = dict(reference.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert parameter.grad is not None, parameter_name
        truth = expected[parameter_name]
        error = (parameter.grad - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
        assert error <= 1e-10, f"{parameter_name}: {error:.1e}"


@pytest.mark.parametrize("attention_type", ["divided_space_time", "joint_space_time"])
def test_a_clip_is_the_same_in_every_pack(attention_type):
    model = make_model(attention_type=attention_type)
    clips = clips_of(MIX)
    with torch.no_grad():
        together, features = model(clips), model.forward_features(clips)
        for i, clip in enumerate(clips):
            alone = model([clip])
            assert (together[i] - alone[0]).abs().max() <= 1e-5, MIX[i]
            tokens = model.forward_features(clip[None])[0]
            assert features[i].shape == tokens.shape
            assert (features[i] - tokens).abs().max() <= 1e-5, MIX[i]
            assert (model.head(tokens[0]) - together[i]).abs().max() <= 1e-5, "logits read the class token"


def test_packed_gradients_are_the_sum_of_those_alone():
    model = make_model().double()
    clips = clips_of(MIX, dtype=torch.float64)
    model(clips).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for clip in clips:
        model([clip]).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert (packed[name] - p.grad).abs().max() <= 1e-10 * p.grad.abs().max(), name


def test_norms_go_by_the_grid_of_a_clip():
    """Every length has norm parameters of its own, whatever the number of frames."""
    model = make_model()
    with torch.no_grad():
        single = {g: copy.deepcopy(model) for g in model.grids}
        for i, grid in enumerate(model.grids):
            for module in single[grid].modules():
                if isinstance(module, TALLayerNorm):
                    for parameter in (module.weight, module.bias):
                        parameter.copy_(parameter[i].expand_as(parameter))
        for grid, n_frames in ((5, 1), (5, 7), (3, 7), ((4, 3), 2), ((4, 5), 2)):
            clip = clips_of([(grid, n_frames)])
            n = grid**2 if isinstance(grid, int) else grid[0] * grid[1]
            nearest = 5 if n >= 17 else 3
            assert torch.equal(model(clip), single[nearest](clip)), (grid, n_frames)
            assert not torch.equal(model(clip), single[8 - nearest](clip))


def test_without_autograd_and_with_it_alike():
    model = make_model()
    clips = clips_of(MIX)
    with torch.inference_mode():
        quiet = model(clips)
    logits = model(clips)
    assert torch.equal(quiet, logits)
    logits.sum().backward()  # what inference kept serves training


def test_uint8_frames_are_normalised_by_the_model():
    model = make_model()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (n, 30, 40, 3), dtype=np.uint8) for n in (3, 2)]
    options = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    packs = [
        PackedClips.from_frames(frames, [20, (12, 16)], 4, dtype=d, **options) for d in (torch.uint8, torch.float32)
    ]
    assert packs[0].grids == ((5, 5), (3, 4))
    assert packs[0].n_frames == (3, 2)
    with torch.no_grad():
        assert (model(packs[0]) - model(packs[1])).abs().max() <= 1e-5


def test_the_data_loader_of_torch_pins_clips(pinned):
    frames = [np.zeros((n, 30, 40, 3), np.uint8) for n in (3, 2)]
    clips = PackedClips.from_frames(frames, [20, (12, 16)], 4, dtype=torch.uint8)
    for got in (clips.pin_memory(), *torch_pin_memory([clips])):
        assert type(got) is PackedClips
        assert got.n_frames == (3, 2)
        assert got.grids == clips.grids
        copies = [copy for _, copy in pinned]
        for name in ("data", "cu_seqlens", "length_index", "grid_hw", "normalization"):
            assert any(getattr(got.frames, name) is copy for copy in copies), name


def test_frames_are_resized_as_images_are():
    frames = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    box = (4.0, 2.0, 36.0, 30.0)
    clips = PackedClips.from_frames([frames], [12], 4, boxes=[box])
    images = ops.resize_patchify(list(frames), 12, 4, boxes=box)
    assert torch.equal(clips.frames.data, images.data)


def test_a_model_begins_as_one_without_time():
    torch.manual_seed(0)
    model = TimeSformer(base_grid=(3, 3), num_frames=3, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    assert model.time_embed.abs().max() == 0
    assert model.blocks[0].temporal_fc.weight.abs().max() > 0
    assert model.blocks[1].temporal_fc.weight.abs().max() == 0
    assert {"time_embed", "blocks.0.temporal_norm1.weight", "norm.bias"} <= model.no_weight_decay()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_optimised_copy_is_as_accurate(name):
    hf = hf_model(name)
    x = hf_clips(hf)
    model = TimeSformer.from_transformers(hf)
    fast = optimize(model)
    with torch.no_grad():
        assert (fast(x) - hf(x).logits).abs().max() <= 2e-5
        features = hf.timesformer(x).last_hidden_state
        assert (fast.forward_features(x) - features).abs().max() <= 2e-5
        truth = copy.deepcopy(model).double().forward_features(x.double())
        assert_as_accurate(fast.forward_features(x), model.forward_features(x), truth, "tokens")


@pytest.mark.parametrize("attention_type", ["divided_space_time", "joint_space_time"])
def test_an_optimised_copy_gives_a_clip_the_same_bits_in_every_pack(isa, attention_type):
    fast = optimize(make_model(attention_type=attention_type))
    clips = clips_of(MIX)
    together, features = fast(clips), fast.forward_features(clips)
    for i, clip in enumerate(clips):
        assert torch.equal(together[i], fast([clip])[0]), MIX[i]
        assert torch.equal(features[i], fast.forward_features([clip])[0]), MIX[i]
    assert torch.equal(fast(clips[::-1]), together.flip(0))


def test_an_optimised_copy_takes_uint8_frames():
    model = make_model()
    fast = optimize(model)
    frames = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    for mean in ((0.4, 0.5, 0.6), (0.5, 0.5, 0.5)):
        clips = PackedClips.from_frames([frames], [20], 4, mean=mean, std=(0.2, 0.3, 0.25), dtype=torch.uint8)
        with torch.no_grad():
            assert (fast(clips) - model(clips)).abs().max() <= 1e-5


def test_an_optimised_copy_notices_changed_parameters_and_is_copied():
    model = make_model()
    fast, clips = optimize(model), clips_of(MIX[:2])
    before = fast(clips)
    with torch.no_grad():
        fast.blocks[0].temporal_fc.weight.mul_(2)
        model.blocks[0].temporal_fc.weight.mul_(2)
    assert not torch.equal(before, fast(clips))
    assert (fast(clips) - model(clips)).abs().max() <= 1e-5
    assert torch.equal(pickle.loads(pickle.dumps(fast))(clips), fast(clips))
    assert torch.equal(optimize(fast)(clips), fast(clips))
    assert not fast(clips).requires_grad
    double = optimize(model).double()
    assert double([clip.double() for clip in clips]).dtype == torch.float64


def test_threads_share_an_optimised_copy():
    fast = optimize(make_model())
    packs = [clips_of([(g, n), ((g, 2), 2)], seed=g) for g in range(1, 7) for n in (1, 3)]
    expected = [optimize(make_model())(clips) for clips in packs]
    with ThreadPoolExecutor(4) as pool:
        for got, alone in zip(pool.map(fast, packs), expected, strict=True):
            assert torch.equal(got, alone)


def test_bfloat16():
    model = make_model()
    clips = clips_of(MIX)
    with torch.no_grad():
        expected = model(clips)
        got = model.bfloat16()([clip.bfloat16() for clip in clips])
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_only_other_classes_are_refused():
    with pytest.raises(TypeError, match="TimeSformer, got Linear"):
        optimize(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="TimeSformer, got Mine"):
        optimize(type("Mine", (TimeSformer,), {})(depth=1, embed_dim=8, num_heads=2))
    with pytest.raises(ValueError, match="train the model that it was made of"):
        optimize(make_model()).train()


class Doubled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return self.inner(*args, **options) * 2


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "temporal_fc", "head"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model


def wrapped(name):
    def change(model):
        parent, _, child = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, child, Doubled(getattr(parent, child)))

    return change


def hooked(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda module, args, output: output * 1.5)


def of_weight(apply, name):
    return lambda model: apply(model.get_submodule(name))


SERVED = {
    "LoRA": adapted,
    **{
        f"hook on {name}": hooked(f"blocks.0.{name}") for name in ("temporal_attn", "temporal_attn.proj", "temporal_fc")
    },
    **{f"hook on {name}": hooked(f"blocks.1.{name}") for name in ("attn", "attn.qkv", "mlp", "mlp.act", "mlp.drop")},
    "hook on the embedding": hooked("patch_embed.proj"),
    **{
        f"wrapped {name}": wrapped(name) for name in ("blocks.0.temporal_attn", "blocks.1.attn.qkv", "blocks.0.mlp.fc2")
    },
    "an activation without a kernel": lambda m: [setattr(b.mlp, "act", torch.nn.Softsign()) for b in m.blocks],
    "a parametrisation": of_weight(
        lambda layer: parametrize.register_parametrization(layer, "weight", torch.nn.Tanh()), "blocks.0.temporal_fc"
    ),
    "pruning": of_weight(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "blocks.0.temporal_attn.proj"),
    "another head": lambda m: setattr(m, "head", torch.nn.Sequential(m.head, torch.nn.Tanh())),
    "no bias": lambda m: setattr(m.blocks[0].temporal_attn.proj, "bias", None),
}


@pytest.mark.parametrize("change", SERVED.values(), ids=SERVED)
def test_whatever_was_done_to_a_model_is_served(change):
    model, clips = make_model(), clips_of(MIX)
    fast = optimize(model)
    with torch.no_grad():
        unchanged = fast(clips)
        expected = copy.deepcopy(model)
        expected = change(expected) if change is adapted else (change(expected), expected)[1]
        logits, features = expected(clips), expected.forward_features(clips)
        assert (logits - unchanged).abs().max() > 1e-3, "it must do something"
        before = optimize(expected)
        for copied in (before, copy.deepcopy(before)):
            assert (copied(clips) - logits).abs().max() <= 2e-5
        if change is not adapted:
            change(fast)
            assert (fast(clips) - logits).abs().max() <= 2e-5, "after the first call"
        for got, tokens in zip(before.forward_features(clips), features, strict=True):
            assert (got - tokens).abs().max() <= 5e-5
    with torch.inference_mode():
        assert (before(clips) - logits).abs().max() <= 2e-5


def test_temporal_projections_are_merged_while_they_are_plain():
    fast, clips = optimize(make_model()), clips_of(MIX)
    fast(clips)
    blocks = fast.blocks
    assert all(block._packed.value is not None for block in blocks)
    assert not any(block.temporal_attn.proj._packed.value or block.temporal_fc._packed.value for block in blocks)
    blocks[0].temporal_fc.register_forward_hook(lambda *_: None)
    fast.refresh()
    fast(clips)
    assert [block._packed.value is None for block in blocks] == [True, False]
    assert blocks[0].temporal_attn.proj._packed.value


def test_a_copy_has_the_names_of_the_model():
    model = make_model()
    fast = optimize(model)
    fast(clips_of(MIX))
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]


def test_results_are_of_the_old_or_the_new_weights():
    models = [make_model(), make_model()]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.1)
    states, clips = [copy.deepcopy(model.state_dict()) for model in models], clips_of(MIX[:2])
    fast, expected = optimize(models[0]), [optimize(model)(clips) for model in models]
    got, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            got.append(fast(clips))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(30):
        fast.load_state_dict(states[i % 2])
    stop.set()
    for thread in threads:
        thread.join()
    assert len(got) > 3
    assert all(any(torch.equal(one, result) for result in expected) for one in got)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"attention_type": "space_only"}, "space_only"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0.1"),
        ({"attention_probs_dropout_prob": 0.2}, "attention_probs_dropout_prob=0.2"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"drop_path_rate": 1}, "drop_path_rate=1"),
    ],
)
def test_features_that_there_are_none_of_are_refused_by_name(options, names):
    with pytest.raises(ValueError, match=names):
        TimeSformer.from_transformers(hf_model(**options))


def test_other_models_are_refused():
    pytest.importorskip("transformers")
    with pytest.raises(TypeError, match=r"TimesformerModel.*Linear"):
        TimeSformer.from_transformers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model_type='vit'"):
        TimeSformer.from_state_dict({}, {"model_type": "vit"})
    with pytest.raises(ValueError, match="patch_size=\\[16, 8\\]"):
        TimeSformer.from_state_dict({}, {"patch_size": [16, 8]})
    state = hf_model().state_dict()
    del state["timesformer.layernorm.bias"]
    with pytest.raises(ValueError, match=r"1 missing: norm\.bias"):
        TimeSformer.from_state_dict(state, hf_model().config.to_dict())


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(3, 3, 20, 20), ValueError, r"\[B, F, 3, H, W\].*x\[None\]"),
        ([torch.zeros(3, 20, 20)], ValueError, r"clips\[0\]: expected a tensor \[F, 3, H, W\]"),
        ([torch.zeros(0, 3, 20, 20)], ValueError, "at least one frame"),
        ([], ValueError, "at least one clip"),
        ([torch.zeros(1, 3, 20, 18)], ValueError, "patch size 4"),
        (7, TypeError, "PackedClips, got int"),
    ],
)
def test_wrong_clips_are_named(x, error, text):
    with pytest.raises(error, match=text):
        make_model()(x)


def test_wrong_packs_are_named():
    frames = PackedBatch.from_images(list(torch.zeros(3, 3, 8, 8)), 4)
    with pytest.raises(ValueError, match="n_frames: expected at least 1 frame a clip and 3 in all"):
        PackedClips(frames, (2,))
    with pytest.raises(ValueError, match="n_frames"):
        PackedClips(frames, (3, 0))
    with pytest.raises(TypeError, match="frames: expected a PackedBatch"):
        PackedClips(torch.zeros(3, 48), (3,))
    mixed = PackedBatch.from_images([torch.zeros(3, 8, 8), torch.zeros(3, 8, 12)], 4)
    with pytest.raises(ValueError, match=r"clip 0 has frames of grids \[\(2, 2\), \(2, 3\)\]"):
        PackedClips(mixed, (2,))
    assert len(PackedClips(mixed, (1, 1))) == 2
    with pytest.raises(ValueError, match=r"expected patch rows \[T, 48\], got \(1, 192\)"):
        make_model()(PackedClips.from_list([torch.zeros(1, 3, 8, 8)], 8))
    with pytest.raises(ValueError, match=r"clips\[0\]: expected uint8 frames"):
        PackedClips.from_frames([np.zeros((4, 4, 3), np.uint8)], [4], 4)
    with pytest.raises(ValueError, match="sizes: expected 1"):
        PackedClips.from_frames([np.zeros((1, 4, 4, 3), np.uint8)], [4, 4], 4)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim 24, got 5"):
        make_model(num_heads=5)
    with pytest.raises(ValueError, match="divided_space_time, joint_space_time, got 'axial'"):
        make_model(attention_type="axial")
    with pytest.raises(ValueError, match="strictly decreasing"):
        make_model(grids=(3, 5))


# Without options it is the model of the next test but for its dropout.
@pytest.mark.parametrize("options", [full({}), {"attention_type": "joint_space_time", "act_layer": "silu"}], ids=str)
@pytest.mark.parametrize("left_out", [full(None), "blocks.0"])
def test_optimized_copies_follow_every_change(options, left_out):
    model = make_model(embed_dim=16, num_heads=2, hidden_dim=12, num_classes=3, depth=2, **options)
    assert_copies_follow(model, optimize, clips_of([(3, 2), (2, 1)]), refuses=False, left_out=left_out)


@pytest.mark.parametrize("left_out", [full(None), full("blocks.0")])
def test_optimized_copies_follow_changes_of_dropout(left_out):
    """As above, with dropout rates that act if a dropout is put into training mode."""
    model = make_model(embed_dim=16, num_heads=2, hidden_dim=12, num_classes=3, depth=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert_copies_follow(model, optimize, clips_of([(3, 2), (2, 1)]), refuses=False, left_out=left_out)

"""NaN and infinity: a pixel makes all logits of its image NaN and changes no other image's, in every dtype."""

import numpy as np
import pytest
import torch
from helpers import cu_seqlens_of, randn
from small_models import MIX, images_of, make_model
from train_helpers import noise_images, tiny_trainer

import revit_fast as rf
from revit_fast import ops
from revit_fast.adaptive.policies import Calibration, Evidence, make_policy
from revit_fast.train.assigner import train_assigner
from revit_fast.train.stopping import NotFiniteError

NARROW_PRODUCTS = "all"  # of the fixture `isa`
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
every_value = pytest.mark.parametrize("value", NOT_FINITE)

RUNS = {
    "model": lambda model: model,
    "bfloat16 model": lambda model: model.bfloat16(),
    "float32": lambda model: rf.optimize(model),
    "bfloat16": lambda model: rf.optimize(model, torch.bfloat16),
    "int8": lambda model: rf.optimize(model, torch.int8),
    "int8, calibrated": lambda model: rf.optimize(model, torch.int8, calibrate=[images_of(MIX)]),
    "modules": lambda model: rf.optimize(model, engine="modules"),
}
SPECS = {
    "plain": {},
    "relu and rms": {"act_layer": "relu", "norm_layer": "rms", "global_pool": "avg"},
    "silu": {"act_layer": "silu", "reg_tokens": 2, "fc_norm": True, "global_pool": "avg"},
    "quick": {"act_layer": "quick_gelu", "init_values": 0.5},
    "tanh": {"act_layer": "gelu_tanh", "distilled": True},
}
every_run = pytest.mark.parametrize("run", RUNS)


def logits(run, images):
    with torch.no_grad():
        return run([image.to(next(run.parameters()).dtype) for image in images])


class TestPixels:
    @staticmethod
    def check(fast, clean):
        expected = logits(fast, clean)
        assert expected.isfinite().all()
        for i, value in enumerate(NOT_FINITE):
            images = [image.clone() for image in clean]
            images[i + 1][i, -1, i] = value
            found = logits(fast, images)
            assert found[i + 1].isnan().all(), value
            others = [j for j in range(len(images)) if j != i + 1]
            assert torch.equal(found[others], expected[others]), value

    @pytest.mark.parametrize("run", ["float32", "bfloat16", "int8"])
    @pytest.mark.parametrize("spec", SPECS)
    def test_only_their_image_has_no_numbers(self, spec, run, isa):
        self.check(RUNS[run](make_model(**SPECS[spec])), images_of(MIX))

    @pytest.mark.parametrize("run", ["model", "bfloat16 model", "int8, calibrated", "modules"])
    @pytest.mark.parametrize("spec", ["plain", "relu and rms"])
    def test_however_the_model_runs(self, spec, run):
        self.check(RUNS[run](make_model(**SPECS[spec])), images_of(MIX))

    @pytest.mark.parametrize("kind", [lambda model: model, rf.optimize])
    def test_a_convolutional_stem_and_a_token_label_head(self, kind):
        self.check(kind(make_model(patch_size=4, stem_chans=4, aux_head=True)), images_of([4, 6, 2, (3, 5)], patch=4))


CU_SEQLENS = cu_seqlens_of((4, 3, 5))
INDEX = torch.tensor([0, 1, 0], dtype=torch.int32)
CALLS = {
    "attention": lambda x, cu, index: ops.varlen_attention(*(x.view(-1, 2, 4),) * 3, cu),
    "causal attention": lambda x, cu, index: ops.varlen_attention(*(x.view(-1, 2, 4),) * 3, cu, causal=True),
    "norm": lambda x, cu, index: ops.tal_layer_norm(x, *torch.ones(2, 2, 8, dtype=x.dtype), cu, index),
    "rms norm": lambda x, cu, index: ops.tal_rms_norm(x, torch.ones(2, 8, dtype=x.dtype), cu, index),
    "tokens": lambda x, cu, index: ops.assemble_tokens(x, x[:0], torch.zeros_like(x), 0 * index, cu),
    "mean": lambda x, cu, index: ops.mean_pool(x, cu),
    "rotary": lambda x, cu, index: ops.rotary(x.view(-1, 2, 4), x.view(-1, 2, 4), *torch.ones(2, len(x), 1, 2))[0],
}


class TestOps:
    """Rows of the second sequence are not finite; those of the others keep their bits, forward and backward."""

    @every_value
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CALLS)
    def test_of_a_pack(self, name, dtype, value):
        clean = randn(12, 8, dtype=dtype)
        bad = clean.clone()
        bad[5, 3] = value
        results = []
        for x in (clean.requires_grad_(), bad.requires_grad_()):
            y = CALLS[name](x, CU_SEQLENS, INDEX)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), x.grad))
        for (y, clean_y), rows in zip(zip(*results, strict=True), (len(results[0][0]), 12), strict=True):
            keep = [0, 2] if rows == 3 else [0, 1, 2, 3, 7, 8, 9, 10, 11]
            assert torch.equal(y[keep], clean_y[keep])
        assert not results[1][0][[1] if len(results[1][0]) == 3 else [4, 5, 6]].isfinite().all()

    @every_value
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
    def test_a_row_of_a_packed_linear_layer(self, dtype, value, isa):
        """Also at the end of a row with several scales."""
        weight, x = ops.pack_weight(randn(20, 1100), randn(20), dtype), randn(5, 1100)
        expected = ops.packed_linear(x, weight)
        for column in (0, 511, 700, 1099):
            bad = x.clone()
            bad[2, column] = value
            found = ops.packed_linear(bad, weight)
            assert not found[2].isfinite().any(), column
            assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]]), column

    @every_value
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
    def test_a_weight_reaches_its_output_alone(self, dtype, value, isa):
        w, x = randn(20, 100), randn(5, 100)
        expected = ops.packed_linear(x, ops.pack_weight(w, None, dtype))
        w[7, 50] = value
        found = ops.packed_linear(x, ops.pack_weight(w, None, dtype))
        assert not found[:, 7].isfinite().any()
        others = [n for n in range(20) if n != 7]
        assert torch.equal(found[:, others], expected[:, others])

    def test_scores_that_are_all_minus_infinity(self):
        q = torch.full((5, 1, 8), 1e20)
        out, lse = ops.varlen_attention(q, -q, randn(5, 1, 8), cu_seqlens_of((5,)), return_lse=True)
        assert out.eq(0).all()
        assert lse.isneginf().all()


@every_run
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, NOT_FINITE[0]) for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias", "blocks.1.mlp.fc1.bias")]
    + [("blocks.1.mlp.fc2.weight", value) for value in NOT_FINITE],
)
def test_weights_make_every_logit_nan_or_are_refused(run, name, value):
    """Rounded to integers, they must not become zeros. (Infinity before attention or an activation may vanish.)"""
    model = make_model(global_pool="avg")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    if run == "int8, calibrated" and name not in ("blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias"):
        with pytest.raises(ValueError, match=r"^calibrate: rows that enter .* are not finite; check the weights"):
            logits(RUNS[run](model), images_of(MIX))
    else:  # rows that enter a later layer show what they are; those of the last one are the logits
        assert logits(RUNS[run](model), images_of(MIX)).isnan().all()


class TestPipelines:
    def test_an_error_names_the_image_whose_logits_are_no_numbers(self):
        model = make_model()
        with torch.no_grad():
            model.norm.weight[0, 3] = float("nan")  # the norm of the longest grid alone
        pipe = rf.pipeline(model, policy=("fixed", [6, 4, 2]))
        results = list(pipe([np.zeros((20, 20, 3), np.uint8)] * 3))
        assert [r.error and "the model's output is not a number" in r.error for r in results] == [True, None, None]

    def test_an_assigner_of_nan_gives_the_longest_grid(self):
        tla = rf.TokenLengthAssigner((6, 4, 2), thumbnail_px=16, widths=(8, 16)).eval()
        with torch.no_grad():
            tla.network.head.bias[1] = float("nan")
        images = [np.zeros((20, 20, 3), np.uint8)] * 2
        for policy in ("argmax", ("threshold", 0.0), ("threshold", 0.9)):
            assert tla.assign(images, policy) == [6, 6]
        with pytest.raises(ValueError, match=r"^calibration: suffices holds NaN; check the assigner's weights"):
            tla.calibrate(images)

    @pytest.mark.parametrize("policy", ["argmax", ("threshold", 0.05), ("threshold", 0.0)])
    def test_one_probability_of_nan(self, policy):
        probabilities = np.array([[0.1, np.nan, 0.9], [0.1, 0.1, 0.8]], dtype=np.float32)
        assert make_policy(policy, (6, 4, 2)).choose(Evidence(np.arange(2), probabilities)).tolist() == [0, 2]

    def test_an_entropy_of_nan(self):
        policy = make_policy(("entropy", [3.0, 2.0]), (6, 4, 2))
        assert policy.choose(Evidence(np.arange(2), None, np.array([np.nan, 0.0]))).tolist() == [0, 2]

    @pytest.mark.parametrize(
        "spec", [("threshold", np.nan), ("cascade", np.nan), ("budget", np.nan), ("entropy", [np.nan])]
    )
    def test_policies_of_nan_are_refused(self, spec):
        with pytest.raises(ValueError, match=r"^policy: expected"):
            make_policy(spec, (6, 4), calibration=Calibration(1.0, np.ones((2, 2), np.float32), (1.0,)))

    @pytest.mark.parametrize("temperature", [np.nan, np.inf, 0.0, -1.0])
    def test_temperatures_that_are_no_divisors_are_refused(self, temperature):
        with pytest.raises(ValueError, match=r"^calibration: expected a positive, finite temperature"):
            Calibration(temperature, np.ones((2, 2), np.float32), (1.0,))

    def test_a_saved_calibration_of_nan_is_refused(self, tmp_path):
        tla = rf.TokenLengthAssigner((6, 4), thumbnail_px=16, widths=(8, 16)).eval()
        tla.calibrate([np.zeros((20, 20, 3), np.uint8)])
        object.__setattr__(tla.calibration, "temperature", float("nan"))
        tla.save(tmp_path / "tla.safetensors")
        with pytest.raises(
            ValueError, match=r"^assigner: .*tla.safetensors cannot be read: calibration: expected a positive, finite"
        ):
            rf.TokenLengthAssigner.load(tmp_path / "tla.safetensors")


class TestTraining:
    def test_no_image_without_numbers_counts_as_right(self):
        trainer = tiny_trainer(held_out=noise_images(12))
        with torch.no_grad():
            trainer.model.head.bias[0] = float("nan")
        found = trainer.evaluate()
        assert found.accuracy == [0.0] * 3  # NaN is the largest for argmax
        assert found.n_images == 12

    def test_the_weights_are_as_before_a_loss_that_is_no_number(self):
        trainer = tiny_trainer(held_out=False)
        with torch.no_grad():
            trainer.model.head.bias[0] = float("nan")
        before = trainer.weights()
        with pytest.raises(NotFiniteError, match="loss is nan at update 1"):
            trainer.fit()
        assert all(torch.equal(value, before[name]) for name, value in trainer.weights().items() if name != "head.bias")

    def test_an_assigner_that_loses_its_numbers_is_reported(self):
        tla, images = rf.TokenLengthAssigner((4, 3, 2), thumbnail_px=16, widths=(8, 16)), noise_images(24)
        with torch.no_grad():
            tla.network.head.bias[0] = float("nan")
        with pytest.raises(ValueError, match=r"^lr: the loss of epoch 1 is nan"):
            train_assigner(tla, images, images.labels, epochs=1, batch_size=8)

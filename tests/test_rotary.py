"""rotary against the float64 reference: values, gradients, invariances and errors; and its use in attention."""

import pytest
import torch
from helpers import FLOAT_DTYPES, alike_on_all_devices, assert_as_accurate, check_op, full, only_on, randn, to_float64
from small_models import images_of, make_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from revit_fast import ops, reference
from revit_fast.deploy import export
from revit_fast.layers.attention import Attention, Queries
from revit_fast.layers.rope import Rope, RotaryEmbedding, Rotation
from revit_fast.packing import PackPlan

pytestmark = pytest.mark.usefixtures("on_device")

# A pair or two, no power of two, below a vector, ViT-S to ViT-H, twice and four times that.
HEAD_DIMS = (4, 20, 40, 64, 72, 80, 128, 256)
HEADS = {"self": (3, 3, 1), "grouped": (4, 2, 1), "own angles": (3, 3, 3), "one head": (1, 1, 1), "no keys": (2, 0, 2)}
"""Heads of queries, of keys and of the angles."""

NAN = float("nan")
every_layout = pytest.mark.parametrize("half", [True, False], ids=["half", "interleaved"])
every_kind = pytest.mark.parametrize("heads", HEADS)


def make(n_rows, heads, head_dim, dtype=torch.float32, *, n_padding=0):
    """q and k as views of the rows of one product, cosines and sines; padding rows are NaN."""
    n_q, n_k, n_angles = HEADS[heads]
    product = randn(n_rows + n_padding, (n_q + 2 * n_k) * head_dim, dtype=dtype)
    product[n_rows:] = NAN
    q, k, _ = product.split([n * head_dim for n in (n_q, n_k, n_k)], dim=1)
    angle = randn(n_rows + n_padding, n_angles, head_dim // 2, dtype=torch.float64, seed=1, scale=3.0)
    wide = torch.promote_types(dtype, torch.float32)
    rows = (t.unflatten(1, (n, head_dim)) for t, n in ((q, n_q), (k, n_k)))
    return *rows, angle.cos().to(wide), angle.sin().to(wide)


def grads_like(q, k, seed=5):
    return [randn(*t.shape, dtype=t.dtype, seed=seed + i) for i, t in enumerate((q, k))]


def gradients(function, args, grads, n_leaves=4, **options):
    """Gradients of q, k, cos and sin, which keep their strides; of the first of them."""
    leaves = [t.detach().requires_grad_(i < n_leaves) for i, t in enumerate(args)]
    return torch.autograd.grad(function(*leaves, **options), leaves[:n_leaves], grads)


@every_layout
@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64])
@every_kind
def test_matches_reference(heads, dtype, half):
    for head_dim in HEAD_DIMS:
        args = make(9, heads, head_dim, dtype)
        for inverse in (False, True) if head_dim in (20, 64) else (False,):
            turned = ops.rotary(*args, half=half, inverse=inverse)
            what = f"D={head_dim}, inverse={inverse}"
            check_op(turned, reference.rotary, *args, half, inverse, what=what)
            assert all(t.is_contiguous() and t.dtype == dtype for t in turned), what


@every_layout
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@every_kind
def test_gradients_match_reference(heads, dtype, half):
    for head_dim in (4, 20, 64):
        args = make(9, heads, head_dim, dtype)
        grads = grads_like(*args[:2])
        for inverse in (False, True):
            ours = gradients(ops.rotary, args, grads, half=half, inverse=inverse)
            options = {"half": half, "inverse": inverse}
            same = gradients(reference.rotary, args, grads, **options)
            truth = gradients(reference.rotary, [to_float64(t) for t in args], [g.double() for g in grads], **options)
            for name, *three in zip(("q", "k", "cos", "sin"), ours, same, truth, strict=True):
                assert_as_accurate(*three, f"gradient of {name}, D={head_dim}, inverse={inverse}")


@every_layout
@every_kind
def test_gradcheck(heads, half):
    leaves = [t.detach().requires_grad_() for t in make(3, heads, 6, torch.float64)]
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda *args, i=inverse: ops.rotary(*args, half=half, inverse=i), leaves)


@every_layout
@pytest.mark.parametrize("n_rows", [0, 1])
def test_few_rows(n_rows, half):
    args = make(n_rows, "grouped", 8)
    check_op(ops.rotary(*args, half=half), reference.rotary, *args, half)
    for t, grad in zip(args, gradients(ops.rotary, args, grads_like(*args[:2]), half=half), strict=True):
        assert grad.shape == t.shape


@every_layout
def test_more_rows_than_a_program_has(half):
    for head_dim, n_rows in ((4, 700), (64, 67)):
        args = make(n_rows, "grouped", head_dim)
        check_op(ops.rotary(*args, half=half), reference.rotary, *args, half)


@every_layout
def test_other_strides(half):
    args = make(7, "grouped", 20)
    expected = ops.rotary(*args, half=half)
    for change in (
        torch.Tensor.contiguous,
        lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),  # channels apart
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),  # heads first
        lambda t: torch.cat([t[:1], t])[1:],  # from an address that no vector begins at
        lambda t: t.repeat_interleave(2, dim=2)[..., ::2],
    ):
        found = ops.rotary(*map(change, args), half=half)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert one.is_contiguous()
    # The gradient of a sum is an expanded tensor: strides of zero.
    ones = [torch.ones((), dtype=t.dtype).expand(t.shape) for t in args[:2]]
    found, expected = (gradients(ops.rotary, args, g, half=half) for g in (ones, [t.contiguous() for t in ones]))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@every_layout
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("heads", ["grouped", "own angles"])
def test_bitwise_alone_and_packed(heads, dtype, half):
    for head_dim in (20, 72):
        args = make(40, heads, head_dim, dtype)
        grads = grads_like(*args[:2])
        packed = [*ops.rotary(*args, half=half), *gradients(ops.rotary, args, grads, half=half)]
        for rows in (slice(0, 1), slice(1, 8), slice(13, 40)):
            part, part_grads = [t[rows] for t in args], [t[rows] for t in grads]
            alone = [*ops.rotary(*part, half=half), *gradients(ops.rotary, part, part_grads, half=half)]
            for one, all_rows in zip(alone, packed, strict=True):
                assert torch.equal(one, all_rows[rows]), (head_dim, rows)


@every_layout
@every_kind
def test_padding_rows_reach_no_other(heads, half):
    padded = make(6, heads, 20, n_padding=5)
    args, grads = [t[:6] for t in padded], grads_like(*padded[:2])
    for grad in grads:
        grad[6:] = 0
    expected = [*ops.rotary(*args, half=half), *gradients(ops.rotary, args, [g[:6] for g in grads], half=half)]
    found = [*ops.rotary(*padded, half=half), *gradients(ops.rotary, padded, grads, half=half)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[:6], other)
    for grad in found[2:4]:
        assert not grad[6:].any()


def test_turning_back():
    args = make(9, "self", 64, torch.float64)
    turned = ops.rotary(*args, half=True)
    for back, t in zip(ops.rotary(*turned, *args[2:], half=True, inverse=True), args[:2], strict=True):
        torch.testing.assert_close(back, t, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(turned[0], args[0])


def test_no_angle_leaves_every_bit():
    q, k, cos, sin = make(5, "self", 20, torch.bfloat16)
    turned = ops.rotary(q, k, torch.ones_like(cos), torch.zeros_like(sin))
    assert torch.equal(turned[0], q)
    assert torch.equal(turned[1], k)


def test_rows_are_kept_for_learned_angles_alone():
    args = make(5, "self", 8)
    for n_leaves, n_kept in ((2, 2), (3, 4)):
        kept = []
        leaves = [t.detach().requires_grad_(i < n_leaves) for i, t in enumerate(args)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ops.rotary(*leaves)
        assert len(kept) == n_kept


@alike_on_all_devices
def test_opcheck():
    for heads, half in (("grouped", True), ("own angles", False), ("no keys", False)):
        args = [t.detach().requires_grad_() for t in make(5, heads, 8)]
        torch.library.opcheck(torch.ops.revit_fast.rotary, (*args, half, False))


def test_compile_fullgraph_and_dynamic():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, cos, sin):
        turned_q, turned_k = ops.rotary(q, k, cos, sin, half=True)
        return turned_q * 2, turned_k + 1

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n_rows in (5, 9, 4, 50):
        args = make(n_rows, "grouped", 8)
        grads = grads_like(*args[:2])
        for got, wanted in zip(compiled(*args), function(*args), strict=True):
            torch.testing.assert_close(got, wanted)
        for got, wanted in zip(gradients(compiled, args, grads), gradients(function, args, grads), strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 4, f"{counter.frame_count} compilations with and without gradients"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (lambda: {"q": [1.0]}, TypeError, "^q: expected a tensor"),
        (lambda: {"q": torch.zeros(7, 16)}, ValueError, r"^q: expected shape \[T, H, D\]"),
        (lambda: {"q": torch.zeros(7, 2, 8, dtype=torch.int32)}, TypeError, "^q: expected float32"),
        (lambda: {"q": torch.zeros(7, 2, 7)}, ValueError, "^q: expected at least one head, of an even number"),
        (lambda: {"q": torch.zeros(7, 0, 8)}, ValueError, "^q: expected at least one head"),
        (lambda: {"k": None}, TypeError, "^k: expected a tensor"),
        (lambda: {"k": torch.zeros(7, 2, 8, dtype=torch.bfloat16)}, TypeError, "^k: expected torch.float32 like q"),
        (lambda: {"k": torch.zeros(6, 2, 8)}, ValueError, r"^k: expected shape \[7, 2, 8\], got \[6, 2, 8\]"),
        (lambda: {"k": torch.zeros(7, 1, 4)}, ValueError, r"^k: expected shape \[7, 1, 8\]"),
        (lambda: {"k": torch.zeros(7, 2, 8, device="meta")}, ValueError, "^k: expected a tensor on"),
        (lambda: {"cos": 1.0}, TypeError, "^cos: expected a tensor"),
        (lambda: {"cos": torch.zeros(7, 1, 4).half()}, TypeError, r"^cos: .*float16; use cos.float\(\)"),
        (lambda: {"cos": torch.zeros(7, 1, 8)}, ValueError, r"^cos: expected shape \[7, 1, 4\] or \[7, 2, 4\]"),
        (lambda: {"cos": torch.zeros(6, 1, 4)}, ValueError, r"^cos: expected shape \[7, 1, 4\]"),
        (lambda: {"sin": torch.zeros(7, 2, 4)}, ValueError, r"^sin: expected shape \[7, 1, 4\], got \[7, 2, 4\]"),
        (lambda: {"sin": torch.zeros(7, 1, 4).double()}, TypeError, "^sin: expected torch.float32 like cos"),
        (lambda: {"sin": torch.zeros(7, 1, 4, device="meta")}, ValueError, "^sin: expected a tensor on"),
        (
            lambda: {"k": torch.zeros(7, 1, 8), "cos": torch.zeros(7, 2, 4), "sin": torch.zeros(7, 2, 4)},
            ValueError,
            r"^k: expected 2 heads \(or none\), as cos has an angle for each head of q, got 1; turn",
        ),
    ],
)
def test_bad_inputs_are_named(changes, error, match):
    arguments = dict(q=torch.zeros(7, 2, 8), k=torch.zeros(7, 2, 8), cos=torch.zeros(7, 1, 4), sin=torch.zeros(7, 1, 4))
    with pytest.raises(error, match=match):
        ops.rotary(**{**arguments, **changes()})


class TestLearnedFrequencies:
    """Mixed rotary embeddings, whose cosines and sines have gradients."""

    def embedding(self, dtype=torch.float64):
        embedding = RotaryEmbedding(Rope("mixed"), depth=3, heads=2, head_dim=8)
        embedding.freqs = nn.Parameter(randn(2, 3, 2, 4, dtype=dtype, scale=0.5))
        return embedding

    def test_gradients(self):
        embedding, coords = self.embedding(), randn(5, 2)
        q, k = (randn(5, 2, 8, dtype=torch.float64, seed=i) for i in (1, 2))

        def turned(freqs, q, k):
            found = torch.func.functional_call(embedding, {"freqs": freqs}, (coords, torch.float64, 3))
            return [t for rotation in found for t in rotation.turn(q, k)]

        leaves = [embedding.freqs, q.requires_grad_(), k.requires_grad_()]
        assert torch.autograd.gradcheck(turned, leaves)

    def test_tables_of_all_blocks_are_those_of_each(self):
        embedding, coords = self.embedding(torch.float32), randn(5, 2)
        rotations = embedding(coords, torch.float32, 3)
        assert len(rotations) == 3
        for i, rotation in enumerate(rotations):
            x, y = coords[:, 0, None, None], coords[:, 1, None, None]
            angle = x * embedding.freqs[0, i] + y * embedding.freqs[1, i]
            assert torch.equal(rotation.cos, angle.cos())
            assert torch.equal(rotation.sin, angle.sin())


@only_on("cpu", reason="a program of PyTorch's operators is the same on every device")
@pytest.mark.parametrize("rope", [full({"half": True}), {"kind": "mixed"}], ids=["half", "mixed"])
def test_programs_call_the_op_but_for_those_of_one_grid(rope):
    model, images = make_model(rope=rope, head_dim=8, depth=2), torch.stack(images_of([4, 4]))
    expected, batch = model(images), model.pack(images)
    for program, inputs, n_calls in (
        (export.export_packed(model), (batch.data, batch.grid_hw), 2),
        (export.export_single(model, 4), (images,), 0),
    ):
        ops_called = [str(node.target) for node in program.graph.nodes]
        assert sum(name.startswith("revit_fast.rotary") for name in ops_called) == n_calls
        assert n_calls or not any("revit_fast" in name for name in ops_called)
        torch.testing.assert_close(program.module()(*inputs), expected, atol=1e-5, rtol=1e-5)


class TestAttention:
    """Attention over two sequences; the queries of some rows alone equal those of all."""

    def make(self):
        attn, x, layout = Attention(24, 3, 8, num_kv_heads=1), randn(9, 24), PackPlan((4, 5), (0, 0)).layout("cpu")
        angle = randn(9, 1, 4, seed=2, scale=3.0)
        angle[[0, 4]] = 0  # their prefix tokens
        for parameter in attn.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
        return attn, x, layout, Rotation(angle.cos(), angle.sin(), True)

    @only_on("cpu", "interpreter", reason="tensors are on the CPU")
    @pytest.mark.parametrize(("rows", "still"), [((2, 7), False), ((0, 4), False), ((0, 4), True)])
    def test_some_queries(self, rows, still):
        attn, x, layout, rotation = self.make()
        queries = Queries(torch.tensor(rows), PackPlan((1, 1), (0, 0)).layout("cpu"), still)
        expected = attn.attend(x, layout, None, rotation)[list(rows)]
        torch.testing.assert_close(attn.attend(x, layout, queries, rotation), expected)
        without = attn.attend(x, layout, None, None)[list(rows)]
        assert (without - expected).abs().max() > 0.01, "rotation has no effect"

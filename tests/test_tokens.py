"""assemble_tokens and mean_pool against the float64 reference: values, gradients, invariances and errors."""

import pytest
import torch
from helpers import (
    FLOAT_DTYPES,
    SEQLENS,
    alike_on_all_devices,
    assert_as_accurate,
    check_op,
    cu_seqlens_of,
    cut,
    only_on,
    randn,
    thin,
    to_float64,
)
from torch._dynamo.testing import CompileCounterWithBackend

from revit_fast import ops, reference

pytestmark = pytest.mark.usefixtures("on_device")

cpu_only = only_on("cpu", reason="about the C++ kernels")
triton_only = only_on("interpreter", "cuda", reason="about the Triton kernels")
contents = only_on("cpu", reason="contents of index tensors are clamped, not checked, where reading them is a sync")

# One channel, below a vector, every tail of a four-vector step, DeiT-S.
CHANNELS = thin((1, 7, 50, 90, 384))
(TABLE_ROWS,) = cut((300,))
NAN = float("nan")


def make_assemble(seqlens, channels, dtype=torch.float32, *, n_prefix=2, padding=0):
    patches = randn(sum(seqlens) + padding, channels, dtype=dtype)
    patches[sum(seqlens) :] = NAN
    prefix = randn(n_prefix, channels, dtype=dtype, seed=1)
    pos_table = randn(TABLE_ROWS, channels, dtype=dtype, seed=2)
    pos_offset = torch.tensor([(37 * b) % (TABLE_ROWS - n + 1) for b, n in enumerate(seqlens)], dtype=torch.int32)
    return patches, prefix, pos_table, pos_offset, cu_seqlens_of(seqlens)


def gradients(function, args, n_leaves, grad, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in args[:n_leaves]]
    return torch.autograd.grad(function(*leaves, *args[n_leaves:], **kwargs), leaves, grad, materialize_grads=True)


def check_gradients(function, truth_function, args, n_leaves, grad, end):
    """Our gradients by the error rule; rows of the first gradient from `end` on are padding."""
    ours = gradients(function, args, n_leaves, grad)
    assert not ours[0][end:].any(), "padding rows of the gradient are not zero"
    clean = torch.where(torch.isnan(grad), torch.zeros((), dtype=grad.dtype), grad)
    same = gradients(truth_function, args, n_leaves, clean)
    truth = gradients(truth_function, [to_float64(t) for t in args], n_leaves, clean.double())
    if grad.dtype == torch.float64:  # there is no better truth to hold it to
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        return
    for i in range(n_leaves):
        assert_as_accurate(ours[i], same[i], truth[i], f"gradient {i}")


@pytest.mark.parametrize("n_prefix", thin((0, 1, 5)))
@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64])
def test_assemble_matches_reference(isa, dtype, n_prefix):
    seqlens = cut(thin((3, 49, 196, 0, 100, 49, 0)))
    for channels in CHANNELS:
        args = make_assemble(seqlens, channels, dtype, n_prefix=n_prefix, padding=4)
        check_op(ops.assemble_tokens(*args), reference.assemble_tokens, *args, what=f"C={channels}")
        grad = randn(args[0].shape[0] + len(seqlens) * n_prefix, channels, dtype=dtype, seed=3)
        grad[-4:] = NAN
        check_gradients(ops.assemble_tokens, reference.assemble_tokens, args, 3, grad, sum(seqlens))


@pytest.mark.parametrize("seqlens", [(), (0,), (0, 0)])
def test_assemble_without_patches(isa, seqlens):
    args = make_assemble(seqlens, 12, padding=2)
    tokens = ops.assemble_tokens(*args)
    assert torch.equal(tokens, reference.assemble_tokens(*args))
    grad = randn(*tokens.shape, seed=3)
    grad_patches, grad_prefix, grad_pos_table = gradients(ops.assemble_tokens, args, 3, grad)
    assert not grad_patches.any()
    assert not grad_pos_table.any()
    torch.testing.assert_close(grad_prefix, grad[: 2 * len(seqlens)].view(-1, 2, 12).sum(0))


def test_assemble_gradcheck(isa):
    args = make_assemble((3, 0, 4), 5, torch.float64, padding=1)
    args[0][7:] = 0
    leaves = [args[0].requires_grad_(), args[1].requires_grad_(), args[2][:50].clone().requires_grad_()]
    offsets = torch.tensor([2, 0, 3], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *leaves: ops.assemble_tokens(*leaves, offsets, args[4]), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_pool_of_every_length(isa, dtype):
    for channels in CHANNELS:
        x = randn(sum(SEQLENS) + 2, channels, dtype=dtype)
        x[-2:] = NAN
        cu_seqlens = cu_seqlens_of(SEQLENS)
        for skip in (0, 1, 3, 60):
            pooled = ops.mean_pool(x, cu_seqlens, skip)
            empty = [b for b, n in enumerate(SEQLENS) if n <= skip]
            assert not pooled[empty].any(), "mean of no rows is not zero"
            check_op(pooled, mean_pool_as_eager, x, cu_seqlens, skip, what=f"C={channels}, skip={skip}")


def mean_pool_as_eager(x, cu_seqlens, skip):
    """The reference with float32 sums for 16-bit rows, as torch.mean has them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return reference.mean_pool(x.to(wide), cu_seqlens, skip).to(x.dtype)


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64])
def test_mean_pool_backward(isa, dtype):
    for channels in CHANNELS:
        args = (randn(64, channels, dtype=dtype), cu_seqlens_of((1, 0, 50, 2, 9)), 1)
        args[0][62:] = NAN
        grad = randn(5, channels, dtype=dtype, seed=4)
        check_gradients(ops.mean_pool, reference.mean_pool, args, 1, grad, 62)


@pytest.mark.parametrize("skip", [2**31 - 1, 2**63 - 1])
def test_mean_pool_that_skips_more_than_there_can_be(isa, skip):
    x = randn(9, 5).requires_grad_()
    out = ops.mean_pool(x, cu_seqlens_of((4, 0, 5)), skip)
    assert torch.equal(out, torch.zeros(3, 5))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.zeros(9, 5))


def test_mean_pool_gradcheck(isa):
    x = randn(11, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.mean_pool(x, cu_seqlens_of((3, 0, 1, 6)), 1), [x])


@pytest.mark.parametrize("seqlens", [(), (0,)])
def test_mean_pool_of_nothing(seqlens):
    x = torch.full((3, 6), NAN, requires_grad=True)
    out = ops.mean_pool(x, cu_seqlens_of(seqlens))
    assert torch.equal(out, torch.zeros(len(seqlens), 6))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 6))


def test_bitwise_alone_and_packed(isa):
    seqlens = cut((49, 0, 196, 33, 100))
    patches, prefix, pos_table, pos_offset, cu_seqlens = make_assemble(seqlens, 90, padding=2)
    grad = randn(len(seqlens), 90, seed=5)
    tokens = ops.assemble_tokens(patches, prefix, pos_table, pos_offset, cu_seqlens)
    packed = cu_seqlens + 2 * torch.arange(len(seqlens) + 1, dtype=torch.int32)
    pooled = ops.mean_pool(tokens, packed, 2)
    (grad_tokens,) = gradients(ops.mean_pool, (tokens, packed, 2), 1, grad)
    for b, (rows, out) in enumerate(zip(reference.segments(cu_seqlens), reference.segments(packed), strict=True)):
        alone = ops.assemble_tokens(
            patches[rows], prefix, pos_table, pos_offset[b : b + 1], cu_seqlens_of(seqlens[b : b + 1])
        )
        assert torch.equal(tokens[out], alone)
        of_alone = (alone, cu_seqlens_of([len(alone)]), 2)
        assert torch.equal(pooled[b : b + 1], ops.mean_pool(*of_alone))
        assert torch.equal(grad_tokens[out], gradients(ops.mean_pool, of_alone, 1, grad[b : b + 1])[0])


@triton_only
def test_positions_outside_the_table_add_nothing():
    patches, prefix, pos_table, _, cu_seqlens = make_assemble((4, 3), 12)
    tokens = ops.assemble_tokens(patches, prefix, pos_table, int32(-2, TABLE_ROWS - 1), cu_seqlens)
    positions = torch.zeros(7, 12)
    positions[2:4], positions[4] = pos_table[:2], pos_table[-1]
    assert torch.equal(tokens[[2, 3, 4, 5, 8, 9, 10]], patches + positions)


@cpu_only
def test_bitwise_for_any_number_of_threads(isa):
    args = make_assemble((196, 49, 100, 49, 196), 200, padding=2)
    grad = randn(args[0].shape[0] + 10, 200, seed=6)
    pool = (randn(592, 200, seed=7), args[4], 1)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(
                [
                    ops.assemble_tokens(*args),
                    *gradients(ops.assemble_tokens, args, 3, grad),
                    ops.mean_pool(*pool),
                    *gradients(ops.mean_pool, pool, 1, grad[:5]),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_non_contiguous_inputs():
    args = make_assemble((9, 4), 32)

    def strided(t):
        return t.new_zeros(*t.shape[:-1], t.shape[-1] * 2)[..., ::2].copy_(t)

    other = [strided(t) for t in args]
    assert torch.equal(ops.assemble_tokens(*other), ops.assemble_tokens(*args))
    grad = randn(32, 17, seed=3).t()
    for one, another in zip(
        gradients(ops.assemble_tokens, args, 3, grad), gradients(ops.assemble_tokens, other, 3, grad), strict=True
    ):
        assert torch.equal(one, another)
    assert torch.equal(ops.mean_pool(other[0], other[4]), ops.mean_pool(args[0], args[4]))
    # The gradient of a sum is an expanded tensor: strides of zero.
    assert torch.equal(
        gradients(ops.mean_pool, (args[0], args[4]), 1, torch.ones(1, 1).expand(2, 32))[0],
        gradients(ops.mean_pool, (args[0], args[4]), 1, torch.ones(2, 32))[0],
    )


@alike_on_all_devices
def test_opcheck():
    patches, prefix, pos_table, pos_offset, cu_seqlens = make_assemble((3, 0, 5), 8)
    for t in (patches, prefix, pos_table):
        t.requires_grad_()
    library = torch.ops.revit_fast
    torch.library.opcheck(library.assemble_tokens, (patches, prefix, pos_table, pos_offset, cu_seqlens))
    torch.library.opcheck(
        library.assemble_tokens_backward, (randn(14, 8), pos_table.detach(), pos_offset, cu_seqlens, 2)
    )
    torch.library.opcheck(library.mean_pool, (patches, cu_seqlens, 1))
    torch.library.opcheck(library.mean_pool_backward, (randn(3, 8), cu_seqlens, 1, 10))


@alike_on_all_devices
def test_compile_fullgraph_and_dynamic():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(patches, prefix, pos_table, pos_offset, cu_seqlens):
        tokens = ops.assemble_tokens(patches, prefix, pos_table, pos_offset, cu_seqlens)
        offsets = torch.arange(cu_seqlens.shape[0], dtype=torch.int32, device=prefix.device) * prefix.shape[0]
        return ops.mean_pool(tokens * 2, cu_seqlens + offsets, prefix.shape[0])

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for seqlens in [(5, 9), (4, 0, 11), (7,) * 6, (3, 8, 2), (50, 2)]:
        args = make_assemble(seqlens, 16)
        grad = randn(len(seqlens), 16, seed=8)
        torch.testing.assert_close(compiled(*args), function(*args))
        for got, wanted in zip(gradients(compiled, args, 3, grad), gradients(function, args, 3, grad), strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 6, f"{counter.frame_count} compilations with and without gradients"


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (lambda: {"patches": [1.0]}, TypeError, "patches"),
        (lambda: {"patches": torch.zeros(12, 8, dtype=torch.int32)}, TypeError, "patches"),
        (lambda: {"patches": torch.zeros(12)}, ValueError, "patches"),
        pytest.param(lambda: {"patches": torch.zeros(6, 8)}, RuntimeError, "cu_seqlens", marks=contents),
        (lambda: {"prefix": torch.zeros(2, 7)}, ValueError, "prefix"),
        (lambda: {"prefix": torch.zeros(8)}, ValueError, "prefix"),
        (lambda: {"prefix": None}, TypeError, "prefix"),
        (lambda: {"prefix": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "prefix"),
        (lambda: {"pos_table": torch.zeros(300, 7)}, ValueError, "pos_table"),
        (lambda: {"pos_table": torch.zeros(300, 8, dtype=torch.bfloat16)}, TypeError, "pos_table"),
        (lambda: {"pos_table": torch.zeros(300, 8, device="meta")}, ValueError, "pos_table"),
        (lambda: {"pos_offset": torch.tensor([0, 1])}, TypeError, "pos_offset"),
        (lambda: {"pos_offset": int32(0)}, ValueError, "pos_offset"),
        pytest.param(lambda: {"pos_offset": int32(0, -1)}, RuntimeError, "pos_offset of sequence 1", marks=contents),
        pytest.param(lambda: {"pos_offset": int32(298, 0)}, RuntimeError, "pos_offset of sequence 0", marks=contents),
        (lambda: {"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "cu_seqlens"),
        pytest.param(lambda: {"cu_seqlens": int32(0, 3, 99)}, RuntimeError, "cu_seqlens", marks=contents),
        pytest.param(lambda: {"cu_seqlens": int32(0, 8, 7)}, RuntimeError, "cu_seqlens", marks=contents),
        pytest.param(lambda: {"cu_seqlens": int32(2, 3, 7)}, RuntimeError, "cu_seqlens", marks=contents),
        (lambda: {"cu_seqlens": int32()}, ValueError, "cu_seqlens"),
    ],
)
def test_bad_inputs_of_assemble_are_named(changes, error, match):
    names = ("patches", "prefix", "pos_table", "pos_offset", "cu_seqlens")
    arguments = dict(zip(names, make_assemble((3, 4), 8), strict=True))
    with pytest.raises(error, match=match):
        ops.assemble_tokens(**{**arguments, **changes()})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (lambda: {"x": None}, TypeError, "x"),
        (lambda: {"x": torch.zeros(7)}, ValueError, "x"),
        (lambda: {"x": torch.zeros(7, 2, dtype=torch.uint8)}, TypeError, "x"),
        pytest.param(lambda: {"x": torch.zeros(6, 2)}, RuntimeError, "cu_seqlens", marks=contents),
        (lambda: {"cu_seqlens": None}, TypeError, "cu_seqlens"),
        (lambda: {"cu_seqlens": int32(0, 3, 7)[None]}, ValueError, "cu_seqlens"),
        (lambda: {"skip": -1}, ValueError, "skip"),
        (lambda: {"skip": 1.5}, TypeError, "skip"),
    ],
)
def test_bad_inputs_of_mean_pool_are_named(changes, error, match):
    arguments = {"x": torch.zeros(7, 2), "cu_seqlens": int32(0, 3, 7), "skip": 1}
    with pytest.raises(error, match=match):
        ops.mean_pool(**{**arguments, **changes()})

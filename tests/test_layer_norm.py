"""tal_layer_norm and tal_rms_norm against the float64 reference: values, gradients, invariances and errors."""

import pytest
import torch
import torch.nn.functional as F
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
from revit_fast.packing import work_list

pytestmark = pytest.mark.usefixtures("on_device")

cpu_only = only_on("cpu", reason="about the C++ kernels")
triton_only = only_on("interpreter", "cuda", reason="about the Triton kernels")
contents = only_on("cpu", reason="contents of index tensors are clamped, not checked, where reading them is a sync")

# One channel, below a vector, around one, every tail of a four-vector step, DeiT-Ti to ViT-B, long rows; in an order
# that leaves DeiT-S to the interpreter.
CHANNELS = thin((1, 3, 7, 16, 50, 31, 384, 192, 390, 768, 3001))
N_LENGTHS = 3

both_kinds = pytest.mark.parametrize("kind", ["layer", "rms"])


def norm(x, weight, bias, *args, **kwargs):
    """The function for arguments that `make` made: without bias it is RMSNorm, as for the reference."""
    if bias is None:
        return ops.tal_rms_norm(x, weight, *args, **kwargs)
    return ops.tal_layer_norm(x, weight, bias, *args, **kwargs)


def make(seqlens, channels, dtype=torch.float32, *, kind="layer", padding=0, param_dtype=None, mean=0.0, seed=0):
    """x, weight, bias (None for RMSNorm), cu_seqlens, length_index, residual; the padding rows hold NaN."""
    n_rows = sum(seqlens)
    x = randn(n_rows + padding, channels, seed=seed, dtype=torch.float64) + mean
    residual = randn(n_rows + padding, channels, seed=seed + 1, dtype=torch.float64)
    x[n_rows:] = float("nan")
    residual[n_rows:] = float("nan")
    weight = randn(N_LENGTHS, channels, seed=seed + 2, dtype=param_dtype or dtype)
    bias = randn(N_LENGTHS, channels, seed=seed + 3, dtype=param_dtype or dtype) if kind == "layer" else None
    length_index = torch.arange(len(seqlens), dtype=torch.int32) * 2 % N_LENGTHS
    return x.to(dtype), weight, bias, cu_seqlens_of(seqlens), length_index, residual.to(dtype)


def reference_as_eager(x, weight, bias, cu_seqlens, length_index, eps, residual=None):
    """The reference with float32 statistics for 16-bit rows, rounded to their dtype, as torch's norms do it."""
    total = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    args = (total.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = reference.tal_layer_norm(*args, cu_seqlens, length_index, eps).to(x.dtype)
    if residual is None:
        return y
    valid = torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1]
    return y, torch.where(valid[:, None], total, torch.zeros((), dtype=x.dtype))


def check_forward(args, residual, eps=1e-6):
    """The norm is checked on the sum as rounded to the dtype of x: that is what is normalised, in torch too."""
    x, weight, bias, cu_seqlens, length_index = args
    if residual is None:
        check_y(norm(*args, eps), *args, eps)
        return
    y, total = norm(*args, eps, residual)
    expected = (x + residual)[: cu_seqlens[-1]]
    assert torch.equal(total[: cu_seqlens[-1]], expected), "sum differs from x + residual"
    assert not total[cu_seqlens[-1] :].any(), "sum: padding rows are not zero"
    check_y(y, total, weight, bias, cu_seqlens, length_index, eps)


def check_y(y, *args):
    if y.dtype == torch.float64:  # there is no better truth to hold it to
        torch.testing.assert_close(y, reference.tal_layer_norm(*args), rtol=1e-12, atol=1e-12)
        return
    check_op(y, reference_as_eager, *args, what=f"y, C={y.shape[1]}")


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64])
@both_kinds
def test_forward_matches_reference(isa, kind, dtype, with_residual):
    for channels in CHANNELS:
        *args, residual = make((1, 0, 5, 2, 19, 0), channels, dtype, kind=kind, padding=3)
        check_forward(args, residual if with_residual else None)


@both_kinds
def test_forward_of_every_length(isa, kind):
    *args, residual = make(cut(SEQLENS), 40, kind=kind, padding=1)
    check_forward(args, residual)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[1:])
@both_kinds
def test_float32_parameters_with_16_bit_rows(isa, kind, dtype):
    *args, residual = make((7, 3, 12), 100, dtype, kind=kind, param_dtype=torch.float32, padding=2)
    check_forward(args, residual)
    check_forward(args, None)


@pytest.mark.parametrize("channels", [7, 100, 384, 3001])
@both_kinds
def test_large_mean_stays_accurate(isa, kind, channels):
    *args, residual = make((17, 9, 4), channels, kind=kind, mean=1e4)
    check_forward(args, None)
    check_forward(args, residual)


def test_large_mean_is_more_accurate_than_layer_norm_in_float32(isa):
    """The correction of the mean counts: without it the error is that of a rounded mean, 5e-4 of a deviation."""
    x, weight, bias, cu_seqlens, length_index, _ = make((64,), 384, mean=1e4)
    y = ops.tal_layer_norm(x, weight, bias, cu_seqlens, length_index)
    truth = reference.tal_layer_norm(*map(to_float64, (x, weight, bias)), cu_seqlens, length_index, 1e-6)
    assert (y - truth).abs().max() < 2e-5


def test_constant_rows_and_eps(isa):
    _, weight, bias, cu_seqlens, length_index, _ = make((4, 2), 33)
    x = torch.full((6, 33), 3.25)
    y = ops.tal_layer_norm(x, weight, bias, cu_seqlens, length_index, eps=1e-5)
    for rows, index in zip(reference.segments(cu_seqlens), length_index.tolist(), strict=True):
        torch.testing.assert_close(y[rows], bias[index].expand_as(y[rows]), rtol=0, atol=1e-6)
    x = randn(6, 33)
    check_op(
        ops.tal_layer_norm(x, weight, bias, cu_seqlens, length_index, 0.5),
        reference.tal_layer_norm, x, weight, bias, cu_seqlens, length_index, 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.float64])
def test_rms_norm_is_torch_s(isa, dtype):
    """The truth here is torch's own function: the reference is ours."""
    for channels in (1, 40, 385):
        x, weight, bias, cu_seqlens, length_index, _ = make((5, 9, 3), channels, dtype, kind="rms")
        y = norm(x, weight, bias, cu_seqlens, length_index, 1e-5)
        for rows, index in zip(reference.segments(cu_seqlens), length_index.tolist(), strict=True):
            same = F.rms_norm(x[rows], (channels,), weight[index], 1e-5)
            truth = F.rms_norm(x[rows].double(), (channels,), weight[index].double(), 1e-5)
            if dtype == torch.float64:
                torch.testing.assert_close(y[rows], truth, rtol=1e-12, atol=1e-12)
            else:
                assert_as_accurate(y[rows], same, truth, f"y, C={channels}")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 1e19),
        (torch.float32, 1e30),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e19),
        (torch.bfloat16, 3e38),
        (torch.float32, 1e-30),
        (torch.float16, 1e-7),
        (torch.float32, float("inf")),
        (torch.float32, float("nan")),
    ],
)
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter, which computes in numpy
def test_rms_norm_of_huge_tiny_and_infinite_rows(isa, dtype, value):
    """As in torch: 16-bit rows have float32 statistics too; where a mean square is infinite, finite values give 0."""
    x = torch.full((2, 100), value, dtype=dtype)
    x[:, 3::7] = 1.0
    weight = torch.full((1, 100), 2.0, dtype=dtype)
    y = ops.tal_rms_norm(x, weight, cu_seqlens_of([2]), int32(0))
    torch.testing.assert_close(y, F.rms_norm(x, (100,), weight[0], 1e-6), equal_nan=True)


@pytest.mark.parametrize("seqlens", [(), (0,), (0, 0)])
@both_kinds
def test_nothing_but_padding(isa, kind, seqlens):
    x, weight, bias, cu_seqlens, length_index, residual = make(seqlens, 20, kind=kind, padding=3)
    x.requires_grad_()
    y, total = norm(x, weight.requires_grad_(), bias, cu_seqlens, length_index, residual=residual)
    assert torch.equal(y, torch.zeros(3, 20))
    assert torch.equal(total, torch.zeros(3, 20))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 20))
    assert torch.equal(weight.grad, torch.zeros(N_LENGTHS, 20))


@both_kinds
def test_no_rows_at_all(isa, kind):
    x, weight, bias, cu_seqlens, length_index, residual = make((0, 0), 20, kind=kind)
    y, total = norm(x.requires_grad_(), weight.requires_grad_(), bias, cu_seqlens, length_index, residual=residual)
    assert y.shape == total.shape == (0, 20)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(N_LENGTHS, 20))


def gradients(function, args, residual, grads, **kwargs):
    """Gradients of x, weight, bias and the residual, of those that are there, for the given output gradients."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (*args[:3], residual)]
    out = function(*leaves[:3], *args[3:], residual=leaves[3], **kwargs)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    return torch.autograd.grad(out, [t for t in leaves if t is not None], grads[: len(out)])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@both_kinds
def test_backward_matches_reference(isa, kind, dtype, with_residual):
    # RMSNorm's gradients of few channels and rows pass or fail by luck: torch's largest error may be one rounding.
    for channels in thin((2, 7, 50, 390, 384) if kind == "layer" else (7, 2, 50, 390, 384)):
        *args, residual = make(cut(thin((130, 1, 5, 19, 0, 0))), channels, dtype, kind=kind, padding=3)
        x, cu_seqlens = args[0], args[3]
        end = int(cu_seqlens[-1])
        grads = [randn(*x.shape, dtype=dtype, seed=9), randn(*x.shape, dtype=dtype, seed=10)]
        for grad in grads:
            grad[end:] = float("nan")
        ours = gradients(norm, args, residual if with_residual else None, grads, eps=1e-6)
        assert not ours[0][end:].any(), "grad_x: padding rows are not zero"
        # The truth starts from the rounded sum, like the kernel; its padding is cut, as NaN there would spread.
        total = (x + residual if with_residual else x)[:end]
        grads = [grad[:end] for grad in grads]

        def function(total, *rest, residual=None, **kwargs):
            y = reference_as_eager(total, *rest, **kwargs)
            return (y, total.clone()) if with_residual else y

        same = gradients(function, (total, *args[1:]), None, grads, eps=1e-6)
        truth = gradients(
            function, list(map(to_float64, (total, *args[1:]))), None, [grad.double() for grad in grads], eps=1e-6
        )
        mine = (ours[0][:end], *ours[1:])
        assert len(same) == (3 if kind == "layer" else 2)
        for name, *results in zip(("grad_x", "grad_weight", "grad_bias"), mine, same, truth, strict=False):
            assert_as_accurate(*results, f"{name}, C={channels}")
        if with_residual:
            assert torch.equal(ours[0], ours[-1])


@cpu_only
@pytest.mark.parametrize("channels", [20, 384])
@both_kinds
def test_affine_gradients_lose_less_than_torch_over_many_draws(isa, kind, channels):
    """Sums over rows are compensated: on average their errors are below those of torch's cascaded sums."""
    errors = []
    for seed in range(30):
        *args, _ = make((5, 0, 7, 19, 130), channels, kind=kind, seed=10 * seed)
        grads = [randn(161, channels, seed=10 * seed + 5)]
        ours = gradients(norm, args, None, grads, eps=1e-6)[1:]
        same = gradients(reference.tal_layer_norm, args, None, grads, eps=1e-6)[1:]
        truth = gradients(reference.tal_layer_norm, list(map(to_float64, args)), None, [grads[0].double()], eps=1e-6)
        errors.append([[(t.double() - u).abs().max() for t, u in zip(g, truth[1:], strict=True)] for g in (ours, same)])
    ours, torch_error = torch.tensor(errors).mean(dim=0)
    assert (ours < torch_error).all(), f"grad_weight and grad_bias: {ours.tolist()}, torch {torch_error.tolist()}"


@triton_only
@pytest.mark.parametrize("part_rows", [1, 6, 64])
@both_kinds
def test_parts_of_the_backward_may_have_any_size(monkeypatch, part_rows, kind):
    """Which rows share a partial sum is chosen by the size of the pack; small packs would only ever see one choice."""
    from revit_fast.kernels import layer_norm

    *args, _ = make((0, 1, 70, 0, 19, 5, 0), 40, kind=kind, padding=9)
    grads = [randn(*args[0].shape, seed=9)]
    expected = gradients(norm, args, None, grads)
    monkeypatch.setattr(layer_norm, "_part_rows", lambda n_rows: part_rows)
    grad_x, *of_parameters = gradients(norm, args, None, grads)
    assert torch.equal(grad_x, expected[0])
    torch.testing.assert_close(tuple(of_parameters), expected[1:], rtol=1e-5, atol=1e-5)


@triton_only
def test_length_index_is_clamped():
    x, weight, bias, cu_seqlens, _, _ = make((3, 4), 24)
    for index, clamped in ((int32(-5, 99), int32(0, 2)), (int32(3, -(2**31)), int32(2, 0))):
        got = ops.tal_layer_norm(x, weight, bias, cu_seqlens, index)
        assert torch.equal(got, ops.tal_layer_norm(x, weight, bias, cu_seqlens, clamped))


def test_backward_of_one_channel(isa):
    """The norm of one channel is its bias: grad_x is zero but for the rounding of grad_y * weight, times rstd."""
    *args, _ = make((6, 5), 1)
    eps, grad = 1e-6, randn(11, 1, seed=9)
    grad_x, grad_weight, grad_bias = gradients(ops.tal_layer_norm, args, None, [grad], eps=eps)
    rounding = torch.finfo(torch.float32).eps * (grad * args[1].abs().max()).abs().max() / eps**0.5
    assert grad_x.abs().max() <= rounding
    assert not grad_weight.any()
    torch.testing.assert_close(grad_bias, torch.stack([grad[:6].sum(0), grad[:0].sum(0), grad[6:].sum(0)]))


@pytest.mark.parametrize("with_residual", [False, True])
@both_kinds
def test_gradcheck(isa, kind, with_residual):
    x, weight, bias, cu_seqlens, length_index, residual = make((3, 0, 1, 4), 11, torch.float64, kind=kind)
    leaves = [t.requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]

    def function(x, weight, bias=None, residual=None):
        return norm(x, weight, bias, cu_seqlens, length_index, residual=residual)

    if with_residual and bias is None:
        leaves = [*leaves, None]
    assert torch.autograd.gradcheck(function, [*leaves, residual.requires_grad_()] if with_residual else leaves)


def test_gradients_of_only_one_output(isa):
    """A block whose sum (or whose norm) goes unused gets no, or a zero, gradient for it."""
    *args, residual = make((5, 3), 24)
    zero = torch.zeros(8, 24)
    g = randn(8, 24, seed=5)
    for used in (0, 1):
        x = args[0].clone().requires_grad_()
        ops.tal_layer_norm(x, *args[1:], residual=residual)[used].backward(g)
        grads = [g, zero] if used == 0 else [zero, g]
        torch.testing.assert_close(x.grad, gradients(ops.tal_layer_norm, args, residual, grads)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_kinds
def test_bitwise_alone_and_packed(isa, kind, dtype):
    seqlens = cut(thin((2, 65, 0, 50, 101, 3)))
    *args, residual = make(seqlens, 202, dtype, kind=kind, padding=5)
    x, weight, bias, cu_seqlens, length_index = args
    grads = [randn(*x.shape, dtype=dtype, seed=11), randn(*x.shape, dtype=dtype, seed=12)]
    y, total = norm(*args, residual=residual)
    grad_x = gradients(norm, args, residual, grads)[0]
    for b, rows in enumerate(reference.segments(cu_seqlens)):
        alone = (x[rows], weight, bias, cu_seqlens_of(seqlens[b : b + 1]), length_index[b : b + 1])
        y_alone, total_alone = norm(*alone, residual=residual[rows])
        assert torch.equal(y[rows], y_alone), f"y of sequence {b}"
        assert torch.equal(total[rows], total_alone), f"sum of sequence {b}"
        grad_alone = gradients(norm, alone, residual[rows], [grad[rows] for grad in grads])[0]
        assert torch.equal(grad_x[rows], grad_alone), f"grad_x of sequence {b}"


@cpu_only
@both_kinds
def test_large_packs_take_another_store_and_give_the_same_bits(isa, kind):
    """From 1 MiB on the sum is written past the caches; the same rows in small packs are not."""
    seqlens = [577, 197]
    x, weight, bias, cu_seqlens, length_index, residual = make(seqlens, 384, kind=kind, padding=3)
    assert x.numel() * x.element_size() > 1 << 20
    y, total = norm(x, weight, bias, cu_seqlens, length_index, residual=residual)
    for start in range(0, sum(seqlens), 50):
        part = slice(start, min(start + 50, sum(seqlens)))
        index = length_index[:1] if start < 577 and part.stop <= 577 else length_index[1:]
        if start < 577 < part.stop:
            continue
        rows = part.stop - part.start
        alone = norm(x[part], weight, bias, cu_seqlens_of([rows]), index.contiguous(), residual=residual[part])
        assert torch.equal(alone[0], y[part])
        assert torch.equal(alone[1], total[part])
    assert torch.equal(y[-3:], torch.zeros(3, 384))
    assert torch.equal(total[-3:], torch.zeros(3, 384))


@cpu_only
@both_kinds
def test_bitwise_for_any_number_of_threads(isa, kind):
    *args, residual = make((197, 101, 50, 101, 197, 50), 384, kind=kind, padding=3)
    grads = [randn(*args[0].shape, seed=13), randn(*args[0].shape, seed=14)]
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append([*norm(*args, residual=residual), *gradients(norm, args, residual, grads)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def test_tiles_change_nothing():
    seqlens = (70, 3)
    *args, residual = make(seqlens, 48)
    tiles = work_list(seqlens).tiles.to(args[0].device)
    assert torch.equal(ops.tal_layer_norm(*args, tiles=tiles), ops.tal_layer_norm(*args))
    y, total = ops.tal_layer_norm(*args, residual=residual, tiles=tiles)
    assert torch.equal(y, ops.tal_layer_norm(*args, residual=residual)[0])
    assert torch.equal(total, args[0] + residual)


@both_kinds
def test_non_contiguous_inputs(kind):
    *args, residual = make((9, 4), 32, kind=kind)
    x, weight, bias, cu_seqlens, length_index = args

    def strided(t):
        return t.new_zeros(*t.shape[:-1], t.shape[-1] * 2)[..., ::2].copy_(t)

    def transposed(t):
        return t.t().contiguous().t()

    bias = None if bias is None else strided(bias)
    other = (transposed(x), strided(weight), bias, strided(cu_seqlens), strided(length_index))
    grads = [transposed(randn(13, 32, seed=3)), strided(randn(13, 32, seed=4))]
    for one, another in zip(
        (*norm(*args, residual=residual), *gradients(norm, args, residual, grads)),
        (*norm(*other, residual=strided(residual)), *gradients(norm, other, strided(residual), grads)),
        strict=True,
    ):
        assert torch.equal(one, another)


@pytest.mark.parametrize("with_residual", [False, True])
@both_kinds
@alike_on_all_devices
def test_opcheck(kind, with_residual):
    x, weight, bias, cu_seqlens, length_index, residual = make((3, 0, 5), 24, kind=kind, padding=1)
    x[8:], residual[8:] = 0, 0  # opcheck compares with assert_close, for which NaN inputs are unlike themselves
    for t in (x, weight, residual, *([] if bias is None else [bias])):
        t.requires_grad_()
    rest = (weight, bias, cu_seqlens, length_index, 1e-6, None)
    if with_residual:
        torch.library.opcheck(torch.ops.revit_fast.tal_layer_norm_residual, (x, residual, *rest))
        return
    torch.library.opcheck(torch.ops.revit_fast.tal_layer_norm, (x, *rest))
    _, mean, rstd = torch.ops.revit_fast.tal_layer_norm(x, *rest)
    mean = None if bias is None else mean
    backward = (x.detach(), None, x.detach(), weight.detach(), mean, rstd, cu_seqlens, length_index, None)
    torch.library.opcheck(torch.ops.revit_fast.tal_layer_norm_backward, backward)


@both_kinds
@alike_on_all_devices
def test_compile_fullgraph_and_dynamic(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(x, weight, bias, cu_seqlens, length_index, residual):
        y, total = norm(x, weight, bias, cu_seqlens, length_index, residual=residual)
        return norm(y * 2, weight, bias, cu_seqlens, length_index) + total

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for seed, seqlens in enumerate([(5, 9), (4, 0, 11), (7,) * 6, (3, 8, 2), (50, 2)]):
        args = make(seqlens, 24, kind=kind, seed=seed)
        leaves = [t.detach().clone().requires_grad_() for t in (args[0], args[5])]
        for function in (block, compiled):
            out = function(leaves[0], *args[1:5], leaves[1])
            out.backward(torch.ones_like(out))
            if function is block:
                expected = [out, *(t.grad.clone() for t in leaves)]
                for t in leaves:
                    t.grad = None
        for got, wanted in zip((out, leaves[0].grad, leaves[1].grad), expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 3, f"{counter.frame_count} compilations"


def replaced(**changes):
    x, weight, bias, cu_seqlens, length_index, _ = make((3, 2), 8)
    return {
        "x": x, "weight": weight, "bias": bias, "cu_seqlens": cu_seqlens, "length_index": length_index, **changes,
    }  # fmt: skip


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "name"),
    [
        (lambda: {"x": [[1.0]]}, TypeError, "x"),
        (lambda: {"x": torch.zeros(5, 8, dtype=torch.int64)}, TypeError, "x"),
        (lambda: {"x": torch.zeros(5, 2, 4)}, ValueError, "x"),
        (lambda: {"x": torch.zeros(5, 0)}, ValueError, "x"),
        pytest.param(lambda: {"x": torch.zeros(4, 8)}, RuntimeError, "cu_seqlens", marks=contents),
        (lambda: {"weight": torch.zeros(3, 7)}, ValueError, "weight"),
        (lambda: {"weight": torch.zeros(8)}, ValueError, "weight"),
        (lambda: {"weight": torch.zeros(3, 8, dtype=torch.float16)}, TypeError, "weight"),
        (lambda: {"weight": None}, TypeError, "weight"),
        (lambda: {"weight": torch.zeros(3, 8, device="meta")}, ValueError, "weight"),
        (lambda: {"bias": torch.zeros(2, 8)}, ValueError, "bias"),
        (lambda: {"bias": torch.zeros(3, 8, dtype=torch.float64)}, TypeError, "bias"),
        (lambda: {"bias": None}, TypeError, "bias"),
        (lambda: {"cu_seqlens": [0, 3, 5]}, TypeError, "cu_seqlens"),
        (lambda: {"cu_seqlens": torch.tensor([0, 3, 5])}, TypeError, "cu_seqlens"),
        (lambda: {"cu_seqlens": int32(0, 3, 5)[None]}, ValueError, "cu_seqlens"),
        (lambda: {"cu_seqlens": int32()}, ValueError, "cu_seqlens"),
        (lambda: {"cu_seqlens": int32(0, 3, 5).to("meta")}, ValueError, "cu_seqlens"),
        pytest.param(lambda: {"cu_seqlens": int32(1, 3, 5)}, RuntimeError, "cu_seqlens", marks=contents),
        pytest.param(lambda: {"cu_seqlens": int32(0, 6, 5)}, RuntimeError, "cu_seqlens", marks=contents),
        pytest.param(lambda: {"cu_seqlens": int32(0, 3, 6)}, RuntimeError, "cu_seqlens", marks=contents),
        (lambda: {"length_index": torch.tensor([0, 1])}, TypeError, "length_index"),
        (lambda: {"length_index": int32(0, 1, 2)}, ValueError, "length_index"),
        pytest.param(lambda: {"length_index": int32(0, 3)}, RuntimeError, "length_index", marks=contents),
        pytest.param(lambda: {"length_index": int32(-1, 0)}, RuntimeError, "length_index", marks=contents),
        (lambda: {"eps": float("nan")}, ValueError, "eps"),
        (lambda: {"eps": -1e-6}, ValueError, "eps"),
        (lambda: {"eps": float("inf")}, ValueError, "eps"),
        (lambda: {"residual": torch.zeros(5, 9)}, ValueError, "residual"),
        (lambda: {"residual": torch.zeros(5, 8, dtype=torch.float64)}, TypeError, "residual"),
        (lambda: {"residual": 1.0}, TypeError, "residual"),
    ],
)
def test_bad_inputs_are_named(changes, error, name):
    arguments = replaced(**changes())
    with pytest.raises(error, match=rf"\b{name}\b"):
        ops.tal_layer_norm(**arguments)
    if name != "bias":
        del arguments["bias"]
        with pytest.raises(error, match=rf"\b{name}\b"):
            ops.tal_rms_norm(**arguments)

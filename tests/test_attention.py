"""varlen_attention against the float64 reference, the pack contract, autograd, compilation and bad inputs."""

import math
import os
import subprocess
import sys
from itertools import pairwise, product

import helpers
import numpy
import pytest
import torch
from helpers import (
    FLOAT_DTYPES,
    HEAD_DIMS,
    SEQLENS,
    alike_on_all_devices,
    check_op,
    cu_seqlens_of,
    cut,
    full,
    full_if,
    only_on,
    randn,
)

from revit_fast import ops, reference
from revit_fast.kernels import launch
from revit_fast.kernels.constants import KEY_CLASSES, PADDING, STREAMING
from revit_fast.ops import _library
from revit_fast.packing import work_list

pytestmark = pytest.mark.usefixtures("on_device")

needs_extension = pytest.mark.skipif(
    helpers.device == "cpu" and not _library.HAS_EXTENSION, reason="the extension is not built"
)
cpu_only = only_on("cpu", reason="about the C++ kernels")
triton_only = only_on("interpreter", "cuda", reason="about the Triton kernels")
contents = only_on("cpu", reason="contents of index tensors are clamped, not checked, where reading them is a sync")

# A sequence that takes the streaming schedule; the interpreter takes milliseconds for each block and gets a short one.
LONG = 300 if helpers.device == "interpreter" else 600

# Lengths that leave a remainder in every blocking: rows (2, 6, 12, 24, 48), vectors (4, 8, 16) and key blocks (512).
SHORT_MIX = (50, 0, 1, 101, 2, 7)
# Queries and keys of each sequence: none on either side, fewer and more keys than queries, two and three key blocks.
CROSS_MIX = ((5, 9), (0, 3), (4, 0), (1, 1), (30, 7), (14, LONG - 23), (3, 2 * LONG - 170))


def inputs(seqlens_q, seqlens_k, heads=(2, 2), dim=32, dtype=torch.float32, padding=0):
    """q, k, v with `padding` rows of NaN behind the sequences, and their offsets."""
    tensors = []
    for seed, (lengths, n_heads) in enumerate(((seqlens_q, heads[0]), (seqlens_k, heads[1]), (seqlens_k, heads[1]))):
        t = randn(sum(lengths) + padding, n_heads, dim, dtype=dtype, seed=seed)
        t[sum(lengths) :] = float("nan")
        tensors.append(t)
    return *tensors, cu_seqlens_of(seqlens_q), cu_seqlens_of(seqlens_k)


def check_forward_and_backward(q, k, v, cu_q, cu_k, causal=False, scale=None):
    """Output, lse and the three gradients, through both results, by the error rule."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = ops.varlen_attention(q, k, v, cu_q, cu_k, scale=scale, causal=causal, return_lse=True)
    grad_out = randn(*out.shape, dtype=out.dtype, seed=7)
    # Where lse is -inf it is a constant, but reference and kernel need not agree on the gradient of a constant.
    grad_lse = randn(*lse.shape, dtype=lse.dtype, seed=8).masked_fill(torch.isneginf(lse), 0.0)
    grads = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))

    def truth(q, k, v, grad_out, grad_lse):
        used_q, used_k = int(cu_q[-1]), int(cu_k[-1])
        leaves = [t.detach().nan_to_num().requires_grad_() for t in (q, k, v)]
        results = reference.varlen_attention(*leaves, cu_q, cu_k, scale=scale, causal=causal)
        grads = torch.autograd.grad(results, leaves, (grad_out, grad_lse.to(results[1].dtype)))
        for grad, used in zip(grads, (used_q, used_k, used_k), strict=True):
            assert not grad[used:].any()
        return (*(t.detach() for t in results), *grads)

    ours = (out.detach(), lse.detach(), *grads)
    if q.dtype == torch.float64:  # the error rule leaves nothing to allow: 2^-53 times the longest sum of terms near 1
        for i, (a, b) in enumerate(zip(ours, truth(q, k, v, grad_out, grad_lse), strict=True)):
            torch.testing.assert_close(
                a, b, atol=1e-13 * max(1, q.shape[-1]), rtol=1e-12, msg=lambda m, i=i: f"{i}: {m}"
            )
    else:
        check_op(ours, truth, q.detach(), k.detach(), v.detach(), grad_out, grad_lse)


# Head dimensions of each blocking: the interpreter, which takes seconds for each, has these in the quick suite.
BLOCKINGS = (7, 64, 80, 256)


# Every head_dim meets both masks on one mix; dtypes and instruction sets beyond float32 take the odd ones.
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [full_if(helpers.device == "interpreter" and d not in BLOCKINGS, d) for d in HEAD_DIMS])
def test_matches_reference_for_every_head_dim(isa, dim, causal):
    check_forward_and_backward(*inputs(SHORT_MIX, SHORT_MIX, dim=dim, padding=3), causal=causal)


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES[1:], torch.float64])
@pytest.mark.parametrize("dim", [7, 72])
def test_matches_reference_for_every_dtype(isa, dtype, dim):
    check_forward_and_backward(*inputs(SHORT_MIX, SHORT_MIX, dim=dim, dtype=dtype, padding=3), causal=dim == 7)


@pytest.mark.parametrize("seqlens", [cut(SEQLENS), full(SEQLENS)] if helpers.device == "interpreter" else [SEQLENS])
def test_matches_reference_for_every_length(isa, seqlens):
    check_forward_and_backward(*inputs(seqlens, seqlens, heads=(1, 1), dim=20))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [*(full_if(helpers.device == "interpreter", h) for h in ((4, 4), (4, 2))), (3, 1)])
def test_different_query_and_key_lengths_and_grouped_heads(isa, heads, causal):
    check_forward_and_backward(*inputs(*zip(*CROSS_MIX, strict=True), heads=heads, dim=40, padding=2), causal=causal)


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
def test_scale(scale):
    check_forward_and_backward(*inputs((50, 7), (50, 7)), scale=scale)


def test_streaming_causal(isa):
    lengths = (LONG - 23, LONG + 25)
    check_forward_and_backward(*inputs(lengths, lengths, heads=(1, 1), dim=16), causal=True)


@only_on("interpreter", reason="the interpreter's float32 products, made to round as a GPU's do")
@pytest.mark.full  # machine code of a GPU shows the same: tests/aot
@pytest.mark.parametrize("causal", [False, True])
def test_long_sums_when_products_round_after_every_row(monkeypatch, causal):
    """NumPy sums a block's product alone; a GPU without tensor cores begins at the accumulator and adds row by row."""
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def row_by_row(self, a, b, d, *options):
        if a.data.dtype != numpy.float32:
            return create_dot(self, a, b, d, *options)
        total = d.data
        for column, row in zip(a.data.T.astype(float), b.data.astype(float), strict=True):
            total = (total + column[:, None] * row).astype(numpy.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", row_by_row)
    check_forward_and_backward(*inputs((577, 625), (577, 625), heads=(1, 1), dim=16), causal=causal)


def test_large_scores_stay_finite(isa):
    q, k, v, cu, _ = inputs((LONG, 33), (LONG, 33))
    check_forward_and_backward(30 * q, 30 * k, v, cu, cu)


@needs_extension
def test_wholly_masked_rows_and_padding_are_zero_though_inputs_are_nan(isa):
    q, k, v, cu_q, cu_k = inputs(*zip(*CROSS_MIX, strict=True), padding=5)
    q.requires_grad_()
    out, lse = ops.varlen_attention(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    blind = torch.isneginf(lse).all(0)
    expected = torch.ones(q.shape[0], dtype=torch.bool)
    for (a, b), (n_q, n_k) in zip(pairwise(cu_q.tolist()), CROSS_MIX, strict=True):
        expected[a + max(n_q - n_k, 0) : b] = False
    assert torch.equal(blind, expected)
    assert not out[blind].any()
    out.nansum().backward()
    assert not q.grad[blind].any()


def test_nan_in_a_sequence_stays_in_that_sequence(isa):
    q, k, v, cu, _ = inputs((50, 33), (50, 33))
    k[3] = float("nan")
    out = ops.varlen_attention(q, k, v, cu)
    assert out[:50].isnan().all()
    assert out[50:].isfinite().all()


def run_all(q, k, v, grad, cu_q, cu_k, causal):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = ops.varlen_attention(q, k, v, cu_q, cu_k, causal=causal, return_lse=True)
    return (out.detach(), lse.detach().T, *torch.autograd.grad(out, (q, k, v), grad))


@needs_extension
@pytest.mark.parametrize("causal", [full_if(helpers.device == "interpreter", False), True])
@pytest.mark.parametrize("n_threads", [1, 2, 5] if helpers.device == "cpu" else [1])
def test_bitwise_alone_and_packed(isa, causal, n_threads):
    lengths = [cut(pair) for pair in ((50, 50), (197, 197), (7, 101))] + [(LONG, LONG), (101, 30)]
    heads = (4, 2) if helpers.device == "cpu" else (2, 1)
    q, k, v, cu_q, cu_k = inputs(*zip(*lengths, strict=True), heads=heads, dim=40)
    grad = randn(*q.shape, seed=9)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)  # more threads cut long sequences into more items
    try:
        packed = run_all(q, k, v, grad, cu_q, cu_k, causal)
        torch.set_num_threads(1)
        rows, keys = list(pairwise(cu_q.tolist())), list(pairwise(cu_k.tolist()))
        for (a, b), (c, d) in zip(rows, keys, strict=True):
            own = (q[a:b], k[c:d], v[c:d], grad[a:b], cu_seqlens_of([b - a]), cu_seqlens_of([d - c]))
            alone = run_all(*own, causal)
            for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), packed, alone, strict=True):
                part = slice(c, d) if name in ("dk", "dv") else slice(a, b)
                assert torch.equal(x[part], y), f"{name} of rows {a}:{b} depends on the pack"
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_strided_views_are_read_in_place(isa):
    qkv = randn(157, 3, 2, 40)
    cu = cu_seqlens_of((50, 101, 6))
    strided = qkv.unbind(1)
    plain = [t.contiguous() for t in strided]
    transposed = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in strided]
    columns = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in strided]
    expected = run_all(*plain, randn(157, 2, 40, seed=1), cu, cu, False)
    for tensors in (strided, transposed, columns):
        got = run_all(*tensors, randn(40, 2, 157, seed=1).permute(2, 1, 0), cu, cu, False)
        assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))
    got = run_all(*strided, torch.ones(()).expand(157, 2, 40), cu, cu, False)
    expected = run_all(*plain, torch.ones(157, 2, 40), cu, cu, False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_offsets_may_be_strided():
    q, k, v, cu_seqlens_q, cu_seqlens_k = inputs([3, 5], [2, 7], heads=(2, 1), dim=16)
    strided = [torch.stack([cu, cu], dim=1)[:, 0] for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert not strided[0].is_contiguous()
    expected = ops.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert torch.equal(ops.varlen_attention(q, k, v, *strided), expected)


def test_defaults_and_results():
    q, k, v, cu, _ = inputs((50, 7), (50, 7))
    out = ops.varlen_attention(q, k, v, cu, None, 50)
    work = work_list((50, 7))
    tiles = work.tiles.to(q.device)
    explicit, lse = ops.varlen_attention(
        q, k, v, cu, cu, 50, 64, scale=32**-0.5, return_lse=True, tiles=tiles, tile_counts=work.counts
    )
    assert torch.equal(out, explicit)
    assert (lse.shape, lse.dtype) == ((2, 57), torch.float32)
    empty = ops.varlen_attention(q[:0], k[:0], v[:0], cu_seqlens_of([]))
    assert empty.shape == (0, 2, 32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [((5, 0, 3), (5, 0, 3)), ((3, 2, 4), (5, 0, 2))])
def test_gradcheck(lengths, causal):
    q, k, v, cu_q, cu_k = inputs(*lengths, heads=(2, 1), dim=5, dtype=torch.float64)
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def function(q, k, v):
        out, lse = ops.varlen_attention(q, k, v, cu_q, cu_k, causal=causal, return_lse=True)
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_gradient_through_lse_alone(isa):
    q, k, v, cu, _ = inputs((50, 7), (50, 7), dtype=torch.float64)
    q.requires_grad_()
    (ours,) = torch.autograd.grad(ops.varlen_attention(q, k, v, cu, return_lse=True)[1].square().sum(), q)
    (truth,) = torch.autograd.grad(reference.varlen_attention(q, k, v, cu, cu, scale=32**-0.5)[1].square().sum(), q)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-12)


def test_a_gradient_of_lse_counts_for_nothing_where_no_key_is_seen(isa):
    q, k, v, cu_q, cu_k = inputs(*zip(*CROSS_MIX, strict=True))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    results = ops.varlen_attention(*leaves, cu_q, cu_k, causal=True, return_lse=True)
    blind = torch.isneginf(results[1])
    assert blind.any()
    assert not blind.all()
    grads = []
    for value in (0.0, float("nan")):  # NaN is what logaddexp gives to two of -inf
        incoming = (torch.ones_like(results[0]), torch.ones_like(results[1]).masked_fill(blind, value))
        grads.append(torch.autograd.grad(results, leaves, incoming, retain_graph=True))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@alike_on_all_devices
def test_opcheck(dtype):
    q, k, v, cu_q, cu_k = inputs((5, 0, 9), (4, 2, 9), heads=(2, 1), dim=8, dtype=dtype)
    options = (cu_q, cu_k, 9, None, 0.3, True, None, [])
    torch.library.opcheck(torch.ops.revit_fast.varlen_attention, (q, k, v, *options))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.revit_fast.varlen_attention, (*leaves, *options))
    out, lse = torch.ops.revit_fast.varlen_attention(q, k, v, *options)
    for grad_lse in (None, torch.ones_like(lse)):
        args = (torch.ones_like(out), grad_lse, q, k, v, out, lse, *options)
        torch.library.opcheck(torch.ops.revit_fast.varlen_attention_backward, args)


@alike_on_all_devices
def test_compiles_as_one_graph_for_every_mix():
    def layer(qkv, cu):
        q, k, v = (t * 2 for t in qkv.unbind(1))
        out, lse = ops.varlen_attention(q, k, v, cu, return_lse=True)
        return (out.sum() + lse.sum()) * 3

    n_compiled = 0

    def count(graph, example_inputs):
        nonlocal n_compiled
        n_compiled += 1
        return graph.forward

    torch._dynamo.reset()
    counted = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for mix in ((50, 7), (3, 101, 20), (9, 9, 9, 9), (31,)):
        cu = cu_seqlens_of(mix)
        grads = []
        for function in (layer, compiled):
            qkv = randn(sum(mix), 3, 2, 16).requires_grad_()
            grads.append(torch.autograd.grad(function(qkv, cu), qkv)[0])
        counted(randn(sum(mix), 3, 2, 16), cu)
        torch.testing.assert_close(*grads)
    assert n_compiled <= 3


@triton_only
def test_a_derived_work_list_changes_nothing():
    lengths, keys, n_padding = (50, 0, 197, 1, LONG, 64, 130), (50, 3, 0, 257, LONG, 64, 20), 70
    q, k, v, cu_q, cu_k = inputs(lengths, keys, heads=(2, 1), padding=n_padding)
    work = work_list(lengths, keys, n_padding=n_padding)
    derived = ops.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True)
    tiles = work.tiles.to(q.device)
    for given in ({"tiles": tiles}, {"tiles": tiles, "tile_counts": work.counts}, {"max_seqlen_k": max(keys)}):
        for a, b in zip(derived, ops.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **given), strict=True):
            assert torch.equal(a, b), given.keys()


@triton_only
@pytest.mark.parametrize("self_attention", [True, False])
def test_programs_launched_are_tiles_that_hold_rows(self_attention):
    lengths, n_padding, heads = (50, 0, 197, 1, 600, 64, 130), 70, 3
    q, k, v, cu_q, cu_k = inputs(lengths, lengths, heads=(heads, heads), padding=n_padding)
    work = work_list(lengths, n_padding=n_padding)
    tiles, cu_k = work.tiles.to(q.device), cu_q if self_attention else cu_k
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for target in launch.TARGETS:
        with launch.record(target) as launches:
            out = ops.varlen_attention(*leaves, cu_q, cu_k, tiles=tiles, tile_counts=work.counts)
        assert sum(math.prod(entry.grid) for entry in launches) == len(tiles) * heads
        with launch.record(target) as launches:
            torch.autograd.grad(out, leaves, out.detach())
        if self_attention:  # other keys have no list on the host: one is derived, with room for every possible tile
            assert count_programs(launches, "fused", "grad_q") == (len(tiles) - work.counts[PADDING]) * heads
            assert count_programs(launches, "fused", "grad_kv") == (len(tiles) - work.counts[PADDING]) * heads
            assert count_programs(launches, "padding") == 3 * work.counts[PADDING] * heads


@triton_only
@pytest.mark.parametrize(
    ("dtype", "dim", "causal"),
    [
        full_if(
            (dtype, dim, causal) not in ((torch.float32, 80, False), (torch.bfloat16, 64, True)), dtype, dim, causal
        )
        for dtype, dim, causal in product(FLOAT_DTYPES, (64, 80), (False, True))
    ],
)
def test_classes_of_one_launch_keep_their_bits(monkeypatch, dtype, dim, causal):
    """Bits do not depend on which classes share a launch: on every one's own launch, on their number, on the pack."""
    lengths, n_padding = (*(n - 7 for n in KEY_CLASSES), LONG), 70
    q, k, v, cu, _ = inputs(lengths, lengths, heads=(1, 1), dim=dim, dtype=dtype, padding=n_padding)
    work = work_list(lengths, n_padding=n_padding)
    listed = {"tiles": work.tiles.to(q.device), "tile_counts": work.counts}

    def results(q=q, k=k, v=v, cu=cu, **options):
        return ops.varlen_attention(q, k, v, cu, causal=causal, return_lse=True, **options)

    together = results(**listed)
    assert not together[0][-n_padding:].any()
    assert torch.isneginf(together[1][:, -n_padding:]).all()
    for length, (begin, end) in zip(lengths, pairwise(cu.tolist()), strict=True):
        alone = results(*(t[begin:end] for t in (q, k, v)), cu_seqlens_of((length,)))
        assert torch.equal(alone[0], together[0][begin:end]), length
        assert torch.equal(alone[1], together[1][:, begin:end]), length
    schedules = pytest.importorskip("revit_fast.kernels.schedules")
    chosen = schedules.forward

    def apart(*call):
        return tuple(schedules.ForwardLaunch((one,)) for part in chosen(*call) for one in part.schedules)

    monkeypatch.setattr(schedules, "forward", apart)
    for options in (listed, {}):
        assert all(map(torch.equal, results(**options), together))


@triton_only
@pytest.mark.parametrize("listed", [True, False])
def test_a_pack_of_padding_alone_is_zero(listed):
    q, k, v, cu, _ = inputs((0, 0), (0, 0), padding=70)
    work = work_list((0, 0), n_padding=70)
    options = {"tiles": work.tiles.to(q.device), "tile_counts": work.counts} if listed else {}
    out, lse = ops.varlen_attention(q, k, v, cu, return_lse=True, **options)
    assert not out.any()
    assert torch.isneginf(lse).all()


def count_programs(launches, *names):
    return sum(math.prod(entry.grid) for entry in launches if any(name in entry.kernel.__name__ for name in names))


@triton_only
@pytest.mark.parametrize("target", [full_if(target != "sm_90", target) for target in launch.TARGETS])
def test_choices_of_every_chip(target):
    """One sequence of every class, with the tiles, warps and schedules that each chip would get."""
    lengths = (*(n - 7 for n in KEY_CLASSES), KEY_CLASSES[-1] + 9)
    assert len(lengths) == STREAMING + 1
    with launch.assume_target(target):
        check_forward_and_backward(*inputs(lengths, lengths, heads=(1, 1), dim=80, dtype=torch.bfloat16))


@triton_only
def test_offsets_out_of_range_touch_no_other_memory():
    """Garbage offsets give garbage, but neither a fault nor a write beyond the outputs."""
    q, k, v, _, _ = inputs((57,), (57,))
    for offsets in ([0, 90, 57], [0, -5, 57], [40, 3, 900], [-(2**31), 2**31 - 1, 0]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        work = work_list((50, 7))
        for given in ({}, {"tiles": work.tiles.to(q.device) + 1}):
            ops.varlen_attention(q, k, v, cu_seqlens, **given)


GOOD = dict(zip(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"), inputs((5, 3), (4, 2), heads=(4, 2)), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("q", [1.0], TypeError, "q: expected a tensor"),
        ("q", torch.zeros(8, 32), ValueError, "q: expected shape"),
        ("q", torch.zeros(8, 4, 32, dtype=torch.int32), TypeError, "q: expected float32"),
        ("q", torch.zeros(8, 3, 32), ValueError, "q: the number of heads"),
        ("q", torch.zeros(8, 0, 32), ValueError, "q: the number of heads"),
        ("k", torch.zeros(6, 2, 32, dtype=torch.bfloat16), TypeError, "k: expected torch.float32 like q"),
        ("k", torch.zeros(6, 2, 31), ValueError, "k: expected head_dim 32"),
        ("k", torch.zeros(6, 2, 32, device="meta"), ValueError, "k: expected a tensor on cpu like q"),
        ("v", torch.zeros(7, 2, 32), ValueError, "v: expected"),
        ("v", torch.zeros(6, 1, 32), ValueError, "v: expected"),
        ("cu_seqlens_q", (0, 5, 8), TypeError, "cu_seqlens_q: expected an int32 tensor"),
        ("cu_seqlens_q", torch.tensor([0, 5, 8]), TypeError, "cu_seqlens_q: expected int32"),
        ("cu_seqlens_q", torch.zeros(1, 3, dtype=torch.int32), ValueError, "cu_seqlens_q: expected shape"),
        (
            "cu_seqlens_q",
            torch.zeros(3, dtype=torch.int32, device="meta"),
            ValueError,
            "cu_seqlens_q: expected a tensor on cpu like q",
        ),
        ("cu_seqlens_k", cu_seqlens_of([4, 1, 1]), ValueError, "cu_seqlens_k: expected 3 offsets"),
        ("scale", float("nan"), ValueError, "scale: expected a finite number"),
    ],
)
def test_bad_arguments_are_named(name, value, error, message):
    with pytest.raises(error, match=message):
        ops.varlen_attention(**{**GOOD, name: value})


@needs_extension
@contents
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_seqlens_q", torch.tensor([0, 9, 8], dtype=torch.int32), "cu_seqlens_q must not decrease"),
        ("cu_seqlens_q", torch.tensor([1, 5, 8], dtype=torch.int32), "cu_seqlens_q must start at 0"),
        ("cu_seqlens_q", torch.tensor([0, 5, 9], dtype=torch.int32), "cu_seqlens_q ends at 9"),
        ("cu_seqlens_k", torch.tensor([0, 5, 7], dtype=torch.int32), "cu_seqlens_k ends at 7"),
        ("max_seqlen_q", 4, "max_seqlen_q is 4, but sequence 0 has 5"),
        ("max_seqlen_k", 3, "max_seqlen_k is 3, but sequence 0 has 4"),
    ],
)
def test_bad_contents_are_named(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops.varlen_attention(**{**GOOD, name: value})


def test_head_dim_beyond_256_is_refused():
    q, k, v, cu, _ = inputs((5,), (5,), dim=257)
    with pytest.raises(ValueError, match="head_dim must be 1 to 256"):
        ops.varlen_attention(q, k, v, cu)


PEAK = """
import resource, torch
from revit_fast import ops
from revit_fast.packing import cumulative

torch.set_num_threads(2)
q, k, v, grad = (torch.randn(100_000, 1, 8) for _ in range(4))
grads = [torch.zeros_like(t) for t in (q, k, v)]
scale = 8 ** -0.5


def peak_kib(n):
    lengths = [n // 5, *[197] * ((n - n // 5) // 197)]
    cu = cumulative(lengths)
    args = (q[:n], k[:n], v[:n])
    out, lse = torch.ops.revit_fast.varlen_attention(*args, cu, cu, None, None, scale, False, None, [])
    torch.ops.revit_fast.varlen_attention_backward(
        grad[:n], None, *args, out, lse, cu, cu, None, None, scale, False, None, []
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


before = peak_kib(8)
print(*(peak_kib(n) - before for n in (1_000, 10_000, 100_000)))
"""


@pytest.mark.processes
@needs_extension
@cpu_only
def test_peak_memory_grows_linearly():
    """One long sequence (a fifth of the tokens) among short ones: its scores alone would take 1.6 GB at 100k tokens."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=environment)
    # Rows of eight floats: out, lse, three gradients, and in each thread the long sequence's packed keys, values and
    # sums, padded to sixteen. The constant is tiles and the allocator's.
    bytes_per_token, constant_kib = 400, 4096
    for n_tokens, peak in zip((1_000, 10_000, 100_000), map(int, run.stdout.split()), strict=True):
        allowed = constant_kib + n_tokens * bytes_per_token // 1024
        assert peak <= allowed, f"{n_tokens} tokens: {peak} KiB, allowed {allowed}; all: {run.stdout}"


OUT_OF_MEMORY = """
import resource, torch
from pathlib import Path
from revit_fast import ops
from revit_fast.packing import cumulative

few, many = torch.randn(16, 1, 8), torch.randn(2_000_000, 1, 8)
few_rows, many_rows = cumulative([8, 8]), cumulative([1_000_000, 1_000_000])
limits = resource.getrlimit(resource.RLIMIT_AS)
for n_threads in (1, 2):
    torch.set_num_threads(n_threads)
    expected = ops.varlen_attention(few, few, few, few_rows)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), limits[1]))
    try:
        ops.varlen_attention(few, many, many, few_rows, many_rows)  # a sequence's packed keys alone take 32 MB
    except (MemoryError, RuntimeError):  # torch 2.10 says of one in a thread only which call it came through
        print("no memory")
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert torch.equal(ops.varlen_attention(few, few, few, few_rows), expected)
"""


@pytest.mark.processes
@needs_extension
@cpu_only
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory and reads /proc")
def test_a_call_that_finds_no_memory_does_not_harm_the_next():
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines() == ["no memory"] * 2, run.stdout


@pytest.mark.processes
@needs_extension
@cpu_only
def test_fallback_without_the_extension_agrees():
    """The same script with and without the extension prints the same sums."""
    script = (
        "import torch, sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, 'tests')\n"
        "from helpers import randn; from revit_fast import ops; from revit_fast.packing import cumulative\n"
        "q, k, v = (randn(20, 2, 8, dtype=torch.float64, seed=i).requires_grad_() for i in range(3))\n"
        "out, lse = ops.varlen_attention(q, k, v, cumulative([7, 0, 9]), causal=True, return_lse=True)\n"
        "(out.square().sum() + lse[:, :16].sin().sum()).backward()\n"
        "print(*(f'{t.abs().sum():.9f}' for t in (out, q.grad, k.grad, v.grad)))"
    )
    outputs = []
    for without in ("0", "1"):
        environment = {**os.environ, "REVIT_FAST_NO_EXTENSION": without, "PYTHONPATH": os.getcwd()}
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr[-2000:]
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]

"""Linear layers in int8: exact integer sums, and the rules by which numbers become integers."""

import pytest
import torch
from helpers import only_on, randn

from revit_fast import ops
from revit_fast.ops import _library
from revit_fast.ops.linear import LEAST_SCALED, chain_length, quantize_rows, quantize_weight, unpack_weight

NARROW_PRODUCTS = "all"
pytestmark = [
    only_on("cpu", reason="a CPU op"),
    pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built"),
]

INF, NAN = float("inf"), float("nan")


def integers(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator).float()


@pytest.mark.parametrize("depth", [1, 2, 3, 31, 33, 147, 384, 511, 512, 513, 1000])
def test_sums_are_those_of_python_integers(isa, depth):
    """Scales of one, or another power of two for a row, so that float32 holds every result."""
    for n_rows, n_out in ((1, 1), (2, 17), (7, 33), (13, 5)):
        x, weight = integers(n_rows, depth, seed=depth), integers(n_out, depth, seed=depth + 1)
        x[:, :: chain_length(depth)] = 127  # the largest value of every chain
        weight[:, depth // 2] = -127
        exponent = torch.tensor([2.0 ** (i - 3) for i in range(n_rows)]).unsqueeze(1)
        got = ops.packed_linear(x * exponent, ops.pack_weight(weight, None, torch.int8)) / exponent
        rows, columns = x.int().tolist(), weight.int().tolist()
        expected = [[sum(a * w for a, w in zip(row, column, strict=True)) for column in columns] for row in rows]
        assert got.int().tolist() == expected, f"T={n_rows}, K={depth}, N={n_out}"


def test_the_largest_sums(isa):
    for depth in (511, 512):
        for sign in (1, -1):
            got = ops.packed_linear(
                torch.full((3, depth), 127.0), ops.pack_weight(torch.full((2, depth), sign * 127.0), None, torch.int8)
            )
            assert got.tolist() == [[sign * 127 * 127 * depth] * 2] * 3


def rounded(x):
    """The integers times their scales that the kernel makes of rows of at most 512 values."""
    identity = 127 * torch.eye(x.shape[1])  # of scale one
    return ops.packed_linear(x, ops.pack_weight(identity, None, torch.int8)) / 127


def test_rows_are_rounded_to_the_nearest_even(isa):
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0.49999997, 3.0]])
    expected = [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 126.0, -126.0, 0.0, 3.0]
    assert rounded(ties).tolist() == [expected]
    assert rounded(-ties * 2**-20).tolist() == [[-(2**-20) * value for value in expected]]


def test_rows_of_every_size(isa):
    """The rule of `quantize_rows`: zeros, what is too small for a scale, subnormal numbers and the largest."""
    row = torch.tensor([1.0, -0.3, 0.0, 0.7, 0.01])
    factors = [0.0, 1e-45, 1e-38, LEAST_SCALED / 2, LEAST_SCALED, 1e-30, 1.0, 1e30, 3.4e38]
    x = torch.stack([row * factor for factor in factors])
    q, scale = quantize_rows(x)
    assert not q[:4].any()
    assert not scale[:4].any()
    assert (q[4:] == torch.tensor([127.0, -38.0, 0.0, 89.0, 1.0])).all()
    got, expected = ops.packed_linear(x, ops.pack_weight(torch.eye(5), None, torch.int8)), q * scale
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 7, 600])
def test_rows_that_are_not_finite_give_nan_alone(isa, value, place):
    x, packed = randn(11, 601), ops.pack_weight(randn(40, 601, seed=1), randn(40), torch.int8)
    clean = ops.packed_linear(x, packed)
    x[5, place] = value
    got = ops.packed_linear(x, packed)
    assert got[5].isnan().all()
    others = [i for i in range(11) if i != 5]
    assert torch.equal(got[others], clean[others])


def test_instruction_sets_round_alike(isa):
    """Chains are cut at the same places in all of them, and nothing but float32 sums may differ."""
    x = randn(9, 1100) * torch.logspace(-3, 3, 1100)
    q, scale = quantize_rows(x)
    # Of a layer that reads one value of each row, the sum is one product.
    places = torch.tensor([0, 1, 7, 383, 384, 500, 767, 768, 1099])
    weight = torch.zeros(len(places), 1100)
    weight[torch.arange(len(places)), places] = 127.0
    expected = (q[:, places] * 127) * scale[:, places // chain_length(1100)]
    assert torch.equal(ops.packed_linear(x, ops.pack_weight(weight, None, torch.int8)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_rounded_by_rows(isa, dtype):
    weight, bias = randn(100, 33, dtype=dtype), randn(100, seed=1, dtype=dtype)
    weight[3] = 0
    weight[4] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5] + [0.0] * 26)
    packed = ops.pack_weight(weight, bias, torch.int8)
    q, scale = unpack_weight(packed.panels, 100, 33), packed.bias[1, :100]
    assert packed.panels.dtype == torch.int8
    assert torch.equal(packed.bias[0, :100], bias.float())
    assert torch.equal(scale, weight.double().abs().amax(1).float() / 127)
    assert ((q.double() * scale.double()[:, None] - weight.double()).abs() <= 0.5001 * scale.double()[:, None]).all()
    assert q[4, :7].tolist() == [127, 0, 2, 2, 0, -2, -126]
    assert not q[3].any()
    padding = unpack_weight(packed.panels, packed.bias.shape[1], 34)
    assert not padding[100:].any()
    assert not padding[:, 33:].any()
    assert not packed.bias[:, 100:].any()


def test_weights_that_are_not_finite_give_nan_in_their_column(isa):
    weight = randn(20, 8)
    clean = ops.packed_linear(randn(3, 8, seed=2), ops.pack_weight(weight, None, torch.int8))
    weight[2, 1], weight[9, 0] = NAN, INF
    assert quantize_weight(weight)[1].isnan().nonzero().flatten().tolist() == [2, 9]
    got = ops.packed_linear(randn(3, 8, seed=2), ops.pack_weight(weight, None, torch.int8))
    assert got[:, [2, 9]].isnan().all()
    others = [n for n in range(20) if n not in (2, 9)]
    assert torch.equal(got[:, others], clean[:, others])


def test_an_outlier_costs_its_own_chain_only(isa):
    x, packed = randn(4, 1024), ops.pack_weight(randn(8, 1024, seed=1), None, torch.int8)
    x[:, 0] = 1e6
    q, scale = quantize_rows(x)
    assert not q[:, 1:512].any()
    assert (scale[:, 1] < 0.05).all()
    rows = q.double() * scale.double().repeat_interleave(512, 1)
    truth = rows @ (unpack_weight(packed.panels, 8, 1024).double() * packed.bias[1, :8, None].double()).t()
    torch.testing.assert_close(ops.packed_linear(x, packed).double(), truth, rtol=1e-6, atol=1e-2)

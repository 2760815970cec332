"""packed_linear and the packing of its weights: against float64 by the error rule, invariances and errors."""

import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ALL_ISAS, assert_as_accurate, only_on, randn
from torch.nn import functional as F

from revit_fast import ops, reference
from revit_fast.ops import _library
from revit_fast.ops.linear import (
    ACTIVATIONS,
    FLOAT_PACKED_DTYPES,
    PACKED_DTYPES,
    PackedWeight,
    cpu_multiplies_bf16,
    cpu_panel,
    huge_pages,
    round_rows,
    unpack_weight,
    unpacked,
)

NARROW_PRODUCTS = "dtype"
pytestmark = only_on("cpu", reason="a CPU op")

needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the C++ extension is not built")

# One row, less than a half block, a batch of classification tokens, several tasks of rows; one depth, an odd number,
# DeiT's, four chains; less than a panel, a whole one of some instruction sets, ragged ones.
ROWS = (1, 2, 5, 50, 197)
DEPTHS = (1, 3, 147, 384, 768, 1000)
COLUMNS = (1, 5, 16, 100, 384, 1000)
# Every depth meets every number of rows and of columns: what they do to a result does not depend on the third.
SHAPES = [(ROWS[(i + j) % len(ROWS)], k, n) for i, k in enumerate(DEPTHS) for j, n in enumerate(COLUMNS)]
# Errors are held to torch's in a product of so many rows and columns. Of fewer, torch adds up the lanes of a vector
# apart, and so errs up to three times less than it does with the same row in a batch. Ours is the same in both. The
# largest of a few errors says little.
LEAST_ROWS, LEAST_COLUMNS, LEAST_VALUES = 64, 16, 4096
N_BATCHES = 3


def linear(x, weight, bias):
    """x Wᵀ + b as torch has it in a product of at least LEAST_COLUMNS columns."""
    n_out = weight.shape[0]
    padding = max(0, LEAST_COLUMNS - n_out)
    bias = bias if bias is None else F.pad(bias, (0, padding))
    return F.linear(x, F.pad(weight, (0, 0, 0, padding)), bias)[:, :n_out]


def make(n_out, depth, dtype=torch.float32, *, with_bias=True, seed=0):
    """Weight and bias of a layer, and both packed.

    The weight is rounded to `dtype` first: how well bfloat16 holds it is not the op's matter.
    """
    weight = randn(n_out, depth, seed=seed + 1, scale=depth**-0.5)
    weight = weight if dtype == torch.int8 else weight.to(dtype).float()
    bias = randn(n_out, seed=seed + 2) if with_bias else None
    return weight, bias, ops.pack_weight(weight, bias, dtype)


@functools.cache
def problem(n_rows, depth, n_out, dtype, rounds):
    """x, weight and bias, and their product in float32 and in float64, computed once for all tests.

    The product is that of the rounded numbers: how well int8 holds them is not the op's matter either.
    """
    weight, bias, packed = make(n_out, depth, dtype, with_bias=n_rows != 5)
    x = randn(max(LEAST_ROWS, LEAST_VALUES // n_out, N_BATCHES * n_rows), depth)
    products = []
    for wide in (torch.float32, torch.float64):
        rows = round_rows(x.to(wide)) if dtype == torch.int8 else (x.bfloat16() if rounds else x).to(wide)
        products.append(linear(rows, *unpacked(*packed, wide)))
    return x, weight, bias, *products


# A few shapes come first: an emulated instruction set has the first case alone in the quick suite.
@pytest.mark.parametrize(
    ("activation", "shapes"),
    [*((activation, SHAPES[::4]) for activation in ACTIVATIONS), ("none", SHAPES)],
    ids=[*ACTIVATIONS, "all shapes"],
)
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_matches_float64(isa, dtype, activation, shapes):
    rounds = dtype == torch.bfloat16 and cpu_multiplies_bf16()
    for n_rows, depth, n_out in shapes:
        x, weight, bias, *products = problem(n_rows, depth, n_out, dtype, rounds)
        packed = ops.pack_weight(weight, bias, dtype)
        batches = (*x[: N_BATCHES * n_rows].split(n_rows), x[N_BATCHES * n_rows :])
        ours = torch.cat([ops.packed_linear(batch, packed, activation) for batch in batches])
        same, truth = (reference.activate(activation, product) for product in products)
        assert_as_accurate(ours, same, truth, f"T={n_rows}, K={depth}, N={n_out}")


# Instruction sets and those that compute the same in portable vectors.
EMULATED = {"avx512_bf16": "avx2x16", "avx512_vnni": "avx2x16", "avxvnni": "avx2_vnni", "amx": "avx2_amx"}


def results_of(isas, x, weight, dtype):
    before, results = _library.cpu_isa(), []
    try:
        for isa in isas:
            torch.ops.revit_fast.select_cpu_isa(isa)
            results.append(ops.packed_linear(x, ops.pack_weight(weight, None, dtype)))
    finally:
        torch.ops.revit_fast.select_cpu_isa(before)
    return results


def needs(native):
    return pytest.param(
        native, marks=pytest.mark.skipif(native not in ALL_ISAS, reason=f"this CPU is without {native}")
    )


@pytest.mark.parametrize("native", [needs("avx512_bf16"), needs("amx")])
@pytest.mark.parametrize("exponents", [(0, 255), (40, 90), (100, 150)], ids=["any", "tiny", "common"])
def test_emulated_products_have_the_bits_of_the_instruction(native, exponents):
    """On random bits: denormals, infinities and NaN among them. The emulation is what other CPUs test."""
    generator = torch.Generator().manual_seed(exponents[1])

    def numbers(*shape):
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
        exponent = torch.randint(*exponents, shape, generator=generator, dtype=torch.int64) << 23
        return ((bits & ~(255 << 23)) | exponent).to(torch.int32).view(torch.float32)

    x, weight = numbers(200, 601), numbers(70, 601)
    x[::2] = torch.where(torch.rand(x[::2].shape, generator=generator) < 0.99, 0.0, x[::2])  # few terms: all bits count
    results = results_of((native, EMULATED[native]), x, weight, torch.bfloat16)
    ours, emulated = (torch.where(r.isnan(), 0.5, r) for r in results)
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(ours.view(torch.int32), emulated.view(torch.int32))
    assert ours.unique().numel() > 1000


@pytest.mark.parametrize("native", [needs(isa) for isa in EMULATED])
def test_emulated_integer_products_have_the_bits_of_the_instruction(native):
    x, weight = randn(200, 601) * torch.logspace(-3, 3, 601), randn(70, 601, seed=1)
    ours, emulated = results_of((native, EMULATED[native]), x, weight, torch.int8)
    assert torch.equal(ours, emulated)


@needs_extension
@pytest.mark.parametrize("depth", [1, 64, 147, 384, 512, 1000])
def test_int8_has_the_same_bits_on_every_instruction_set(depth):
    """Sums of a chain are exact integers, of pairs and of bytes alike; sums of several chains round by themselves."""
    x, weight = randn(50, depth), randn(70, depth, seed=1)
    first, *others = results_of(ALL_ISAS, x, weight, torch.int8)
    for isa, result in zip(ALL_ISAS[1:], others, strict=True):
        if depth <= 512:
            assert torch.equal(result, first), isa
        else:
            torch.testing.assert_close(result, first, rtol=1e-6, atol=1e-5)


INSTRUCTIONS = ("vdpbf16ps", "vpdpbusd", "tdpbf16ps", "tdpbusd", "tileloadd", "ldtilecfg", "tilerelease")


@needs_extension
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
def test_the_instructions_are_in_the_binary():
    binary = Path(_library.__file__).parents[1] / "_C.so"
    listing = subprocess.run(["objdump", "-d", binary], capture_output=True, text=True, check=True).stdout
    for instruction in INSTRUCTIONS:
        assert re.search(rf"\b{instruction}\b", listing), f"{instruction} is nowhere in the compiled code"


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_no_rows(isa, dtype):
    for depth, n_out in ((1, 1), (3, 16), (384, 100)):
        *_, packed = make(n_out, depth, dtype)
        assert ops.packed_linear(torch.empty(0, depth), packed, "gelu").shape == (0, n_out)
        arguments = (torch.empty(0, depth), *packed[:3], ACTIVATIONS.index("gelu"))
        assert _library.reference_ops["packed_linear"](*arguments).shape == (0, n_out)


def activated(values, activation):
    """The activation alone: of a layer of one weight, which is one."""
    return ops.packed_linear(values[:, None], ops.pack_weight(torch.ones(1, 1)), activation)[:, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activation_on_a_dense_grid(isa, activation):
    grid = torch.cat([torch.linspace(-8, 8, 40_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 1e4, -1e4])])
    truth = reference.activate(activation, grid.double())
    ours, same = (
        (got.double() - truth).abs() for got in (activated(grid, activation), reference.activate(activation, grid))
    )
    assert ours.max() <= 2 * same.max(), (
        f"error {ours.max():.3e} at {grid[ours.argmax()]}, torch {same.max():.3e} at {grid[same.argmax()]}"
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinity_and_nan_pass(isa, activation):
    inf, nan = float("inf"), float("nan")
    got = activated(torch.tensor([inf, nan, 1.0, 3e38, -nan]), activation)
    # Every one of them tends to the identity. Not asked of PyTorch: its gelu(inf) is NaN on some machines.
    one = reference.activate(activation, torch.tensor(1.0)).item()
    expected = torch.tensor([inf, nan, one, 3e38, nan])
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOAT_PACKED_DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_packing_keeps_the_weight(isa, weight_dtype, dtype):
    panel = cpu_panel()
    for n_out, depth in ((1, 1), (panel, 4), (panel + 1, 7), (100, 33), (384, 257)):
        weight, bias = randn(n_out, depth, dtype=weight_dtype), randn(n_out, seed=1, dtype=weight_dtype)
        packed = ops.pack_weight(weight, bias, dtype)
        n_panels = -(-n_out // panel)
        shape = (n_panels, depth, panel) if dtype == torch.float32 else (n_panels, -(-depth // 32) * 16, panel, 2)
        assert packed.n_out == n_out
        assert packed.panels.shape == shape
        assert packed.panels.dtype == dtype
        assert packed.panels.is_contiguous()
        assert torch.equal(unpack_weight(packed.panels, n_out, depth), weight.to(dtype))
        assert torch.equal(packed.bias[:n_out], bias.float())
        whole = unpack_weight(packed.panels, n_panels * panel, shape[1] * 2)
        assert not whole[n_out:].any(), "not zero beyond N"
        assert not whole[:, depth:].any(), "not zero beyond K"
        assert packed.bias.shape == (n_panels * panel,)
        assert not packed.bias[n_out:].any(), "bias is not zero beyond N"


def test_packing_of_views_and_parameters(isa):
    weight, bias = randn(40, 12), randn(40, seed=1)
    expected = ops.pack_weight(weight, bias)
    for other in (
        (weight.t().contiguous().t(), bias[:, None].expand(-1, 2)[:, 0]),
        (torch.nn.Parameter(weight), torch.nn.Parameter(bias)),
    ):
        packed = ops.pack_weight(*other)
        assert torch.equal(packed.panels, expected.panels)
        assert torch.equal(packed.bias, expected.bias)
        assert not packed.panels.requires_grad
        assert not packed.bias.requires_grad
    assert torch.equal(ops.pack_weight(weight).bias, ops.pack_weight(weight, torch.zeros(40)).bias)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("n_out", [64, 100])
def test_a_row_is_bitwise_the_same_in_any_batch(isa, n_out, dtype):
    """64 columns are whole panels of every instruction set, which are written in place."""
    *_, packed = make(n_out, 600, dtype)
    x = randn(150, 600)
    whole = ops.packed_linear(x, packed, "gelu")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    for rows in (*(slice(i, i + n) for n in (1, 2, 3, 5, 11, 13, 72, 75) for i in (0, 1, 75)), order, [7, 7, 7, 149]):
        assert torch.equal(ops.packed_linear(x[rows], packed, "gelu"), whole[rows]), f"rows {rows}"


@pytest.mark.parametrize("n_out", [64, 100])
def test_rows_do_not_touch_each_other(isa, n_out):
    *_, packed = make(n_out, 20)
    x = randn(80, 20)
    expected = ops.packed_linear(x, packed)
    x[::3] = float("nan")
    got = ops.packed_linear(x, packed)
    assert got[::3].isnan().all()
    for first in (1, 2):
        assert torch.equal(got[first::3], expected[first::3])


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_bitwise_for_any_number_of_threads(isa, dtype):
    before = torch.get_num_threads()
    for n_rows, n_out in ((1, 1000), (7, 384), (197, 64), (200, 100)):
        *_, packed = make(n_out, 300, dtype)
        x = randn(n_rows, 300)
        results = []
        try:
            for n_threads in (1, 2, 5):
                torch.set_num_threads(n_threads)
                results.append(ops.packed_linear(x, packed, "gelu"))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert torch.equal(result, results[0]), f"T={n_rows}, N={n_out}"


def test_non_contiguous_x(isa):
    *_, packed = make(100, 30)
    x = randn(20, 30)
    expected = ops.packed_linear(x, packed)
    for other in (x.t().contiguous().t(), x.new_zeros(20, 60)[:, ::2].copy_(x), x.new_zeros(40, 30)[::2].copy_(x)):
        assert not other.is_contiguous()
        assert torch.equal(ops.packed_linear(other, packed), expected)
    assert torch.equal(ops.packed_linear(x[:1].expand(5, -1), packed), expected[:1].expand(5, -1))


def test_no_gradient_flows(isa):
    *_, packed = make(16, 8)
    x = randn(3, 8)
    out = ops.packed_linear(x.requires_grad_(), packed)
    assert not out.requires_grad
    assert torch.equal(out, ops.packed_linear(x.detach(), packed))


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_opcheck(isa, dtype):
    *_, packed = make(20, 7, dtype)
    for n_rows in (5, 0):
        arguments = (randn(n_rows, 7), *packed[:3], ACTIVATIONS.index("gelu"))
        torch.library.opcheck(torch.ops.revit_fast.packed_linear, arguments)


@needs_extension
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_panels_of_another_instruction_set_are_refused(isa, dtype):
    *_, packed = make(100, 24, dtype)
    x, panel = randn(5, 24), cpu_panel()
    expected = ops.packed_linear(x, packed)
    others = 0
    for other in ALL_ISAS:
        torch.ops.revit_fast.select_cpu_isa(other)
        if cpu_panel() != panel:
            others += 1
            with pytest.raises(RuntimeError, match=f"panels must be .* in use, {other}.*pack it again"):
                ops.packed_linear(x, packed)
    torch.ops.revit_fast.select_cpu_isa(isa)
    assert torch.equal(ops.packed_linear(x, packed), expected)
    if others == 0:
        pytest.skip("this machine has one width of panels")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (lambda: {"weight": [[1.0]]}, TypeError, "weight"),
        (lambda: {"weight": torch.zeros(4, 3, dtype=torch.int8)}, TypeError, "weight"),
        (lambda: {"weight": torch.zeros(3)}, ValueError, "weight"),
        (lambda: {"weight": torch.zeros(4, 3, 1, 1)}, ValueError, "weight"),
        (lambda: {"weight": torch.zeros(4, 0)}, ValueError, "weight"),
        (lambda: {"weight": torch.zeros(0, 3), "bias": None}, ValueError, "weight"),
        (lambda: {"bias": 0.0}, TypeError, "bias"),
        (lambda: {"bias": torch.zeros(4, dtype=torch.int64)}, TypeError, "bias"),
        (lambda: {"bias": torch.zeros(4, 1)}, ValueError, "bias"),
        (lambda: {"bias": torch.zeros(3)}, ValueError, "bias"),
        (lambda: {"dtype": torch.float16}, TypeError, "dtype"),
        (lambda: {"dtype": "float32"}, TypeError, "dtype"),
    ],
)
def test_bad_inputs_of_pack_weight_are_named(changes, error, match):
    arguments = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4), "dtype": torch.float32}
    with pytest.raises(error, match=f"^{match}: "):
        ops.pack_weight(**{**arguments, **changes()})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (lambda: {"x": [[1.0]]}, TypeError, "x"),
        (lambda: {"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x"),
        (lambda: {"x": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "x"),
        (lambda: {"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, TypeError, "x"),
        (lambda: {"x": torch.zeros(3)}, ValueError, "x"),
        (lambda: {"x": torch.zeros(1, 2, 3)}, ValueError, "x"),
        (lambda: {"activation": "swish"}, ValueError, "activation"),
        (lambda: {"activation": None}, ValueError, "activation"),
    ],
)
def test_bad_inputs_of_packed_linear_are_named(isa, changes, error, match):
    arguments = {"x": torch.zeros(2, 3), "weight": ops.pack_weight(torch.zeros(4, 3)), "activation": "gelu"}
    with pytest.raises(error, match=f"^{match}: "):
        ops.packed_linear(**{**arguments, **changes()})


@needs_extension
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (lambda packed: {"n_out": 0}, "n_out must be positive, got 0"),
        (lambda packed: {"n_out": 1000}, r"weight \[1000, 6\] .* pack it again"),
        (lambda packed: {"panels": packed.panels.double()}, "panels"),
        (lambda packed: {"panels": packed.panels[0]}, "panels"),
        (lambda packed: {"panels": packed.panels[:, :-1]}, "panels"),
        (lambda packed: {"panels": packed.panels[:, :-1].contiguous()}, r"weight \[20, 6\] .* pack it again"),
        (lambda packed: {"bias": packed.bias[1:]}, "bias"),
        (lambda packed: {"bias": packed.bias[:, None]}, "bias"),
        (lambda packed: {"bias": packed.bias.double()}, "bias"),
    ],
)
def test_weights_that_were_not_packed_so_are_refused(isa, changes, match, dtype):
    *_, packed = make(20, 6, dtype)
    with pytest.raises(RuntimeError, match=match):
        ops.packed_linear(torch.zeros(2, 6), PackedWeight(**{**packed._asdict(), **changes(packed)}))


@needs_extension
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_another_depth_is_refused(isa, dtype):
    *_, packed = make(20, 6, dtype)
    for depth in (1, 4, 5, 8, 60, 200):
        with pytest.raises(ValueError, match=rf"x: expected 6 columns, as the weight has, got shape \[2, {depth}\]"):
            ops.packed_linear(torch.zeros(2, depth), packed)
    with pytest.raises(RuntimeError, match=r"weight \[20, 200\] .* pack it again"):
        ops.packed_linear(torch.zeros(2, 200), packed._replace(depth=200))


@needs_extension
def test_unknown_number_of_an_activation_is_refused(isa):
    *_, packed = make(20, 6)
    for number in (-1, len(ACTIVATIONS)):
        with pytest.raises(RuntimeError, match=f"activation must be in .*, got {number}"):
            torch.ops.revit_fast.packed_linear(torch.zeros(2, 6), *packed[:3], number)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells the size of pages")
def test_weights_lie_on_huge_pages():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system has no transparent huge pages")
    memory = huge_pages(16 << 20)
    assert memory.data_ptr() % (2 << 20) == 0
    assert memory.numel() == 16 << 20
    assert not memory.any()
    memory.fill_(1)
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds and int(bounds[1], 16) <= memory.data_ptr() < int(bounds[2], 16):
            huge_kib = next(int(entry.split()[1]) for entry in lines if entry.startswith("AnonHugePages"))
            assert huge_kib >= 8 << 10, "most of it, where memory is not in pieces"
            return
    raise AssertionError("the memory is in no mapping")

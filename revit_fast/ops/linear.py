"""Linear layers with weights that are packed once, for inference on the CPU."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu", "quick_gelu")
"""Names of the activations, indexed by the kernels' numbers for them (`Activation` in csrc/cpu/linear.h)."""

FLOAT_PACKED_DTYPES = (torch.float32, torch.bfloat16)
PACKED_DTYPES = (*FLOAT_PACKED_DTYPES, torch.int8)

MAX_CHAIN, CHAIN_UNIT = 512, 64
"""The longest part of a row that is quantized with one scale, and the unit that its length is a multiple of."""

LINE = 64
"""Bytes of a cache line. A column of narrow weights is padded to whole lines."""

LARGEST = 127
"""The largest integer: the range is symmetric, [-127, 127]."""

LEAST_SCALED = 2.0**-119
"""Rows whose largest value is below this are quantized to zero."""


class PackedWeight(NamedTuple):
    """A linear layer's weight as the CPU kernels read it.

    Attributes:
        panels: float32 `[N / p, K, p]`, panels of p columns of the transposed weight, where p depends on the
            instruction set in use (`cpu_panel`); or bfloat16 or int8 `[N / p, K / d, p, d]` with d depths side by side,
            where K is rounded up to 32 (bfloat16) or 64 (int8), and d is 2, or for int8 `cpu_integer_depths`. Zero
            beyond N and K.
        bias: float32 `[N]` with N rounded up to whole panels, zero beyond; with int8 panels `[2, N]`, where the second
            row holds the scales: weight `[n, k]` is the integer times scale n. If d is 4, one more row follows for
            every chain (`chain_length`): -128 times the sum of its integers. It takes off what the rows are raised by
            to become unsigned.
        n_out: N, the number of outputs.
        depth: K, the number of inputs.
    """

    panels: Tensor
    bias: Tensor
    n_out: int
    depth: int


def cpu_panel() -> int:
    """Columns of a panel for the instruction set in use."""
    return torch.ops.revit_fast.cpu_panel() if _library.HAS_EXTENSION else 16


def cpu_multiplies_bf16() -> bool:
    """Whether products with bfloat16 weights are of bfloat16, by the instruction set in use (see `packed_linear`)."""
    return _library.HAS_EXTENSION and torch.ops.revit_fast.cpu_multiplies_bf16()


def cpu_integer_depths() -> int:
    """Depths side by side in int8 panels for the instruction set in use: 4 where it multiplies bytes (VNNI), else 2."""
    return torch.ops.revit_fast.cpu_integer_depths() if _library.HAS_EXTENSION else 2


def cpu_untried(dtype: torch.dtype) -> bool:
    """Whether products of a dtype, by the instruction set in use, were only tested in emulation before a release."""
    untried = {torch.bfloat16: ("amx",), torch.int8: ("amx", "avxvnni")}
    return _library.cpu_isa() in untried.get(dtype, ())


def pack_weight(
    weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32, scale: Tensor | None = None
) -> PackedWeight:
    """Packs a linear layer for `packed_linear`, for the instruction set in use.

    Args:
        weight: `[N, K]` of any float dtype, on the CPU.
        bias: `[N]`; None for zero.
        dtype: dtype of the packed weight: float32, bfloat16 or int8. int8 is symmetric with a scale for every row of
            the weight; an output whose row is not finite is NaN. `packed_linear` says what becomes of x.
        scale: float32 `[N]`, the scales for int8; by default max |W| / 127. Other dtypes have none.

    Raises:
        TypeError: for a dtype that is not one of these, or an argument that is not a tensor.
        ValueError: for shapes that do not belong together, or a weight without rows or columns.
    """
    _checks.check_rows("weight", weight, "[N, K]")
    if 0 in weight.shape:
        raise ValueError(f"weight: expected at least one row and one column, got shape {list(weight.shape)}")
    if dtype not in PACKED_DTYPES:
        raise TypeError(f"dtype: expected torch.float32, torch.bfloat16 or torch.int8, got {dtype}")
    n_out, depth = weight.shape
    if bias is not None:
        _checks.check_rows("bias", bias, "[N]")
        if bias.shape[0] != n_out:
            raise ValueError(f"bias: expected shape [{n_out}] like the rows of weight, got {list(bias.shape)}")
    panel, depths = cpu_panel(), {torch.float32: 1, torch.bfloat16: 2, torch.int8: cpu_integer_depths()}[dtype]
    columns = -(-n_out // panel) * panel
    unit = 1 if dtype == torch.float32 else LINE // dtype.itemsize
    with torch.no_grad():
        if dtype == torch.int8:
            weight, scale = quantize_weight(weight, scale)
            rows = [bias, scale, *(offsets(weight) if depths == 4 else ())]
        else:
            rows = [bias]
        vectors = torch.zeros(len(rows), columns, dtype=torch.float32, device="cpu")
        for vector, row in zip(vectors, rows, strict=True):
            if row is not None:
                vector[:n_out] = row
        wide = torch.zeros(columns, -(-depth // unit) * unit, dtype=dtype, device="cpu")
        wide[:n_out, :depth] = weight
        panels = wide.view(-1, panel, wide.shape[1] // depths, depths).permute(0, 2, 1, 3)
        panels = panels.squeeze(3) if dtype == torch.float32 else panels
        return PackedWeight(panels.contiguous(), vectors if dtype == torch.int8 else vectors[0], n_out, depth)


def offsets(integers: Tensor) -> Tensor:
    """What to add to the sums of each chain `[chains, N]` of an integer weight `[N, K]` if rows are raised by 128."""
    chains = integers.split(chain_length(integers.shape[1]), 1)
    return torch.stack([-128.0 * chain.sum(1, dtype=torch.float32) for chain in chains])


def quantize_weight(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers of a weight `[N, K]` and the float32 scale `[N]` of every row, NaN where a row is not finite.

    Args:
        weight: the weight.
        scale: the scales; by default max |W| / 127.
    """
    weight = weight.double()
    if scale is None:
        scale = weight.abs().amax(1).float() / LARGEST
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    integers = (weight / scale.double().unsqueeze(1)).round().nan_to_num(0).clamp(-LARGEST, LARGEST)
    return integers.to(torch.int8), scale


def chain_length(depth: int) -> int:
    """Number of values that share a scale in a row of `depth` values (`chain_of` in csrc/cpu/linear.inl.h)."""
    n_chains = max(1, -(-depth // MAX_CHAIN))
    return -(-depth // (n_chains * CHAIN_UNIT)) * CHAIN_UNIT


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of rows `[T, K]` as the kernels round them, in float32, and the scales `[T, chains]`.

    The scale is the largest magnitude of a chain over 127. Halfway cases go to the even integer; a row that is not
    finite has scale NaN and integers zero.
    """
    chain = chain_length(x.shape[1])
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % chain)).unflatten(1, (-1, chain))
    largest = padded.abs().amax(2)
    scaled = (largest >= LEAST_SCALED) & largest.isfinite()
    whole = torch.full_like(largest, LARGEST)  # number / tensor would multiply by a reciprocal
    inverse = torch.where(scaled, whole / largest, 0)
    integers = (padded * inverse.unsqueeze(2)).round().nan_to_num(0)
    scale = torch.where(scaled, largest / LARGEST, torch.where(largest.isfinite(), 0, torch.nan))
    return integers.flatten(1)[:, : x.shape[1]], scale


def round_rows(x: Tensor) -> Tensor:
    """Rows `[T, K]` as rounded for int8 weights: their integers times their scales, in the dtype of x."""
    integers, scale = quantize_rows(x)
    scale = scale.repeat_interleave(chain_length(x.shape[1]), 1)[:, : x.shape[1]]
    return integers.to(x.dtype) * scale.to(x.dtype)


def huge_pages(n_bytes: int) -> Tensor:
    """Zeroed memory, uint8 `[n_bytes]`, on pages of 2 MiB where the system has them.

    A forward pass reads all weights front to back; with pages of 4 KiB, address translation takes a seventh of its
    time.
    """
    page = 2 << 20
    # The memory is private because shared memory, the default, gets pages of 4 KiB.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, n_bytes + page, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.narrow(0, -flat.data_ptr() % page, n_bytes)


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors in one piece of memory of huge pages, in this order, each at the beginning of a cache line."""
    sizes = [-(-t.nbytes // LINE) * LINE for t in tensors]
    places = huge_pages(sum(sizes)).split(sizes)
    return [place[: t.nbytes].view(t.dtype).view(t.shape).copy_(t) for place, t in zip(places, tensors, strict=True)]


def unpack_weight(panels: Tensor, n_out: int, depth: int) -> Tensor:
    """The weight `[N, K]` that was packed; for int8 panels its integers."""
    rows = panels.permute(0, 2, 1) if panels.dim() == 3 else panels.permute(0, 2, 1, 3)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)[:n_out, :depth]


def packed_linear(x: Tensor, weight: PackedWeight, activation: str = "none") -> Tensor:
    """activation(x Wᵀ + b) with a packed weight; a row's result is bitwise the same in every batch.

    With a bfloat16 weight, and where the CPU has instructions for it (`cpu_multiplies_bf16`), x is rounded to bfloat16
    too, to nearest even; denormals of either count as zero. The products are summed in float32. On other CPUs the
    weight is widened when it is read, and x is not rounded.

    With an int8 weight, a row of x is first rounded to 8-bit integers, with one scale for every part of at most 512
    values (max |x| / 127, ties to even). The products are summed exactly as integers within each part, and the parts
    are added in float32. A row that holds an infinity or NaN gives NaN; a row below 2^-119 counts as zero.

    Args:
        x: float32 `[T, K]` on the CPU.
        weight: from `pack_weight`.
        activation: "none", "gelu", "gelu_tanh", "silu", "relu" or "quick_gelu".

    Returns:
        float32 `[T, N]`. No gradient flows through it.

    Raises:
        TypeError, ValueError: for an x of another dtype or shape, or an unknown activation.
        RuntimeError: for panels of another instruction set.
    """
    _checks.check_rows("x", x)
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {x.dtype}; use x.float()")
    if x.shape[1] != weight.depth:
        raise ValueError(f"x: expected {weight.depth} columns, as the weight has, got shape {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    index = ACTIVATIONS.index(activation)
    with torch.no_grad():
        return _library.call("packed_linear", x, weight.panels, weight.bias, weight.n_out, index)


@torch.library.register_fake("revit_fast::packed_linear")
def _(x, panels, bias, n_out, activation):
    return x.new_empty(x.shape[0], n_out)


def unpacked(panels: Tensor, bias: Tensor, n_out: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight `[N, K]` and bias `[N]` of a packed layer; int8 weights are scaled."""
    weight = unpack_weight(panels, n_out, depth).to(dtype)
    if panels.dtype != torch.int8:
        return weight, bias[:n_out].to(dtype)
    return weight * bias[1, :n_out, None].to(dtype), bias[0, :n_out].to(dtype)


def _reference(x, panels, bias, n_out, activation):
    weight, bias = unpacked(panels, bias, n_out, x.shape[1], x.dtype)
    x = round_rows(x) if panels.dtype == torch.int8 else x
    return reference.activate(ACTIVATIONS[activation], x @ weight.t() + bias)


_library.register_fallback("packed_linear", _reference)

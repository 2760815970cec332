"""Linear layers on weights that were packed once, for inference on the CPU."""

from __future__ import annotations

import contextlib
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _checks, _library

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
"""Names by the number that the kernels know them by (`Activation` in csrc/cpu/linear.h)."""

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedWeight(NamedTuple):
    """A linear layer's weight as the CPU kernels read it.

    Attributes:
        panels: float32 `[N / p, K, p]`, panels of p columns of the transposed weight, p being that of the instruction
            set in use (`cpu_panel`); or bfloat16 `[N / p, K / 2, p, 2]`, two depths side by side. Zero beyond N and K.
        bias: float32 `[N]`, N rounded up to whole panels, zero beyond.
        n_out: N.
    """

    panels: Tensor
    bias: Tensor
    n_out: int


def cpu_panel() -> int:
    """Columns of a panel for the instruction set in use."""
    return torch.ops.revit_fast.cpu_panel() if _library.HAS_EXTENSION else 16


def pack_weight(weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> PackedWeight:
    """Packs a linear layer for `packed_linear`, for the instruction set in use.

    Args:
        weight: `[N, K]` of any float dtype, on the CPU.
        bias: `[N]`; None for zero.
        dtype: float32 or bfloat16 of the packed weight; bfloat16 is widened as it is read, so products are float32's.

    Raises:
        TypeError: for a dtype that is not one of these, or an argument that is no tensor.
        ValueError: for shapes that do not belong together.
    """
    _checks.check_rows("weight", weight, "[N, K]")
    if dtype not in PACKED_DTYPES:
        raise TypeError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    n_out, depth = weight.shape
    if bias is not None:
        _checks.check_rows("bias", bias, "[N]")
        if bias.shape[0] != n_out:
            raise ValueError(f"bias: expected shape [{n_out}] like the rows of weight, got {list(bias.shape)}")
    panel = cpu_panel()
    with torch.no_grad():
        padded = -(-n_out // panel) * panel
        wide = torch.zeros(padded, depth + depth % 2 if dtype == torch.bfloat16 else depth, dtype=dtype, device="cpu")
        wide[:n_out, :depth] = weight
        if dtype == torch.bfloat16:
            panels = wide.view(-1, panel, wide.shape[1] // 2, 2).permute(0, 2, 1, 3)
        else:
            panels = wide.view(-1, panel, depth).permute(0, 2, 1)
        wide_bias = torch.zeros(padded, dtype=torch.float32, device="cpu")
        if bias is not None:
            wide_bias[:n_out] = bias
        return PackedWeight(panels.contiguous(), wide_bias, n_out)


def huge_pages(n_bytes: int) -> Tensor:
    """Zeroed memory, uint8 `[n_bytes]`, on pages of 2 MiB where the system has them.

    A forward pass reads all weights front to back; on pages of 4 KiB a seventh of its time goes into their addresses.
    """
    page = 2 << 20
    # Private: shared memory, the default, gets pages of 4 KiB.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, n_bytes + page, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.narrow(0, -flat.data_ptr() % page, n_bytes)


def unpack_weight(panels: Tensor, n_out: int, depth: int) -> Tensor:
    """The weight `[N, K]` that was packed."""
    rows = panels.permute(0, 2, 1) if panels.dim() == 3 else panels.permute(0, 2, 1, 3)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)[:n_out, :depth]


def packed_linear(x: Tensor, weight: PackedWeight, activation: str = "none") -> Tensor:
    """activation(x Wᵀ + b) on a packed weight; a row's result is bitwise the same in every batch.

    Args:
        x: float32 `[T, K]` on the CPU.
        weight: from `pack_weight`.
        activation: "none", "gelu", "gelu_tanh", "silu" or "relu".

    Returns:
        float32 `[T, N]`. No gradient flows through it.

    Raises:
        TypeError, ValueError: for an x of another dtype or shape, or an unknown activation.
        RuntimeError: for panels of another instruction set or depth.
    """
    _checks.check_rows("x", x)
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {x.dtype}; use x.float()")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    index = ACTIVATIONS.index(activation)
    with torch.no_grad():
        return torch.ops.revit_fast.packed_linear.default(x, weight.panels, weight.bias, weight.n_out, index)


@torch.library.register_fake("revit_fast::packed_linear")
def _(x, panels, bias, n_out, activation):
    return x.new_empty(x.shape[0], n_out)


def _reference(x, panels, bias, n_out, activation):
    weight = unpack_weight(panels, n_out, x.shape[1]).to(x.dtype)
    return reference.activate(ACTIVATIONS[activation], x @ weight.t() + bias[:n_out].to(x.dtype))


_library.register_fallback("packed_linear", _reference)

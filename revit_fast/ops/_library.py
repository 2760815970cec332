"""The op library: the C++ extension if it was built, otherwise the plain-PyTorch reference with the same schemas.

Kernels are chosen by PyTorch's dispatcher: CPU from the extension, CUDA from `revit_fast.kernels`. An op without a
kernel in the extension, such as `rotary`, runs the reference on a CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from torch.autograd import forward_ad

from revit_fast.ops._modes import refuse_examples, without_autocast

# The schemas of csrc/library.cpp, for installations without the extension. A test checks that the two are equal.
SCHEMAS = (
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, float scale, bool causal, Tensor? tiles, SymInt[] tile_counts) -> (Tensor out, Tensor lse)",
    "varlen_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float scale, bool causal, Tensor? tiles, SymInt[] tile_counts) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    "tal_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, Tensor length_index, float eps, "
    "Tensor? tiles) -> (Tensor y, Tensor mean, Tensor rstd)",
    "tal_layer_norm_residual(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor cu_seqlens, "
    "Tensor length_index, float eps, Tensor? tiles) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    "tal_layer_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor? mean, Tensor rstd, "
    "Tensor cu_seqlens, Tensor length_index, Tensor? tiles) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    "assemble_tokens(Tensor patches, Tensor prefix, Tensor pos_table, Tensor pos_offset, Tensor cu_seqlens) -> Tensor",
    "assemble_tokens_backward(Tensor grad_tokens, Tensor pos_table, Tensor pos_offset, Tensor cu_seqlens, "
    "SymInt n_prefix) -> (Tensor grad_patches, Tensor grad_prefix, Tensor grad_pos_table)",
    "mean_pool(Tensor x, Tensor cu_seqlens, SymInt skip) -> Tensor",
    "mean_pool_backward(Tensor grad_out, Tensor cu_seqlens, SymInt skip, SymInt n_rows) -> Tensor",
    "resize_patchify(Tensor[] images, Tensor boxes, Tensor sizes, SymInt patch_size, Tensor? table, bool bicubic, "
    "SymInt n_rows) -> Tensor",
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool half, bool inverse) -> (Tensor turned_q, Tensor turned_k)",
    "packed_linear(Tensor x, Tensor panels, Tensor bias, SymInt n_out, SymInt activation) -> Tensor",
    "vit_forward(Tensor rows, Tensor cu_seqlens, Tensor length_index, Tensor pos_offset, Tensor pos_table, "
    "Tensor prefix, Tensor[] weights, Tensor descriptor, SymInt n_pooled, Tensor? rope=None) -> Tensor",
)

HOW_TO_BUILD = "install a C++17 compiler (g++ or clang++) and reinstall: pip install --no-build-isolation ."


def _load_extension() -> bool:
    """Loads `revit_fast/_C`; False where it was not built. An existing library that cannot be loaded is an error."""
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not found or os.environ.get("REVIT_FAST_NO_EXTENSION") == "1":
        return False
    torch.ops.load_library(found[0])
    return True


HAS_EXTENSION = _load_extension()

if HAS_EXTENSION:
    _wanted, _available = os.environ.get("REVIT_FAST_ISA"), torch.ops.revit_fast.cpu_isas().split()
    if _wanted and _wanted not in _available:
        raise ImportError(
            f"REVIT_FAST_ISA: {_wanted!r} cannot be executed here; this machine has {', '.join(_available)}"
        )
else:
    warnings.warn(
        f"revit_fast: the C++ extension is not built, CPU ops run the slow PyTorch reference; {HOW_TO_BUILD}",
        RuntimeWarning,
        stacklevel=2,
    )

_kernels = torch.library.Library("revit_fast", "IMPL" if HAS_EXTENSION else "DEF")
for _schema in () if HAS_EXTENSION else SCHEMAS:
    _kernels.define(_schema)


reference_ops: dict[str, Callable] = {}
"""Every op as a function that uses `revit_fast.reference`, on any device."""


def register_fallback(name: str, function: Callable, *, in_extension: bool = True) -> None:
    """Registers `function`, which uses `revit_fast.reference`, as op `name`'s CPU kernel if there is no other.

    Args:
        name: the op.
        function: takes the arguments of the op's schema.
        in_extension: whether the extension has a CPU kernel of the op.
    """
    reference_ops[name] = function
    if not (HAS_EXTENSION and in_extension):

        @wraps(function)
        def in_own_precision(*args):
            with without_autocast():
                return function(*args)

        _kernels.impl(name, in_own_precision, "CPU")


def call(name: str, *args):
    """Calls the op `name`, whose derivatives are for reverse mode alone.

    PyTorch would treat its result as a constant in forward mode: a tangent would silently be zero.

    Raises:
        NotImplementedError: in forward mode, under a transform of `torch.func`, in `torch.jit.trace` and
            `torch.onnx.export`.
    """
    refuse_examples(f"revit_fast::{name}")
    if not torch.compiler.is_compiling():
        _refuse_transforms(name, [arg for arg in args if isinstance(arg, torch.Tensor)])
    return getattr(torch.ops.revit_fast, name).default(*args)


def _refuse_transforms(name: str, tensors: list[torch.Tensor]) -> None:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"revit_fast::{name}: forward-mode derivatives (torch.func.jvp, jacfwd, dual tensors) are not implemented; "
            "use backward(), torch.autograd.grad or torch.autograd.functional.jacobian"
        )
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        raise NotImplementedError(
            f"revit_fast::{name}: transforms of torch.func (grad, vjp, jacrev, vmap) are not implemented; use "
            "backward() or torch.autograd.functional.jacobian, and instead of vmap one pack of all sequences"
        )


class _DifferentiableOnce(torch.autograd.Function):
    """Calls an op whose results must not be differentiated."""

    @staticmethod
    def forward(ctx, name, *args):
        ctx.name = name
        return getattr(torch.ops.revit_fast, name).default(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"revit_fast::{ctx.name}: gradients of gradients are not implemented; run what needs them on "
            "revit_fast.reference, which PyTorch differentiates as often as needed"
        )


def call_backward(name: str, *args):
    """Calls the backward op `name` for autograd; differentiating its result raises an error.

    The ops have no second derivatives, and PyTorch would treat their results as constants: a gradient penalty would
    silently have no effect.
    """
    if torch.is_grad_enabled():  # with create_graph only
        return _DifferentiableOnce.apply(name, *args)
    return getattr(torch.ops.revit_fast, name).default(*args)


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use: avx512, avx2, baseline, or reference without the extension."""
    return torch.ops.revit_fast.cpu_isa() if HAS_EXTENSION else "reference"


def cpu_isas() -> list[str]:
    """Instruction sets of the CPU kernels that this machine can execute, best first."""
    return torch.ops.revit_fast.cpu_isas().split() if HAS_EXTENSION else []

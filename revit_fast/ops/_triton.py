"""The Triton kernels behind the ops' CUDA key (which is ROCm's too), imported when an op first meets such a tensor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from revit_fast.ops import _library

KERNELS = {
    "varlen_attention": "attention",
    "varlen_attention_backward": "attention_backward",
    "tal_layer_norm": "layer_norm",
    "tal_layer_norm_residual": "layer_norm",
    "tal_layer_norm_backward": "layer_norm",
    "assemble_tokens": "tokens",
    "assemble_tokens_backward": "tokens",
    "mean_pool": "tokens",
    "mean_pool_backward": "tokens",
}
"""Module of `revit_fast.kernels` with the function of each op: its name is the op's, its arguments the schema's."""

OLDEST_TRITON = (3, 5)


def load(module: str) -> ModuleType:
    """Imports a module of `revit_fast.kernels`.

    Raises:
        ImportError: where Triton is missing or older than the kernels need; names the fix.
    """
    fix = f'pip install "triton>={".".join(map(str, OLDEST_TRITON))}" (Windows: triton-windows), or move to the CPU'
    try:
        import triton
    except ImportError:
        raise ImportError(f"revit_fast's GPU kernels need Triton, which is not installed: {fix}") from None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        raise ImportError(f"revit_fast's GPU kernels do not run on Triton {triton.__version__}: {fix}")
    return importlib.import_module(f"revit_fast.kernels.{module}")


def _launcher(name: str, module: str) -> Callable:
    def launch(*args):
        floating = next(a for a in args if isinstance(a, Tensor))
        if floating.dtype == torch.float64:  # not a GPU's trade: the reference serves gradient checks
            return _library.reference_ops[name](*args)
        return getattr(load(module), name)(*args)

    return launch


def register(key: str = "CUDA") -> None:
    """Puts the kernels behind a dispatch key; "CPU" is for Triton's interpreter, where they run on CPU tensors."""
    for name, module in KERNELS.items():
        _implementations.impl(name, _launcher(name, module), key)


_implementations = torch.library.Library("revit_fast", "IMPL")

"""Registers the Triton kernels for the ops' CUDA key (also ROCm's); they are imported when an op first needs them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from revit_fast.ops import _backends, _library

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
    "rotary": "rotary",
}
"""Module of `revit_fast.kernels` with the function of each op; it has the op's name and the schema's arguments."""


@functools.cache
def load(module: str) -> ModuleType:
    """Imports a module of `revit_fast.kernels`; raises an ImportError that names the fix if Triton is unusable."""
    _backends.require_triton()
    return importlib.import_module(f"revit_fast.kernels.{module}")


def _launcher(name: str, module: str) -> Callable:
    def launch(*args):
        floating = next(a for a in args if isinstance(a, Tensor))
        if floating.dtype == torch.float64:  # no kernel computes float64: gradient checks use the reference
            return _library.reference_ops[name](*args)
        implementation = _backends.selected_implementation(name) or getattr(load(module), name)
        return implementation(*args)

    return launch


def register(key: str = "CUDA", library: torch.library.Library | None = None) -> None:
    """Registers the kernels for a dispatch key; "CPU" is for Triton's interpreter, where they run on CPU tensors.

    Args:
        key: dispatch key.
        library: library that keeps the registration alive; by default it lasts as long as the process.
    """
    for name, module in KERNELS.items():
        (library or _implementations).impl(name, _launcher(name, module), key)


_implementations = torch.library.Library("revit_fast", "IMPL")

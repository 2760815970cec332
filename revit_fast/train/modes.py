"""Training under the caller's modes of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from revit_fast.layers.derived import check_versioned
from revit_fast.ops._modes import as_saved, without_autocast

P = ParamSpec("P")
T = TypeVar("T")


def check_trainable(module: nn.Module, name: str) -> None:
    """Raises a ValueError for parameters that cannot be trained: those on the meta device, and inference tensors."""
    check_versioned(module)
    empty = next((own for own, parameter in module.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise ValueError(f"{name}: {empty} has no values, it is on the meta device; make it with torch.device('cpu')")


def in_training_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a function that trains as if the caller had set no mode: with gradients, and autocast as configured alone.

    Models are made in the default dtype, as elsewhere in PyTorch. float64 trains as float32 does. A default of 16 bits
    would round weights, targets and updates without a word, so it is refused.

    Raises (the function):
        ValueError: for a default dtype of 16 bits.
    """

    @wraps(function)
    def trained(*args: P.args, **options: P.kwargs) -> T:
        dtype = torch.get_default_dtype()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"torch.set_default_dtype: expected torch.float32 or torch.float64 for training, got {dtype}; set "
                'torch.float32, and amp="bfloat16" in the configuration to multiply in bfloat16'
            )
        with as_saved(), torch.enable_grad(), without_autocast("cpu"), without_autocast("cuda"):
            return function(*args, **options)

    return trained

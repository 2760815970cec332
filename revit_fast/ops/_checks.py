"""Checks of the arguments that all packed ops take: rows, `cu_seqlens` and per-sequence indices."""

from __future__ import annotations

import torch
from torch import Tensor

from revit_fast.packing.tensors import FLOAT_DTYPES, check_plain


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor, or the type of anything else, for an error message."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    return type(value).__name__


def check_rows(name: str, value: Tensor, axes: str = "[T, C]") -> None:
    """Raises unless `value` is a floating tensor of as many dimensions as `axes` names."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {axes}, got {describe(value)}")
    check_plain(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}; convert it with {name}.float()"
        )
    if value.dim() != axes.count(",") + 1:
        raise ValueError(f"{name}: expected shape {axes}, got {describe(value)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, shape: tuple | None = None) -> None:
    """Raises unless `value` is a tensor with the dtype and device of `other`, and `shape` if that is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    check_plain(name, value)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected {other.dtype} like {other_name}, got {value.dtype}; use {name}.to({other_name}.dtype)"
        )
    check_device(name, value, other_name, other)
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless both tensors are on the same device."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected a tensor on {other.device} like {other_name}, got {describe(value)}; "
            f"use {name}.to({other_name}.device)"
        )


def check_index(name: str, value: Tensor, other_name: str, other: Tensor, axes: str) -> None:
    """Raises unless `value` is an int32 vector on the device of `other`. Its contents are checked by the kernel."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int32 tensor {axes}, got {describe(value)}")
    check_plain(name, value)
    if value.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {value.dtype}; use {name}.to(torch.int32)")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected shape {axes}, got {describe(value)}")
    check_device(name, value, other_name, other)


def check_cu_seqlens(value: Tensor, other_name: str, other: Tensor, name: str = "cu_seqlens") -> None:
    """Raises unless `value` can be the `cu_seqlens` of `other`."""
    check_index(name, value, other_name, other, "[B + 1]")
    if value.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [B + 1], got an empty tensor; an empty batch is [0]")


def check_per_sequence(name: str, value: Tensor, cu_seqlens: Tensor) -> None:
    """Raises unless `value` is an int32 vector with one entry for each sequence of `cu_seqlens`."""
    check_index(name, value, "cu_seqlens", cu_seqlens, "[B]")
    if value.shape[0] != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"{name}: expected one entry for each of the {cu_seqlens.shape[0] - 1} sequences of cu_seqlens, "
            f"got {value.shape[0]}"
        )

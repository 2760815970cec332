"""Which tensors the package reads: plain ones in strided memory, pixels in floats."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.masked import MaskedTensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_plain(name: str, value: Tensor) -> None:
    """Raises a TypeError unless a tensor is a plain one in strided memory; it says what to give instead."""
    strided = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    if strided and type(value) in (Tensor, nn.Parameter):
        return
    if value.is_nested:
        rows = f"{name}.values()" if value.layout is torch.jagged else f"torch.cat({name}.unbind())"
        found, fix = "a nested tensor", f"{rows} with cu_seqlens, or PackedBatch.from_list({name}.unbind(), grids=...)"
    elif isinstance(value, MaskedTensor):
        found, fix = "a masked tensor", f"{name}.to_tensor(0.0), or a pack of the rows that count"
    elif hasattr(value, "full_tensor"):
        found, fix = "a distributed tensor", f"{name}.to_local() or {name}.full_tensor()"
    elif value.is_quantized:
        found, fix = f"a quantized tensor ({value.dtype})", f"{name}.dequantize()"
    elif not strided:
        found, fix = f"a tensor of layout {value.layout}", f"{name}.to_dense()"
    else:
        return  # a subclass of strided memory, such as torchvision's Image
    raise TypeError(f"{name}: expected a plain tensor, got {found}; give {fix}")


def as_list(items: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The tensors of a list or of a nested tensor; those of another tensor along its first axis."""
    return list(items.unbind() if isinstance(items, Tensor) else items)


def check_pixels(name: str, dtype: torch.dtype, raw: bool = False) -> None:
    """Raises a TypeError unless a dtype is that of normalised pixels, or of raw ones whose normalisation is known.

    Args:
        name: name of the images, for the message.
        dtype: their dtype.
        raw: whether a normalisation comes with them, so that they may be uint8.
    """
    if dtype in FLOAT_DTYPES or (raw and dtype == torch.uint8):
        return
    if dtype == torch.uint8:
        raise TypeError(
            f"{name}: expected normalised pixels in floats, got torch.uint8; normalise them as the model's "
            "pretrained_cfg says, or make a pack with AdaptivePreprocessor or ops.resize_patchify"
        )
    raise TypeError(
        f"{name}: expected pixels in float32, bfloat16, float16 or float64, got {dtype}; convert them with "
        f"{name}.float()" + (" after .real or .abs()" if dtype.is_complex else "")
    )

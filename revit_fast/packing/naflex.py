"""Padded batches of patches, as NaFlex preprocessing makes them, without their padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revit_fast.packing.tensors import check_plain


def rows_of_padded(
    pixel_values: Tensor, spatial_shapes: Tensor | Sequence[tuple[int, int]], mask: Tensor | None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The rows of all images one after another, and their grids; see `PackedBatch.from_naflex`."""
    if not isinstance(pixel_values, Tensor):
        got = type(pixel_values).__name__
        raise TypeError(f"pixel_values: expected a tensor [B, N, P*P*C], got {got}; give torch.as_tensor(pixel_values)")
    check_plain("pixel_values", pixel_values)
    if pixel_values.dim() != 3:
        raise ValueError(
            f"pixel_values: expected patches [B, N, P*P*C], got {tuple(pixel_values.shape)}; give images to the model, "
            "or PackedBatch.from_images"
        )
    n_images, n_padded = pixel_values.shape[:2]
    grids = _grids(spatial_shapes, n_images)
    for b, (h, w) in enumerate(grids):
        if h < 1 or w < 1 or h * w > n_padded:
            raise ValueError(
                f"spatial_shapes[{b}]: expected at least one row and column and at most {n_padded} patches as in "
                f"pixel_values, got {h}x{w}"
            )
    if mask is not None:
        _check_mask(mask, (n_images, n_padded), grids)
    counts = torch.tensor([h * w for h, w in grids], dtype=torch.int64, device="cpu").view(-1, 1)
    real = torch.arange(n_padded, dtype=torch.int64, device="cpu") < counts
    return pixel_values[real.to(pixel_values.device)], grids


def _grids(spatial_shapes: Tensor | Sequence[tuple[int, int]], n_images: int) -> list[tuple[int, int]]:
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else list(spatial_shapes)
    if len(shapes) != n_images:
        raise ValueError(
            f"spatial_shapes: expected (rows, columns) of {n_images} images as in pixel_values, got {len(shapes)}"
        )
    for b, shape in enumerate(shapes):
        pair = isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(n, int) for n in shape)
        if not pair:
            raise TypeError(f"spatial_shapes[{b}]: expected two whole numbers, (rows, columns), got {shape!r}")
    return [(h, w) for h, w in shapes]


def _check_mask(mask: Tensor, shape: tuple[int, int], grids: Sequence[tuple[int, int]]) -> None:
    """Refuses a mask that is not 1 for the patches of every image and 0 for the padding after them."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"pixel_attention_mask: expected a tensor [B, N] or None, got {type(mask).__name__}")
    if mask.shape != shape:
        raise ValueError(
            f"pixel_attention_mask: expected {list(shape)} as in pixel_values, got {list(mask.shape)}; give None if "
            "spatial_shapes is all that is known"
        )
    for b, (row, (h, w)) in enumerate(zip(mask.cpu() != 0, grids, strict=True)):
        n = int(row.sum())
        if not bool(row[:n].all()):
            raise ValueError(
                f"pixel_attention_mask[{b}]: expected ones and then zeros, got a zero before a one; put the patches of "
                "an image before its padding"
            )
        if n != h * w:
            raise ValueError(
                f"pixel_attention_mask[{b}]: expected {h * w} ones for {h}x{w} patches in spatial_shapes, got {n}; "
                "make both from one image"
            )

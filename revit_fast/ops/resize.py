"""Resizes 8-bit images of any sizes to normalised patch rows of one pack, bit-equal to Pillow's resize."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from revit_fast import reference
from revit_fast.ops import _library
from revit_fast.packing import PackedBatch, cached_tensors
from revit_fast.packing.tensors import check_plain

Box = tuple[float, float, float, float]

_NO_MEAN, _NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)

STACKED_BYTES = 1 << 14
"""Images of one shape with at most this many bytes are copied into one array; one tensor for each would cost more."""


def resize_patchify(
    images: Sequence[np.ndarray | Tensor],
    sizes: int | tuple[int, int] | Sequence[int | tuple[int, int]],
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    boxes: Box | Sequence[Box | None] | None = None,
    interpolation: str = "bicubic",
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
) -> PackedBatch:
    """Resizes every image to its own size, normalises it and cuts it into the patch rows of one pack.

    Equal, bit by bit, to `Image.fromarray(image).resize((width, height), BICUBIC or BILINEAR, box=box)` of Pillow 13
    followed by torchvision's ToTensor and Normalize. No intermediate image is built and the GIL is released meanwhile.

    Args:
        images: uint8 numpy arrays or CPU tensors, `[H, W, 3]`, or grey `[H, W]` or `[H, W, 1]`, which gives three equal
            channels. Any strides; only arrays with negative strides are copied.
        sizes: pixels to resize to, multiples of `patch_size`: one (height, width) or int (a square) for all images, or
            a list of these, one per image.
        patch_size: P, in pixels.
        mean: mean of each channel, for pixels in [0, 1]; by default 0.
        std: standard deviation of each channel, likewise; by default 1.
        boxes: (left, upper, right, lower) of the region to resize, in source pixels, fractions allowed: one for all
            images or a list with one per image. None, for all or in the list, means the whole image.
        interpolation: "bicubic" or "bilinear", both antialiased.
        dtype: dtype of the rows: float32, bfloat16 or float16 for normalised pixels, or uint8 for pixels that must
            still be normalised; `PackedBatch.normalization` then holds the normalisation.
        lengths: configured lengths in patches, see `PackedBatch.from_rows`.

    Returns:
        A pack of rows `[sum(gh * gw), P * P * 3]`, each with the pixels of a patch in the order rows, columns,
        channels.

    Raises:
        TypeError, ValueError: for any argument that is not as above.
    """
    options = {"mean": mean, "std": std, "boxes": boxes, "interpolation": interpolation, "dtype": dtype}
    rows, grids = resized_rows(images, sizes, patch_size, **options)
    normalization = None
    if dtype == torch.uint8:
        values = [_channels(mean, "mean", _NO_MEAN), _channels(std, "std", _NO_STD)]
        normalization = torch.tensor(values, dtype=torch.float32, device="cpu")
    seqlens = grids.prod(axis=1).tolist()
    return PackedBatch.from_rows(rows, seqlens, grids=grids.tolist(), lengths=lengths, normalization=normalization)


def resized_rows(
    images: Sequence[np.ndarray | Tensor],
    sizes: int | tuple[int, int] | Sequence[int | tuple[int, int]],
    patch_size: int,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    boxes: Box | Sequence[Box | None] | None = None,
    interpolation: str = "bicubic",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, np.ndarray]:
    """The rows of `resize_patchify` without a pack around them; arguments and errors are the same.

    Returns:
        The rows, and the grid (rows, columns) of every image, int64 `[n_images, 2]`.
    """
    if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
        raise ValueError(f"patch_size: expected a positive int, got {patch_size!r}")
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"interpolation: expected 'bicubic' or 'bilinear', got {interpolation!r}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or uint8, got {dtype}")
    if isinstance(images, (np.ndarray, Tensor)):
        raise TypeError("images: expected a list of images [H, W, 3], got one array; wrap it: [image]")
    tensors = _image_tensors(list(images))
    size_table = _size_table(sizes, len(tensors), patch_size)
    box_table = _box_table(boxes, tensors)
    mean, std = _channels(mean, "mean", _NO_MEAN), _channels(std, "std", _NO_STD)
    if 0.0 in std:
        raise ValueError(f"std: must not be zero, got {std}")

    grids = size_table // patch_size
    rows = torch.ops.revit_fast.resize_patchify(
        tensors,
        torch.from_numpy(box_table),
        torch.from_numpy(size_table),
        patch_size,
        None if dtype == torch.uint8 else _table(mean, std, dtype),
        interpolation == "bicubic",
        int(grids.prod(axis=1).sum()),
    )
    return rows, grids


class _Borrowed:
    """Presents read-only memory (of a decoder or a file map) as writable memory, which torch requires."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface = array.__array_interface__
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def _image_tensors(images: list[np.ndarray | Tensor]) -> list[Tensor]:
    """The images as uint8 CPU tensors `[H, W, 3]` or `[H, W, 1]`."""
    if not images:
        raise ValueError("images: expected at least one image, got an empty list")
    first = images[0]
    if len(images) > 1 and isinstance(first, np.ndarray) and 0 < first.nbytes <= STACKED_BYTES:
        shape, dtype = first.shape, first.dtype
        if all(isinstance(i, np.ndarray) and i.shape == shape and i.dtype == dtype for i in images):
            first = _image_tensor(first, 0)  # checks one image for all of them
            return list(torch.from_numpy(np.concatenate(images)).view(len(images), *first.shape).unbind())
    return [_image_tensor(image, i) for i, image in enumerate(images)]


def _image_tensor(image: np.ndarray | Tensor, i: int) -> Tensor:
    """The image as a uint8 CPU tensor `[H, W, 3]` or `[H, W, 1]` on the same memory if its strides allow it."""
    if isinstance(image, Tensor):
        check_plain(f"images[{i}]", image)
    shape = getattr(image, "shape", None)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"images[{i}]: expected uint8, got {image.dtype}; {_how_to_convert(image.dtype.kind)}")
        if image.ndim == 2:
            image = image[..., None]  # takes a fraction of the time of torch's unsqueeze
        if min(image.strides, default=0) < 0:
            image = image.copy()
        elif not image.flags.writeable:
            image = np.asarray(_Borrowed(image))
        image = torch.from_numpy(image)
    elif not isinstance(image, Tensor):
        raise TypeError(
            f"images[{i}]: expected a numpy array or a tensor, got {type(image).__name__}; "
            "for a PIL image: numpy.asarray(image.convert('RGB'))"
        )
    elif image.dtype != torch.uint8:
        kind = "f" if image.is_floating_point() else "u"
        raise TypeError(f"images[{i}]: expected uint8, got {image.dtype}; {_how_to_convert(kind)}")
    elif image.device.type != "cpu":
        raise ValueError(f"images[{i}]: expected a CPU tensor, got one on {image.device}; call .cpu()")
    if image.dim() == 2:
        image = image.unsqueeze(-1)
    sides = image.shape
    if len(sides) != 3 or sides[2] not in (1, 3):
        shape, fix = tuple(shape), ""
        if image.dim() == 3 and shape[-1] == 4:
            fix = "; drop or blend alpha first, for instance image[..., :3] or PIL's convert('RGB')"
        elif image.dim() == 3 and shape[0] in (1, 3):
            fix = "; channels come last: image.permute(1, 2, 0)"
        raise ValueError(f"images[{i}]: expected shape [H, W, 3], [H, W, 1] or [H, W], got {shape}{fix}")
    if sides[0] == 0 or sides[1] == 0:
        raise ValueError(f"images[{i}]: expected at least one pixel, got shape {tuple(shape)}")
    return image


def _how_to_convert(kind: str) -> str:
    if kind == "f":
        return "for pixels in [0, 1]: (255 * image).round().clip(0, 255), then cast to uint8"
    if kind == "b":
        return "multiply by 255 and cast to uint8"
    return "for 16 bits a channel: image // 257, then cast to uint8"


def _size_table(sizes, n_images: int, patch_size: int) -> np.ndarray:
    """(height, width) of every image, int64 `[n_images, 2]`."""
    if isinstance(sizes, (Tensor, np.ndarray)):
        sizes = sizes.tolist()
    one = not isinstance(sizes, Sequence) or (isinstance(sizes, tuple) and len(sizes) == 2 and _is_int(sizes[0]))
    if one:
        return np.full((n_images, 2), _size(sizes, "sizes", patch_size))
    if len(sizes) != n_images:
        raise ValueError(
            f"sizes: expected one per image ({n_images}) or one for all as an int or a tuple (height, width), "
            f"got {len(sizes)}"
        )
    with suppress(ValueError):  # a ragged list has ints among pairs
        table = np.array(sizes)
        table = np.stack([table, table], axis=1) if table.ndim == 1 else table
        legal = table.dtype.kind in "iu" and table.shape == (n_images, 2)
        if legal and table.min() >= 1 and not (table % patch_size).any():
            return table.astype(np.int64)
    # Check one by one to name what is wrong; for many images this takes longer than their resizing.
    return np.array([_size(size, f"sizes[{i}]", patch_size) for i, size in enumerate(sizes)])


def _is_int(value) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _size(size, name: str, patch_size: int) -> tuple[int, int]:
    pair = (size, size) if _is_int(size) else size
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(_is_int, pair)):
        raise TypeError(f"{name}: expected (height, width) in pixels or an int, got {size!r}")
    height, width = map(operator.index, pair)
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"{name}: expected positive multiples of patch_size {patch_size}, got {height}x{width}")
    return height, width


def _box_table(boxes, images: Sequence[Tensor]) -> np.ndarray:
    """A box within every image, float64 `[n_images, 4]`."""
    if isinstance(boxes, (Tensor, np.ndarray)):
        boxes = boxes.tolist()
    if boxes is None or (len(boxes) == 4 and isinstance(boxes[0], (int, float))):
        boxes = [boxes] * len(images)
    if len(boxes) != len(images):
        raise ValueError(
            f"boxes: expected one per image ({len(images)}) or one (left, upper, right, lower) for all, "
            f"got {len(boxes)}"
        )
    sides, repeats = [image.shape for image in images], 1
    if all(box is boxes[0] for box in boxes) and sides.count(sides[0]) == len(sides):
        boxes, sides, repeats = boxes[:1], sides[:1], len(sides)  # one check and one row serve all
    whole = [
        (0, 0, width, height) if box is None else box for box, (height, width, _) in zip(boxes, sides, strict=True)
    ]
    with suppress(TypeError, ValueError):
        table = np.array(whole, dtype=np.float64)
        if table.shape == (len(sides), 4) and _legal(table, np.array(sides)).all():
            return table.repeat(repeats, axis=0)
    # Check one by one to name what is wrong.
    table = np.array([_box(box, side, i) for i, (box, side) in enumerate(zip(whole, sides, strict=True))])
    return table.repeat(repeats, axis=0)


def _legal(boxes: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Whether each box is not empty and within its image, bool `[n, 4]`."""
    # NaN fails every comparison. Edges are float32 in Pillow, so a box must not be empty in float32 either.
    edges = boxes.astype(np.float32)
    not_empty = edges[:, :2] < edges[:, 2:]
    within = (boxes[:, :2] >= 0) & (boxes[:, 2:] <= sides[:, 1::-1])
    return np.concatenate([not_empty, within], axis=1)


def _box(box: Sequence[float], sides: Sequence[int], i: int) -> Box:
    height, width = sides[:2]
    try:
        left, upper, right, lower = map(float, box)
    except (TypeError, ValueError):
        raise TypeError(f"boxes[{i}]: expected four numbers (left, upper, right, lower), got {box!r}") from None
    legal = _legal(np.array([[left, upper, right, lower]]), np.array([sides]))[0]
    if not legal[:2].all():
        raise ValueError(f"boxes[{i}]: expected left < right and upper < lower, got {tuple(box)}")
    if not legal[2:].all():
        raise ValueError(
            f"boxes[{i}]: expected a box within the image (0, 0, {width}, {height}), got {tuple(box)}; clip it"
        )
    return left, upper, right, lower


def _channels(values: Sequence[float] | None, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    if values is None:
        return default
    try:
        values = tuple(map(float, values))
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected three numbers, one per channel, got {values!r}") from None
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise ValueError(f"{name}: expected three finite numbers, one per channel, got {values}")
    return values


@cached_tensors(maxsize=32)
def _table(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Normalised value for each channel and 8-bit value, `[3, 256]`: ToTensor and Normalize, then one rounding."""
    values = torch.arange(256, dtype=torch.uint8, device="cpu").to(torch.float32).div(255)
    columns = torch.tensor([mean, std], dtype=torch.float32, device="cpu").unsqueeze(-1)
    return values.expand(3, 256).sub(columns[0]).div(columns[1]).to(dtype)


@torch.library.register_fake("revit_fast::resize_patchify")
def _resize_patchify_fake(images, boxes, sizes, patch_size, table, bicubic, n_rows):
    dtype = torch.uint8 if table is None else table.dtype
    return boxes.new_empty((n_rows, patch_size * patch_size * 3), dtype=dtype)


def _resize_patchify_reference(images, boxes, sizes, patch_size, table, bicubic, n_rows):
    return reference.resize_patchify(images, boxes.tolist(), sizes.tolist(), patch_size, table, bicubic=bicubic)


_library.register_fallback("resize_patchify", _resize_patchify_reference)

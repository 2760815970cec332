"""The pack: many sequences of different lengths as one tensor of rows, and everything kernels need to know about it.

Rows of sequence `b` are `data[cu_seqlens[b] : cu_seqlens[b + 1]]`; rows beyond `cu_seqlens[-1]` are padding. Lengths
are known on the host when a pack is made, so its index tensors are built here once and no kernel reads them back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from revit_fast.grids import DEFAULT_GRIDS, check_grids, nearest_lengths
from revit_fast.kernels.constants import KEY_CLASSES, N_CLASSES, PADDING, TILE_ROWS

INT32_MAX = 2**31 - 1

T = TypeVar("T")


def cached_tensors(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`lru_cache` of functions that make tensors.

    A `FakeTensorMode` bypasses the cache: its tensors have no values and belong to that mode only.
    """

    def cached(make: Callable[..., T]) -> Callable[..., T]:
        kept = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*key) -> T:
            return kept(*key) if type(torch.empty(0)) is Tensor else make(*key)

        return get

    return cached


class WorkList(NamedTuple):
    """Tiles of a pack, class by class.

    Attributes:
        tiles: int32 `[n_tiles, 3]`: sequence, first row within it, class.
        counts: number of tiles of each class, on the host: kernels are launched once per class, over exactly its tiles.
    """

    tiles: Tensor
    counts: tuple[int, ...]


def work_list(seqlens_q: Sequence[int], seqlens_k: Sequence[int] | None = None, n_padding: int = 0) -> WorkList:
    """Tiles that cover every row of every sequence.

    A class is the index of the first of `KEY_CLASSES` that the sequence's keys fit into, else `STREAMING`. Within a
    class, tiles follow the order of the rows. A tile and its class depend only on the lengths of its sequence, so an
    image is computed in the same way in every pack. Padding rows count as one more sequence at the end, of class
    `PADDING`.

    Args:
        seqlens_q: rows (queries) per sequence.
        seqlens_k: keys per sequence; by default equal to `seqlens_q`.
        n_padding: padding rows after the sequences.

    Returns:
        The work list; its tensor is on the CPU.
    """
    lengths = np.array([*seqlens_q, n_padding], dtype=np.int64)
    keys = lengths if seqlens_k is None else np.array([*seqlens_k, 0], dtype=np.int64)
    classes = np.searchsorted(KEY_CLASSES, keys).astype(np.int32)
    classes[-1] = PADDING
    n_tiles = -(-lengths // TILE_ROWS)
    sequence = np.arange(len(lengths)).repeat(n_tiles)
    first_tile = (n_tiles.cumsum() - n_tiles)[sequence]
    tiles = np.empty((len(sequence), 3), dtype=np.int32)
    tiles[:, 0] = sequence
    tiles[:, 1] = (np.arange(len(sequence)) - first_tile) * TILE_ROWS
    tiles[:, 2] = classes[sequence]
    tiles = tiles[np.argsort(tiles[:, 2], kind="stable")]
    return WorkList(torch.from_numpy(tiles), tuple(np.bincount(tiles[:, 2], minlength=N_CLASSES).tolist()))


def cumulative(seqlens: Sequence[int]) -> Tensor:
    """`cu_seqlens` of the given lengths: int32 `[B + 1]` on the CPU, starting at 0."""
    total = [0, *accumulate(map(int, seqlens))]
    if total[-1] > INT32_MAX:
        raise ValueError(f"seqlens: {total[-1]} rows exceed int32; split the batch into several packs")
    return torch.tensor(total, dtype=torch.int32, device="cpu")


def nearest_length(counts: Tensor, lengths: Sequence[int]) -> Tensor:
    """Index into `lengths` (strictly decreasing) of the length nearest to each count; ties go to the longer.

    This is plain tensor arithmetic, so compiled code can compute it without reading lengths on the host.

    Args:
        counts: integer tensor `[B]`, patches per sequence (prefix tokens not counted).
        lengths: patches of every configured length.

    Returns:
        int32 tensor `[B]` on the device of `counts`.
    """
    table = torch.tensor(tuple(lengths), device=counts.device, dtype=counts.dtype)
    return (counts[:, None] - table).abs().argmin(dim=1).to(torch.int32)


def image_grid(image: Tensor, patch_size: int, name: str) -> tuple[int, int]:
    """Patch grid (rows, columns) of an image `[..., H, W]` whose sides are multiples of `patch_size`."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor [3, H, W], got {type(image).__name__}")
    if image.dim() != 3:
        raise ValueError(f"{name}: expected shape [3, H, W], got {tuple(image.shape)}")
    height, width = image.shape[-2:]
    if height == 0 or width == 0 or height % patch_size or width % patch_size:
        raise ValueError(
            f"{name}: height and width must be positive multiples of the patch size {patch_size}, "
            f"got {height}x{width}; resize it, for instance with revit_fast.ops.resize_patchify"
        )
    return height // patch_size, width // patch_size


def patch_rows(images: Sequence[Tensor], patch_size: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Patch rows `[sum(gh*gw), P*P*C]` of images `[C, gh*P, gw*P]`, one image after another, and their grids."""
    images = list(images)
    if not images:
        raise ValueError("images: expected at least one image, got an empty list")
    grids = [image_grid(image, patch_size, f"images[{i}]") for i, image in enumerate(images)]
    first = images[0]
    channels = first.shape[0]
    rows = first.new_empty(sum(h * w for h, w in grids), patch_size * patch_size * channels)
    begin = 0
    for i, (image, (h, w)) in enumerate(zip(images, grids, strict=True)):
        if (image.shape[0], image.dtype, image.device) != (channels, first.dtype, first.device):
            raise ValueError(
                f"images[{i}]: expected {channels} channels, {first.dtype} on {first.device} like images[0], "
                f"got {image.shape[0]}, {image.dtype} on {image.device}"
            )
        out = rows[begin : begin + h * w].view(h, w, patch_size, patch_size, channels)
        out.copy_(image.reshape(channels, h, patch_size, w, patch_size).permute(1, 3, 2, 4, 0))
        begin += h * w
    return rows, grids


class Layout(NamedTuple):
    """What kernels need to know about a pack besides its rows; the fields are those of `PackedBatch`."""

    cu_seqlens: Tensor
    length_index: Tensor
    tiles: Tensor | None
    tile_counts: tuple[int, ...] = ()


def _patch_counts(seqlens: Sequence[int], n_prefix: int) -> list[int]:
    return [max(n - n_prefix, 0) for n in seqlens]


@cached_tensors(maxsize=256)
def _index_tensors(
    seqlens: tuple[int, ...],
    n_prefix: int,
    lengths: tuple[int, ...],
    grids: tuple[tuple[int, int], ...] | None,
    n_padding: int,
    device: torch.device,
) -> tuple[Layout, Tensor | None]:
    """Layout and `grid_hw` of a pack, shared by all packs of the same lengths."""
    index = nearest_lengths(_patch_counts(seqlens, n_prefix), lengths)
    with torch.inference_mode(False):  # a pack made in inference mode must also work in training
        grid_hw = None
        if grids is not None:
            grid_hw = torch.tensor(grids, dtype=torch.int32, device="cpu").reshape(-1, 2).to(device)
        length_index = torch.tensor(index, dtype=torch.int32, device="cpu").to(device)
        work = work_list(seqlens, n_padding=n_padding)
        return Layout(cumulative(seqlens).to(device), length_index, work.tiles.to(device), work.counts), grid_hw


def _shared(normalization: Tensor, device: torch.device) -> Tensor:
    """A CPU normalization on `device`: all packs with the same values share one tensor, so it is folded only once."""
    return _shared_values(tuple(map(tuple, normalization.tolist())), normalization.dtype, device)


@cached_tensors(maxsize=16)
def _shared_values(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu").to(device)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A batch of sequences as one tensor of rows.

    Make one with `from_list`, `from_images`, `ops.resize_patchify` or a preprocessor rather than field by field. Its
    index tensors are shared with other packs of the same lengths: they must not be written to.

    Attributes:
        data: `[T, ...]` rows of all sequences, one after another; rows from `cu_seqlens[-1]` on are padding.
        cu_seqlens: int32 `[B + 1]`, first row of each sequence, then the end of the last.
        length_index: int32 `[B]`, index of the configured length nearest to each sequence's patch count.
        tiles: int32 `[n_tiles, 3]`, the work list (see `work_list`), sorted by class.
        tile_counts: number of tiles of each class, on the host.
        seqlens: the lengths on the host. Compiled code must not read them: it would be recompiled for every batch.
        lengths: the configured lengths (in patches, strictly decreasing) that `length_index` points into.
        n_prefix: prefix tokens at the start of every sequence, included in `cu_seqlens`; 0 for a batch of patch rows.
        grids: patch grid (rows, columns) of every sequence on the host; None where it is not known.
        grid_hw: int32 `[B, 2]`, the grids on the device.
        normalization: float32 `[2, 3]`, mean and std (of pixels in [0, 1]) that must still be applied to uint8 rows.
    """

    data: Tensor
    cu_seqlens: Tensor
    length_index: Tensor
    tiles: Tensor
    tile_counts: tuple[int, ...]
    seqlens: tuple[int, ...]
    lengths: tuple[int, ...]
    n_prefix: int = 0
    grids: tuple[tuple[int, int], ...] | None = None
    grid_hw: Tensor | None = None
    normalization: Tensor | None = None
    _layouts: dict[int, Layout] = field(default_factory=dict, repr=False)

    @property
    def max_seqlen(self) -> int:
        """Longest sequence in rows (0 for an empty batch)."""
        return max(self.seqlens, default=0)

    @property
    def device(self) -> torch.device:
        """Device of the rows and of the index tensors."""
        return self.data.device

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.split())

    @classmethod
    def from_rows(
        cls,
        data: Tensor,
        seqlens: Sequence[int],
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        lengths: Sequence[int] | None = None,
        n_prefix: int = 0,
        normalization: Tensor | None = None,
    ) -> PackedBatch:
        """Wraps rows that are already in order, one sequence after another.

        Args:
            data: `[T, ...]`, T at least the sum of `seqlens`; further rows are padding.
            seqlens: rows of every sequence; zero is legal.
            grids: patch grid (rows, columns) of every sequence; by default square where the patch count is a square.
            lengths: configured lengths in patches, strictly decreasing; by default those of grids (14, 10, 7).
            n_prefix: prefix tokens included in every sequence.
            normalization: `[2, 3]` mean and std that must still be applied to uint8 rows.

        Raises:
            TypeError, ValueError: for lengths that are negative, that exceed the data, or that contradict `grids`.
        """
        if not isinstance(data, Tensor) or data.dim() < 1:
            raise TypeError(f"data: expected a tensor [T, ...], got {type(data).__name__}")
        seqlens = tuple(int(n) for n in seqlens)
        if any(n < 0 for n in seqlens):
            raise ValueError(f"seqlens: lengths must not be negative, got {min(seqlens)}")
        if sum(seqlens) > data.shape[0]:
            raise ValueError(f"seqlens: {sum(seqlens)} rows in all, but data has only {data.shape[0]}")
        counts = _patch_counts(seqlens, n_prefix)
        lengths = tuple(g * g for g in DEFAULT_GRIDS) if lengths is None else check_grids(lengths)
        if grids is None:
            sides = [math.isqrt(n) for n in counts]
            if all(s * s == n for s, n in zip(sides, counts, strict=True)):
                grids = [(s, s) for s in sides]
        if grids is not None:
            grids = tuple((int(h), int(w)) for h, w in grids)
            if len(grids) != len(seqlens):
                raise ValueError(f"grids: expected {len(seqlens)}, one per sequence, got {len(grids)}")
            for b, ((h, w), n) in enumerate(zip(grids, counts, strict=True)):
                if h * w != n:
                    raise ValueError(f"grids: sequence {b} has {n} patches, but its grid {h}x{w} has {h * w}")
        n_padding = data.shape[0] - sum(seqlens)
        layout, grid_hw = _index_tensors(seqlens, n_prefix, lengths, grids, n_padding, data.device)
        return cls(
            data=data,
            **layout._asdict(),
            seqlens=seqlens,
            lengths=lengths,
            n_prefix=n_prefix,
            grids=grids,
            grid_hw=grid_hw,
            normalization=normalization,
        )

    @classmethod
    def from_list(
        cls,
        items: Sequence[Tensor],
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        lengths: Sequence[int] | None = None,
        n_prefix: int = 0,
    ) -> PackedBatch:
        """Concatenates tensors `[n_i, ...]` (same trailing shape, dtype and device) into one pack.

        Args:
            items: one tensor per sequence; an empty list raises an error because its row shape is unknown.
            grids: see `from_rows`.
            lengths: see `from_rows`.
            n_prefix: see `from_rows`.
        """
        items = list(items)
        if not items:
            raise ValueError("items: expected at least one tensor, got an empty list")
        first = items[0]
        for i, item in enumerate(items):
            if not isinstance(item, Tensor) or item.dim() < 1:
                raise TypeError(f"items[{i}]: expected a tensor [n, ...], got {type(item).__name__}")
            same = (item.shape[1:], item.dtype, item.device) == (first.shape[1:], first.dtype, first.device)
            if not same:
                raise ValueError(
                    f"items[{i}]: expected rows of shape {tuple(first.shape[1:])}, {first.dtype} on {first.device} "
                    f"like items[0], got {tuple(item.shape[1:])}, {item.dtype} on {item.device}"
                )
        seqlens = [item.shape[0] for item in items]
        return cls.from_rows(torch.cat(items), seqlens, grids=grids, lengths=lengths, n_prefix=n_prefix)

    @classmethod
    def from_images(
        cls, images: Sequence[Tensor], patch_size: int, *, lengths: Sequence[int] | None = None
    ) -> PackedBatch:
        """Cuts images `[3, gh*P, gw*P]` of any grids into patch rows `[gh*gw, P*P*3]` in one pack.

        Args:
            images: one tensor per image, same dtype and device.
            patch_size: P, in pixels.
            lengths: see `from_rows`.
        """
        rows, grids = patch_rows(images, patch_size)
        return cls.from_rows(rows, [h * w for h, w in grids], grids=grids, lengths=lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same pack with its tensors on `device`."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        tensors = ("data", "cu_seqlens", "length_index", "tiles", "grid_hw")
        normalization = self.normalization
        if normalization is not None:
            on_host = normalization.device.type == "cpu"
            normalization = _shared(normalization, torch.device(device)) if on_host else move(normalization)
        moved = {name: move(getattr(self, name)) for name in tensors}
        return replace(self, **moved, normalization=normalization, _layouts={})

    def pin_memory(self) -> PackedBatch:
        """The same pack in page-locked memory, so that `to(device, non_blocking=True)` need not wait for the copy.

        torch's `DataLoader(pin_memory=True)` calls this method.
        """
        names = ("data", "cu_seqlens", "length_index", "tiles", "grid_hw", "normalization")
        tensors = {name: getattr(self, name) for name in names}
        pinned = {name: None if tensor is None else tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **pinned, _layouts={})

    def without_padding(self) -> PackedBatch:
        """The same sequences without the padding rows after them."""
        n_rows = sum(self.seqlens)
        if n_rows == self.data.shape[0]:
            return self
        counts = (*self.tile_counts[:PADDING], 0)
        return replace(self, data=self.data[:n_rows], tiles=self.tiles[: sum(counts)], tile_counts=counts, _layouts={})

    def select(self, sequences: Sequence[int]) -> PackedBatch:
        """A pack of the sequences at these indices, in this order; its rows are copies.

        Raises:
            IndexError: for an index outside 0 to the number of sequences.
        """
        for b in sequences:
            if not 0 <= b < len(self.seqlens):
                raise IndexError(f"sequences: expected 0 to {len(self.seqlens) - 1}, got {b}")
        rows = self.split()
        seqlens = [self.seqlens[b] for b in sequences]
        return PackedBatch.from_rows(
            torch.cat([rows[b] for b in sequences]) if seqlens else self.data[:0],
            seqlens,
            grids=None if self.grids is None else [self.grids[b] for b in sequences],
            lengths=self.lengths,
            n_prefix=self.n_prefix,
            normalization=self.normalization,
        )

    def with_data(self, data: Tensor) -> PackedBatch:
        """The same layout with other rows `[T, ...]`."""
        if data.shape[0] != self.data.shape[0]:
            raise ValueError(f"data: expected {self.data.shape[0]} rows, got {data.shape[0]}")
        return replace(self, data=data, _layouts={})

    def layout(self, n_prefix: int) -> Layout:
        """Layout of this batch after `n_prefix` prefix tokens are put before every sequence.

        It is built on the host once and kept. Compiled code instead derives it from `cu_seqlens` and leaves the work
        list to the kernels, so that no lengths become guards.
        """
        if n_prefix == self.n_prefix:
            return Layout(self.cu_seqlens, self.length_index, self.tiles, self.tile_counts)
        if self.n_prefix:
            raise ValueError(
                f"n_prefix: this batch counts {self.n_prefix} prefix tokens already, cannot make it {n_prefix}"
            )
        if torch.compiler.is_compiling():
            sequence = torch.arange(self.cu_seqlens.shape[0], device=self.cu_seqlens.device, dtype=torch.int32)
            return Layout(self.cu_seqlens + n_prefix * sequence, self.length_index, None)
        if n_prefix not in self._layouts:
            seqlens = [n + n_prefix for n in self.seqlens]
            with torch.inference_mode(False):  # tensors kept from inference must also work in training
                work = work_list(seqlens, n_padding=self.data.shape[0] - sum(self.seqlens))
                cu_seqlens, tiles = cumulative(seqlens).to(self.device), work.tiles.to(self.device)
            self._layouts[n_prefix] = Layout(cu_seqlens, self.length_index, tiles, work.counts)
        return self._layouts[n_prefix]

    def with_tokens(self, data: Tensor, n_prefix: int) -> PackedBatch:
        """The embedded batch: `data` `[T + B * n_prefix, C]` holds prefix tokens and patches of every sequence."""
        layout = self.layout(n_prefix)
        added = n_prefix - self.n_prefix
        return replace(
            self,
            data=data,
            cu_seqlens=layout.cu_seqlens,
            tiles=layout.tiles,
            tile_counts=layout.tile_counts,
            seqlens=tuple(n + added for n in self.seqlens),
            n_prefix=n_prefix,
            normalization=None,
            _layouts={},
        )

    def split(self) -> list[Tensor]:
        """The rows of every sequence as a view, in order; padding rows are left out."""
        return list(self.data[: sum(self.seqlens)].split(list(self.seqlens)))

"""`PackedBatch`: many sequences of different lengths as one tensor of rows, with its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.packing.naflex import rows_of_padded
from revit_fast.packing.plan import Layout, PackPlan, cached_tensors, device_cu_seqlens
from revit_fast.packing.tensors import as_list, check_plain


def image_grid(image: Tensor, patch_size: int, name: str) -> tuple[int, int]:
    """Patch grid (rows, columns) of an image `[..., H, W]` whose sides are multiples of `patch_size`."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{name}: expected a tensor [3, H, W], got {type(image).__name__}")
    check_plain(name, image)
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
    images = as_list(images)
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


def normalization_on(normalization: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """A normalization on `device`: all packs with the same values on the host share one tensor, copied only once."""
    if normalization.device.type != "cpu":
        return normalization.to(device, non_blocking=non_blocking)
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
        plan: what the host knows of the pack. Compiled code must not read its lengths: it would be recompiled for
            every batch.
        grid_hw: int32 `[B, 2]`, the grids on the device; None where they are not known.
        normalization: float32 `[2, 3]`, mean and std (of pixels in [0, 1]) that must still be applied to uint8 rows.
    """

    data: Tensor
    cu_seqlens: Tensor
    length_index: Tensor
    plan: PackPlan
    grid_hw: Tensor | None = None
    normalization: Tensor | None = None

    def __setstate__(self, state: dict) -> None:
        if "plan" not in state:  # pickled before there were plans
            n_padding = state["data"].shape[0] - sum(state["seqlens"])
            options = {name: state[name] for name in ("grids", "n_prefix")}
            state["plan"] = PackPlan.of(state["seqlens"], state["lengths"], n_padding=n_padding, **options)
        names = self.__dataclass_fields__
        self.__dict__.update({name: value for name, value in state.items() if name in names})

    @property
    def seqlens(self) -> tuple[int, ...]:
        """Rows of every sequence, on the host."""
        return self.plan.seqlens

    @property
    def lengths(self) -> tuple[int, ...]:
        """The configured lengths (in patches, strictly decreasing) that `length_index` points into."""
        return self.plan.lengths

    @property
    def n_prefix(self) -> int:
        """Prefix tokens at the start of every sequence, included in `cu_seqlens`; 0 for a batch of patch rows."""
        return self.plan.n_prefix

    @property
    def grids(self) -> tuple[tuple[int, int], ...] | None:
        """Patch grid (rows, columns) of every sequence on the host; None where it is not known."""
        return self.plan.grids

    @property
    def tiles(self) -> Tensor:
        """int32 `[n_tiles, 3]`, the work list (see `work_list`), sorted by class."""
        return self.plan.layout(self.device).tiles

    @property
    def tile_counts(self) -> tuple[int, ...]:
        """Number of tiles of each class, on the host."""
        return self.plan.tile_counts

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
        check_plain("data", data)
        seqlens = tuple(map(int, seqlens))
        n_padding = data.shape[0] - sum(seqlens)
        if n_padding < 0:
            raise ValueError(f"seqlens: {sum(seqlens)} rows in all, but data has only {data.shape[0]}")
        lengths = tuple(g * g for g in DEFAULT_GRIDS) if lengths is None else lengths
        plan = PackPlan.of(seqlens, lengths, grids=grids, n_prefix=n_prefix, n_padding=n_padding)
        return cls.from_plan(data, plan, normalization)

    @classmethod
    def from_plan(cls, data: Tensor, plan: PackPlan, normalization: Tensor | None = None) -> PackedBatch:
        """Wraps rows `[plan.n_rows + plan.n_padding, ...]` whose plan is known."""
        return cls(data, *plan.index(data.device), plan, plan.grid_hw(data.device), normalization)

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
            items: one tensor per sequence, also as a nested tensor; an empty list raises an error because its row shape
                is unknown.
            grids: see `from_rows`.
            lengths: see `from_rows`.
            n_prefix: see `from_rows`.
        """
        items = as_list(items)
        if not items:
            raise ValueError("items: expected at least one tensor, got an empty list")
        first = items[0]
        for i, item in enumerate(items):
            if not isinstance(item, Tensor) or item.dim() < 1:
                raise TypeError(f"items[{i}]: expected a tensor [n, ...], got {type(item).__name__}")
            check_plain(f"items[{i}]", item)
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

    @classmethod
    def from_naflex(
        cls,
        pixel_values: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        pixel_attention_mask: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
    ) -> PackedBatch:
        """Packs what transformers' `Siglip2ImageProcessor` returns, `from_naflex(**processor(images))`.

        Padding is left out. A mask or shapes on a GPU are read back once.

        Args:
            pixel_values: `[B, N, P*P*C]`, patches row by row, each with its channels last, then padding.
            spatial_shapes: integer `[B, 2]`, rows and columns of every image.
            pixel_attention_mask: `[B, N]`, not 0 for patches; None if `spatial_shapes` is all that is known.
            lengths: see `from_rows`.

        Raises:
            TypeError, ValueError: for shapes that do not fit each other, or padding that is not at the end; the message
                names the image.
        """
        rows, grids = rows_of_padded(pixel_values, spatial_shapes, pixel_attention_mask)
        return cls.from_rows(rows, [h * w for h, w in grids], grids=grids, lengths=lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same pack with its tensors on `device`."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        tensors = ("data", "cu_seqlens", "length_index", "grid_hw")
        normalization = self.normalization
        if normalization is not None:
            normalization = normalization_on(normalization, torch.device(device), non_blocking)
        return replace(self, **{name: move(getattr(self, name)) for name in tensors}, normalization=normalization)

    def pin_memory(self) -> PackedBatch:
        """The same pack in page-locked memory, so that `to(device, non_blocking=True)` need not wait for the copy.

        torch's `DataLoader(pin_memory=True)` calls this method.
        """
        tensors = {name: getattr(self, name) for name in ("data", "cu_seqlens", "length_index", "grid_hw")}
        tensors["normalization"] = self.normalization
        pinned = {name: None if tensor is None else tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **pinned)

    def without_padding(self) -> PackedBatch:
        """The same sequences without the padding rows after them."""
        plan = self.plan.without_padding()
        return self if plan is self.plan else replace(self, data=self.data[: plan.n_rows], plan=plan)

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
        return replace(self, data=data)

    def layout(self, n_prefix: int) -> Layout:
        """Layout of this batch after `n_prefix` prefix tokens are put before every sequence.

        The plan keeps it. Compiled code instead derives it from `cu_seqlens` and leaves the work list to the kernels,
        so that no lengths become guards.
        """
        if not torch.compiler.is_compiling():
            return self.plan.tokens(n_prefix).layout(self.device)
        if n_prefix == self.n_prefix:
            return Layout(self.cu_seqlens, self.length_index, None)
        added = device_cu_seqlens(n_prefix, self.cu_seqlens.shape[0] - 1, self.cu_seqlens.device)
        return Layout(self.cu_seqlens + added, self.length_index, None)

    def with_tokens(self, data: Tensor, n_prefix: int) -> PackedBatch:
        """The embedded batch: `data` `[T + B * n_prefix, C]` holds prefix tokens and patches of every sequence."""
        plan = self.plan.tokens(n_prefix)
        return replace(self, data=data, cu_seqlens=self.layout(n_prefix).cu_seqlens, plan=plan, normalization=None)

    def split(self) -> list[Tensor]:
        """The rows of every sequence as a view, in order; padding rows are left out."""
        return list(self.data[: sum(self.seqlens)].split(list(self.seqlens)))

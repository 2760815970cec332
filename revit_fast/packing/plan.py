"""What the host knows of a pack, and the index tensors that kernels read, which follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial, wraps
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from revit_fast.grids import check_grids
from revit_fast.kernels.constants import KEY_CLASSES, N_CLASSES, PADDING, TILE_ROWS

INT32_MAX = 2**31 - 1

_LARGEST = np.array(KEY_CLASSES)

T = TypeVar("T")


def _keeps_tensors() -> bool:
    """Whether a new tensor may be kept: one made in a `FakeTensorMode` or a transform of `torch.func` belongs to it."""
    new = torch.empty(0, dtype=torch.int32, device="cpu")
    return type(new) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(new)


def cached_tensors(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`lru_cache` of functions that make tensors; where these may not be kept, the cache is bypassed."""

    def cached(make: Callable[..., T]) -> Callable[..., T]:
        kept = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*key) -> T:
            return kept(*key) if _keeps_tensors() else make(*key)

        return get

    return cached


class WorkList(NamedTuple):
    """Tiles of a pack, class by class.

    Attributes:
        tiles: int32 `[n_tiles, 3]`: sequence, first row within it, class.
        counts: number of tiles of each class, on the host: a launch covers exactly the tiles of its classes.
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
    tiles, counts = _tiles(seqlens_q, seqlens_k, n_padding)
    return WorkList(torch.from_numpy(tiles), counts)


def _tiles(
    seqlens_q: Sequence[int], seqlens_k: Sequence[int] | None, n_padding: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """`work_list` without tensors."""
    lengths = np.array([*seqlens_q, n_padding], dtype=np.int64)
    keys = lengths if seqlens_k is None else np.array([*seqlens_k, 0], dtype=np.int64)
    classes = _LARGEST.searchsorted(keys)
    classes[-1] = PADDING
    order = classes.argsort(kind="stable")  # sequences class by class
    n_tiles = (lengths[order] + (TILE_ROWS - 1)) // TILE_ROWS
    ends = n_tiles.cumsum()
    heads = np.empty((len(lengths), 3), dtype=np.int32)  # of each sequence: itself, tiles before its first, class
    heads[:, 0] = order
    heads[:, 1] = ends - n_tiles
    heads[:, 2] = classes[order]
    tiles = heads.repeat(n_tiles, axis=0)
    rows = tiles[:, 1]
    np.subtract(np.arange(len(tiles), dtype=np.int32), rows, out=rows)
    rows *= TILE_ROWS
    return tiles, tuple(np.bincount(tiles[:, 2], minlength=N_CLASSES).tolist())


def cumulative(seqlens: Sequence[int]) -> Tensor:
    """`cu_seqlens` of lengths that the host knows: int32 `[B + 1]` on the CPU, starting at 0."""
    offsets = np.empty(len(seqlens) + 1, dtype=np.int32)
    _write_cumulative(seqlens, sum(map(int, seqlens)), offsets)
    return torch.from_numpy(offsets)


def _write_cumulative(seqlens: Sequence[int], n_rows: int, out: np.ndarray) -> None:
    """Writes `cumulative` into an int32 array `[S + 1]` with room for more sequences, which become empty.

    Args:
        seqlens: rows of every sequence.
        n_rows: their sum.
        out: the array.
    """
    if n_rows > INT32_MAX:
        raise ValueError(f"seqlens: {n_rows} rows exceed int32; split the batch into several packs")
    n = len(seqlens)
    out[0] = 0
    np.array(seqlens, dtype=np.int32).cumsum(dtype=np.int32, out=out[1 : n + 1])
    out[n + 1 :] = n_rows


def device_cu_seqlens(
    seqlens: Tensor | int, n_sequences: int | None = None, device: torch.device | None = None
) -> Tensor:
    """`cumulative` by tensor arithmetic alone, for code that must not know lengths on the host, such as compiled code.

    Args:
        seqlens: integer tensor `[B]`; or one length for all of `n_sequences` sequences on `device`.
        n_sequences: see `seqlens`.
        device: see `seqlens`.

    Returns:
        int32 `[B + 1]`.
    """
    if isinstance(seqlens, Tensor):
        return F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    return seqlens * torch.arange(n_sequences + 1, dtype=torch.int32, device=device)


def nearest_length(counts: Tensor, lengths: Sequence[int]) -> Tensor:
    """Index into `lengths` (strictly decreasing) of the length nearest to each count; ties go to the longer.

    Plain tensor arithmetic, so compiled code can compute it without reading lengths on the host.

    Args:
        counts: integer tensor `[B]`, patches per sequence (prefix tokens not counted).
        lengths: patches of every configured length.

    Returns:
        int32 tensor `[B]` on the device of `counts`.
    """
    table = torch.tensor(tuple(lengths), device=counts.device, dtype=counts.dtype)
    return (counts[:, None] - table).abs().argmin(dim=1).to(torch.int32)


class Layout(NamedTuple):
    """What kernels need to know about a pack besides its rows; the fields are those of `PackedBatch`."""

    cu_seqlens: Tensor
    length_index: Tensor
    tiles: Tensor | None
    tile_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackPlan:
    """What the host knows of a pack. Make one with `of`; packs of equal lengths share it and its tensors.

    Attributes:
        seqlens: rows of every sequence.
        length_index: index of the configured length nearest to each sequence's patches: the norm parameters it uses.
        lengths: configured lengths in patches, strictly decreasing.
        n_prefix: prefix tokens at the start of every sequence, included in `seqlens`; 0 for patch rows.
        n_padding: padding rows after the sequences.
        grids: patch grid (rows, columns) of every sequence; None where it is not known.
    """

    seqlens: tuple[int, ...]
    length_index: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    n_prefix: int = 0
    n_padding: int = 0
    grids: tuple[tuple[int, int], ...] | None = None
    _kept: dict = field(default_factory=dict, repr=False, compare=False)

    def __reduce__(self) -> tuple:
        return PackPlan, (self.seqlens, self.length_index, self.lengths, self.n_prefix, self.n_padding, self.grids)

    @staticmethod
    def of(
        seqlens: Sequence[int],
        lengths: Sequence[int],
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        n_prefix: int = 0,
        n_padding: int = 0,
    ) -> PackPlan:
        """The plan of sequences; see the attributes. By default grids are square where the patch count is a square.

        Raises:
            TypeError, ValueError: for lengths that are negative, that do not decrease, or that contradict `grids`.
        """
        grids = None if grids is None else tuple(map(tuple, grids))
        lengths = lengths if isinstance(lengths, tuple) else check_grids(lengths)
        return _plan(tuple(map(int, seqlens)), lengths, grids, n_prefix, n_padding)

    @cached_property
    def n_rows(self) -> int:
        """Rows of all sequences, without padding."""
        return sum(self.seqlens)

    @cached_property
    def _host_tiles(self) -> tuple[np.ndarray, tuple[int, ...]]:
        return _tiles(self.seqlens, None, self.n_padding)

    @property
    def tile_counts(self) -> tuple[int, ...]:
        """Number of tiles of each class."""
        return self._host_tiles[1]

    @property
    def work(self) -> WorkList:
        """The work list; its tensor is on the CPU."""
        tiles, counts = self._host_tiles
        return self._tensors("work", torch.device("cpu"), lambda: WorkList(torch.from_numpy(tiles), counts))

    def index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`cu_seqlens` int32 `[B + 1]` and `length_index` int32 `[B]` on `device`."""

        def make() -> tuple[Tensor, Tensor]:
            index = np.array(self.length_index, dtype=np.int32)
            return cumulative(self.seqlens).to(device), torch.from_numpy(index).to(device)

        return self._tensors("index", device, make)

    def layout(self, device: torch.device) -> Layout:
        """What kernels need, on `device`."""
        return self._tensors(
            "layout", device, lambda: Layout(*self.index(device), self.work.tiles.to(device), self.work.counts)
        )

    def grid_hw(self, device: torch.device) -> Tensor | None:
        """The grids as int32 `[B, 2]` on `device`."""
        if self.grids is None:
            return None
        sides = chain.from_iterable(self.grids)
        return self._tensors(
            "grids", device, lambda: torch.from_numpy(np.fromiter(sides, np.int32).reshape(-1, 2)).to(device)
        )

    def tokens(self, n_prefix: int, n_padding: int | None = None) -> PackPlan:
        """The plan of the same sequences after `n_prefix` prefix tokens are put before each.

        Args:
            n_prefix: number of prefix tokens.
            n_padding: padding rows after the tokens; by default as many as now.

        Raises:
            ValueError: if this plan counts other prefix tokens already.
        """
        n_padding = self.n_padding if n_padding is None else n_padding
        if (n_prefix, n_padding) == (self.n_prefix, self.n_padding):
            return self
        if self.n_prefix:
            raise ValueError(
                f"n_prefix: this batch counts {self.n_prefix} prefix tokens already, cannot make it {n_prefix}"
            )
        seqlens = tuple([n + n_prefix for n in self.seqlens])
        make = partial(PackPlan, seqlens, self.length_index, self.lengths, n_prefix, n_padding, self.grids)
        return self._keep((n_prefix, n_padding), make)

    def for_lengths(self, lengths: tuple[int, ...]) -> PackPlan:
        """The plan of the same sequences for a model with other configured lengths."""
        if lengths == self.lengths:
            return self
        options = {"grids": self.grids, "n_prefix": self.n_prefix, "n_padding": self.n_padding}
        return PackPlan.of(self.seqlens, lengths, **options)

    def without_padding(self) -> PackPlan:
        """The plan of the sequences alone."""
        return self._keep("no padding", partial(replace, self, n_padding=0, _kept={})) if self.n_padding else self

    def write_cu_seqlens(self, out: np.ndarray) -> None:
        """Writes `cu_seqlens` into an int32 array `[S + 1]` with room for more sequences, which become empty."""
        _write_cumulative(self.seqlens, self.n_rows, out)

    def write_tiles(self, out: np.ndarray, room: Sequence[int]) -> None:
        """Writes the tiles of the work list, each class at the begin of its room; further tiles have class -1.

        Args:
            out: int32 array `[n_tiles, 3]`, all zero.
            room: number of tiles that `out` has for each class.
        """
        out[:, 2] = -1
        (tiles, counts), begin, target = self._host_tiles, 0, 0
        for count, most in zip(counts, room, strict=True):
            if count:
                out[target : target + count] = tiles[begin : begin + count]
            begin, target = begin + count, target + most

    def _keep(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _tensors(self, name: str, device: torch.device, make: Callable[[], T]) -> T:
        if not _keeps_tensors():
            return make()
        with torch.inference_mode(False):  # tensors kept from inference must also work in training
            return self._keep((name, device), make)


@lru_cache(maxsize=256)
def _plan(
    seqlens: tuple[int, ...],
    lengths: tuple[int, ...],
    grids: tuple[tuple[int, int], ...] | None,
    n_prefix: int,
    n_padding: int,
) -> PackPlan:
    if any(n < 0 for n in seqlens):
        raise ValueError(f"seqlens: lengths must not be negative, got {min(seqlens)}")
    lengths = check_grids(lengths)
    counts = np.maximum(np.array(seqlens, dtype=np.int64) - n_prefix, 0)
    patches = counts.tolist()
    if grids is None:
        sides = {n: math.isqrt(n) for n in set(patches)}
        if all(s * s == n for n, s in sides.items()):
            grids = tuple((sides[n], sides[n]) for n in patches)
    else:
        grids = tuple((int(h), int(w)) for h, w in grids)
        if len(grids) != len(seqlens):
            raise ValueError(f"grids: expected {len(seqlens)}, one per sequence, got {len(grids)}")
        if [h * w for h, w in grids] != patches:
            b, (h, w) = next((b, (h, w)) for b, (h, w) in enumerate(grids) if h * w != patches[b])
            raise ValueError(f"grids: sequence {b} has {patches[b]} patches, but its grid {h}x{w} has {h * w}")
    index = np.abs(counts[:, None] - np.array(lengths)).argmin(axis=1)  # `nearest_length` on the host
    return PackPlan(seqlens, tuple(index.tolist()), lengths, n_prefix, n_padding, grids)

"""Position embeddings of many token grids from one stored table.

Resampling is a linear map, whether bicubic and antialiased (timm's `resample_abs_pos_embed`) or linear along each side
of the grid, so the tables of all grids together are one matrix product with the stored table. They are built once for
inference and are differentiable in training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_fast.layers.derived import Derived, kept_tensors
from revit_fast.ops._modes import without_autocast

MAX_EXTRA_GRIDS = 128
"""How many grids besides the configured ones are kept: photographs of all shapes need fewer under three budgets."""


def resample(
    patches: Tensor,
    old_hw: tuple[int, int],
    new_hw: tuple[int, int],
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool = False,
) -> Tensor:
    """Resamples the embeddings `[old tokens, C]` of a grid to `[new tokens, C]`; unchanged if both grids are equal."""
    if old_hw == new_hw:
        return patches
    maps = patches.t().reshape(1, -1, *old_hw)
    maps = F.interpolate(maps, size=new_hw, mode=interpolation, antialias=antialias, align_corners=align_corners)
    return maps[0].flatten(1).t()


class Resampling(NamedTuple):
    """How the embeddings of any grid are computed from the stored ones, as in timm's ViTs and `NaFlexVit`.

    Attributes:
        base_grid: (rows, columns) of the grid that embeddings are stored for.
        factorized: whether embeddings are stored for the rows of the grid, followed by those for its columns. The
            embedding of a patch is then the sum of its row's and its column's (NaViT, arXiv 2307.06304). Each side is
            resampled linearly.
        keep_aspect: whether both sides are resampled by the same factor, to a square with the longer side; the grid is
            its upper left part. Otherwise each side is stretched to its own length.
        interpolation: "bicubic" or "bilinear", of embeddings that are not factorized.
        antialias: whether a smaller grid is resampled with a wider filter.
        align_corners: whether the centres of the corner patches stay, and not the corners of the grid.
        none: nothing is stored, and all embeddings are zero.
    """

    base_grid: tuple[int, int]
    factorized: bool = False
    keep_aspect: bool = False
    interpolation: str = "bicubic"
    antialias: bool = True
    align_corners: bool = False
    none: bool = False

    @property
    def n_stored(self) -> int:
        """Rows of the stored table."""
        rows, columns = self.base_grid
        return 0 if self.none else rows + columns if self.factorized else rows * columns

    def resampled(self, stored: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embeddings `[tokens, C]` of a grid from the stored ones `[n_stored, C]`."""
        if self.none:
            return stored.new_zeros(grid[0] * grid[1], stored.shape[1])
        height, width = (max(grid),) * 2 if self.keep_aspect else grid
        if self.factorized:
            rows, columns = stored.split(self.base_grid)
            rows, columns = _resample_line(rows, height)[: grid[0]], _resample_line(columns, width)[: grid[1]]
            return (rows.unsqueeze(1) + columns).flatten(0, 1)
        if grid == self.base_grid:  # unchanged, even if a resampled square would change it
            return stored
        square = resample(stored, self.base_grid, (height, width), *self[3:6])
        return square.unflatten(0, (height, width))[: grid[0], : grid[1]].flatten(0, 1)

    def rebased(self, stored: Tensor, old_grid: tuple[int, int]) -> Tensor:
        """What is stored for the base grid, `[n_stored, C]`, from what another model stores for `old_grid`."""
        if not self.factorized:
            return resample(stored, old_grid, self.base_grid, *self[3:6])
        lines = zip(stored.split(old_grid), self.base_grid, strict=True)
        return torch.cat([_resample_line(line, length) for line, length in lines])


def _resample_line(embeddings: Tensor, length: int) -> Tensor:
    """Resamples the embeddings `[old length, C]` of one side linearly to `[length, C]`."""
    if embeddings.shape[0] == length:
        return embeddings
    return F.interpolate(embeddings.t().unsqueeze(0), size=length, mode="linear", align_corners=False)[0].t()


class KnownGrids:
    """Grids, and where the rows of each begin in a table of all of them. It never changes, so threads may share it.

    Args:
        first_row: first row of the table for every grid.
        matrix: float64 `[R, n_stored]`, the table as a linear map of the stored embeddings.
        coordinates: float32 `[R, 2]` of rotary embeddings, see `layers.rope`; without them None.
        generation: its tables begin with those of every smaller `KnownGrids` of the same generation.
    """

    def __init__(
        self, first_row: dict[tuple[int, int], int], matrix: Tensor, coordinates: Tensor | None, generation: int
    ) -> None:
        self.first_row, self.matrix, self.coordinates, self.generation = first_row, matrix, coordinates, generation
        self.grid_hw = torch.tensor(list(first_row), dtype=torch.int32, device="cpu").view(-1, 2)
        self.offset = torch.tensor(list(first_row.values()), dtype=torch.int32, device="cpu")
        self._placed: dict[torch.device, tuple[Tensor | None, ...]] = {}

    def offsets(self, grid_hw: Tensor) -> Tensor:
        """First row of every image's grid in the table: int32 `[B]` for grids int32 `[B, 2]`, -1 for an unknown grid.

        An empty grid needs no rows and starts at 0.
        """
        known_hw, known_offset, _ = self._on(grid_hw.device)
        same = (grid_hw.unsqueeze(1) == known_hw).all(dim=-1)
        offset = known_offset[same.int().argmax(dim=1)]
        return torch.where(same.any(dim=1), offset, torch.where(grid_hw.prod(dim=1) == 0, 0, -1).to(torch.int32))

    def coordinates_on(self, device: torch.device) -> Tensor | None:
        """The coordinates on `device`."""
        return self._on(device)[2]

    def _on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Grids, offsets and coordinates on `device`, copied once: a copy in every forward pass would wait for it."""
        tables = self.grid_hw, self.offset, self.coordinates
        if torch.compiler.is_compiling():
            return tuple(t if t is None else t.to(device) for t in tables)
        if device not in self._placed:
            with kept_tensors():
                self._placed[device] = tuple(t if t is None else t.to(device) for t in tables)
        return self._placed[device]

    def first_rows(self, grids: Iterable[tuple[int, int]]) -> list[int]:
        """`offsets` on the host, for known grids."""
        return [0 if 0 in grid else self.first_row[grid] for grid in grids]

    def table(self, pos_embed: Tensor, n_prefix: int, first_row: int = 0) -> Tensor:
        """Embeddings `[R - first_row, C]` of the grids from `first_row` on, see `PositionTables.table`."""
        stored = wide_patches(pos_embed, n_prefix)
        n_rows = [h * w for (h, w), first in self.first_row.items() if first >= first_row]
        # Each grid has its own product: in a joint product, a grid's bits would depend on the other grids.
        parts = self.matrix[first_row:].to(stored).split(n_rows)
        with without_autocast(stored.device):
            return torch.cat([part @ stored for part in parts]).to(pos_embed.dtype)


class PositionTables:
    """Tables of the configured grids and of later ones, one grid after another. Threads may use it concurrently.

    Args:
        resampling: how embeddings are computed from the stored table.
        grids: the configured grids.
        coordinates: makes the coordinates of a grid's patches for rotary embeddings; None where there are none.
    """

    def __init__(
        self,
        resampling: Resampling,
        grids: Iterable[tuple[int, int]],
        coordinates: Callable[[tuple[int, int]], Tensor] | None = None,
    ) -> None:
        self.resampling = resampling
        self.configured = tuple(grids)
        self.coordinates = coordinates
        self.known = KnownGrids({}, torch.empty(0, resampling.n_stored, dtype=torch.float64, device="cpu"), None, 0)
        self._growing = threading.Lock()
        self._tables = Derived(_Tables, _Stored)
        self.learn(self.configured)

    def __getstate__(self) -> dict:
        return {"resampling": self.resampling, "configured": self.configured, "coordinates": self.coordinates}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["resampling"], state["configured"], state.get("coordinates"))

    def learn(self, grids: Iterable[tuple[int, int]]) -> KnownGrids:
        """The known grids, with `grids` among them. If there are too many, only these and the configured ones stay."""
        known = self.known
        if all(grid in known.first_row or 0 in grid for grid in set(grids)):
            return known
        with self._growing:
            known = self.known  # another thread may have added some
            new = [grid for grid in dict.fromkeys(grids) if grid not in known.first_row and 0 not in grid]
            first_row, matrix, generation = dict(known.first_row), known.matrix, known.generation
            if len(first_row) + len(new) > len(self.configured) + MAX_EXTRA_GRIDS:
                first_row, matrix, generation = {}, matrix[:0], generation + 1
                new = list(dict.fromkeys([*self.configured, *new]))
            with kept_tensors():
                identity = torch.eye(matrix.shape[1], dtype=torch.float64, device="cpu")
                parts = [self.resampling.resampled(identity, grid) for grid in new]
                ends = accumulate((len(part) for part in parts), initial=matrix.shape[0])
                first_row.update(zip(new, ends, strict=False))
                coordinates = self.coordinates and torch.cat([self.coordinates(grid) for grid in first_row])
                self.known = KnownGrids(first_row, torch.cat([matrix, *parts]), coordinates, generation)
            return self.known

    def table(self, known: KnownGrids, pos_embed: Tensor, n_prefix: int, dtype: torch.dtype | None = None) -> Tensor:
        """Embeddings of all known grids, `[R, C]`, from the stored `pos_embed` `[1, n_prefix + base tokens, C]`.

        Without autograd the table is kept while `pos_embed` stays the same, and grows with the grids; it may then have
        further rows at its end. On the CPU the values of `pos_embed` are compared, because a write through `.data`
        leaves its version unchanged. On other devices only the version is checked, because a comparison would wait for
        the device.

        Args:
            known: the grids, from `learn`.
            pos_embed: the stored embeddings.
            n_prefix: its rows before those of the grid.
            dtype: type that the table is widened to; by default that of `pos_embed`.
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and pos_embed.requires_grad):
            return known.table(pos_embed, n_prefix)
        with self._tables.of(pos_embed) as tables, kept_tensors():
            return tables.grown(known, n_prefix, dtype or pos_embed.dtype)


class _Stored:
    """Watches the stored embeddings, see `PositionTables.table`."""

    def __init__(self, pos_embed: Tensor) -> None:
        self._pos_embed, self._key = pos_embed, self._read(pos_embed)
        self._values = pos_embed.clone() if pos_embed.device.type == "cpu" else None

    @staticmethod
    def _read(pos_embed: Tensor) -> tuple:
        version = 0 if pos_embed.is_inference() else pos_embed._version
        return pos_embed.data_ptr(), version, pos_embed.dtype, pos_embed.device

    def holds(self) -> bool:
        now = self._pos_embed
        return self._read(now) == self._key and (self._values is None or torch.equal(self._values, now))


class _Tables:
    """The tables of one `pos_embed`, in each dtype asked for."""

    def __init__(self, pos_embed: Tensor) -> None:
        self._pos_embed = pos_embed
        self._kept: dict[torch.dtype, tuple[int, Tensor]] = {}

    def grown(self, known: KnownGrids, n_prefix: int, dtype: torch.dtype) -> Tensor:
        generation, table = self._kept.get(dtype, (None, None))
        n_rows = 0 if generation != known.generation else table.shape[0]
        if n_rows < known.matrix.shape[0]:
            added = known.table(self._pos_embed, n_prefix, n_rows).to(dtype)
            table = torch.cat([table, added]) if n_rows else added
            self._kept[dtype] = known.generation, table
        return table


def wide_patches(pos_embed: Tensor, n_prefix: int) -> Tensor:
    """The patches' part of `pos_embed` `[1, n_prefix + tokens, C]` as `[tokens, C]` in float32 or wider."""
    return pos_embed[0, n_prefix:].to(torch.promote_types(pos_embed.dtype, torch.float32))

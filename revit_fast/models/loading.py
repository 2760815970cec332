"""Loads weights into a model of other lengths or another base grid: what belongs to a length follows that length."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast.grids import check_grids, rows_of_lengths
from revit_fast.layers.derived import kept_tensors
from revit_fast.layers.norm import TALNorm
from revit_fast.layers.positions import PositionTables, wide_patches
from revit_fast.models.timm_blocks import plain_names
from revit_fast.models.weights import EXTRA_STATE, load_fitting, read_checkpoint, state_dict_of


def named_numbers(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1, then whole numbers that a state dict shall carry, see `numbers_named_in`.

    They are homogeneous coordinates: state dicts are averaged, scaled and summed, and the numbers stay what they are.
    """
    with kept_tensors():
        return torch.tensor([1, *numbers], dtype=dtype, device=device)


def numbers_named_in(state_dict: Mapping[str, Tensor], prefix: str = "") -> list[int] | None:
    """The numbers of `named_numbers` in a state dict; None if it has none, or arithmetic has made them unreadable."""
    state = state_dict.get(prefix + EXTRA_STATE)
    if not isinstance(state, Tensor) or state.is_meta or state.dim() != 1 or len(state) < 2:
        return None
    one, *scaled = state.double().tolist()
    if not math.isfinite(sum(scaled)) or not one:
        return None
    numbers = [number / one for number in scaled]
    return None if any(abs(n - round(n)) > 0.01 * n for n in numbers) else [round(n) for n in numbers]


class MadeFor(NamedTuple):
    """What the rows of a model's norms and position embeddings stand for.

    Attributes:
        base_grid: (rows, columns) of the grid that position embeddings are stored for; None if it is not known.
        grids: the configured grids, one for every row of a norm.
    """

    base_grid: tuple[int, int] | None
    grids: tuple[int, ...]

    def as_tensor(self, like: Tensor) -> Tensor:
        """`[3 + n_lengths]`: 1, base grid, grids; in the dtype of other weights, see `named_numbers`."""
        return named_numbers([*self.base_grid, *self.grids], like.dtype, like.device)

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> MadeFor | None:
        """What a state dict says of itself; None if it says nothing, or arithmetic has made it unreadable."""
        numbers = numbers_named_in(state_dict, prefix)
        if numbers is None or len(numbers) < 3:
            return None
        rows, columns, *grids = numbers
        decreases = all(a > b for a, b in pairwise([*grids, 0]))
        return cls((rows, columns), tuple(grids)) if decreases and min(rows, columns) > 0 else None


class LoadsWeights:
    """The methods of a model with norms of several lengths that load weights.

    A state dict names the grids that it was made for in an entry of its own, which strict loading can do without. A
    model of other grids takes the norms of the grids that it has too, and for a new grid those of the nearest length.

    Attributes:
        norm_parameter: pattern of the names of norm parameters, which are `[n_lengths, C]`.
        grids: configured grids.
        base_grid: (rows, columns) of the grid that position embeddings are stored for.
    """

    norm_parameter: re.Pattern
    grids: tuple[int, ...]
    base_grid: tuple[int, int]
    _positions: PositionTables
    _n_prefix_embedded: int

    def get_extra_state(self) -> Tensor:
        """The grids that the state dict is made for, see `MadeFor.as_tensor`."""
        return MadeFor(self.base_grid, self.grids).as_tensor(self.pos_embed.detach())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is kept: `_load_from_state_dict` has followed it."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        key = prefix + EXTRA_STATE
        inner = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        if MadeFor.of(inner) is not None:
            followed = self.follow(inner)  # state_dict is a copy that torch made for this call
            state_dict.update({prefix + name: value for name, value in followed.items()})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if key in missing:  # a plain state dict, or one of before
            missing.remove(key)

    def convert_state_dict(
        self, state_dict: Mapping[str, Tensor], *, made_for: MadeFor | None = None, match_norms: str = "length"
    ) -> dict[str, Tensor]:
        """Converts the state dict of a plain ViT, or of a model of other grids, to the shapes of this model.

        EVA's names become a `VisionTransformer`'s. Norm parameters of one length are repeated for every length, those
        of several follow their length, and position embeddings are resampled to the base grid.

        Args:
            state_dict: the weights.
            made_for: the grids of the weights, where they do not say it; without either, norms are taken by order.
            match_norms: see `grids.rows_of_lengths`.
        """
        state_dict = plain_names(state_dict, (name for name, _ in self.named_parameters()))
        converted = {
            name: value.expand(len(self.grids), -1) if value.dim() == 1 and self.norm_parameter.search(name) else value
            for name, value in state_dict.items()
        }
        return self.follow(converted, made_for, match_norms)

    def load_checkpoint(
        self, path: str | Path, *, grids: Sequence[int] | None = None, match_norms: str = "length"
    ) -> None:
        """Loads the weights of a plain ViT or of a ReViT from `.safetensors` or `.pth` (with `weights_only=True`).

        Args:
            path: the file.
            grids: see `load_weights`.
            match_norms: see `load_weights`.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: where names or shapes do not fit; the message lists missing, unexpected and misshapen ones.
        """
        self.load_weights(read_checkpoint(Path(path), self.state_dict()), path, grids=grids, match_norms=match_norms)

    def load_weights(
        self,
        state_dict: Mapping[str, Tensor],
        source: str | Path,
        *,
        grids: Sequence[int] | None = None,
        match_norms: str = "length",
    ) -> None:
        """Loads the state dict of a plain ViT or of a model of this kind, also out of a training checkpoint.

        Args:
            state_dict: state dict of either, or what a checkpoint holds (`weights.CONTAINERS`).
            source: name of the state dict in errors.
            grids: grids that it was trained with, where it does not say them; by default those of this model.
            match_norms: "length": norms follow their length, and a length that is new here takes those of the nearest;
                "order": the longest takes the longest's, and so on, for a model whose lengths are all scaled.

        Raises:
            ValueError: where names or shapes do not fit; the message lists missing, unexpected and misshapen ones.
        """
        made_for = None if grids is None else MadeFor(None, check_grids(grids))
        state_dict = state_dict_of(state_dict, source, self.state_dict())
        load_fitting(self, self.convert_state_dict(state_dict, made_for=made_for, match_norms=match_norms), source)

    def follow(
        self, state_dict: Mapping[str, Tensor], made_for: MadeFor | None = None, match_norms: str = "length"
    ) -> dict[str, Tensor]:
        """A state dict for this model's grids and base grid instead of those that it was made for.

        Args:
            state_dict: that of a model of this kind.
            made_for: the grids of the weights, where they do not say it; without either, norms are taken by order.
            match_norms: see `grids.rows_of_lengths`.
        """
        made_for = MadeFor.of(state_dict) or made_for
        followed = dict(state_dict)
        if made_for is not None and made_for.grids != self.grids:
            rows = rows_of_lengths(made_for.grids, self.grids, match_norms)
            norms = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, TALNorm))
            for name, value in state_dict.items():
                if name.startswith(norms) and value.dim() == 2 and len(value) == len(made_for.grids):
                    followed[name] = value[rows]
        if "pos_embed" in state_dict:
            base_grid = None if made_for is None else made_for.base_grid
            followed["pos_embed"] = self._positions_here(state_dict["pos_embed"], base_grid)
        if EXTRA_STATE in state_dict:
            followed[EXTRA_STATE] = self.get_extra_state()
        return followed

    def _positions_here(self, stored: Tensor, base_grid: tuple[int, int] | None) -> Tensor:
        """Position embeddings `[1, tokens, C]` resampled to this model's base grid; a grid of None is a square."""
        n_prefix, resampling = self._n_prefix_embedded, self._positions.resampling
        if stored.dim() != 3 or base_grid == self.base_grid:
            return stored  # where it does not fit, the caller reports the error
        if base_grid is None:
            side = math.isqrt(max(stored.shape[1] - n_prefix, 0))
            base_grid = (side, side)
            if stored.shape[1] == n_prefix + resampling.n_stored or resampling.factorized:
                return stored
        if stored.shape[1] != n_prefix + resampling._replace(base_grid=base_grid).n_stored:
            return stored
        patches = resampling.rebased(wide_patches(stored, n_prefix), base_grid).to(stored.dtype)
        return torch.cat([stored[:, :n_prefix], patches.unsqueeze(0)], dim=1)

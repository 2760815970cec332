"""Rotary position embeddings: pairs of channels of queries and keys turn by angles that follow a patch's coordinates.

An angle is `c₀ f₀ + c₁ f₁`, with the coordinates c of the patch and the frequencies f of the pair. All kinds of rotary
embedding differ in c and f alone. A token with the coordinates (0, 0), such as a prefix token, does not turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revit_fast.layers.derived import kept_tensors
from revit_fast.ops._modes import without_autocast
from revit_fast.ops.rotary import rotary


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of queries and keys (arXiv 2104.09864) in two dimensions (arXiv 2403.13298).

    Attributes:
        kind: "axial": half of the pairs turn with one coordinate, half with the other; "mixed": every pair turns with
            both, by frequencies that are learned for every block and head; "interleaved": pairs 1, 4, 7, ... turn with
            the row, 2, 5, 8, ... with the column (Qwen2-VL, arXiv 2409.12191).
        temperature: the frequencies fall from 1 to almost its reciprocal; with centred coordinates from 2π.
        coords: "index": numbers of row and column; "centered": from -1 to 1, each the centre of its patch (DINOv3,
            arXiv 2508.10104).
        order: "ij": the row is the first coordinate; "xy": the column is.
        offset: added to row and column.
        reference: (rows, columns) of the grid to whose coordinates those of every grid are stretched; None for none.
        normalize: side that centred coordinates are divided by: "separate" (each by its own), "min" or "max".
        half: a pair is channels j and j + D / 2; otherwise 2 j and 2 j + 1.
        sections: "interleaved" turns pairs below three times these, with rows and with columns.
        shift: in training each coordinate moves by up to this, all patches alike; None for none.
        jitter: in training each coordinate is multiplied by a factor between the reciprocal of this and this.
        rescale: in training both are multiplied by such a factor.
    """

    kind: str = "axial"
    temperature: float = 10000.0
    coords: str = "index"
    order: str = "ij"
    offset: float = 0.0
    reference: tuple[int, int] | None = None
    normalize: str = "separate"
    half: bool = False
    sections: tuple[int, int] = (12, 12)
    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", ("axial", "mixed", "interleaved")),
            ("coords", ("index", "centered")),
            ("order", ("ij", "xy")),
            ("normalize", ("separate", "min", "max")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"rope: expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def step(self) -> int:
        """What the channels of a head must be a multiple of."""
        return 2 if self.kind == "interleaved" else 4

    def coordinates(self, grid: tuple[int, int]) -> Tensor:
        """Coordinates of a grid's patches, float32 `[rows * columns, 2]`, rounded as timm's are."""
        divisors = grid if self.normalize == "separate" else ({"min": min, "max": max}[self.normalize](grid),) * 2
        lines = []
        for axis, side in enumerate(grid):
            line = torch.arange(side, dtype=torch.float32, device="cpu")
            if self.coords == "centered":
                line = 2.0 * ((line + 0.5 + self.offset) / divisors[axis]) - 1.0
            else:
                line = line + self.offset
                line = line if self.reference is None else line / side * self.reference[axis]
            lines.append(line)
        row, column = lines[0].unsqueeze(1).expand(grid), lines[1].expand(grid)
        return torch.stack((row, column) if self.order == "ij" else (column, row), dim=-1).flatten(0, 1)

    def augmented(self, coords: Tensor) -> Tensor:
        """Coordinates `[n, 2]` for training, all moved by one random transformation."""
        if self.shift is not None:
            coords = coords + coords.new_empty(2).uniform_(-self.shift, self.shift)
        for largest, n in ((self.jitter, 2), (self.rescale, 1)):
            if largest is not None:
                coords = coords * coords.new_empty(n).uniform_(-math.log(largest), math.log(largest)).exp()
        return coords

    def frequencies(self, head_dim: int) -> Tensor:
        """Frequencies of every pair of channels, float64 `[2, head_dim / 2]`, of a kind that does not learn them."""
        n = head_dim // self.step
        power = self.temperature ** (torch.arange(n, dtype=torch.float32, device="cpu") / n)  # rounded as timm's is
        frequency = 2 * math.pi / power.double() if self.coords == "centered" else (1.0 / power).double()
        if self.kind == "axial":
            return torch.block_diag(frequency, frequency)
        pair = torch.arange(n, dtype=torch.int64, device="cpu")
        turns = [(pair % 3 == axis) & (pair < 3 * section) for axis, section in enumerate(self.sections, start=1)]
        return torch.stack([torch.where(turning, frequency, 0.0) for turning in turns])


class Rotation(NamedTuple):
    """The rotation of every token in a block.

    Attributes:
        cos: `[T, 1 or heads, D / 2]`.
        sin: of the same shape.
        half: see `Rope`.
    """

    cos: Tensor
    sin: Tensor
    half: bool

    def of_rows(self, rows: Tensor) -> Rotation:
        """The rotation of some tokens."""
        return Rotation(self.cos.index_select(0, rows), self.sin.index_select(0, rows), self.half)

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Turns queries `[T, H, D]` and keys `[T, Hkv, D]`, computed in float32 or wider."""
        return rotary(q, k, self.cos, self.sin, half=self.half)

    def turn_alone(self, x: Tensor) -> Tensor:
        """Turns queries, or keys, `[T, H, D]`."""
        return self.turn(x, x.new_empty(x.shape[0], 0, x.shape[2]))[0]


class RotaryEmbedding(nn.Module):
    """Makes the rotations of all blocks from the coordinates of tokens.

    Args:
        rope: the kind of embedding.
        depth: number of blocks.
        heads: heads of every block, for frequencies that are learned.
        head_dim: channels D of a head.
    """

    def __init__(self, rope: Rope, depth: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self._rope = rope
        self._placed: dict[tuple, Tensor] = {}
        if rope.kind == "mixed":
            self.freqs = nn.Parameter(torch.empty(2, depth, heads, head_dim // 2))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_placed": {}}

    def init_weights(self) -> None:
        """New frequencies that are learned: axial ones, turned by a random angle for every block and head."""
        if self._rope.kind != "mixed":
            return
        steps = torch.arange(0, self.head_dim, 4, dtype=torch.float32, device="cpu") / self.head_dim
        angle = 2 * math.pi * torch.rand(*self.freqs.shape[1:3], 1, dtype=torch.float32, device="cpu")
        directions = torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])
        new = [self._rope.temperature**-steps * direction for direction in directions]
        with torch.no_grad():
            self.freqs.copy_(torch.cat(new, dim=-1))

    def forward(self, coords: Tensor, dtype: torch.dtype, depth: int) -> list[Rotation]:
        """The rotation of every block.

        Args:
            coords: float32 `[T, 2]`.
            dtype: dtype of the model; rotations are in float32 or wider.
            depth: number of blocks.
        """
        wide = torch.promote_types(dtype, torch.float32)
        learned, half = self._rope.kind == "mixed", self._rope.half
        with without_autocast(coords.device):
            # The tables of all blocks are made together: on a GPU every operation is a launch.
            fixed = None if learned else self._fixed(coords.device, wide)
            frequencies = self.freqs[:, :depth].to(wide).unsqueeze(2) if learned else fixed
            first, second = coords.to(wide)[:, :, None, None].unbind(1)
            angle = first * frequencies[0] + second * frequencies[1]
            cos, sin = angle.cos(), angle.sin()
        if not learned:
            return [Rotation(cos, sin, half)] * depth
        cos, sin = cos.unbind(0), sin.unbind(0)
        return [Rotation(cos[i], sin[i], half) for i in range(depth)]

    def _fixed(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Frequencies `[2, 1, D / 2]` that are not learned. A buffer would be rounded to the model's dtype."""
        if torch.compiler.is_compiling():
            return self._rope.frequencies(self.head_dim).unsqueeze(1).to(device, dtype)
        if (device, dtype) not in self._placed:
            with kept_tensors():
                self._placed[device, dtype] = self._rope.frequencies(self.head_dim).unsqueeze(1).to(device, dtype)
        return self._placed[device, dtype]

    def extra_repr(self) -> str:
        return f"{self._rope.kind}, head_dim={self.head_dim}"

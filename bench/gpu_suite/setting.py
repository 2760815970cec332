"""Sizes, dtypes and inputs of the suite's cases."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revit_fast.packing import PackedBatch

GRIDS = (14, 10, 7)
"""Square patch grids of the models' images."""


@dataclass(frozen=True)
class Setting:
    """Sizes, dtype and device of a case.

    Attributes:
        name: name of the case.
        device: device of all tensors.
        dtype: dtype of rows and weights.
        groups: (sequences, tokens) of each length, strictly decreasing. Tokens include one prefix token.
        heads: attention heads.
        head_dim: channels of a head.
        depth: blocks of the model.
        patch: patch size in pixels.
        n_sets: input sets that calls rotate through.
        compiled: whether peers that need `torch.compile` are compiled.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    groups: tuple[tuple[int, int], ...]
    heads: int = 6
    head_dim: int = 64
    depth: int = 12
    patch: int = 16
    n_sets: int = 4
    compiled: bool = True

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def seqlens(self) -> list[int]:
        return [n for count, n in self.groups for _ in range(count)]

    @property
    def n_tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def grids(self) -> tuple[int, ...]:
        """Patches per side of each length, for models."""
        return tuple(math.isqrt(n - 1) for _, n in self.groups)

    def pack(self) -> PackedBatch:
        """The layout of the tokens, as a pack of rows without channels."""
        rows = torch.empty(self.n_tokens, 0, device=self.device)
        return PackedBatch.from_rows(rows, self.seqlens, lengths=[n - 1 for _, n in self.groups], n_prefix=1)

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)


def models(device: torch.device) -> list[Setting]:
    """DeiT-S and ViT-B, 64 and 256 images, a quarter of them at 14x14, the rest half at 10x10 and half at 7x7.

    For the interpreter one small model. The error rule compares two maxima, which depend on luck over a few dozen rows,
    so its images have 119 rows.
    """
    if device.type == "cpu":
        small = Setting("tiny", device, torch.float32, ((1, 50), (2, 26), (1, 17)), 1, 32, 1, 4, 2, False)
        return [small]
    found = []
    for n_images in (64, 256):
        groups = tuple((n_images * eighths // 8, g * g + 1) for eighths, g in zip((2, 3, 3), GRIDS, strict=True))
        small = Setting(f"DeiT-S, {n_images} images", device, torch.bfloat16, groups)
        found += [small, replace(small, name=f"ViT-B, {n_images} images", heads=12)]
    return found


SEQLENS = (50, 101, 197, 256, 577, 1025)
HEADS = {64: 6, 80: 16, 72: 16, 128: 8}
"""Heads of each head dimension: DeiT-S, ViT-H, SigLIP's SO400M, and eight."""


def attentions(device: torch.device) -> list[Setting]:
    """Sequences of one length, about 16,384 rows; for the interpreter a few short ones."""
    if device.type == "cpu":
        return [Setting("L 50, D 16", device, torch.float32, ((2, 50),), 1, 16, n_sets=2, compiled=False)]
    return [
        Setting(f"L {n}, D {d}", device, torch.bfloat16, ((16384 // n, n),), heads, d)
        for d, heads in HEADS.items()
        for n in SEQLENS
    ]

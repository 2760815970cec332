"""Images as patch rows, and the linear embedding of such rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.layers.comparison import is_plain


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Images `[B, C, gh*P, gw*P]` as rows `[B*gh*gw, P*P*C]`."""
    batch, channels, height, width = x.shape
    p = patch_size
    patches = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(-1, p * p * channels)


def unpatchify(rows: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Rows `[B*gh*gw, P*P*C]` as images `[B, C, gh*P, gw*P]` in channels-last memory."""
    (h, w), p = grid, patch_size
    patches = rows.reshape(-1, h, w, p, p, rows.shape[1] // (p * p)).permute(0, 1, 3, 2, 4, 5)
    return patches.reshape(-1, h * p, w * p, patches.shape[-1]).permute(0, 3, 1, 2)


def normalised(rows: Tensor, normalization: Tensor) -> Tensor:
    """Normalises uint8 rows `[T, P*P*C]` as ToTensor and Normalize do, in float32."""
    mean, std = normalization.to(rows.device, torch.float32)
    pixels = rows.view(rows.shape[0], -1, mean.shape[0]).float()
    return ((pixels / 255 - mean) / std).flatten(1)


class FoldedEmbedding(NamedTuple):
    """A patch embedding of raw pixels, with their normalisation folded in.

    Attributes:
        weight: `[C, P*P*3]`.
        bias: `[C]`.
    """

    weight: Tensor
    bias: Tensor


class PatchEmbed(nn.Module):
    """Linear embedding of patch rows `[T, P*P*3]`.

    Parameters have the names, shapes and memory layout of timm's convolution.

    Attributes:
        patch_size: (P, P).
        grid_size: (rows, columns) of the grid that position embeddings are stored for; the name is timm's.
        num_patches: patches of that grid.
        norm: norm of the embedded patches, which the model calls; None for none.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        dim: int,
        grid_size: tuple[int, int],
        bias: bool = True,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = grid_size
        self.num_patches = grid_size[0] * grid_size[1]
        self.kernel_px, self.row_width = patch_size, patch_size**2 * in_chans
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = norm

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "kernel_px" not in state:  # pickled before these were kept
            self.kernel_px, self.row_width = self.proj.weight.shape[-1], self.proj.weight[0].numel()
        if not hasattr(self, "norm"):
            self.norm = None

    def fold(self, normalization: Tensor) -> FoldedEmbedding:
        """The embedding of raw uint8 rows, with this (mean, std) `[2, 3]` of pixels in [0, 1] folded in.

        Raises:
            ValueError: if `proj` is not a plain convolution.
        """
        if not is_plain(self.proj, nn.Conv2d):
            raise ValueError(
                f"patch_embed.proj: expected a plain Conv2d to fold the normalization of uint8 rows into, got "
                f"{type(self.proj).__name__} or one with hooks; merge it first, or give rows of floats"
            )
        weight, bias = self.proj.weight, self.proj.bias
        mean, std = normalization.to(weight.dtype).view(2, 1, -1, 1, 1)
        shift = -(weight * (mean / std)).sum(dim=(1, 2, 3))
        return FoldedEmbedding(self._matrix(weight / (255 * std)), shift if bias is None else bias + shift)

    def forward(self, rows: Tensor, normalization: Tensor | FoldedEmbedding | None = None) -> Tensor:
        """Embeds normalised rows, or raw uint8 rows whose normalization is folded into the weights, here or earlier."""
        if not is_plain(self.proj, nn.Conv2d):
            return self._called(rows, normalization)
        if isinstance(normalization, Tensor):
            normalization = self.fold(normalization)
        weight, bias = self.matrix() if normalization is None else normalization
        return F.linear(rows.to(weight.dtype), weight, bias)

    def _called(self, rows: Tensor, normalization: Tensor | None) -> Tensor:
        """The embedding by calling `proj` on every patch as an image."""
        if normalization is not None:
            rows = normalised(rows, normalization)
        parameter = next(self.proj.parameters(), rows)
        patches = unpatchify(rows.to(parameter.dtype), (1, 1), self.kernel_px)
        return self.proj(patches).flatten(1)

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[C, P*P*3]` in the order of the rows, and bias."""
        return self._matrix(self.proj.weight), self.proj.bias

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)

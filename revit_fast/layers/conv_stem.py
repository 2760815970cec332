"""LV-ViT's convolutional stem ("All Tokens Matter", arXiv 2104.10858) before the patch embedding of packed images.

The kernel of its last convolution is as large as its stride: this is a linear embedding of patches of the features that
the earlier convolutions compute. The stem therefore assembles an image from its patch rows, runs the earlier
convolutions on it, and cuts their features into rows again. These rows pass through the model like the patch rows of an
image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.layers.patch_embed import PatchEmbed, normalised, patchify, unpatchify

CONVOLUTIONS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
"""Names of the stem's convolutions and of the norms after them."""


class ConvStem(PatchEmbed):
    """Three convolutions at half the resolution, then the linear embedding of patches of their features.

    Parameters have the names and shapes of the official `PatchEmbed4_2`. Each image is padded with zeros at its border,
    so no image sees another. In training, batch norms compute statistics over the images of one grid at a time, and
    update their running averages once for each grid of a batch.

    Args:
        patch_size: P in pixels, even.
        in_chans: image channels.
        stem_chans: channels of the convolutions.
        dim: channels C of the embedding.
        grid_size: see `PatchEmbed`.
        bias: whether the embedding has a bias.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        stem_chans: int,
        dim: int,
        grid_size: tuple[int, int],
        bias: bool = True,
    ) -> None:
        if patch_size % 2:
            raise ValueError(f"patch_size: a convolutional stem halves the image; expected an even P, got {patch_size}")
        super().__init__(patch_size // 2, stem_chans, dim, grid_size, bias)
        self.patch_size = (patch_size, patch_size)
        self.conv1 = nn.Conv2d(in_chans, stem_chans, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_chans)
        self.conv2 = nn.Conv2d(stem_chans, stem_chans, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_chans)
        self.conv3 = nn.Conv2d(stem_chans, stem_chans, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_chans)

    def features(self, images: Tensor) -> Tensor:
        """Features `[B, stem_chans, H/2, W/2]` of images `[B, in_chans, H, W]`."""
        x = images.to(self.conv1.weight.dtype)
        for convolution, norm in CONVOLUTIONS:
            x = F.relu(getattr(self, norm)(getattr(self, convolution)(x)))
        return x

    def feature_rows(self, rows: Tensor, grids: Sequence[tuple[int, int]], normalization: Tensor | None) -> Tensor:
        """Feature rows `[T, (P/2)*(P/2)*stem_chans]`, the input of the embedding.

        In evaluation on a CPU the convolutions run on one image at a time, which costs nothing there and gives an image
        the same bits in every batch. Otherwise they run on all images of a grid together.

        Args:
            rows: `[T, P*P*in_chans]` patch rows; rows after those of the grids are padding and become zero.
            grids: (rows, columns) of every image.
            normalization: `[2, in_chans]` mean and std that must still be applied to uint8 rows.
        """
        alone = not self.training and rows.device.type == "cpu"
        return _uncompiled(_packed_features)(self.features, rows, grids, normalization, self, alone)

    def folded(self) -> FoldedStem:
        """The convolutions for evaluation, each with the norm after it folded in."""
        folded = []
        for convolution, norm in CONVOLUTIONS:
            conv, bn = getattr(self, convolution), getattr(self, norm)
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            weight = (conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
            bias = (bn.bias.double() - bn.running_mean.double() * scale).float()
            weight = weight.contiguous(memory_format=torch.channels_last)
            folded.append(FoldedConvolution(weight, bias, conv.stride[0], conv.padding[0]))
        return FoldedStem(self, folded)


class FoldedConvolution(NamedTuple):
    """A convolution with a norm folded in, in float32."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int


class FoldedStem(NamedTuple):
    """A stem for inference on a CPU; see `ConvStem.folded`."""

    stem: ConvStem
    convolutions: list[FoldedConvolution]

    def features(self, images: Tensor) -> Tensor:
        """As `ConvStem.features`, in float32."""
        x = images.float()
        for weight, bias, stride, padding in self.convolutions:
            x = F.conv2d(x, weight, bias, stride, padding).relu_()
        return x

    def feature_rows(self, rows: Tensor, grids: Sequence[tuple[int, int]], normalization: Tensor | None) -> Tensor:
        """As `ConvStem.feature_rows`, in float32, one image at a time."""
        return _uncompiled(_packed_features)(self.features, rows, grids, normalization, self.stem, alone=True)


def _uncompiled(function: Callable) -> Callable:
    """Excludes the function from compilation, which would otherwise recompile it for every mix of grids."""
    # This is not a decorator because a decorator would import the compiler together with this module.
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _packed_features(
    features: Callable[[Tensor], Tensor],
    rows: Tensor,
    grids: Sequence[tuple[int, int]],
    normalization: Tensor | None,
    stem: ConvStem,
    alone: bool,
) -> Tensor:
    if normalization is not None:
        rows = normalised(rows, normalization)
    patch_size, width, dtype = stem.patch_size[0], stem.row_width, stem.conv1.weight.dtype
    counts = [h * w for h, w in grids]
    *images, padding = rows.split([*counts, rows.shape[0] - sum(counts)])
    groups: dict[tuple, list[int]] = {}
    for b, grid in enumerate(grids):
        groups.setdefault((grid, b if alone else None), []).append(b)
    pieces = [rows.new_zeros(0, width, dtype=dtype)] * len(grids)
    for (grid, _), members in groups.items():
        if 0 in grid:
            continue
        together = images[members[0]] if len(members) == 1 else torch.cat([images[b] for b in members])
        rows_of_group = patchify(features(unpatchify(together, grid, patch_size)), patch_size // 2)
        for b, piece in zip(members, rows_of_group.split(grid[0] * grid[1]), strict=True):
            pieces[b] = piece
    return torch.cat([*pieces, rows.new_zeros(padding.shape[0], width, dtype=dtype)])

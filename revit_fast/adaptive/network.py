"""The assigner's network: a small separable CNN on thumbnails, and a fused form of it for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.ops.linear import PackedWeight, pack_weight
from revit_fast.packing import device_cu_seqlens

STEM_PATCH = 4
"""Side, in pixels, of the patches that the stem embeds."""


class SeparableBlock(nn.Module):
    """A 3×3 convolution of each channel alone, then a linear layer over the channels, a norm and GELU."""

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim_in, dim_in, 3, stride, padding=1, groups=dim_in, bias=False)
        self.pointwise = nn.Conv2d(dim_in, dim_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.pointwise(self.depthwise(x))))


class SeparableCNN(nn.Module):
    """A patch embedding, separable blocks that halve the side, the mean over positions and a linear head.

    Args:
        n_out: number of outputs.
        widths: channels of the stem and of each block after it.
    """

    def __init__(self, n_out: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.Conv2d(3, widths[0], STEM_PATCH, STEM_PATCH, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks = [SeparableBlock(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairwise(widths))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, n_out]` of images `[B, 3, S, S]`."""
        x = self.blocks(F.gelu(self.norm(self.stem(x.to(self.stem.weight.dtype)))))
        return self.head(x.mean(dim=(2, 3)))

    def macs(self, image_px: int) -> int:
        """Multiply-adds for one image with a side of `image_px` pixels."""
        side = image_px // STEM_PATCH
        total = side**2 * self.stem.weight.numel() + self.head.weight.numel()
        for block in self.blocks:
            side = -(-side // block.depthwise.stride[0])
            total += side**2 * (block.depthwise.weight.numel() + block.pointwise.weight.numel())
        return total


class FusedCNN:
    """A `SeparableCNN` in evaluation mode on patch rows: folded norms, packed linear layers, in-place activations.

    The logits of an image are bitwise the same in every batch.
    """

    class Layer(NamedTuple):
        """A linear layer, and the weight for `F.conv2d` and the stride of the depthwise convolution before it."""

        depthwise: Tensor | None
        stride: int
        linear: PackedWeight

    def __init__(self, cnn: SeparableCNN) -> None:
        stem = cnn.stem.weight.permute(0, 2, 3, 1).flatten(1)  # in the order of patch rows
        self.layers = [self.Layer(None, 1, self._folded(stem, cnn.norm))]
        for block in cnn.blocks:
            linear = self._folded(block.pointwise.weight.flatten(1), block.norm)
            self.layers.append(self.Layer(block.depthwise.weight.detach().float(), block.depthwise.stride[0], linear))
        self.head = pack_weight(cnn.head.weight, cnn.head.bias)

    @staticmethod
    def _folded(weight: Tensor, norm: nn.BatchNorm2d) -> PackedWeight:
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        bias = norm.bias.double() - norm.running_mean.double() * scale
        return pack_weight(weight.double() * scale.unsqueeze(1), bias)

    def logits(self, rows: Tensor, side: int) -> Tensor:
        """Logits `[B, n_out]` of B images, given as patch rows `[B * side², P·P·3]`."""
        n_images = rows.shape[0] // side**2
        for layer in self.layers:
            if layer.depthwise is not None:
                # Rows are images in channels-last memory, so the convolution needs no copy.
                x = rows.view(n_images, side, side, -1).permute(0, 3, 1, 2)
                x = F.conv2d(x, layer.depthwise, stride=layer.stride, padding=1, groups=x.shape[1])
                side = x.shape[2]
                rows = x.permute(0, 2, 3, 1).reshape(n_images * side**2, -1)
            rows = ops.packed_linear(rows, layer.linear, "gelu")
        pooled = ops.mean_pool(rows, device_cu_seqlens(side**2, n_images, rows.device), 0)
        return ops.packed_linear(pooled, self.head)

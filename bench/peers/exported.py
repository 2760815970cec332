"""A timm ViT as a graph that serves every grid, for runtimes that read exported models."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn

from bench.model_work import Case, Grid, grids_of

N_CALIBRATION = 96
"""Images that a quantizer calibrates with, of the three lengths in the proportions of the mix."""
CALIBRATION_SEED = 2
"""None of the images that are measured has this seed."""


class WithPositions(nn.Module):
    """A timm ViT whose table of positions comes as an input, so that an exported graph serves every grid."""

    def __init__(self, vit: VisionTransformer | Eva) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        """Logits of images `[B, 3, H, W]` with the positions of their grid, see `positions_of`."""
        vit = self.vit
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1)
        if isinstance(vit, Eva):
            for block in vit.blocks:
                x = block(x, rope=positions)
        else:
            x = vit.blocks(x + positions)
        return vit.forward_head(vit.norm(x))


def positions_of(vit: VisionTransformer | Eva, grid: Grid) -> Tensor:
    """Position embeddings `[1, N, C]` of a grid, class token first; of an EVA the sines and cosines `[1, N, 2 * D]`."""
    if isinstance(vit, Eva):
        return vit.rope.get_embed(grid)[None].contiguous()
    n_prefix = vit.num_prefix_tokens
    return resample_abs_pos_embed(vit.pos_embed, grid, num_prefix_tokens=n_prefix).detach().contiguous()


def example_inputs(vit: VisionTransformer | Eva) -> tuple[Tensor, Tensor]:
    """Inputs of `WithPositions` to trace it with."""
    side = 7 * vit.patch_embed.patch_size[0]
    return torch.randn(2, 3, side, side), positions_of(vit, (7, 7))


def calibration_images(vit: VisionTransformer) -> list[tuple[Grid, Tensor]]:
    """Grids and images `[1, 3, H, W]` to calibrate with: drawn as those of a `Case`, but none of them."""
    draw, p = torch.Generator().manual_seed(CALIBRATION_SEED), vit.patch_embed.patch_size[0]
    grids = grids_of("mix", N_CALIBRATION)
    return [((h, w), torch.randn(1, 3, h * p, w * p, generator=draw)) for h, w in grids]


@contextlib.contextmanager
def quiet_export():
    """Hides torch's notices that TorchScript is deprecated: both engines' importers still read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def numpy_inputs(case: Case) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Of every set, images and positions of every group, as arrays over the same memory."""
    positions = {grid: positions_of(case.vit, grid).numpy() for grid in case.groups}
    return [[(images.numpy(), positions[grid]) for grid, images in stacked.items()] for stacked in case.stacked]

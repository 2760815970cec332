"""What a model takes: images or packs become patch rows, offsets and position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from revit_fast.layers.conv_stem import ConvStem
from revit_fast.layers.patch_embed import FoldedEmbedding, patchify
from revit_fast.layers.positions import Resampling, wide_patches
from revit_fast.layers.rope import Rope
from revit_fast.ops._modes import NotScriptable
from revit_fast.packing import (
    Layout,
    PackedBatch,
    PackPlan,
    device_cu_seqlens,
    image_grid,
    nearest_length,
    patch_rows,
)
from revit_fast.packing.tensors import as_list, check_pixels, check_plain

NEW_GRID = (
    "x: a compiled model met a grid that it had not seen before it was compiled; call the model itself once with an "
    "image of this grid, then the compiled one, which is compiled anew"
)
"""What a compiled model says of a new grid: position embeddings are made outside compiled code."""


class Inputs(NamedTuple):
    """A batch on its way into the model.

    Attributes:
        rows: `[Tp, P*P*3]` patch rows; for a model with a convolutional stem, the rows of its features.
        cu_seqlens: int32 `[B + 1]` of the patches.
        layout: layout of the tokens, including prefix tokens.
        pos_table: `[R, C]` position embeddings of several grids, one after another.
        pos_offset: int32 `[B]`, row of `pos_table` where the grid of each image starts.
        normalization: `[2, 3]` mean and std that must still be applied to uint8 rows, or an embedding with them folded
            in.
        coordinates: float32 `[R, 2]`, coordinates of the grids' patches for rotary embeddings, in the order of
            `pos_table`; None for a model without.
    """

    rows: Tensor
    cu_seqlens: Tensor
    layout: Layout
    pos_table: Tensor
    pos_offset: Tensor
    normalization: Tensor | FoldedEmbedding | None
    coordinates: Tensor | None = None


class PatchRows(NamedTuple):
    """Patch rows of a batch, and what the host knows of them; no index tensor is made yet.

    Attributes:
        rows: `[Tp, P*P*3]`, one image after another, without padding.
        plan: the plan of the rows; it has grids.
        normalization: `[2, 3]` mean and std that must still be applied to uint8 rows.
    """

    rows: Tensor
    plan: PackPlan
    normalization: Tensor | None = None


@fx.wrap
def uniform_inputs(
    x: Tensor,
    pos_embed: Tensor,
    patch_size: int,
    resampling: Resampling,
    n_prefix: tuple[int, int],
    lengths: Sequence[int],
    rope: Rope | None = None,
) -> Inputs:
    """Inputs for images of one size by tensor arithmetic only, so that a compiler sees no packing on the host.

    Args:
        x: `[B, C, gh*P, gw*P]`.
        pos_embed: the model's stored position embeddings.
        patch_size: P in pixels.
        resampling: how `pos_embed` is resampled to other grids.
        n_prefix: number of prefix tokens, and the number of those that have a row in `pos_embed`.
        lengths: the configured lengths.
        rope: the model's rotary embedding.
    """
    grid_h, grid_w = image_grid(x[0], patch_size, "x")
    n_patches = grid_h * grid_w
    batch = (x.shape[0], x.device)
    counts = torch.full((x.shape[0],), n_patches, dtype=torch.int64, device=x.device)
    layout = Layout(device_cu_seqlens(n_patches + n_prefix[0], *batch), nearest_length(counts, lengths), None)
    patches = resampling.resampled(wide_patches(pos_embed, n_prefix[1]), (grid_h, grid_w))
    table = patches.to(pos_embed.dtype)
    cu_seqlens = device_cu_seqlens(n_patches, *batch)
    coordinates = None if rope is None else rope.coordinates((grid_h, grid_w)).to(x.device)
    offset = torch.zeros_like(cu_seqlens[1:])
    return Inputs(patchify(x, patch_size), cu_seqlens, layout, table, offset, None, coordinates)


@fx.wrap
def rows_apart(rows: Tensor, layout: Layout) -> Layout:
    """Layout of pooled rows, one row for every sequence of `layout`."""
    return Layout(device_cu_seqlens(1, rows.shape[0], rows.device), layout.length_index, None)


def is_uniform(x: Tensor | Sequence[Tensor] | PackedBatch) -> bool:
    """Whether an input of a model is one tensor of images of one size; a nested tensor counts as a list."""
    return isinstance(x, Tensor) and not x.is_nested


class TakesImages(NotScriptable):
    """The methods of a `ReViT` that prepare its inputs."""

    @property
    def input_device(self) -> torch.device:
        """Device on which the model expects its batches."""
        return self.pos_embed.device

    def pack(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> PackedBatch:
        """Any input of the model as a `PackedBatch` of patch rows without padding.

        Raises:
            TypeError, ValueError: for an invalid input; the message names the image and what is wrong with it.
        """
        if not isinstance(x, PackedBatch):
            return PackedBatch.from_plan(*self._patch_rows(x))
        self._check_pack(x)
        # Padding rows would cost time and, if they hold NaN, reach a weight's gradient.
        return x if torch.compiler.is_compiling() else x.without_padding()

    def _patch_rows(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> PatchRows:
        """Any input of the model as patch rows; nothing is copied to another device."""
        if isinstance(x, PackedBatch):
            self._check_pack(x)
            return PatchRows(x.data[: x.plan.n_rows], x.plan.without_padding(), x.normalization)
        if is_uniform(x):
            self._check_images(x)
            grid = image_grid(x[0] if len(x) else x.new_empty(x.shape[1:]), self.patch_size, "x")
            rows, grids = patchify(x, self.patch_size), [grid] * x.shape[0]
        elif isinstance(x, (Sequence, Tensor)):
            images = as_list(x)
            rows, grids = patch_rows(images, self.patch_size)
            self._check_channels(images[0].shape[0], "images[0]")
            check_pixels("images[0]", rows.dtype)
        else:
            raise TypeError(
                f"x: expected a tensor [B, 3, H, W], a list of tensors or a PackedBatch, got {type(x).__name__}"
            )
        return PatchRows(rows, PackPlan.of([h * w for h, w in grids], self.lengths, grids=grids))

    def _check_images(self, x: Tensor) -> None:
        check_plain("x", x)
        if x.dim() != 4:
            raise ValueError(
                f"x: expected shape [B, {self.in_chans}, H, W], got {tuple(x.shape)}; x[None] for one image"
            )
        self._check_channels(x.shape[1], "x")
        check_pixels("x", x.dtype)

    def _check_channels(self, n: int, name: str) -> None:
        if n != self.in_chans:
            raise ValueError(f"{name}: expected {self.in_chans} channels first, got {n}; convert the images")

    def _inputs(self, x: Tensor | Sequence[Tensor] | PackedBatch) -> Inputs:
        if is_uniform(x) and torch.compiler.is_compiling():
            self._check_images(x)
            return self._uniform_inputs(x)
        batch = self.pack(x)
        if batch.device != self.pos_embed.device:
            raise ValueError(
                f"x: batch is on {batch.device}, model on {self.pos_embed.device}; move one with .to(device)"
            )
        compiling, positions = torch.compiler.is_compiling(), self._positions
        known = positions.known if compiling else positions.learn(batch.grids)
        offset = known.offsets(batch.grid_hw)
        if compiling:
            torch._assert_async((offset >= 0).all(), NEW_GRID)
        layout = batch.layout(self.num_prefix_tokens)
        if batch.lengths != self.lengths:
            layout = layout._replace(length_index=nearest_length(batch.cu_seqlens.diff(), self.lengths))
        table = positions.table(known, self.pos_embed, self._n_prefix_embedded)
        images = self._stemmed(PatchRows(self._finite_rows(batch), batch.plan, batch.normalization))
        coordinates = known.coordinates_on(batch.device)
        return Inputs(images.rows, batch.cu_seqlens, layout, table, offset, images.normalization, coordinates)

    def _stemmed(self, images: PatchRows) -> PatchRows:
        """The input rows of the embedding: the rows of a convolutional stem's features if there is a stem."""
        if not isinstance(self.patch_embed, ConvStem):
            return images
        rows = self.patch_embed.feature_rows(images.rows, images.plan.grids, images.normalization)
        return PatchRows(rows, images.plan)

    def _check_pack(self, batch: PackedBatch) -> None:
        if batch.n_prefix:
            raise ValueError("x: this pack holds tokens (n_prefix > 0) already; give patch rows, or call forward_head")
        width = self.patch_size**2 * self.in_chans
        if batch.data.dim() != 2 or batch.data.shape[1] != width:
            raise ValueError(f"x: expected patch rows [T, {width}], got {tuple(batch.data.shape)}")
        if batch.data.dtype == torch.uint8 and batch.normalization is None:
            raise ValueError("x: uint8 rows need a normalization [2, 3] in their pack (resize_patchify gives it)")
        check_pixels("x", batch.data.dtype, raw=True)
        if batch.grid_hw is None:
            raise ValueError(
                "x: patch counts are not squares and the pack has no grids; give grids=[(rows, columns), ...]"
            )

    def _check_leaves(self, x: fx.Proxy) -> None:
        """Raises a NotImplementedError unless the trace of torch.fx calls the layers that pack as they are."""
        names = ("patch_embed", "rope", "norm_pre", "blocks.0", "norm", "attn_pool", "fc_norm")
        layers = {name: module for name, module in self.named_modules() if name in names}
        inside = [
            name
            for name, module in layers.items()
            if type(module) is not nn.Identity and not x.tracer.is_leaf_module(module, name)
        ]
        if inside:
            raise NotImplementedError(
                f"{type(self).__name__}: torch.fx would trace into {', '.join(inside)}, which must be leaves; use "
                "timm.models.create_feature_extractor(model, names) after import revit_fast.timm_models, or "
                "torch.export.export(model, (images,))"
            )

    def _finite_rows(self, batch: PackedBatch) -> Tensor:
        """The batch's rows. Compiled code cannot cut off padding, so it zeroes padding if gradients are needed."""
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return batch.data  # the token ops zero the results of padding
        rows = torch.arange(batch.data.shape[0], dtype=torch.int32, device=batch.device).unsqueeze(1)
        return torch.where(rows < batch.cu_seqlens[-1], batch.data, 0)

    def _uniform_inputs(self, x: Tensor) -> Inputs:
        n_prefix = (self.num_prefix_tokens, self._n_prefix_embedded)
        patch_size = self.patch_size
        if isinstance(self.patch_embed, ConvStem):
            x, patch_size = self.patch_embed.features(x), patch_size // 2
        rope = self.spec.embed.rope
        return uniform_inputs(x, self.pos_embed, patch_size, self.resampling, n_prefix, self.lengths, rope)

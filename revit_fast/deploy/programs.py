"""The forward passes that `deploy.export` traces: modules from tensors to tensors that do not pack on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.inference import cpu
from revit_fast.inference.optimize import OptimizedReViT
from revit_fast.layers.attention import Attention
from revit_fast.layers.norm import TALNorm, TALRMSNorm
from revit_fast.layers.positions import PositionTables, wide_patches
from revit_fast.models.inputs import Inputs
from revit_fast.models.vit import ReViT
from revit_fast.packing import Layout, PackPlan, device_cu_seqlens, nearest_length


class PackedProgram(nn.Module):
    """Computes the logits of a pack, and its layout from the images' grids; `make_packed` makes the right subclass.

    Args:
        model: the model, in evaluation mode.
        grids: possible grids of images, as (rows, columns).
    """

    def __init__(self, model: ReViT, grids: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.lengths, self.n_prefix = model.lengths, model.num_prefix_tokens
        positions = PositionTables(model.resampling, grids)
        self.grids = positions.known
        self.register_buffer("pos_table", positions.table(self.grids, model.pos_embed, model._n_prefix_embedded))

    def forward(self, rows: Tensor, grid_hw: Tensor) -> Tensor:
        """The same logits as `ReViT.forward` for a pack.

        Args:
            rows: `[T, P*P*3]` patch rows, one image after another.
            grid_hw: int32 `[B, 2]`, rows and columns of patches of each image.
        """
        counts = grid_hw.prod(dim=1, dtype=torch.int32)
        cu_seqlens, of_tokens = device_cu_seqlens(counts), device_cu_seqlens(counts + self.n_prefix)
        layout = Layout(of_tokens, nearest_length(counts, self.lengths), None)
        offsets = self.grids.offsets(grid_hw)  # -1 for an unknown grid; the op reports it
        return self._logits(Inputs(rows, cu_seqlens, layout, self.pos_table, offsets, None))

    def _logits(self, inputs: Inputs) -> Tensor:
        raise NotImplementedError


class EagerProgram(PackedProgram):
    """Runs a pack through the model's own modules and ops."""

    def __init__(self, model: ReViT, grids: Iterable[tuple[int, int]]) -> None:
        super().__init__(model, grids)
        self.model = model

    def _logits(self, inputs: Inputs) -> Tensor:
        return self.model._run(inputs)


class FusedProgram(PackedProgram):
    """Runs a pack through the single op of an optimised copy, with weights packed for the instruction set in use."""

    def __init__(self, model: OptimizedReViT, grids: Iterable[tuple[int, int]]) -> None:
        super().__init__(model, grids)
        self.pos_table = self.pos_table.float()
        packed = model._packed.get(model)
        # A file holds whole storages, so every tensor gets its own.
        own = replace(packed.weights, blocks=cpu.placed(packed.weights.blocks, partial(map, torch.clone)))
        # The model is not a submodule, so that the program contains only the packed weights and not the parameters.
        self._tokens = partial(ops.vit_forward, weights=own, n_pooled=cpu.n_pooled(model))
        self._head = partial(cpu.logits_of, model, packed)

    def _logits(self, inputs: Inputs) -> Tensor:
        layout = inputs.layout
        tokens = self._tokens(inputs.rows, inputs.cu_seqlens, layout.length_index, inputs.pos_offset, inputs.pos_table)
        return self._head(tokens, layout)


def make_packed(model: ReViT, grids: Iterable[tuple[int, int]]) -> PackedProgram:
    """Makes the packed program that runs as the model does: fused if the model is an optimised copy that fuses."""
    if isinstance(model, OptimizedReViT) and cpu.serves(model):
        return FusedProgram(model, grids)
    return EagerProgram(model, grids)


class FixedProgram(nn.Module):
    """A packed program for one mix of grids; the rows are its only input.

    Args:
        program: the program for any mix.
        mix: (rows, columns) of each image, in the order of the pack.
    """

    def __init__(self, program: PackedProgram, mix: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.program = program
        self.register_buffer("grid_hw", torch.tensor(list(mix), dtype=torch.int32, device="cpu"))

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of the pack; `rows` `[T, P*P*3]` are exactly those of its images."""
        return self.program(rows, self.grid_hw)


class DenseProgram(nn.Module):
    """The model at one grid in PyTorch's own operators alone. Its exported files do not need this package.

    Args:
        model: the model, in evaluation mode.
        grid: (rows, columns) of patches.
    """

    def __init__(self, model: ReViT, grid: tuple[int, int]) -> None:
        super().__init__()
        cpu.check_unaltered(model, "a program of one grid")
        self.model = model
        (self.length,) = PackPlan.of([grid[0] * grid[1]], model.lengths, grids=[grid]).length_index
        with torch.no_grad():
            patches = model.resampling.resampled(wide_patches(model.pos_embed, model._n_prefix_embedded), grid)
            self.register_buffer("positions", patches.to(model.pos_embed.dtype).contiguous())
            self.register_buffer("prefix", model._prefix())

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]`; if the model does not pool, `[B, N, num_classes]`, those of each token.

        Args:
            images: normalised images `[B, 3, rows * P, columns * P]`.
        """
        model = self.model
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.prefix.expand(images.shape[0], -1, -1), patches], dim=1)
        x = self._norm(model.norm_pre, x)
        for block in model.blocks:
            x = x + block.ls1(self._attend(block.attn, self._norm(block.norm1, x)))
            x = x + block.ls2(block.mlp(self._norm(block.norm2, x)))
        x = self._norm(model.norm, x)
        if model.global_pool == "token":
            x = x[:, :2] if model.distilled else x[:, 0]
        elif model.global_pool:
            mean = (x if model.pool_include_prefix else x[:, model.num_prefix_tokens :]).mean(dim=1)
            x = mean if model.global_pool == "avg" else torch.cat([x[:, 0], mean], dim=1)
        x = self._norm(model.fc_norm, x)
        if model.distilled:
            return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
        return model.head(x)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(norm, TALNorm):
            return norm(x)
        normalise = F.rms_norm if isinstance(norm, TALRMSNorm) else F.layer_norm
        affine = [parameter[self.length] for parameter in norm.affine()]
        return normalise(x, affine[0].shape, *affine, eps=norm.eps)

    @staticmethod
    def _attend(attn: Attention, x: Tensor) -> Tensor:
        qkv = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return attn.proj(F.scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2))


class AssignerProgram(nn.Module):
    """Computes an assigner's calibrated probabilities for thumbnails.

    Args:
        tla: the assigner, in evaluation mode.
    """

    def __init__(self, tla: TokenLengthAssigner) -> None:
        super().__init__()
        self.tla = tla
        self.temperature = tla.calibration.temperature if tla.calibration else 1.0

    def forward(self, thumbnails: Tensor) -> Tensor:
        """Probabilities `[B, n_lengths]`, longest length first, of normalised thumbnails `[B, 3, S, S]`."""
        return (self.tla(thumbnails) / self.temperature).softmax(dim=1)

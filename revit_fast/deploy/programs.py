"""The forward passes that `deploy.export` traces: modules from tensors to tensors that do not pack on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast import ops, reference
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.inference import cpu, fusable, packed_weights
from revit_fast.inference.optimize import OptimizedReViT
from revit_fast.layers.attention import Attention, AttentionPool
from revit_fast.layers.mlp import Mlp
from revit_fast.layers.norm import TALNorm, TALRMSNorm
from revit_fast.layers.positions import PositionTables, wide_patches
from revit_fast.layers.rope import Rotation
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
        positions = PositionTables(model.resampling, grids, model._positions.coordinates)
        self.grids = positions.known
        self.register_buffer("pos_table", positions.table(self.grids, model.pos_embed, model._n_prefix_embedded))
        self.register_buffer("coordinates", self.grids.coordinates_on(model.pos_embed.device))

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
        return self._logits(Inputs(rows, cu_seqlens, layout, self.pos_table, offsets, None, self.coordinates))

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
        self.register_buffer("rope", packed_weights.rope_tables(model, self.coordinates))
        # A file holds whole storages, so every tensor gets its own.
        own = replace(packed.weights, blocks=packed_weights.placed(packed.weights.blocks, partial(map, torch.clone)))
        # The model is not a submodule, so that the program contains only the packed weights and not the parameters.
        self._tokens = partial(ops.vit_forward, weights=own, n_pooled=cpu.n_pooled(model))
        self._head = partial(cpu.logits_of, model, packed)

    def _logits(self, inputs: Inputs) -> Tensor:
        layout = inputs.layout
        index = inputs.cu_seqlens, layout.length_index, inputs.pos_offset
        return self._head(self._tokens(inputs.rows, *index, inputs.pos_table, rope=self.rope), layout)


def make_packed(model: ReViT, grids: Iterable[tuple[int, int]]) -> PackedProgram:
    """Makes the packed program that runs as the model does: fused if the model is an optimised copy that fuses."""
    if isinstance(model, OptimizedReViT) and fusable.serves(model):
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
        fusable.check_unaltered(model, "a program of one grid")
        self.model = model
        (self.length,) = PackPlan.of([grid[0] * grid[1]], model.lengths, grids=[grid]).length_index
        with torch.no_grad():
            patches = model.resampling.resampled(wide_patches(model.pos_embed, model._n_prefix_embedded), grid)
            self.register_buffer("positions", patches.to(model.pos_embed.dtype).contiguous())
            self.register_buffer("prefix", model._prefix())
            self.rotations = self._made_rotations(grid)

    def _made_rotations(self, grid: tuple[int, int]) -> list[Rotation | None]:
        """How the tokens of an image turn in every block."""
        model = self.model
        if model.rope is None:
            return [None] * len(model.blocks)
        coordinates = model.spec.embed.rope.coordinates(grid).to(model.pos_embed.device)
        coordinates = F.pad(coordinates, (0, 0, model.num_prefix_tokens, 0))
        return model.rope(coordinates, model.pos_embed.dtype, len(model.blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, num_classes]`; if the model does not pool, `[B, N, num_classes]`, those of each token.

        Args:
            images: normalised images `[B, 3, rows * P, columns * P]`.
        """
        model = self.model
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        if model.spec.embed.patch_norm is not None:
            patches = self._norm(model.patch_embed.norm, patches)
        patches = patches + self.positions
        x = torch.cat([self.prefix.expand(images.shape[0], -1, -1), patches], dim=1)
        x = self._norm(model.norm_pre, x)
        for block, rotation in zip(model.blocks, self.rotations, strict=True):
            x = x + block.ls1(self._attend(block.attn, self._norm(block.norm1, x), rotation))
            x = x + block.ls2(self._mlp(block.mlp, self._norm(block.norm2, x)))
        x = self._norm(model.norm, x)
        if model.global_pool == "token":
            x = x[:, :2] if model.distilled else x[:, 0]
        elif model.global_pool == "map":
            x = self._pooled(model.attn_pool, x if model.pool_include_prefix else x[:, model.num_prefix_tokens :])
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

    def _attend(self, attn: Attention, x: Tensor, rotation: Rotation | None) -> Tensor:
        q, k, v = (t.unflatten(0, x.shape[:2]) for t in attn.project(x.flatten(0, 1)))
        if rotation is not None:
            q, k = reference.rotary(q, k, *rotation)
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        out = self._attention(q, k, v, attn.scale)
        out = out if attn.norm is None else self._norm(attn.norm, out)
        return attn.proj(out if attn.gate is None else out * attn.gate(x).sigmoid())

    def _mlp(self, mlp: Mlp, x: Tensor) -> Tensor:
        hidden = mlp.hidden(x)
        return mlp.fc2(hidden if mlp.norm is None else self._norm(mlp.norm, hidden))

    def _pooled(self, pool: AttentionPool, x: Tensor) -> Tensor:
        heads = (pool.num_heads, -1)
        q = pool.q(pool.latent).unflatten(2, heads).expand(x.shape[0], -1, -1, -1)
        k, v = pool.kv(x).unflatten(2, (2, *heads)).unbind(2)
        pooled = pool.proj(self._attention(q, k, v, None)[:, 0])
        return pooled + self._mlp(pool.mlp, self._norm(pool.norm, pooled))

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of `[B, N, H, D]`, the heads side by side."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


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

"""Attention maps: how much every token of an image reads of every other, computed from queries and keys on request."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from revit_fast.models.inputs import is_uniform
from revit_fast.packing import PackedBatch

Maps = Tensor | list[Tensor]


class AttentionMaps:
    """The methods of a `ReViT` that return its attention. The forward pass itself never holds a map."""

    @torch.no_grad()
    def attention_maps(
        self, x: Tensor | Sequence[Tensor] | PackedBatch, block: int | Sequence[int] = -1
    ) -> Maps | list[Maps]:
        """softmax(scale · q kᵀ) of a block, without gradients: row i says how much token i reads of every token.

        Tokens come in the order of the model: class token, distillation token, register tokens, each if the model has
        it (`num_prefix_tokens` together), then the patches row by row. Queries and keys have the precision of the
        model, also under autocast, those of an optimised copy that of the weights that it serves. The maps are float32,
        those of a float64 model float64.

        Args:
            x: any input of the model.
            block: index of the block, negative from the end; or a list of them. A copy that runs fused computes every
                block of a list from the start.

        Returns:
            `[B, heads, tokens, tokens]` for an image tensor; otherwise a list with a tensor `[heads, tokens, tokens]`
            per image. For a list of blocks, a list of these.

        Raises:
            TypeError, ValueError: if `block` is not a block of the model; for an invalid `x`.
        """
        wanted = _block_indices(block, len(self.blocks))
        batch = self.pack(x)
        shape = (len(batch), self.num_prefix_tokens + _n_patches(self, x)) if is_uniform(x) else None
        seqlens = [n + self.num_prefix_tokens for n in batch.seqlens]
        found = self._queries_and_keys(batch, set(wanted))

        def maps(i: int) -> Maps:
            attn, pair = self.spec.blocks[i].attn, found[i]
            scale = attn.head_dim**-0.5 if attn.scale is None else attn.scale
            if shape is not None:
                return _softmax(*(rows.unflatten(0, shape) for rows in pair), scale)
            return [_softmax(q, k, scale) for q, k in zip(*(rows.split(seqlens) for rows in pair), strict=True)]

        return maps(wanted[0]) if isinstance(block, int) else [maps(i) for i in wanted]

    def class_attention(self, x: Tensor | Sequence[Tensor] | PackedBatch, block: int = -1) -> Maps:
        """What the class token reads of every patch in a block, as a grid; without class token, the patches' mean.

        The weights of a head sum to at most 1: what it reads of prefix tokens is left out.

        Args:
            x: any input of the model.
            block: index of the block, negative from the end.

        Returns:
            `[B, heads, grid_h, grid_w]` for an image tensor; otherwise a list with a tensor `[heads, grid_h, grid_w]`
            per image.

        Raises:
            TypeError, ValueError: see `attention_maps`.
        """
        _block_indices(block, len(self.blocks), several=False)
        if is_uniform(x):
            maps = self.attention_maps(x, block)
            return self._of_patches(maps).unflatten(-1, tuple(side // self.patch_size for side in x.shape[2:]))
        batch = self.pack(x)
        maps = self.attention_maps(batch, block)
        return [self._of_patches(m).unflatten(-1, grid) for m, grid in zip(maps, batch.grids, strict=True)]

    def _of_patches(self, maps: Tensor) -> Tensor:
        n_prefix = self.num_prefix_tokens
        readers = maps[..., 0, :] if self.has_class_token else maps[..., n_prefix:, :].mean(-2)
        return readers[..., n_prefix:]

    def _queries_and_keys(self, batch: PackedBatch, blocks: Collection[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Queries `[T, heads, D]` and keys `[T, kv_heads, D]` of some blocks, by the number of the block."""
        inputs, found, last = self._inputs(batch), {}, max(blocks)
        tokens, delta = self._embed(inputs), None
        for i, rotation in enumerate(self._rotations(inputs)[: last + 1]):
            if i in blocks:
                found[i] = self.blocks[i].queries_and_keys(tokens, delta, inputs.layout, rotation)
            if i < last:
                tokens, delta = self._run_block(self.blocks[i], tokens, delta, inputs.layout, rotation)
        return found


def _n_patches(model: AttentionMaps, x: Tensor) -> int:
    return (x.shape[2] // model.patch_size) * (x.shape[3] // model.patch_size)


def _softmax(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The map `[..., heads, n, n]` of queries `[..., n, heads, D]` and keys `[..., n, kv_heads, D]`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
    with torch.autocast(q.device.type, enabled=False):
        q, k = (rows.to(wide).transpose(-3, -2) for rows in (q, k))
        return torch.softmax(scale * (q @ k.mT), dim=-1)


def _block_indices(block: int | Sequence[int], depth: int, several: bool = True) -> list[int]:
    """The blocks counted from the first, in the given order."""
    if not depth:
        raise ValueError("block: this model has no blocks, so it has no attention")
    kind = "an int, or a list of them," if several else "an int"
    blocks = block if several and isinstance(block, (list, tuple, range)) else [block]
    if not blocks or not all(isinstance(i, int) and not isinstance(i, bool) for i in blocks):
        raise TypeError(f"block: expected {kind} from {-depth} to {depth - 1}, got {block!r}")
    if not all(-depth <= i < depth for i in blocks):
        raise ValueError(f"block: expected {kind} from {-depth} to {depth - 1}, got {block!r}")
    return [i % depth for i in blocks]

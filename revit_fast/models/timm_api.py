"""timm's interface of a Vision Transformer, as far as it is not the forward pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from revit_fast.models.inputs import is_uniform
from revit_fast.packing import PackedBatch

NORM_PARAMETER = re.compile(r"(^|\.)(norm1|norm2|norm_pre|fc_norm|norm)\.(weight|bias)$")


OF_CLASSES = ("label_names", "label_descriptions", "num_classes")
"""Entries of timm's configuration that say which classes the head of the weights is for."""


class TimmInterface:
    """The methods of a `ReViT` that timm's training, feature extraction and fine-tuning call."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: tokens, position embeddings and every TAL-LN parameter."""
        names = {"pos_embed", "cls_token", "reg_token", "dist_token", "rope.freqs"}
        return names | {name for name, _ in self.named_parameters() if NORM_PARAMETER.search(name)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of every block in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """Makes a distilled model return (class logits, distillation logits) while training."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or both heads of a distilled model."""
        return (self.head, self.head_dist) if self.distilled else self.head

    @property
    def head_hidden_size(self) -> int:
        """Number of channels that the head reads; the name is timm's."""
        return self.embed_dim * (2 if self.global_pool == "token_avg" else 1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Sets a new head for `num_classes` classes (0: none), and another pooling if `global_pool` is given."""
        pool = self.global_pool if global_pool is None else global_pool
        head = replace(self._spec.head, classes=num_classes, pool=pool)
        if pool != "map":
            head, self.attn_pool = replace(head, attention=None), None
        self._spec = replace(self._spec, head=head)
        self.num_classes, self.global_pool = num_classes, pool
        # A new head knows no classes: names of the old one's would be written beside it where the number is the same.
        self.pretrained_cfg = {name: value for name, value in self.pretrained_cfg.items() if name not in OF_CLASSES}
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = self._linear_head().to(**like).train(self.training)
        if self.distilled:
            self.head_dist = self._linear_head().to(**like).train(self.training)
        if self.has_aux_head:
            self.aux_head = self._token_label_head()
            if self.aux_head is not None:
                self.aux_head.to(**like).train(self.training)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the modules that features after chosen blocks do not need, as timm's feature extraction does.

        Args:
            indices: blocks to keep, with all blocks before them (see `forward_intermediates`).
            prune_norm: also remove the norm after the blocks.
            prune_head: also remove the head, its norm and (except in a distilled model) the pooling.

        Returns:
            The chosen blocks, counted from the first.
        """
        take = sorted(self._block_indices(indices))
        self.blocks = self.blocks[: take[-1] + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.has_aux_head, self.aux_head = False, None
        pooled = type(self.fc_norm) is not nn.Identity
        head = self._spec.head
        head = replace(
            head,
            norm=head.norm if pooled or type(self.norm) is not nn.Identity else None,
            norm_pooled=pooled,
            token_labels=self.has_aux_head,
        )
        self._spec = replace(self._spec, blocks=self._spec.blocks[: len(self.blocks)], head=head)
        if prune_head:
            self.reset_classifier(0, None if self.distilled else "")
        return take

    def forward_intermediates(
        self,
        x: Tensor | Sequence[Tensor] | PackedBatch,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor | PackedBatch, list]:
        """Features after chosen blocks.

        Args:
            x: any input of the model.
            indices: blocks to take (negative from the end), the last n for an int, all for None.
            return_prefix_tokens: pair every feature map with its prefix tokens.
            norm: apply the final norm to the features.
            stop_early: do not run blocks after the last one taken.
            output_fmt: "NCHW" feature maps or "NLC" token rows, prefix tokens left out.
            intermediates_only: return the list alone.

        Returns:
            (`forward_features` result, intermediates), or the intermediates. For an image tensor each is a tensor
            `[B, C, gh, gw]` (or `[B, N, C]`); otherwise a list with a tensor `[C, gh, gw]` (or `[n, C]`) per image.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt: expected "NCHW" or "NLC", got {output_fmt!r}')
        take = self._block_indices(indices)
        batch = self.pack(x)
        inputs = self._inputs(batch)
        tokens, delta = self._embed(inputs), None
        intermediates, n_run = [], max(take) + 1 if stop_early else len(self.blocks)
        for i, rotation in enumerate(self._rotations(inputs)[:n_run]):
            tokens, delta = self._run_block(self.blocks[i], tokens, delta, inputs.layout, rotation)
            if i in take:
                taken = self._add_and_norm(tokens, delta, inputs.layout) if norm else tokens + delta
                intermediates.append(self._as_maps(taken, batch, is_uniform(x), output_fmt, return_prefix_tokens))
        if intermediates_only:
            return intermediates
        tokens = self._add_and_norm(tokens, delta, inputs.layout)
        if is_uniform(x):
            return tokens.view(x.shape[0], -1, self.embed_dim), intermediates
        return batch.with_tokens(tokens, self.num_prefix_tokens), intermediates

    def _block_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            last = depth if indices is None else indices
            wanted = range(depth - last, depth)
        else:
            wanted = [i + depth if i < 0 else i for i in indices]
        if not wanted or any(not 0 <= i < depth for i in wanted):
            raise ValueError(f"indices: expected blocks of a model with {depth}, got {indices!r}")
        return set(wanted)

    def _as_maps(self, tokens: Tensor, batch: PackedBatch, uniform: bool, output_fmt: str, with_prefix: bool):
        n_prefix = self.num_prefix_tokens
        sequences = batch.with_tokens(tokens, n_prefix).split()
        prefixes = [s[:n_prefix] for s in sequences]
        maps = [s[n_prefix:] for s in sequences]
        if output_fmt == "NCHW":
            maps = [m.t().reshape(-1, h, w) for m, (h, w) in zip(maps, batch.grids, strict=True)]
        if uniform:
            maps, prefixes = torch.stack(maps), torch.stack(prefixes)
        return (maps, prefixes) if with_prefix else maps

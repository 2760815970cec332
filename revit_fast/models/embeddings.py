"""Embeddings: what a model's head reads, and the tokens that it is pooled from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from revit_fast.packing import PackedBatch

Output = Literal["logits", "pooled", "tokens"]
"""What a forward pass gives: rows of logits, the rows that the head reads, or all tokens after the final norm."""


class Embeddings:
    """The method of a `ReViT` that returns embeddings."""

    def forward_embeddings(
        self, x: Tensor | Sequence[Tensor] | PackedBatch, *, tokens: bool = False
    ) -> Tensor | tuple[Tensor, PackedBatch]:
        """What the head reads of every image, `[B, head_hidden_size]`, in the given order.

        The same as `forward_head(forward_features(x), pre_logits=True)`. A copy that `optimize` made computes it as it
        computes logits: an image's embedding on the CPU is bitwise the same whatever else is in its batch. Without
        `tokens`, class-token pooling computes of the last block only what is read.

        Args:
            x: any input of the model.
            tokens: also return every token after the final norm.

        Returns:
            The embeddings in the model's dtype; with `tokens` also a `PackedBatch` of rows `[T, C]`, in which the first
            `n_prefix` rows of every image are its prefix tokens (`split()` gives one tensor per image).

        Raises:
            TypeError, ValueError: for an invalid `x`, and for a model without pooling.
        """
        self.check_pools()
        batch = self.pack(x)
        pooled, rows = self._embeddings(batch, tokens)
        # A copy that replays CUDA graphs takes a batch from the CPU.
        return (pooled, batch.to(rows.device).with_tokens(rows, self.num_prefix_tokens)) if tokens else pooled

    def check_pools(self) -> None:
        """Raises a ValueError if the model has no pooling."""
        if not self.global_pool:
            raise ValueError(
                'model: its global_pool is "", so it pools no embedding; call model.forward_features for the tokens, '
                'or model.reset_classifier(0, "avg")'
            )

    def _embeddings(self, batch: PackedBatch, tokens: bool) -> tuple[Tensor, Tensor | None]:
        """Embeddings, and with `tokens` all rows after the final norm."""
        inputs = self._inputs(batch)
        if not tokens:
            return self._run(inputs, "pooled"), None
        rows = self._run(inputs, "tokens")
        return self._classify(rows, inputs.layout, pre_logits=True), rows

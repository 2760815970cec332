"""What a pipeline computes of a pack: logits, or embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.adaptive.policies import Policy
from revit_fast.packing import PackedBatch


class Outputs(NamedTuple):
    """The outputs of a forward pass.

    Attributes:
        values: for each image the fields of its `Result`, float32 on the CPU.
        is_finite: for each image whether all of these values are finite.
        logits: `[B, n_classes]` on the CPU, if they were computed.
    """

    values: list[dict[str, Tensor]]
    is_finite: list[bool]
    logits: Tensor | None = None


def outputs_of_logits(logits: Tensor) -> Outputs:
    """The outputs of logits `[B, n_classes]`."""
    return Outputs([{"logits": row} for row in logits.unbind()], logits.isfinite().all(dim=1).tolist(), logits)


@dataclass(frozen=True)
class Embedder:
    """Computes embeddings instead of logits.

    Attributes:
        tokens: also give every token after the final norm.
        normalize: divide every embedding by its Euclidean norm.
    """

    tokens: bool = False
    normalize: bool = False

    def check(self, model: nn.Module, policy: Policy) -> None:
        """Checks that a pipeline can give embeddings.

        Raises:
            TypeError: if the model has no embeddings.
            ValueError: if it pools none, or the policy needs logits.
        """
        if not hasattr(model, "forward_embeddings"):
            raise TypeError(
                f"model: {type(model).__name__} has no method forward_embeddings; make the pipeline with a ReViT, or "
                "with the copy that optimize makes of one"
            )
        model.check_pools()
        policy.decides_before("embeddings come without logits")

    def __call__(self, model: nn.Module, batch: PackedBatch) -> Outputs:
        """The outputs of a batch on the model's `input_device`."""
        found = model.forward_embeddings(batch, tokens=self.tokens)
        pooled, pack = found if self.tokens else (found, None)
        # Each image gets tensors of its own: a view would keep those of the whole pack alive.
        embeddings = [row.clone() for row in pooled.float().cpu()]
        if self.normalize:
            embeddings = [F.normalize(row, dim=0) for row in embeddings]
        values = [{"embedding": row} for row in embeddings]
        if pack is not None:
            for own, rows in zip(values, pack.data.float().cpu().split(pack.seqlens), strict=True):
                own["tokens"] = rows.clone()
        return Outputs(values, [all(bool(t.isfinite().all()) for t in own.values()) for own in values])

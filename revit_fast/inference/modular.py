"""An inference copy of a ReViT that calls every module; linear layers run on weights packed once for the CPU."""

from __future__ import annotations

import torch

from revit_fast.inference.inference_copy import InferenceCopy, in_turn
from revit_fast.inference.packed_modules import prepack
from revit_fast.models.vit import ReViT


class ModularReViT(InferenceCopy, ReViT):
    """An inference copy with packed modules; make one with `optimize(model, engine="modules")`."""

    def __init__(self, model: ReViT, dtype: torch.dtype | None) -> None:
        self._take(model)
        if dtype is not None:
            self.to(dtype=dtype)
        prepack(self)

    @property
    def dtype_used(self) -> torch.dtype:
        """Dtype of the weights that the blocks multiply with."""
        return self.pos_embed.dtype

    forward = in_turn(torch.no_grad()(ReViT.forward))
    forward_features = in_turn(torch.no_grad()(ReViT.forward_features))
    forward_head = in_turn(torch.no_grad()(ReViT.forward_head))
    forward_embeddings = in_turn(torch.no_grad()(ReViT.forward_embeddings))
    forward_intermediates = in_turn(torch.no_grad()(ReViT.forward_intermediates))
    attention_maps = in_turn(ReViT.attention_maps)

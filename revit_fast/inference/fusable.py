"""Which models the fused forward pass runs: those that do what their spec says, and nothing else."""

from __future__ import annotations

from functools import lru_cache

import torch

from revit_fast.layers.comparison import difference
from revit_fast.layers.mlp import ACTIVATIONS
from revit_fast.models.spec import ViTSpec
from revit_fast.models.vit import ReViT
from revit_fast.ops import _library
from revit_fast.ops.linear import FLOAT_PACKED_DTYPES

CALLED = ("head", "head_dist", "aux_head")
"""Modules that the fused forward pass calls unless they are plain linear layers. They may be anything."""


OTHERWISE = 'run the model itself, or optimize(model, engine="modules"), which calls every module'
"""What to do with a model that the fused forward pass refuses."""

WITHOUT_EFFECT = ("grad_checkpointing", "distilled_training")
"""Attributes of a model that change nothing in evaluation without gradients."""


def check_fusable(model: ReViT, training: bool = False) -> None:
    """Raises a ValueError that names what the fused forward pass would not run as the model does, and what to change.

    Args:
        model: see `check_unaltered`.
        training: see `check_unaltered`.
    """
    check_unaltered(model, "the fused forward pass", training, OTHERWISE)
    mlps = [(f"blocks.{i}", block.mlp) for i, block in enumerate(model.spec.blocks)]
    if model.spec.head.attention is not None:
        mlps.append(("attn_pool", model.spec.head.attention.mlp))
    for name, mlp in mlps:
        if mlp.act.name not in ACTIVATIONS or mlp.act.make is not None:
            raise ValueError(
                f"model: {name}.mlp.act is {mlp.act.name}; the fused forward pass has "
                f"{', '.join(ACTIVATIONS)}; {OTHERWISE}"
            )


def check_unaltered(model: ReViT, runner: str, training: bool = False, otherwise: str = "run the model itself") -> None:
    """Raises a ValueError that names the first module that is not as the model's spec has it.

    Args:
        model: compared with a new model of its spec, module by module.
        runner: what would not run the module, for the message.
        training: whether a module in training mode is refused too.
        otherwise: what to do instead, for the message.
    """
    built = _built(model.spec)
    found = difference(
        model, built, is_called=lambda name: name in CALLED, training=training, ignored=("training", *WITHOUT_EFFECT)
    )
    if found is None:
        empty = (name for name, parameter in model.named_parameters() if parameter.is_meta)
        found = next((f"{name} has no values: they were dropped, or it is on the meta device" for name in empty), None)
    if found:
        raise ValueError(
            f"model: {found}, which {runner} would not run; remove it, or merge it into plain layers first, or "
            f"{otherwise}"
        )


@lru_cache(maxsize=16)
def _built(spec: ViTSpec) -> ReViT:
    with torch.device("meta"):
        return ReViT(spec).eval()


def serves(model: ReViT) -> bool:
    """Whether a model's dtype and device are those of the fused forward pass."""
    return (
        _library.HAS_EXTENSION and model.pos_embed.device.type == "cpu" and model.pos_embed.dtype in FLOAT_PACKED_DTYPES
    )

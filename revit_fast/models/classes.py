"""Names of a model's classes: its own, or those of ImageNet for a model with ImageNet's classes."""

from __future__ import annotations

from collections import Counter
from functools import cache

from torch import nn

from revit_fast.models.weights import label_names


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """A name for each class, in the order of the logits; None if nobody knows them.

    They are those that the model's `pretrained_cfg` holds: of a bundle, of transformers' `id2label`, of timm's
    `label_names`. A timm model that has as many classes as its configuration says, and as a subset of ImageNet has,
    gets the names of that subset, as in timm's own inference script.

    Args:
        model: a `ReViT`.
    """
    config = model.pretrained_cfg or {}
    names = label_names(config)
    if names is None and config.get("num_classes") == model.num_classes:
        names = _imagenet_names(model.num_classes)
    return names if names is not None and len(names) == model.num_classes else None


@cache
def _imagenet_names(n_classes: int) -> tuple[str, ...] | None:
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset
    except ImportError:  # an optional package
        return None
    subset = infer_imagenet_subset({"num_classes": n_classes})
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    texts, synsets = info.label_descriptions(), info.label_names()
    counts = Counter(texts)  # two classes are called "crane"
    return tuple(t if counts[t] == 1 else f"{t} ({s})" for t, s in zip(texts, synsets, strict=True))

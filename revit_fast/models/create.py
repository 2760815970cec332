"""Creates models from timm's architecture names."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from revit_fast.grids import DEFAULT_GRIDS
from revit_fast.models.vit import ReViT
from revit_fast.models.weights import named_classes, read_checkpoint


def create_model(
    name: str, grids: Sequence[int] = DEFAULT_GRIDS, weights: str | Path | None = None, **kwargs: Any
) -> ReViT:
    """A ReViT with the architecture of a timm ViT.

    Args:
        name: timm's name of a ViT or DeiT, for instance "deit_small_patch16_224".
        grids: configured token grids, strictly decreasing.
        weights: `.safetensors` or `.pth` of a plain ViT or of a ReViT; None: random weights. The head follows the file:
            it has as many classes, under the names that the file or the `config.json` beside it gives them.
        kwargs: passed on to `timm.create_model`. With `num_classes` the head has that many, and weights must fit it.

    Raises:
        ImportError: where timm is not installed.
        TypeError: for `pretrained`, because weights come from a file.
        ValueError: for an unknown name, an architecture that is not supported, or weights that do not fit.
    """
    try:
        import timm
    except ImportError:
        raise ImportError('name: architectures by name need timm: pip install "revit-fast[timm]"') from None
    if not timm.is_model(name):
        family = timm.list_models(f"{name.split('_')[0]}*") if name else []
        near = get_close_matches(name, family or timm.list_models(), n=5, cutoff=0.3 if family else 0.6)
        raise ValueError(f"name: timm knows no model {name!r}; similar: {', '.join(near) or 'none'}")
    if "pretrained" in kwargs:
        raise TypeError(
            "pretrained: not taken, as weights come from a file here; for timm's own give "
            f"ReViT.from_timm(timm.create_model({name!r}, pretrained=True))"
        )
    model = ReViT.from_timm(timm.create_model(name, pretrained=False, **kwargs), grids=grids)
    if weights is not None:
        load_with_head(model, weights, follow="num_classes" not in kwargs)
    return model


def load_with_head(model: ReViT, weights: str | Path, *, follow: bool = True) -> None:
    """Loads a file of weights into a model, which takes the names of its classes, and their number.

    Args:
        model: the model, which is changed.
        weights: see `create_model`.
        follow: whether a head of another number of classes replaces the model's.

    Raises:
        FileNotFoundError, ValueError: see `ReViT.load_checkpoint`.
    """
    path = Path(weights)
    state_dict = read_checkpoint(path, model.state_dict())
    head = state_dict.get("head.weight")
    if follow and head is not None and head.dim() == 2 and len(head) not in (0, model.num_classes):
        model.reset_classifier(len(head))
        model.pretrained_cfg["num_classes"] = len(head)
    model.load_weights(state_dict, weights)
    names = named_classes(path)
    if names is not None and len(names) == model.num_classes:
        model.pretrained_cfg["label_names"] = names

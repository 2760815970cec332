"""Bundles: folders with everything that an adaptive model needs. They run with this package alone.

A bundle is a model folder (`models.folder`) with the model's assigner and its intended policy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import PolicySpec
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.io.threads import check_compute_threads
from revit_fast.models.folder import (
    ASSIGNER,
    CONFIG,
    complete_settings,
    default_policy,
    read_model,
    read_saved,
    write_folder,
)
from revit_fast.models.hub import find_bundle
from revit_fast.models.vit import ReViT
from revit_fast.streaming.pipeline import AdaptivePipeline, pipeline


class Bundle(NamedTuple):
    """The parts of a bundle.

    Attributes:
        model: the model, in evaluation mode; its `pretrained_cfg` contains `settings`, and `classes` as `label_names`.
        tla: the assigner, in evaluation mode; None if the bundle has none.
        classes: names of the classes, in the order of the logits.
        settings: mean, std, crop_pct and interpolation that the model was trained with.
        policy: the intended policy of the bundle, see `policies.make_policy`.
        card: text of the model card in Markdown, which follows the text that every bundle has.
    """

    model: ReViT
    tla: TokenLengthAssigner | None
    classes: tuple[str, ...]
    settings: dict[str, Any]
    policy: PolicySpec
    card: str | None = None


def save_bundle(
    folder: str | os.PathLike,
    model: ReViT,
    tla: TokenLengthAssigner | None = None,
    *,
    classes: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    policy: PolicySpec | None = None,
    card: str | None = None,
) -> None:
    """Writes a bundle, completely or not at all: if the process is killed, the old bundle or the new one is there.

    Args:
        folder: a new or empty folder, or a bundle to replace. An existing folder stays the same one, with its mode and
            its other files: processes may stand in it, it may be a mount point or a link, its parent may be read-only.
        model: the ReViT.
        tla: the model's assigner, calibrated if the policy needs it; None if the model has no assigner yet.
        classes: a name for each class, in the order of the logits; default: the model's own, see
            `models.classes.class_names`, else their numbers.
        settings: mean, std, crop_pct and interpolation that the model was trained with; default: those of the model's
            `pretrained_cfg`, else DeiT's.
        policy: the policy that the bundle runs with; default "argmax", or the longest grid without an assigner.
        card: further text of the model card in Markdown: data, accuracies, limits.

    Raises:
        ValueError: if the parts do not fit together, or the folder contains something else.
    """
    policy = default_policy(model, tla) if policy is None else policy
    _check(model, tla, policy, complete_settings(model, settings))
    write_folder(folder, model, tla, classes=classes, settings=settings, policy=policy, card=card)


def read_bundle(name_or_folder: str | os.PathLike) -> Bundle:
    """Reads the parts of a bundle.

    Args:
        name_or_folder: a folder; or, without a path separator, the name of a model that the package ships; or a
            repository of the Hugging Face Hub, `hf-hub:user/name` or `hf-hub:user/name@revision`.

    Raises:
        FileNotFoundError: if the bundle does not exist or one of its files is missing.
        OSError, ImportError: see `hub.download`.
        RuntimeError: in a process that was forked from one that had computed on several threads.
        ValueError: if a file cannot be read, is another one than `config.json` names, or the files do not fit together;
            the message names the file.
    """
    check_compute_threads("bundle")
    folder = find_bundle(name_or_folder)
    saved = read_saved(folder)
    config = saved.config
    model = read_model(folder, ReViT, saved=saved)
    tla = TokenLengthAssigner.load(folder / ASSIGNER, saved.contents[ASSIGNER]) if config["assigner"] else None
    if tla is not None and tla.grids != model.grids:
        raise ValueError(
            f"bundle: {folder / ASSIGNER} assigns grids {tla.grids}, the model has {model.grids}; give the assigner "
            "that was trained for this model"
        )
    policy = tuple(config["policy"]) if isinstance(config["policy"], list) else config["policy"]
    try:
        _check(model, tla, policy, config["settings"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"bundle: {folder / CONFIG}: {error}; save the bundle again") from error
    return Bundle(model, tla, tuple(config["classes"]), config["settings"], policy, config["card"])


def load(
    name_or_folder: str | os.PathLike, *, optimize: bool = True, policy: PolicySpec | None = None, **options: Any
) -> AdaptivePipeline:
    """Makes a pipeline from a bundle, ready to be called with images; `.classes` are the names of its classes.

    Args:
        name_or_folder: see `read_bundle`.
        optimize: run a copy made by `optimize`; otherwise the model itself.
        policy: see `policies.make_policy`; by default the bundle's.
        **options: further arguments of `pipeline`: device, dtype, token_budget, draft, ...

    Raises:
        OSError, ImportError, ValueError: see `read_bundle`.
    """
    bundle = read_bundle(name_or_folder)
    own = {"policy": policy or bundle.policy, "labels": bundle.classes, "optimize": optimize}
    return pipeline(bundle.model, bundle.tla, **own, **options)


def _check(
    model: ReViT, tla: TokenLengthAssigner | None, policy: PolicySpec, settings: Mapping[str, Any]
) -> AdaptivePreprocessor:
    """Raises an error if the assigner has other grids, or the policy or the settings are not valid for the model."""
    return AdaptivePreprocessor.for_model(model, tla, policy=policy, **settings)

"""Folders that hold a saved model: `save_pretrained` and `save_bundle` write them.

| file | holds |
| --- | --- |
| `config.json` | the ReViT's constructor arguments, class names, preprocessing, policy, the card's text, `files` |
| `model.safetensors` | the ReViT's weights |
| `assigner.safetensors` | the assigner with its calibration, where the folder has one |
| `README.md` | the model card, made of `config.json` |

The names are those of a repository on the Hugging Face Hub, which can hold such a folder as it is (`hub`).

`files` names size and SHA-256 of the files of tensors, so that a reader gets those of one save, or an error
(`verified`). Folders of older versions name none; their files are taken as they are. The card is no such file: nobody
reads it but people, and they may edit it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from revit_fast.grids import check_grids
from revit_fast.io.atomic import is_empty, read_json, replaced_folder
from revit_fast.io.names import dumps, on_one_line, to_text
from revit_fast.io.verified import files_in, read_file, read_together
from revit_fast.models.classes import class_names
from revit_fast.models.loading import MadeFor
from revit_fast.models.macs import forward_macs
from revit_fast.models.settings import SETTINGS, input_settings
from revit_fast.models.weights import load_fitting, read_checkpoint
from revit_fast.ops._modes import as_saved

FORMAT = "revit-fast bundle 1"

OWN = CONFIG, MODEL, ASSIGNER, CARD = "config.json", "model.safetensors", "assigner.safetensors", "README.md"
"""The files of a saved model, in the order in which new ones take their places."""

TAGS = ("revit", "vision-transformer", "adaptive-token-length")
"""Tags of the model card, which the Hub reads."""

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Assigner(Protocol):
    """The part of a `TokenLengthAssigner` that a folder uses."""

    grids: tuple[int, ...]
    description: str

    def save(self, path: Path) -> None: ...

    def check_policy(self, policy: Any, macs: Sequence[float]) -> None: ...


class Saved(NamedTuple):
    """What a folder holds, all of one save.

    Attributes:
        config: the content of `config.json`, see `read_config`.
        contents: the bytes of the files of tensors, by name.
    """

    config: dict[str, Any]
    contents: dict[str, bytes]


def write_folder(
    folder: str | os.PathLike,
    model: nn.Module,
    assigner: Assigner | None = None,
    *,
    classes: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    policy: Any = None,
    card: str | None = None,
) -> None:
    """Writes a folder, all or nothing: if the process is killed, `read_saved` finds the old content or the new.

    The folder stays the same one, with its mode and other files; for links and mount points see `replaced_folder`. The
    caller must have checked assigner and policy. The arguments are those of `save_bundle`.
    """
    folder = Path(folder)
    check_replaceable(folder)
    classes = class_names(model) or range(model.num_classes) if classes is None else classes
    classes = tuple(map(str, classes))
    if len(classes) != model.num_classes:
        raise ValueError(f"classes: the model has {model.num_classes} classes, got {len(classes)} names")
    config = {
        "format": FORMAT,
        "revit": model.config,
        "dtype": str(model.pos_embed.dtype).removeprefix("torch."),
        "classes": list(classes),
        "settings": complete_settings(model, settings),
        "policy": _as_json(default_policy(model, assigner) if policy is None else policy),
        "assigner": None if assigner is None else ASSIGNER,
        "card": card,
    }
    from safetensors.torch import save

    with replaced_folder(folder, OWN) as new:
        tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        (new / MODEL).write_bytes(save(tensors, {"format": "pt"}))  # only the owner could read a file of save_file
        if assigner is not None:
            assigner.save(new / ASSIGNER)
        config["files"] = files_in(new)
        (new / CONFIG).write_text(dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (new / CARD).write_text(_card_text(model, assigner, config), encoding="utf-8")


def check_assigner(assigner: Any, grids: tuple[int, ...]) -> None:
    """Raises an error unless `assigner` is an assigner with the model's grids."""
    if not isinstance(assigner, Assigner):
        raise TypeError(f"tla: expected a TokenLengthAssigner or None, got {type(assigner).__name__}")
    if assigner.grids != grids:
        raise ValueError(
            f"tla: it assigns grids {assigner.grids}, the model has {grids}; give the assigner that was trained "
            "for this model"
        )


def default_policy(model: nn.Module, assigner: Assigner | None) -> Any:
    """The default policy: the length that the assigner finds most probable, or the longest grid without an assigner."""
    return ("fixed", model.grids[0]) if assigner is None else "argmax"


def complete_settings(model: nn.Module, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every setting of the preprocessing: the given one, else that of the model's `pretrained_cfg`, else DeiT's."""
    unknown = sorted(set(given or {}) - set(SETTINGS))
    if unknown:
        raise ValueError(f"settings: expected {', '.join(SETTINGS)}, got {', '.join(unknown)}")
    settings = input_settings(model) | dict(given or {})
    return {name: list(map(float, v)) if name in ("mean", "std") else v for name, v in settings.items()}


def check_replaceable(folder: Path) -> None:
    """Raises an error if the folder holds anything other than a saved model."""
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and is_empty(folder)):
        raise ValueError(f"folder: {folder} exists and is no bundle; give a new or empty folder, or a bundle")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`, checked as far as it can be without the model.

    Raises:
        ValueError: if the file cannot be read, comes from another program or version, or is incomplete.
    """
    path = folder / CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"bundle: {path} cannot be read as JSON: {error}; save the bundle again") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version is None and isinstance(config, dict) and "model_type" in config:
        raise ValueError(
            f"bundle: {path} is that of a {config['model_type']} of transformers; give the folder to "
            "ReViT.from_transformers"
        )
    if version != FORMAT:
        raise ValueError(
            f"bundle: {path} has the format {version!r}, this version reads {FORMAT!r}; install the revit-fast that "
            "wrote it, or save the bundle again"
        )
    missing = [name for name in ("revit", "dtype", "classes", "settings", "policy", "assigner") if name not in config]
    if missing:
        raise ValueError(f"bundle: {path} does not say: {', '.join(missing)}; save the bundle again")
    for name, kind in (("revit", dict), ("classes", list)):
        if not isinstance(config[name], kind):
            raise ValueError(f"bundle: {path}: {name} is no {kind.__name__}; save the bundle again")
    return {"card": None, "files": {}, **config}


def read_saved(folder: Path) -> Saved:
    """Reads a folder; what does not fit is read again, in case that it is being saved.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where `config.json` cannot be read, or names another size or hash of a file.
    """

    def read() -> Saved:
        config = read_config(folder)
        names = [MODEL, ASSIGNER] if config["assigner"] else [MODEL]
        return Saved(config, {name: read_file(folder / CONFIG, name, config["files"], "bundle") for name in names})

    return read_together(folder / CONFIG, read)


def read_model(
    folder: Path,
    kind: type[M],
    arguments: Mapping[str, Any] | None = None,
    saved: Saved | None = None,
    match_norms: str = "length",
) -> M:
    """The model of a folder, in evaluation mode; its `pretrained_cfg` holds the settings and `label_names`.

    Args:
        folder: folder that holds the model.
        kind: `ReViT` or a subclass.
        arguments: constructor arguments that replace the saved ones.
        saved: result of `read_saved`, if the folder has been read already; the model's bytes are taken out.
        match_norms: how norms go to other grids, see `ReViT.load_weights`.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file cannot be read, or files or arguments do not fit each other; the message names it.
    """
    config, contents = saved or read_saved(folder)
    arguments = arguments or {}
    unsaid = kind.unsaid_arguments({**config["revit"], **arguments})
    if unsaid:
        raise ValueError(
            f"bundle: {folder / CONFIG} does not say {', '.join(unsaid)} of {kind.__name__}; give it, or save the "
            "model with a class whose property `config` holds it"
        )
    changed = f" with {', '.join(arguments)} as given" if arguments else ""
    try:
        with as_saved():
            model = kind.from_config({**config["revit"], **arguments}).to(getattr(torch, config["dtype"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"bundle: {folder / CONFIG}{changed} describes no model of this version: {error}") from error
    if len(config["classes"]) != config["revit"].get("num_classes", model.num_classes):
        raise ValueError(
            f"bundle: {folder / CONFIG} names {len(config['classes'])} classes, but its model has {model.num_classes}; "
            "save the bundle again"
        )
    try:
        with as_saved():
            weights = read_checkpoint(folder / MODEL, model.state_dict(), contents.pop(MODEL))
            load_fitting(model, model.follow(weights, _made_for(config["revit"]), match_norms), folder / MODEL)
    except (TypeError, ValueError) as error:
        fix = f"leave out {', '.join(arguments)}" if arguments else "copy the whole folder, or save the bundle again"
        raise ValueError(f"bundle: {error}; {fix}") from error
    settings = config["settings"]
    if not isinstance(settings, dict) or sorted(settings) != sorted(SETTINGS):
        raise ValueError(f"bundle: {folder / CONFIG}: expected settings of {', '.join(SETTINGS)}, got {settings!r}")
    model.pretrained_cfg = settings | {"label_names": list(config["classes"])}
    return model.eval()


def _made_for(revit: Mapping[str, Any]) -> MadeFor | None:
    """What the norms and positions beside a model's constructor arguments stand for; None if these name no grids."""
    grids = revit.get("grids")
    return MadeFor(tuple(revit.get("base_grid") or grids[:1] * 2), check_grids(grids)) if grids else None


def _as_json(policy: Any) -> Any:
    spec = getattr(policy, "spec", policy)  # a Policy's spec, or the spec itself
    try:
        return json.loads(json.dumps(spec))
    except TypeError:
        raise ValueError(f"policy: {spec!r} cannot be kept in a file; give plain numbers, lists and strings") from None


def _card_text(model: nn.Module, assigner: Assigner | None, config: Mapping[str, Any]) -> str:
    """The model card: facts derived from the model and its settings, then the text given by the user."""
    settings, classes = config["settings"], config["classes"]
    rows = [
        f"| {grid}x{grid} | {grid * model.patch_size} | {n + model.num_prefix_tokens} | "
        f"{forward_macs(model, n) / 1e9:.4g} |"
        for grid, n in zip(model.grids, model.lengths, strict=True)
    ]
    n_parameters = sum(p.numel() for p in model.parameters())
    crop = f"crop {settings['crop_pct']:g}, {settings['interpolation']}, mean {settings['mean']}, std {settings['std']}"
    named = [*map(on_one_line, classes[:20]), *["..."] * (len(classes) > 20)]
    task = "image-classification" if model.num_classes else "image-feature-extraction"
    return "\n".join(
        [
            "---",
            "library_name: revit-fast",
            f"pipeline_tag: {task}",
            f"tags: {json.dumps(TAGS)}",
            "---",
            "",
            "# Model card",
            "",
            "A Vision Transformer that gives every image the tokens that it needs (ReViT, arXiv 2307.02092), saved by",
            "revit-fast. In Python: `revit_fast.load(folder)(images)`; in a shell: `revit-fast predict --model FOLDER/",
            "images`.",
            "",
            "| grid | pixels a side | tokens | GMACs |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"- Model: {n_parameters:,} parameters, {len(model.blocks)} blocks of {model.embed_dim} channels, patches "
            f"of {model.patch_size} px",
            f"- Assigner: {'none: every image gets the same grid' if assigner is None else assigner.description}",
            f"- Policy: `{json.dumps(config['policy'])}`",
            f"- Preprocessing: {crop}",
            f"- Classes ({len(classes)}): {', '.join(named)}",
            "",
            *([to_text(config["card"].strip()), ""] if config["card"] else []),
        ]
    )

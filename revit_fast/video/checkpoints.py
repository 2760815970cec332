"""Folders that hold a TimeSformer: those that Hugging Face writes, and ours in the same format.

| file | holds |
| --- | --- |
| `config.json` | Hugging Face's configuration; in our folders also `grids`, the configured lengths, and `files` |
| `model.safetensors` | the weights under Hugging Face's or our names; our norms have a leading length axis |
| `preprocessor_config.json` | mean, std, sizes and filter of Hugging Face's image processor; may be absent |

`files` names size and SHA-256 of the other files, so that a reader gets those of one save, or an error (`verified`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from revit_fast.grids import DEFAULT_GRIDS, scaled_grids
from revit_fast.io.atomic import is_empty, read_json, replaced_folder
from revit_fast.io.names import dumps, loads
from revit_fast.io.verified import files_in, read_file, read_together
from revit_fast.models.weights import names_by_id, read_checkpoint
from revit_fast.video.model import SETTINGS, TimeSformer
from revit_fast.video.transformers_import import config_from_transformers, config_to_transformers

OWN = CONFIG, MODEL, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"

FILTERS = {2: "bilinear", 3: "bicubic"}
"""Names of the filters by Pillow's numbers, which image processors use."""


class Checkpoint(NamedTuple):
    """The content of a folder.

    Attributes:
        model: the model in evaluation mode; its `pretrained_cfg` has mean, std, crop_pct and interpolation.
        classes: names of the classes in the order of the logits; None unless the folder names every class.
    """

    model: TimeSformer
    classes: tuple[str, ...] | None


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether the folder's configuration is that of a TimeSformer."""
    try:
        config = read_json(Path(folder, CONFIG))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "timesformer"


def read_folder(folder: str | os.PathLike) -> Checkpoint:
    """Reads the model and the class names of a folder.

    If the configuration has no `grids`, the lengths are those of 14, 10 and 7 patches a side, in proportion to the
    model's own grid. Norms of one length are repeated for each length.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file cannot be read, is another one than `config.json` names, or describes an unsupported
            feature; the message names the file or folder.
    """
    folder = Path(folder)

    def read() -> tuple[dict[str, Any], dict[str, bytes]]:
        config = _parsed(read_file(folder / CONFIG, CONFIG, {}, "checkpoint"), folder / CONFIG)
        # transformers keeps entries that it does not know when it saves another model; they name the files of ours.
        files = {} if "transformers_version" in config else config.get("files", {})
        contents = {MODEL: read_file(folder / CONFIG, MODEL, files, "checkpoint")}
        if PROCESSOR in files or (folder / PROCESSOR).is_file():
            contents[PROCESSOR] = read_file(folder / CONFIG, PROCESSOR, files, "checkpoint")
        return config, contents

    config, contents = read_together(folder / CONFIG, read)
    try:
        base_grid = config_from_transformers(config)["base_grid"]
        grids = config.get("grids") or scaled_grids(DEFAULT_GRIDS, base_grid)
        model = TimeSformer.from_state_dict(read_checkpoint(folder / MODEL, content=contents.pop(MODEL)), config, grids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {folder}: {error}") from error
    if PROCESSOR in contents:
        processor = _parsed(contents[PROCESSOR], folder / PROCESSOR)
        model.pretrained_cfg = _settings(processor, folder / PROCESSOR)
    return Checkpoint(model, names_by_id(config.get("id2label") or {}, model.num_classes))


def save_folder(folder: str | os.PathLike, model: TimeSformer, classes: Sequence[str] | None = None) -> None:
    """Writes a folder that `read_folder` and `revit-fast predict` can read, all or nothing.

    Args:
        folder: a new or empty folder, or one that holds a TimeSformer. An existing folder stays the same one, with its
            mode and its other files.
        model: the model; its `pretrained_cfg` says how frames are prepared.
        classes: a name for every class, in the order of the logits.

    Raises:
        ValueError: if the folder holds something else, or the number of names is not the number of classes.
    """
    folder = Path(folder)
    if folder.exists() and not is_checkpoint(folder) and not (folder.is_dir() and is_empty(folder)):
        raise ValueError(f"folder: {folder} exists and holds no TimeSformer; give a new or empty folder")
    if classes is not None and len(classes) != model.num_classes:
        raise ValueError(f"classes: the model has {model.num_classes} classes, got {len(classes)} names")
    config = config_to_transformers(model) | {"grids": list(model.grids)}
    if classes is not None:
        config["id2label"] = {str(i): str(name) for i, name in enumerate(classes)}
    settings = model.pretrained_cfg
    cropped = config["image_size"]
    processor = {
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
        "resample": next(number for number, name in FILTERS.items() if name == settings["interpolation"]),
        "size": {"shortest_edge": round(cropped / settings["crop_pct"])},
        "crop_size": {"height": cropped, "width": cropped},
        "do_center_crop": True,
    }
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replaced_folder(folder, OWN) as new:
        (new / MODEL).write_bytes(save(tensors, {"format": "pt"}))
        (new / PROCESSOR).write_text(_as_text(processor), encoding="utf-8")
        (new / CONFIG).write_text(_as_text(config | {"files": files_in(new)}), encoding="utf-8")


def _as_text(content: Mapping[str, Any]) -> str:
    return dumps(content, indent=1, ensure_ascii=False) + "\n"


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = loads(content)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"checkpoint: {path} holds no JSON object")
    return value


def _settings(processor: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """mean, std, crop_pct and interpolation of an image processor; missing values are the authors' (`SETTINGS`)."""
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    shorter, cropped = size.get("shortest_edge"), crop.get("height")
    settings = dict(SETTINGS)
    settings |= {name: processor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in processor}
    if shorter and cropped and processor.get("do_center_crop", True):
        settings["crop_pct"] = cropped / shorter
    if not 0 < settings["crop_pct"] <= 1:
        raise ValueError(f"checkpoint: {path}: a crop of {cropped} px of {shorter} px is not supported")
    filter_number = processor.get("resample", 2)
    if filter_number not in FILTERS:
        raise ValueError(f"checkpoint: {path}: resample={filter_number} is not supported; use 2 or 3")
    return settings | {"interpolation": FILTERS[filter_number]}

"""Folders that hold a TimeSformer: those that Hugging Face writes, and ours in the same format.

| file | holds |
| --- | --- |
| `config.json` | Hugging Face's configuration; in our folders also `grids`, the configured lengths |
| `model.safetensors` | the weights under Hugging Face's or our names; our norms have a leading length axis |
| `preprocessor_config.json` | mean, std, sizes and filter of Hugging Face's image processor; may be absent |
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from revit_fast.grids import DEFAULT_GRIDS, scaled_grids
from revit_fast.io.atomic import read_json, replaced_folder
from revit_fast.io.names import dumps
from revit_fast.models.weights import read_checkpoint
from revit_fast.video.model import SETTINGS, TimeSformer
from revit_fast.video.transformers_import import config_from_transformers, config_to_transformers

CONFIG, MODEL, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"

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
        ValueError: if a file cannot be read or describes an unsupported feature; the message names the file or folder.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    try:
        base_grid = config_from_transformers(config)["base_grid"]
        grids = config.get("grids") or scaled_grids(DEFAULT_GRIDS, base_grid)
        model = TimeSformer.from_state_dict(read_checkpoint(folder / MODEL), config, grids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {folder}: {error}") from error
    if (folder / PROCESSOR).is_file():
        model.pretrained_cfg = _settings(_read_json(folder / PROCESSOR), folder / PROCESSOR)
    names = config.get("id2label") or {}
    known = len(names) == model.num_classes and all(str(i) in names for i in range(len(names)))
    return Checkpoint(model, tuple(str(names[str(i)]) for i in range(len(names))) if known else None)


def save_folder(folder: str | os.PathLike, model: TimeSformer, classes: Sequence[str] | None = None) -> None:
    """Writes a folder that `read_folder` and `revit-fast predict` can read, all or nothing.

    Args:
        folder: a new or empty folder, or one that holds a TimeSformer, which is replaced as a whole.
        model: the model; its `pretrained_cfg` says how frames are prepared.
        classes: a name for every class, in the order of the logits.

    Raises:
        ValueError: if the folder holds something else, or the number of names is not the number of classes.
    """
    folder = Path(folder)
    if folder.exists() and not is_checkpoint(folder) and not (folder.is_dir() and not any(folder.iterdir())):
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
    with replaced_folder(folder) as new:
        (new / MODEL).write_bytes(save(tensors, {"format": "pt"}))
        for name, content in ((CONFIG, config), (PROCESSOR, processor)):
            (new / name).write_text(dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {path} holds no JSON object")
    return content


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

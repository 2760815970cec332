"""Reading checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from revit_fast.io.tensors import metadata_of, tensors_and_metadata

EXTRA_STATE = "_extra_state"
"""torch's name for the entry of a state dict that `get_extra_state` makes; weights of others lack it."""

CLASSES = "classes"
"""Where the metadata of a file of weights, or a saved model's `config.json`, name the classes."""


def read_checkpoint(path: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or in a `.pth` file, which is read with `weights_only=True`.

    A training checkpoint may hold it under `state_dict_ema`, `model_ema`, `state_dict` or `model`.

    Args:
        path: the file.
        content: what the `.safetensors` file holds, if it has been read already.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where the file cannot be read or holds something else.
    """
    if content is None and not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    content = _read(path, content)
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"weights: {path} holds no state dict of tensors")
    return {name.removeprefix("module."): value for name, value in content.items()}


def named_classes(path: Path) -> tuple[str, ...] | None:
    """Names of the classes that the head in a file of weights is for, in the order of its rows; None if it names none.

    They are in the file's own metadata, or in the `config.json` of the saved model that it is a part of.
    """
    names = None
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            names = json.loads(metadata_of(file).get(CLASSES, "null"))
    config = path.parent / "config.json"
    if names is None and path.name == "model.safetensors" and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        names = content.get(CLASSES) if isinstance(content, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def load_fitting(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads a state dict whose names and shapes are those of the module.

    Args:
        module: module to load into.
        state_dict: its parameters and buffers.
        source: name of the state dict in errors.

    Raises:
        ValueError: where names or shapes do not fit; the message lists missing, unexpected and misshapen ones.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state_dict.keys() - {EXTRA_STATE}),
        "unexpected": sorted(state_dict.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & state_dict.keys()
            if own[name].shape != state_dict[name].shape
        ],
    }
    found = "; ".join(f"{len(names)} {what}: {', '.join(names)}" for what, names in problems.items() if names)
    if found:
        raise ValueError(f"weights: {source} does not fit this model: {found}")
    module.load_state_dict(state_dict)


def _read(path: Path, content: bytes | None) -> object:
    try:
        if path.suffix == ".safetensors":
            return tensors_and_metadata(path.read_bytes() if content is None else content)[0]
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ImportError('weights: reading .safetensors needs safetensors: pip install "revit-fast[timm]"') from None
    except UnpicklingError as error:  # PyTorch's text would tell the user to unpickle whatever is in the file
        raise ValueError(
            f"weights: {path} cannot be read as a checkpoint of tensors: it holds other objects, or torch.save did not "
            "write it; save the state dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # the readers raise any exception of their parsers
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights: {path} cannot be read as a checkpoint of tensors: {reason}") from error

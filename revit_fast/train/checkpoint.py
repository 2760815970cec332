"""The state of a run in one safetensors file: tensors, and all other values as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from revit_fast.io.atomic import replaced

FORMAT = "revit-fast training state 2"
TENSOR = "\0tensor"
"""Key of the JSON objects that replace tensors; no parameter or option has this name."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and JSON values, all or nothing.

    Raises:
        OSError: if the file cannot be written; the previous file stays.
        TypeError: for a value of another type.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    skeleton = _taken_apart(state, tensors)
    metadata = {"format": FORMAT, "state": json.dumps(skeleton)}
    with replaced(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except Exception as error:  # safetensors wraps the system's errors in its own
            raise OSError(f"cannot write {path}: {error}; the last complete one is kept") from error


def load_state(path: Path) -> dict[str, Any]:
    """Reads a state that `save_state` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    data = path.read_bytes()  # in one read: `safe_open` opens the path twice, and a run may replace it in between
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no state of a training run of this version")
        return _put_together(json.loads(metadata["state"]), tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as a state of a training run: {error}; remove it to start the run anew"
        ) from error


def _taken_apart(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """The value with every tensor moved to `tensors` and replaced by its name."""
    if isinstance(value, Tensor):
        # A separate copy: safetensors refuses tensors that share memory and other layouts (channels last).
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        # JSON keys are strings, but optimizers number their parameters.
        return {
            "keys": list(value),
            "values": [_taken_apart(v, tensors, f"{name}.{k}" if name else str(k)) for k, v in value.items()],
        }
    if isinstance(value, (list, tuple)):
        return [_taken_apart(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a state holds tensors and JSON values, got {type(value).__name__}")


def _put_together(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    return dict(zip(value["keys"], (_put_together(v, tensors) for v in value["values"]), strict=True))


def save_weights(path: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Writes a state dict as safetensors, all or nothing; `ReViT.load_checkpoint` reads it."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    with replaced(path) as temporary:
        temporary.write_bytes(save(tensors))  # save_file's file is readable for its owner only

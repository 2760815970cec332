"""The state of a run in one safetensors file: tensors, and all other values as JSON in its header."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from revit_fast.io.atomic import replaced
from revit_fast.io.names import dumps
from revit_fast.io.tensors import misfit, tensors_and_metadata
from revit_fast.models.weights import CLASSES

FORMAT = "revit-fast training state 3"
UNREADABLE = "{} cannot be read as a state of a training run: {}; remove it to start the run anew"
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

    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    problem = misfit(io.BytesIO(content), path.name)
    if problem is not None:
        raise ValueError(UNREADABLE.format(path, f"it {problem}"))
    try:
        tensors, metadata = tensors_and_metadata(content)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no state of a training run of this version")
        return _put_together(json.loads(metadata["state"]), tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(UNREADABLE.format(path, error)) from error


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


def save_weights(path: Path, state_dict: Mapping[str, Tensor], classes: Sequence[str] | None = None) -> None:
    """Writes a state dict and the names of its classes as safetensors, all or nothing.

    `ReViT.load_checkpoint` reads the weights, `models.weights.named_classes` the names.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state_dict.items()}
    # One entry alone: safetensors writes several in any order, and equal runs would give other bytes.
    metadata = {} if classes is None else {CLASSES: dumps(classes)}
    with replaced(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)

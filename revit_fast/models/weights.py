"""Reading checkpoints: files, the state dict in them, its names, and what is said if it does not fit a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from revit_fast.io.atomic import read_json
from revit_fast.io.names import loads, on_one_line
from revit_fast.io.tensors import metadata_of, read_tensors

EXTRA_STATE = "_extra_state"
"""torch's name for the entry of a state dict that `get_extra_state` makes; weights of others lack it."""

CLASSES = "classes"
"""Where the metadata of a file of weights, or a saved model's `config.json`, name the classes."""

SAVED = ("model.safetensors", "pytorch_model.bin")
"""Names of files of weights that a `config.json` beside them describes."""

CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "module"),
)
"""Names under which training checkpoints hold a state dict. The first that does is read: averaged weights (EMA), which
are those that a training reports, come before the last ones."""

DEEPEST = 4
"""Most containers that hold each other."""

PREFIXES = ("module.", "model.")
"""Prefixes that data parallel and training loops put before every name."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts that PyTorch's wrappers of modules put into names, at any place."""

COUNTER = "n_averaged"
"""Name of the only tensor that PyTorch's `AveragedModel` adds to those of its `module`."""

NAMED = 5
"""Names of each kind that an error lists."""

FAMILIES = (
    (
        r"^(visual\.|vision_model\.|text_model\.|token_embedding\.)",
        "those of a CLIP with two towers; give one",
    ),
    (
        r"relative_position_bias_table",
        "those of a model with relative positions, which ReViT lacks",
    ),
    (r"^layers\.\d+\.(blocks|downsample)", "those of a Swin, whose attention runs in windows"),
    (r"^(optimizer|average)\.", "the state of a training run; give its model.safetensors"),
    (r"roi_head|rpn|bbox|class_embed|query_embed", "those of a model for detection; give its backbone alone"),
    (r"^decoder_|^mask_token$", "those of a pre-training with a decoder (MAE); give its encoder alone"),
    (r"lora_[AB]\b", "a LoRA adapter without the model; merge it into the model first"),
    (r"encoder\.layer\.\d+\.|^embeddings\.", "those of a model of transformers; use ReViT.from_transformers"),
    (r"^patch_embed\.conv1\.", "those of an LV-ViT; use models.lvvit.from_lvvit_state_dict"),
    (r"^(layer[1-4]\.\d|features\.\d|stages\.\d)", "those of a convolutional network"),
)
"""Patterns in unexpected names, and what such weights are."""


def read_checkpoint(path: Path, own: Collection[str] = (), content: bytes | None = None) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of `torch.save`, which is read with `weights_only=True`.

    Args:
        path: path of the file.
        own: see `state_dict_of`.
        content: what the file holds, if it has been read already.

    Raises:
        FileNotFoundError: where there is no such file.
        ImportError: for a safetensors file where safetensors is not installed.
        ValueError: where the file cannot be read or holds something else; the message says what it is.
    """
    if content is None and not path.is_file():
        what = f"{path} is a folder; give a file in it" if path.is_dir() else f"there is no file {path}"
        raise FileNotFoundError(f"weights: {what}")
    try:
        value = read_tensors(path, content)
    except (ImportError, ValueError) as error:
        raise type(error)(f"weights: {path} cannot be read as a checkpoint of tensors: it {error}") from error
    found = state_dict_of(value, path, own)
    if not found:
        raise ValueError(f"weights: {path} holds no state dict of tensors, but nothing")
    return found


def state_dict_of(content: object, source: str | Path, own: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict that a checkpoint holds, under the names of the plain model.

    It is looked for under `CONTAINERS`, which may hold each other. Prefixes that every name has are taken away, also
    repeated ones, and so are the parts that PyTorch's wrappers put into names.

    Args:
        content: a state dict, or what a training checkpoint holds.
        source: name of the checkpoint in errors.
        own: names of the model's parameters; prefixes and parts that one of them has stay.

    Raises:
        ValueError: if there is no state dict; the message says what there is.
    """
    found = {} if content == {} else _unwrapped(content)
    if found is None:
        raise ValueError(f"weights: {source} holds no state dict of tensors, but {_described(content)}")
    for wrapper in WRAPPERS:
        if not any(wrapper in name for name in own):
            found = _renamed(found, lambda name, part=wrapper: re.sub(rf"(^|(?<=\.)){re.escape(part)}", "", name))
    while True:
        names = found.keys() - {COUNTER}
        free = [prefix for prefix in PREFIXES if not any(name.startswith(prefix) for name in own)]
        prefix = next((p for p in free if names and all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return found
        found = {name.removeprefix(prefix): value for name, value in found.items() if name != COUNTER}


def named_classes(path: Path) -> tuple[str, ...] | None:
    """Names of the classes that the head in a file of weights is for, in the order of its rows; None if it names none.

    They are in the file's own metadata, or in the `config.json` of the saved model that it is a part of: a bundle, or a
    folder of timm or transformers.
    """
    names = None
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            names = loads(metadata_of(file).get(CLASSES, "null"))
    config = path.parent / "config.json"
    if names is None and path.name in SAVED and config.is_file():
        content = read_json(config)
        if isinstance(content, dict):
            own = content.get("pretrained_cfg")
            names = (
                content.get(CLASSES) or label_names(content) or (label_names(own) if isinstance(own, dict) else None)
            )
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else None


def label_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes in a configuration of timm (`label_names`) or transformers (`id2label`); None without any.

    timm's names are explained by its `label_descriptions`, where it has them. transformers' LABEL_0, LABEL_1, ... are
    placeholders, not names.
    """
    names = config.get("label_names")
    if names:
        texts = config.get("label_descriptions") or {}
        return tuple(str(texts.get(name, name)) if isinstance(texts, Mapping) else str(name) for name in names)
    ids = config.get("id2label") or {}
    return names_by_id(ids, len(ids))


def names_by_id(id2label: Mapping[Any, Any], n_classes: int) -> tuple[str, ...] | None:
    """The names of so many classes in transformers' `id2label`; None for another number, or placeholders alone."""
    placeholders = tuple(f"LABEL_{i}" for i in range(n_classes))
    by_id = {str(i): str(name) for i, name in id2label.items()}
    names = tuple(by_id.get(str(i), placeholder) for i, placeholder in enumerate(placeholders))
    return None if len(by_id) != n_classes or names == placeholders else names


def load_fitting(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads a state dict whose names and shapes are those of the module.

    Args:
        module: module to load into.
        state_dict: its parameters and buffers.
        source: name of the state dict in errors.

    Raises:
        ValueError: where names or shapes do not fit; the message counts missing, unexpected and misshapen ones, names
            the first of each, and says what the weights look like.
    """
    own = module.state_dict()
    misshapen = [name for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    problems = {
        "missing": [name for name in own if name not in state_dict and name != EXTRA_STATE],
        "unexpected": [on_one_line(name) for name in state_dict if name not in own],
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}" for name in misshapen
        ],
    }
    found = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names)
    if found:
        hint = _hint(own, state_dict, misshapen)
        raise ValueError(f"weights: {source} does not fit this model: {found}" + (f"; {hint}" if hint else ""))
    module.load_state_dict(state_dict)


def _unwrapped(content: object, depth: int = DEEPEST) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    inner = (_unwrapped(content[name], depth - 1) for name in CONTAINERS if depth and name in content)
    return next((found for found in inner if found is not None), None)


def _renamed(state_dict: dict[str, Tensor], change) -> dict[str, Tensor]:
    """The state dict under changed names; as it is where two names would become one."""
    renamed = {change(name): value for name, value in state_dict.items()}
    return renamed if len(renamed) == len(state_dict) else state_dict


def _described(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    kinds = [f"{on_one_line(str(name))} ({type(value).__name__})" for name, value in content.items()]
    return _listed(kinds)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _hint(own: Mapping[str, Tensor], given: Mapping[str, Tensor], misshapen: Sequence[str]) -> str:
    """What weights that do not fit look like, and what to do; empty if nothing is known."""
    unexpected = given.keys() - own.keys()
    for pattern, family in FAMILIES:
        if any(re.search(pattern, name) for name in unexpected):
            return f"these look like {family}"
    before = Counter(
        name[: -len(rest)] for name in unexpected for rest in _ends(name) if rest in own and rest not in given
    )
    for prefix, count in before.most_common(1):
        if 2 * count > len(own):
            return f"{count} names are the model's after {prefix!r}; save these weights alone, without it"
    depths = [len({name.split(".")[1] for name in names if name.startswith("blocks.")}) for names in (own, given)]
    if depths[0] != depths[1] and depths[1]:
        return f"they have {depths[1]} blocks, the model has {depths[0]}"
    return _hint_of_shapes([(name, tuple(given[name].shape), tuple(own[name].shape)) for name in misshapen])


def _ends(name: str) -> list[str]:
    """The name without its first part, without its first two parts, and so on."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _hint_of_shapes(misshapen: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    for name, theirs, ours in misshapen:
        if name == "pos_embed" and theirs[-1:] != ours[-1:]:
            return f"they are {theirs[-1]} channels wide, the model {ours[-1]}; name the model of this size"
    for name, theirs, ours in misshapen:
        if name == "pos_embed":
            return f"their positions are {theirs[1]} rows, the model's {ours[1]}; give their image size"
        if "norm" in name and len(theirs) == len(ours) == 2 and theirs[1] == ours[1]:
            return f"they are of {theirs[0]} token lengths, the model of {ours[0]}; give their grids"
    heads = [(theirs[0], ours[0]) for name, theirs, ours in misshapen if re.match(r"head(_dist)?\.", name)]
    if heads and len(heads) == len(misshapen):
        return f"they are of {heads[0][0]} classes, the model of {heads[0][1]}; give num_classes={heads[0][0]}"
    return ""

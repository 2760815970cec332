"""Bundles: a folder with all that an adaptive model needs to run where only this package is installed.

| file | holds |
| --- | --- |
| `config.json` | the ReViT's constructor arguments, class names, preprocessing, policy, the card's text |
| `model.safetensors` | the ReViT's weights |
| `assigner.safetensors` | the assigner with its calibration, where the bundle has one |
| `README.md` | the model card, made of `config.json` |

The names are those of a repository on the Hugging Face Hub, which can hold a bundle as it stands (`revit_fast.hub`).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from revit_fast import hub
from revit_fast.atomic import replaced_folder
from revit_fast.checkpoint import load_fitting, read_checkpoint
from revit_fast.costs import forward_macs
from revit_fast.model import ReViT
from revit_fast.pipeline import AdaptivePipeline, pipeline
from revit_fast.policies import Policy, PolicySpec
from revit_fast.preprocess import AdaptivePreprocessor
from revit_fast.settings import input_settings
from revit_fast.tla import TokenLengthAssigner

FORMAT = "revit-fast bundle 1"

CONFIG, MODEL, ASSIGNER, CARD = "config.json", "model.safetensors", "assigner.safetensors", "README.md"

SHIPPED = Path(__file__).parent / "models"
"""Where the bundles lie that the package brings."""

TAGS = ("revit", "vision-transformer", "adaptive-token-length")
"""Of the model card's metadata, which the Hub reads."""

SETTINGS = ("mean", "std", "crop_pct", "interpolation")
"""Of the preprocessing, under timm's names."""


class Bundle(NamedTuple):
    """What a bundle holds.

    Attributes:
        model: in evaluation mode; its `pretrained_cfg` holds `settings`, and `classes` as `label_names`.
        tla: the assigner, in evaluation mode; None where there is none yet.
        classes: names of the classes, in the order of the logits.
        settings: mean, std, crop_pct and interpolation that the model was trained with.
        policy: that the bundle is meant to run with, see `policies.make_policy`.
        card: text of the model card, in Markdown, below what is said of every bundle.
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
    """Writes a bundle, all or nothing: whoever is killed meanwhile leaves the bundle that was there.

    Args:
        folder: to be made, or a bundle to be replaced; other files in it are kept.
        model: the ReViT.
        tla: its assigner, calibrated for policies that need it; None for a model that has none yet.
        classes: a name for every class, in the order of the logits; default: the `label_names` of its
            `pretrained_cfg`, else their numbers.
        settings: mean, std, crop_pct and interpolation that the model was trained with; default: what its
            `pretrained_cfg` says, else DeiT's.
        policy: that the bundle runs with; default "argmax", or the longest grid without an assigner.
        card: further text of the model card, in Markdown: data, accuracies, limits.

    Raises:
        ValueError: for parts that do not fit each other, or a folder that holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder)
    classes = tuple(map(str, _class_names(model) if classes is None else classes))
    if len(classes) != model.num_classes:
        raise ValueError(f"classes: the model has {model.num_classes} classes, got {len(classes)} names")
    policy = policy or default_policy(model, tla)
    bundle = Bundle(model, tla, classes, _settings(model, settings), policy, card)
    _preprocessor(bundle)  # refuses an assigner of other grids, and a policy that cannot be
    config = {
        "format": FORMAT,
        "revit": model.config,
        "dtype": str(model.pos_embed.dtype).removeprefix("torch."),
        "classes": list(classes),
        "settings": bundle.settings,
        "policy": _policy_to_json(policy),
        "assigner": None if tla is None else ASSIGNER,
        "card": card,
    }
    from safetensors.torch import save

    with replaced_folder(folder) as new:
        tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        (new / MODEL).write_bytes(save(tensors, {"format": "pt"}))  # save_file would let nobody else read it
        if tla is not None:
            tla.save(new / ASSIGNER)
        (new / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (new / CARD).write_text(_card_text(bundle), encoding="utf-8")
        _keep_other_files(folder, new)


def read_bundle(name_or_folder: str | os.PathLike) -> Bundle:
    """The parts of a bundle.

    Args:
        name_or_folder: a folder; without a path separator, the name of a model that the package ships; or a repository
            of the Hugging Face Hub, `hf-hub:user/name` or `hf-hub:user/name@revision`.

    Raises:
        FileNotFoundError: where there is no such bundle or one of its files is missing.
        OSError, ImportError: see `hub.download`.
        ValueError: where a file of it cannot be read, or files do not fit each other; the message names the file.
    """
    folder = find_bundle(name_or_folder)
    config = _read_config(folder)
    model = _model_of(folder, config, ReViT, {})
    tla = _read_assigner(folder, model) if config["assigner"] else None
    classes, policy = tuple(config["classes"]), _policy_of_json(config["policy"])
    bundle = Bundle(model, tla, classes, config["settings"], policy, config["card"])
    try:
        _preprocessor(bundle)
    except (TypeError, ValueError) as error:
        raise ValueError(f"bundle: {folder / CONFIG}: {error}; save the bundle again") from error
    return bundle


def read_model(folder: Path, kind: type[ReViT] = ReViT, arguments: Mapping[str, Any] | None = None) -> ReViT:
    """The model of a bundle alone, in evaluation mode.

    Args:
        folder: of the bundle.
        kind: `ReViT` or a subclass.
        arguments: of its constructor, in the place of those that the bundle has.

    Raises:
        FileNotFoundError, ValueError: see `read_bundle`.
    """
    folder = find_bundle(Path(folder))
    return _model_of(folder, _read_config(folder), kind, arguments or {})


def load(
    name_or_folder: str | os.PathLike, *, optimize: bool = True, policy: PolicySpec | None = None, **options: Any
) -> AdaptivePipeline:
    """A pipeline over a bundle, ready to be called with images; `.classes` are the names of its classes.

    Args:
        name_or_folder: see `read_bundle`.
        optimize: run an `optimize`d copy; otherwise the model itself.
        policy: see `policies.make_policy`; by default the bundle's.
        **options: further arguments of `pipeline`: device, dtype, token_budget, draft, ...

    Raises:
        OSError, ImportError, ValueError: see `read_bundle`.
    """
    bundle = read_bundle(name_or_folder)
    own = {"policy": policy or bundle.policy, "labels": bundle.classes, "optimize": optimize}
    return pipeline(bundle.model, bundle.tla, **own, **options)


def find_bundle(name_or_folder: str | os.PathLike) -> Path:
    """The folder of a bundle; see `read_bundle`."""
    if isinstance(name_or_folder, str) and name_or_folder.startswith(hub.SCHEME):
        name_or_folder = hub.download(name_or_folder)
    if not is_bundle(name_or_folder):
        shipped = ", ".join(shipped_names()) or "none"
        here = "; for the folder here, give ./" + name_or_folder if Path(name_or_folder).is_dir() else ""
        raise FileNotFoundError(
            f"bundle: the package ships no model {name_or_folder!r}; shipped: {shipped}; a folder is given with a "
            f"path separator{here}"
        )
    folder = Path(name_or_folder) if _is_path(name_or_folder) else SHIPPED / name_or_folder
    if not (folder / CONFIG).is_file():
        what = f"lacks {CONFIG}" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"bundle: the folder {folder} {what}; save_bundle and `revit-fast fit` write bundles")
    return folder


def is_bundle(name_or_folder: str | os.PathLike) -> bool:
    """Whether this is a path, a repository or the name of a shipped model, rather than that of a timm architecture."""
    return _is_path(name_or_folder) or name_or_folder.startswith(hub.SCHEME) or name_or_folder in shipped_names()


def shipped_names() -> list[str]:
    """Names of the models that the package ships."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def default_policy(model: ReViT, tla: TokenLengthAssigner | None) -> PolicySpec:
    """The policy where none is given: what the assigner finds most probable, or the longest grid."""
    return ("fixed", model.grids[0]) if tla is None else "argmax"


def _is_path(name_or_folder: str | os.PathLike) -> bool:
    separators = [os.sep, os.altsep or os.sep]
    return not isinstance(name_or_folder, str) or any(s in name_or_folder for s in separators)


def _preprocessor(bundle: Bundle) -> AdaptivePreprocessor:
    return AdaptivePreprocessor.for_model(bundle.model, bundle.tla, policy=bundle.policy, **bundle.settings)


def _class_names(model: ReViT) -> Sequence[str]:
    """Names of the classes that the model brings, or else their numbers."""
    names = model.pretrained_cfg.get("label_names") or ()
    return names if len(names) == model.num_classes else range(model.num_classes)


def _settings(model: ReViT, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The preprocessing, every part of it said."""
    unknown = sorted(set(given or {}) - set(SETTINGS))
    if unknown:
        raise ValueError(f"settings: expected {', '.join(SETTINGS)}, got {', '.join(unknown)}")
    settings = input_settings(model) | dict(given or {})
    return {name: list(map(float, v)) if name in ("mean", "std") else v for name, v in settings.items()}


def _policy_to_json(policy: PolicySpec | Policy) -> Any:
    spec = policy.spec if isinstance(policy, Policy) else policy
    try:
        return json.loads(json.dumps(spec))
    except TypeError:
        raise ValueError(f"policy: {spec!r} cannot be kept in a file; give plain numbers, lists and strings") from None


def _policy_of_json(policy: Any) -> PolicySpec:
    return tuple(policy) if isinstance(policy, list) else policy


def check_replaceable(folder: Path) -> None:
    """Refuses what is there and is no bundle."""
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"folder: {folder} exists and is no bundle; give a new or empty folder, or a bundle")


def _keep_other_files(old: Path, new: Path) -> None:
    for entry in sorted(old.iterdir()) if old.is_dir() else ():
        if entry.name not in (CONFIG, MODEL, ASSIGNER, CARD):
            copy = shutil.copytree if entry.is_dir() else shutil.copy2
            copy(entry, new / entry.name)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"bundle: {path} cannot be read as JSON: {error}; save the bundle again") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version is None and isinstance(config, dict) and "model_type" in config:
        raise ValueError(
            f"bundle: {path} is that of a {config['model_type']} of transformers; load it there, and give the model to "
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
    return {"card": None, **config}


def _model_of(folder: Path, config: dict[str, Any], kind: type[ReViT], arguments: Mapping[str, Any]) -> ReViT:
    for name in [MODEL, config["assigner"] and ASSIGNER]:
        if name and not (folder / name).is_file():
            raise FileNotFoundError(f"bundle: {folder} lacks {name}; copy the whole folder, or save the bundle again")
    _check_own_arguments(folder, config, kind, arguments)
    changed = f" with {', '.join(arguments)} as given" if arguments else ""
    try:
        model = kind.from_config(config["revit"] | arguments).to(getattr(torch, config["dtype"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"bundle: {folder / CONFIG}{changed} describes no model of this version: {error}") from error
    if len(config["classes"]) != config["revit"].get("num_classes", model.num_classes):
        raise ValueError(
            f"bundle: {folder / CONFIG} names {len(config['classes'])} classes, but its model has {model.num_classes}; "
            "save the bundle again"
        )
    try:
        load_fitting(model, read_checkpoint(folder / MODEL), folder / MODEL)
    except ValueError as error:
        fix = f"leave out {', '.join(arguments)}" if arguments else "copy the whole folder, or save the bundle again"
        raise ValueError(f"bundle: {error}; {fix}") from error
    settings = config["settings"]
    if not isinstance(settings, dict) or sorted(settings) != sorted(SETTINGS):
        raise ValueError(f"bundle: {folder / CONFIG}: expected settings of {', '.join(SETTINGS)}, got {settings!r}")
    model.pretrained_cfg = settings | {"label_names": list(config["classes"])}
    return model.eval()


def _check_own_arguments(folder: Path, config: dict[str, Any], kind: type[ReViT], arguments: Mapping[str, Any]) -> None:
    """Refuses to leave a subclass's own arguments at their defaults: the model that was saved may have had others."""
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name for name, parameter in _parameters(kind).items() if parameter.kind not in rest}
    unsaid = sorted(named - set(_parameters(ReViT)) - set(config["revit"]) - set(arguments))
    if unsaid:
        raise ValueError(
            f"bundle: {folder / CONFIG} does not say {', '.join(unsaid)} of {kind.__name__}; give it, or save the "
            "model with a class whose property `config` holds it"
        )


def _parameters(kind: type[ReViT]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.__init__).parameters


def _read_assigner(folder: Path, model: ReViT) -> TokenLengthAssigner:
    tla = TokenLengthAssigner.load(folder / ASSIGNER)
    if tla.grids != model.grids:
        raise ValueError(
            f"bundle: {folder / ASSIGNER} assigns grids {tla.grids}, the model has {model.grids}; give the assigner "
            "that was trained for this model"
        )
    return tla


def _card_text(bundle: Bundle) -> str:
    """The model card: what is true of the bundle by construction, then its own text."""
    model, tla, settings = bundle.model, bundle.tla, bundle.settings
    rows = [
        f"| {grid}x{grid} | {grid * model.patch_size} | {n + model.num_prefix_tokens} | "
        f"{forward_macs(model, n) / 1e9:.4g} |"
        for grid, n in zip(model.grids, model.lengths, strict=True)
    ]
    n_parameters = sum(p.numel() for p in model.parameters())
    assigner = "none: every image gets the same grid"
    if tla is not None:
        kind = tla.backbone or f"convolutions of {', '.join(map(str, tla.widths))} channels"
        calibrated = f"{len(tla.calibration.suffices)} held-out images" if tla.calibration else "nothing yet"
        assigner = f"{kind} on thumbnails of {tla.thumbnail_px} px, calibrated on {calibrated}"
    crop = f"crop {settings['crop_pct']:g}, {settings['interpolation']}, mean {settings['mean']}, std {settings['std']}"
    classes = bundle.classes if len(bundle.classes) <= 20 else (*bundle.classes[:20], "...")
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
            f"- Assigner: {assigner}",
            f"- Policy: `{json.dumps(_policy_to_json(bundle.policy))}`",
            f"- Preprocessing: {crop}",
            f"- Classes ({len(bundle.classes)}): {', '.join(classes)}",
            "",
            *([bundle.card.strip(), ""] if bundle.card else []),
        ]
    )

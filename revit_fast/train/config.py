"""What makes a training run: every choice in one record that is kept beside its results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from revit_fast.atomic import replaced
from revit_fast.checkpoint import read_checkpoint
from revit_fast.model import ReViT, create_model
from revit_fast.packing import DEFAULT_GRIDS, check_grids
from revit_fast.preprocess import input_settings
from revit_fast.train.augment import Augment
from revit_fast.train.losses import DISTILL_WEIGHT, TEMPERATURE, check_distillation

MODES = ("packed", "length-parallel")
AMP = ("none", "bfloat16")
PRESETS = {"deit": Augment, "light": Augment.light, "none": Augment.none}

BASE_LR, BASE_BATCH = 5e-4, 512
"""DeiT's learning rate, and the images of a step that it is meant for (arXiv 2012.12877)."""

HEAD_PARAMETER = re.compile(r"head(_dist)?\.(weight|bias)$")


@dataclass(frozen=True)
class TrainConfig:
    """Choices of a training run; optimisation defaults are DeiT's (arXiv 2012.12877).

    Attributes:
        data: images to train on, as `data.open_images` takes them.
        held_out_share: of the training images that is kept for evaluation; 0: the data's own evaluation split is used.
        model: timm's name of a ViT or DeiT.
        model_kwargs: arguments that change that architecture, as of `timm.create_model`.
        grids: token grids, strictly decreasing; every image is seen at all of them.
        weights: `.safetensors` or `.pth` to start from, of a plain ViT or a ReViT; None: random weights.
        epochs: passes over the images.
        batch_size: images that a process draws and mixes at a time (in length-parallel mode: a group of processes).
        micro_batch: images of one pack: a batch passes through the model in as many as that takes, and its gradient is
            their sum, so that a pack's activations stay in the cache or fit the memory; None: on a CPU see
            `trainer.cached_images`, on a GPU all images of the batch.
        grad_accum_steps: batches of an update.
        mode: "packed": all lengths of an image in one pack; "length-parallel": each process has one length.
        distill_weight: λ of TLSD, 0 for none.
        temperature: τ of TLSD.
        opt: timm's name of the optimizer.
        lr: learning rate; None: DeiT's, in proportion to the images of an update.
        weight_decay: of matrices; norms, biases, tokens and position embeddings have none.
        layer_decay: factor of the learning rate from a block to the one below it; None: no decay.
        sched: timm's name of the schedule, stepped at every update; "plateau", which follows no plan, is not supported.
        warmup_epochs: of linear warm-up.
        warmup_lr: learning rate that it begins with.
        min_lr: learning rate at the end.
        clip_grad: largest norm of the gradient; None: not clipped.
        ema_decay: of the moving average of the weights; 0: none.
        amp: "none" or "bfloat16": linear layers and attention in 16 bits, residual stream and parameters in float32.
        grad_checkpointing: recompute activations in the backward pass.
        seed: of weights, order, augmentation and dropout.
        augment: "preset" ("deit", "light" or "none") and changes to it, fields of `augment.Augment`.
        mean: of each channel, of pixels in [0, 1]; None: that of the model's timm configuration, and so the others.
        std: of each channel, likewise.
        crop_pct: share of the shorter side that evaluation shows the model.
        interpolation: "bicubic" or "bilinear".
        workers: processes that decode and augment; 0: none beside the training process.
        checkpoint_steps: updates between checkpoints beside those at the ends of epochs; 0: none.
        log_steps: updates between lines of the log.
        max_unreadable: share of the images that may be unreadable.
    """

    data: str = ""
    held_out_share: float = 0.0
    model: str = "deit_small_patch16_224"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    grids: Sequence[int] = DEFAULT_GRIDS
    weights: str | None = None
    epochs: int = 300
    batch_size: int = 128
    micro_batch: int | None = None
    grad_accum_steps: int = 1
    mode: str = "packed"
    distill_weight: float = DISTILL_WEIGHT
    temperature: float = TEMPERATURE
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float | None = None
    ema_decay: float = 0.0
    amp: str = "none"
    grad_checkpointing: bool = False
    seed: int = 0
    augment: Mapping[str, Any] = field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    workers: int = 0
    checkpoint_steps: int = 0
    log_steps: int = 50
    max_unreadable: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", check_grids(self.grids))
        for name, legal in (("mode", MODES), ("amp", AMP)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}: expected one of {', '.join(legal)}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "grad_accum_steps", "log_steps"):
            _check_number(name, getattr(self, name), 1, whole=True)
        for name in ("warmup_epochs", "workers", "checkpoint_steps"):
            _check_number(name, getattr(self, name), 0, whole=True)
        if self.micro_batch is not None:
            _check_number("micro_batch", self.micro_batch, 1, whole=True)
        for name in ("lr", "layer_decay", "clip_grad"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0)
        for name in ("weight_decay", "warmup_lr", "min_lr", "ema_decay", "max_unreadable"):
            _check_number(name, getattr(self, name), 0)
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share: expected a share in [0, 1), got {self.held_out_share!r}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay!r}")
        if self.sched == "plateau":
            raise ValueError("sched: plateau depends on the course of a run; give a planned one such as cosine")
        if self.sched == "none" and self.layer_decay is not None:
            raise ValueError("layer_decay: timm's schedules apply it, and sched is none; give one such as cosine")
        self.augmentation()
        check_distillation(self.distill_weight, self.temperature)

    def learning_rate(self, images_per_update: int) -> float:
        """The given learning rate, or DeiT's for an update of so many images."""
        return BASE_LR * images_per_update / BASE_BATCH if self.lr is None else self.lr

    def augmentation(self) -> Augment:
        """What happens to the images.

        Raises:
            ValueError: for a preset or a field that there is not.
        """
        changes = dict(self.augment)
        preset = changes.pop("preset", "deit")
        if preset not in PRESETS:
            raise ValueError(f"augment: expected preset {', '.join(PRESETS)}, got {preset!r}")
        unknown = sorted(changes.keys() - {f.name for f in fields(Augment)})
        if unknown:
            raise ValueError(f"augment: unknown {', '.join(unknown)}; expected fields of augment.Augment")
        return PRESETS[preset](**changes)

    def input_settings(self, model: ReViT) -> dict[str, Any]:
        """mean, std, crop_pct and interpolation: as given, else the model's, as `AdaptivePreprocessor` takes them."""
        given = {name: getattr(self, name) for name in ("mean", "std", "crop_pct", "interpolation")}
        return input_settings(model) | {name: value for name, value in given.items() if value is not None}

    def save(self, path: Path) -> None:
        """Writes the choices as JSON, all or nothing."""
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """The choices as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The choices that `as_dict` gave.

        Raises:
            ValueError: for a name that is none of them.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"config: unknown {', '.join(unknown)}; expected names of {cls.__name__}'s fields")
        return cls(**values)

    def with_changes(self, **changes: Any) -> TrainConfig:
        """The same with other values."""
        return replace(self, **changes)


def _check_number(name: str, value: Any, least: float, whole: bool = False) -> None:
    right = isinstance(value, int) if whole else isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(value, bool) or not right or value < least:
        raise ValueError(f"{name}: expected {'a whole number' if whole else 'a number'} >= {least}, got {value!r}")


def build_model(config: TrainConfig, n_classes: int) -> tuple[ReViT, bool]:
    """The model of a run, with its first weights, and whether its head is new.

    The head of a checkpoint that has other classes is left out; one of features alone has none.

    Raises:
        ValueError: for an unknown name, an architecture that is not supported, or weights that do not fit.
    """
    model = create_model(config.model, config.grids, num_classes=n_classes, **config.model_kwargs)
    if config.weights is None:
        return model, False
    state_dict = read_checkpoint(Path(config.weights))
    own = {name: value for name, value in model.state_dict().items() if HEAD_PARAMETER.match(name)}
    new_head = any(
        name not in state_dict or state_dict[name].shape[:1] != value.shape[:1] for name, value in own.items()
    )
    if new_head:
        state_dict |= own
    model.load_weights(state_dict, config.weights)
    return model, new_head

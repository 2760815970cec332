"""The configuration of a training run: one record of all choices, which is saved with the results.

The module imports neither torch nor NumPy, because the command line takes its options from these records.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revit_fast.grids import DEFAULT_GRIDS, MATCH_NORMS, check_grids
from revit_fast.io.atomic import write_json
from revit_fast.io.names import shortened
from revit_fast.models.settings import input_settings

if TYPE_CHECKING:
    from revit_fast.models.vit import ReViT

MOST = 2**63 - 1
"""Largest number of a run: what counts and seeds fit into."""

MODES = ("packed", "length-parallel")
AMP = ("none", "bfloat16")

PATHS = ("data", "weights")
"""Choices that are paths."""

BASE_LR, BASE_BATCH = 5e-4, 512
"""DeiT's learning rate, and the batch size that it belongs to (arXiv 2012.12877)."""

DISTILL_WEIGHT, TEMPERATURE = 0.5, 2.0
"""λ and τ of the self-distillation `losses.tlsd_loss`."""

TIMM_CROPS = ("rrc", "rkrc", "rkrr")
"""timm's `train_crop_mode`: random resized crop, or resize-keep-ratio with a centred or a random crop."""

CROPS = (*TIMM_CROPS, "pad", "none")


@dataclass(frozen=True)
class Augment:
    """The augmentation of training images, with timm's names and meanings. The default is DeiT's recipe.

    The order is: crop and flip, RandAugment or colour jitter, and random erasing for each image; then mixup or cutmix
    for the whole batch (timm's mode "batch"). All steps work on the eight-bit pixels of the longest view, so that every
    view shows the same image. Erasing with `re_mode="pixel"` therefore fills with noise that is clipped to the range of
    pixels. Shorter views are resized from the longest one, so their noise is smoother.

    Attributes:
        crop: "rrc", timm's random resized crop; "rkrc" or "rkrr", timm's other modes; "pad", torchvision's
            `RandomCrop(size, padding=pad)` with black borders, of the image as evaluation sees it at the longest view;
            "none", the image as evaluation sees it.
        pad: pixels of padding on every side for "pad".
        scale: range of the share of the image's area that timm's crops take; None: timm's default for the mode.
        ratio: range of the aspect ratio of timm's crops; None: timm's default for the mode.
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy, for instance "rand-m9-mstd0.5-inc1", "augmix-m3-w3" or "original"; or None.
        color_jitter: strength of the colour jitter, which is only used without `auto_augment`, as in timm; or None.
        re_prob: probability of random erasing.
        re_mode: "pixel", "rand" or "const".
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
        mix_prob: probability that a batch is mixed.
        switch_prob: probability of cutmix instead of mixup, if both are active.
        smoothing: label smoothing, in [0, 1).

    Raises:
        ValueError: if a value is not as described above.
    """

    crop: str = "rrc"
    pad: int = 0
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] | None = (3 / 4, 4 / 3)
    hflip: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float | None = 0.3
    re_prob: float = 0.25
    re_mode: str = "pixel"
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop: expected one of {', '.join(map(repr, CROPS))}, got {self.crop!r}")
        if self.re_mode not in ("pixel", "rand", "const"):
            raise ValueError(f"re_mode: expected 'pixel', 'rand' or 'const', got {self.re_mode!r}")
        if isinstance(self.pad, bool) or not isinstance(self.pad, int) or self.pad < 0:
            raise ValueError(f"pad: expected a number of pixels, 0 or more, got {self.pad!r}")
        for name in ("hflip", "re_prob", "mix_prob", "switch_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a probability in [0, 1], got {getattr(self, name)!r}")
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing: expected a share in [0, 1), got {self.smoothing!r}")
        for name in ("mixup", "cutmix", "color_jitter"):
            value = getattr(self, name)
            if not (value is None and name == "color_jitter") and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite number, 0 or more, got {value!r}")
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            if value is not None and not (len(value) == 2 and 0.0 < value[0] <= value[1]):
                raise ValueError(f"{name}: expected (lowest, highest), both positive, or None, got {value!r}")

    @classmethod
    def none(cls, **changes) -> Augment:
        """No augmentation: images as evaluation sees them, and labels without smoothing.

        Args:
            **changes: attributes with other values.
        """
        off = {"crop": "none", "hflip": 0.0, "auto_augment": None, "color_jitter": None, "re_prob": 0.0}
        return replace(cls(), **off | {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0} | changes)

    @classmethod
    def light(cls, pad: int = 2, **changes) -> Augment:
        """A random crop with padding and a flip, for small images such as those of 28 or 32 pixels.

        Args:
            pad: pixels of padding on every side.
            **changes: attributes with other values.
        """
        return cls.none(**{"crop": "pad", "pad": pad, "hflip": 0.5} | changes)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return (self.mixup > 0.0 or self.cutmix > 0.0) and self.mix_prob > 0.0

    @property
    def soft(self) -> bool:
        """Whether targets are distributions over classes."""
        return self.mixes or self.smoothing > 0.0


PRESETS = {"deit": Augment, "light": Augment.light, "none": Augment.none}


@dataclass(frozen=True)
class TrainConfig:
    """The choices of a training run. The defaults of the optimisation are DeiT's (arXiv 2012.12877).

    Attributes:
        data: path of the images to train on, see `datasets.open_images`.
        held_out_share: share of the training images that is kept for evaluation; 0: the data's own evaluation split is
            used.
        model: timm's name of a ViT or DeiT.
        model_kwargs: arguments of `timm.create_model` that change that architecture.
        grids: token grids, strictly decreasing; the model sees every image at all of them.
        weights: `.safetensors` or `.pth` file of initial weights, of a plain ViT or a ReViT; None: random weights. The
            rows of a head whose classes the file names go to the classes of the same names.
        match_norms: "length": the norms of a ReViT's weights go to the same lengths, and those of the nearest to a new
            length; "order": the longest's go to the longest, and so on, for weights of which all lengths are scaled.
        epochs: passes over the images.
        batch_size: images that one process (in length-parallel mode: one group of processes) loads and mixes together.
        micro_batch: images of one pack. A batch passes through the model in several packs whose gradients are added, so
            that the activations of a pack stay in the cache or fit the memory; None: on a CPU the number that
            `trainer.cached_images` gives, on a GPU all images of the batch.
        grad_accum_steps: batches of one update of the weights.
        mode: "packed": all lengths of an image in one pack; "length-parallel": each process has one length.
        distill_weight: weight λ of the self-distillation (TLSD); 0: no distillation.
        temperature: temperature τ of the self-distillation.
        opt: timm's name of the optimizer.
        lr: learning rate; None: DeiT's, scaled in proportion to the images of an update.
        weight_decay: weight decay of matrices; norms, biases, tokens and position embeddings have none.
        layer_decay: factor by which the learning rate falls from a block to the block before it; None: no decay.
        sched: timm's name of the schedule, which is stepped at every update; "plateau" is not supported, because it
            depends on the course of a run.
        warmup_epochs: epochs of linear warm-up.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end of the run.
        clip_grad: largest norm of the gradient; None: the gradient is not clipped.
        ema_decay: decay of the moving average of the weights; 0: no average.
        amp: "none" or "bfloat16": linear layers and attention in 16 bits, residual stream and parameters in float32.
        grad_checkpointing: recompute activations in the backward pass.
        seed: seed of the initial weights, the order of the images, augmentation and dropout.
        augment: "preset" ("deit", "light" or "none"), and fields of `config.Augment` that differ from it.
        mean: mean of each channel for pixels in [0, 1]; None: the value of the model's timm configuration. The same
            holds for `std`, `crop_pct` and `interpolation`.
        std: standard deviation of each channel for pixels in [0, 1].
        crop_pct: share of the image's shorter side that the model sees in evaluation.
        interpolation: "bicubic" or "bilinear".
        workers: processes that decode and augment; 0: the training process does both.
        checkpoint_steps: updates between additional checkpoints; 0: checkpoints only at the end of every epoch.
        log_steps: updates between lines of the log.
        max_unreadable: share of the images that may be unreadable.
    """

    data: str = ""
    held_out_share: float = 0.0
    model: str = "deit_small_patch16_224"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    grids: Sequence[int] = DEFAULT_GRIDS
    weights: str | None = None
    match_norms: str = "length"
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
        for name, legal in (("mode", MODES), ("amp", AMP), ("match_norms", MATCH_NORMS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}: expected one of {', '.join(legal)}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "grad_accum_steps", "log_steps"):
            _check_number(name, getattr(self, name), 1, whole=True)
        for name in ("warmup_epochs", "workers", "checkpoint_steps", "seed"):
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
        """The given learning rate, or DeiT's for an update of `images_per_update` images."""
        return BASE_LR * images_per_update / BASE_BATCH if self.lr is None else self.lr

    def augmentation(self) -> Augment:
        """The augmentation that `augment` describes.

        Raises:
            ValueError: for an unknown preset or field, or a value that `Augment` refuses.
        """
        changes = dict(self.augment)
        preset = changes.pop("preset", "deit")
        if preset not in PRESETS:
            raise ValueError(f"augment: expected preset {', '.join(PRESETS)}, got {preset!r}")
        unknown = sorted(changes.keys() - {f.name for f in fields(Augment)})
        if unknown:
            raise ValueError(f"augment: unknown {', '.join(unknown)}; expected fields of config.Augment")
        return PRESETS[preset](**changes)

    def input_settings(self, model: ReViT) -> dict[str, Any]:
        """mean, std, crop_pct and interpolation for `AdaptivePreprocessor`: the given values, else the model's."""
        given = {name: getattr(self, name) for name in ("mean", "std", "crop_pct", "interpolation")}
        return input_settings(model) | {name: value for name, value in given.items() if value is not None}

    def resolved(self) -> TrainConfig:
        """A copy with absolute paths, so that a run can be resumed from any folder."""
        return replace(self, **absolute_paths({name: getattr(self, name) for name in PATHS}))

    def save(self, path: Path) -> None:
        """Writes the choices as JSON, all or nothing."""
        write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """The choices as JSON values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration from the output of `as_dict`.

        Raises:
            ValueError: for an unknown name, or a value that is not legal.
        """
        values = dict(values)
        if values.get("norms") == "tal":  # versions up to 0.1 write it; there is no other kind any more
            del values["norms"]
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"config: unknown {', '.join(unknown)}; expected names of {cls.__name__}'s fields")
        return cls(**values)

    def with_changes(self, **changes: Any) -> TrainConfig:
        """A copy with other values of some fields."""
        return replace(self, **changes)


def absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a configuration, with paths from the root."""
    return {**values, **{name: str(Path(values[name]).absolute()) for name in PATHS if values.get(name)}}


def _check_number(name: str, value: Any, least: float, whole: bool = False) -> None:
    largest = MOST if isinstance(value, int) else sys.float_info.max
    right = isinstance(value, int if whole else (int, float)) and least <= value <= largest
    if isinstance(value, bool) or not right:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name}: expected {kind} >= {least}, got {shortened(value)}")


def check_distillation(distill_weight: float, temperature: float) -> None:
    """Raises a ValueError if the weight is not in [0, 1] or the temperature is not positive and finite."""
    if not 0 <= distill_weight <= 1:
        raise ValueError(f"distill_weight: expected a number in [0, 1], got {distill_weight!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")

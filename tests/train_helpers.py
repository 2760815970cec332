"""A small training run: images of two colours of noise, a model of two blocks, seconds in all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ArrayImages
from revit_fast.train.run import build_model
from revit_fast.train.trainer import Trainer

GRIDS = (4, 3, 2)
MODEL_KWARGS = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def noise_images(n: int = 48, seed: int = 0) -> ArrayImages:
    """Three classes that differ by brightness."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 60, (n, 8, 8, 3)) + 60 * labels[:, None, None, None]
    return ArrayImages(images.astype(np.uint8), labels, ("dark", "middle", "bright"))


def write_folders(images: ArrayImages, folder: Path) -> None:
    """The images as PNG files, a folder for each class."""
    for i in range(len(images)):
        path = folder / images.classes[images.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.image(i)).save(path)


def tiny_config(**changes) -> TrainConfig:
    """Two epochs of six updates."""
    values = {
        "model": "vit_tiny_patch16_224",
        "model_kwargs": MODEL_KWARGS,
        "grids": GRIDS,
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup_epochs": 1,
        "augment": {"preset": "light", "pad": 1},
        "crop_pct": 1.0,
        "log_steps": 1,
    }
    return TrainConfig(**values | changes)


def tiny_trainer(config: TrainConfig | None = None, *, images=None, held_out=True, **options) -> Trainer:
    """A trainer whose weights follow from the configuration's seed."""
    config = config or tiny_config()
    torch.manual_seed(config.seed)
    images = images or noise_images()
    model, _ = build_model(config, len(images.classes))
    if isinstance(held_out, bool):
        held_out = noise_images(24, seed=1) if held_out else None
    return Trainer(model, images, config, held_out=held_out, **options)

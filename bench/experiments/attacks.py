"""Harder images: corrupted pixels, and bounded perturbations against a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate1d
from torch import Tensor

from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.models.vit import ReViT
from revit_fast.packing import PackedBatch

SEVERITIES = (1, 2, 3)


def _noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Adds Gaussian noise with a standard deviation of 15, 30 and 60 grey levels."""
    return x + (15, 30, 60)[severity - 1] * rng.standard_normal(x.shape)


def _blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Applies a binomial filter of 3 taps along both axes, 1, 3 and 6 times."""
    for _ in range((1, 3, 6)[severity - 1]):
        for axis in (0, 1):
            x = correlate1d(x, (0.25, 0.5, 0.25), axis, mode="nearest")
    return x


def _contrast(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Reduces the contrast around the image's mean to 60, 35 and 15 per cent."""
    return x.mean() + (0.6, 0.35, 0.15)[severity - 1] * (x - x.mean())


def _occlusion(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Puts a grey rectangle of 20, 35 and 50 per cent of each side at a random place."""
    sides = [round((0.2, 0.35, 0.5)[severity - 1] * n) for n in x.shape[:2]]
    top, left = (int(rng.integers(0, n - side + 1)) for n, side in zip(x.shape[:2], sides, strict=True))
    x[top : top + sides[0], left : left + sides[1]] = 127.5
    return x


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "occlusion": _occlusion,
}
"""Corruptions by name; severities count from 1."""


def corrupted(images: Sequence[np.ndarray], name: str, severity: int) -> list[np.ndarray]:
    """The uint8 images `[H, W]` or `[H, W, 3]` corrupted; the same arguments give the same images.

    Raises:
        ValueError: for an unknown corruption or severity.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"name, severity: expected one of {', '.join(CORRUPTIONS)} and 1 to 3, got {name!r}, {severity}"
        )
    rng = np.random.default_rng((severity, list(CORRUPTIONS).index(name)))
    made = [CORRUPTIONS[name](image.astype(np.float64), severity, rng) for image in images]
    return [image.round().clip(0, 255).astype(np.uint8) for image in made]


def pack_at(model: ReViT, images: Sequence[np.ndarray], grid: int) -> PackedBatch:
    """The images as the model sees them at one grid: normalised patch rows."""
    prep = AdaptivePreprocessor.for_model(model, policy=("fixed", grid), dtype=torch.float32)
    return prep.pack(images, [grid] * len(images))


def attacked(
    model: ReViT, batch: PackedBatch, target: Tensor, epsilon: float, steps: int = 1, seed: int = 0
) -> PackedBatch:
    """Perturbs the pixels that the model sees so that its loss grows.

    One step is FGSM (Goodfellow et al., arXiv 1412.6572): it moves pixels by ε along the sign of the gradient. Several
    steps are PGD (Madry et al., arXiv 1706.06083): from a random start, each step moves pixels by 2.5 ε / steps and
    brings them back to within ε. Pixels stay in [0, 1]. The three channels of a pixel change alike: grey stays grey.

    Args:
        model: model in evaluation mode; its timm configuration gives the preprocessing of the batch.
        batch: normalised patch rows of grey images.
        target: int64 `[B]`, right classes.
        epsilon: largest change of a pixel in [0, 1].
        steps: 1 for FGSM, more for PGD.
        seed: seed of PGD's start.
    """
    if epsilon == 0:
        return batch
    mean, std = (torch.tensor(model.pretrained_cfg[name]).repeat(batch.data.shape[1] // 3) for name in ("mean", "std"))
    clean = batch.data * std + mean
    pixels, size = clean, epsilon
    if steps > 1:
        size = 2.5 * epsilon / steps
        generator = torch.Generator().manual_seed(seed)
        start = torch.empty(clean.shape[0], clean.shape[1] // 3, 1).uniform_(-epsilon, epsilon, generator=generator)
        pixels = _within(clean + _like_rows(start), clean, epsilon)
    for _ in range(steps):
        rows = ((pixels - mean) / std).requires_grad_()
        loss = F.cross_entropy(model(batch.with_data(rows)), target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, rows)
        per_pixel = (gradient / std).view(len(rows), -1, 3).sum(dim=2, keepdim=True)
        pixels = _within(pixels + size * _like_rows(per_pixel.sign()), clean, epsilon)
    return batch.with_data((pixels - mean) / std)


def _like_rows(values: Tensor) -> Tensor:
    """Values `[T, P*P, 1]` repeated for every channel, `[T, P*P*3]`."""
    return values.expand(-1, -1, 3).flatten(1)


def _within(pixels: Tensor, clean: Tensor, epsilon: float) -> Tensor:
    return torch.clamp(pixels, clean - epsilon, clean + epsilon).clamp(0.0, 1.0)


@torch.no_grad()
def accuracy_of(model: ReViT, batch: PackedBatch, target: Tensor) -> float:
    """Share of a pack's images that are classified correctly."""
    return (model(batch).argmax(dim=1) == target).double().mean().item()

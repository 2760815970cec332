"""Augmentation: makes the longest views of a batch from decoded images with timm's transforms, and mixes them.

The random numbers of an image depend only on its row of `Draws`, and those of a batch's mixture only on the given
seeds. No result depends on what was augmented before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_fast.adaptive.crops import eval_box
from revit_fast.ops.resize import resized_rows
from revit_fast.train.config import TIMM_CROPS, Augment

if TYPE_CHECKING:  # the import happens where timm's transforms need it
    from PIL import Image


class Draws(NamedTuple):
    """The random numbers of some images.

    Attributes:
        uniforms: float64 `[n, 3]` in [0, 1), for the row and the column of the crop and for the flip.
        seeds: uint32 `[n, 3]`, seeds of the generators of Python, NumPy and torch, which timm's transforms use.
    """

    uniforms: np.ndarray
    seeds: np.ndarray

    @classmethod
    def of_epoch(cls, seed: int, epoch: int, n: int) -> Draws:
        """The numbers of the first n images of a set in an epoch; row i does not depend on n."""
        uniforms = np.random.default_rng((seed, epoch, 1)).random((n, 3))
        seeds = np.random.default_rng((seed, epoch, 2)).integers(0, 2**32, (n, 3), dtype=np.uint32)
        return cls(uniforms, seeds)

    def at(self, index: Sequence[int] | np.ndarray) -> Draws:
        """The numbers of the images at `index`."""
        return Draws(self.uniforms[index], self.seeds[index])


def batch_seeds(seed: int, epoch: int, batch: int) -> np.ndarray:
    """Seeds of the mixture of a batch, uint32 `[3]`."""
    return np.random.default_rng((seed, epoch, 3, batch)).integers(0, 2**32, 3, dtype=np.uint32)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Context in which the global generators of Python, NumPy and torch may be seeded; it restores their states."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_generators(seeds: np.ndarray) -> None:
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed GPUs too


class Augmenter:
    """Makes the longest views of batches.

    Args:
        augment: choice of the augmentation.
        image_px: side of the longest view, in pixels.
        n_classes: number of classes of the set.
        mean: mean of each channel for pixels in [0, 1]; RandAugment fills with it, and erasing draws around it.
        std: standard deviation of each channel for pixels in [0, 1].
        interpolation: "bicubic" or "bilinear".

    Raises:
        ValueError: for a policy that timm does not know.
        ImportError: if timm is needed and not installed.
    """

    def __init__(
        self,
        augment: Augment,
        *,
        image_px: int,
        n_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
    ) -> None:
        self.augment, self.image_px, self.n_classes, self.interpolation = augment, image_px, n_classes, interpolation
        self.mean, self.std = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
        self._transforms = self._erasing = self._mix = None
        own_crop = augment.crop not in TIMM_CROPS
        if not own_crop or augment.auto_augment or augment.color_jitter:
            crop, colour = _timm_transforms(augment, image_px, mean, interpolation)
            self._transforms = colour.transforms if own_crop else crop.transforms + colour.transforms
        if augment.re_prob:
            self._erasing = _timm("random_erasing").RandomErasing(augment.re_prob, mode=augment.re_mode, device="cpu")
        if augment.mixes:
            self._mix = _timm("mixup").FastCollateMixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.switch_prob,
                label_smoothing=augment.smoothing,
                num_classes=n_classes,
            )
        elif augment.soft:
            _timm("mixup")  # a missing timm is reported here, not in a worker

    def views(self, images: Sequence[np.ndarray], draws: Draws) -> Tensor:
        """The longest view of every image, augmented.

        Args:
            images: uint8 arrays `[H, W, 3]` or `[H, W]`.
            draws: their random numbers, a row per image.

        Returns:
            uint8 `[B, image_px, image_px, 3]`.
        """
        if self.augment.crop not in TIMM_CROPS:
            views = self._cropped(images, draws.uniforms)
            images = views.numpy()
        if self._transforms is None and self._erasing is None:
            return views
        with borrowed_generators():
            return torch.from_numpy(
                np.stack([self._one(image, seeds) for image, seeds in zip(images, draws.seeds, strict=True)])
            )

    def mixed(self, views: Tensor, labels: Tensor, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Views and targets of a batch, mixed by timm's `FastCollateMixup` if the recipe mixes.

        In a batch of odd size the last image is repeated, and its copy is mixed with the first.

        Args:
            views: uint8 `[B, image_px, image_px, 3]`.
            labels: int64 `[B]`.
            seeds: see `batch_seeds`.

        Returns:
            uint8 `[B, image_px, image_px, 3]`, and int64 `[B]` or, with mixing or smoothing, float32 `[B, n_classes]`.
        """
        if not self.augment.soft:
            return views, labels
        if self._mix is None:
            return views, _timm("mixup").mixup_target(labels, self.n_classes, smoothing=self.augment.smoothing)
        pairs = list(zip(views.numpy().transpose(0, 3, 1, 2), labels.tolist(), strict=True))
        with borrowed_generators():
            _seed_generators(seeds)
            mixed, target = self._mix(pairs + pairs[-1:] if len(pairs) % 2 else pairs)
        return mixed[: len(pairs)].permute(0, 2, 3, 1), target[: len(pairs)]

    def _cropped(self, images: Sequence[np.ndarray], uniforms: np.ndarray) -> Tensor:
        """Views as evaluation sees them, then padded, cropped and flipped."""
        px, pad = self.image_px, self.augment.pad if self.augment.crop == "pad" else 0
        boxes = [eval_box(*image.shape[:2], px, 1.0) for image in images]
        options = {"boxes": boxes, "interpolation": self.interpolation, "dtype": torch.uint8}
        # One patch as large as the view: its row is the view.
        views = resized_rows(images, px, px, **options)[0].view(len(images), px, px, 3)
        flip = uniforms[:, 2] < self.augment.hflip
        if pad == 0 and not flip.any():
            return views
        padded = torch.nn.functional.pad(views, (0, 0, pad, pad, pad, pad)).numpy()
        corner = (uniforms[:, :2] * (2 * pad + 1)).astype(np.int64)
        along = np.arange(px)
        rows = corner[:, :1] + along
        columns = corner[:, 1:] + np.where(flip[:, None], along[::-1], along)
        return torch.from_numpy(padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]])

    def _one(self, image: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Applies timm's transforms to one image."""
        _seed_generators(seeds)
        if self._transforms is not None:
            from PIL import Image

            picture = Image.fromarray(image).convert("RGB")
            for transform in self._transforms:
                picture = transform(picture)
            image = np.asarray(picture)
        return image if self._erasing is None else self._erased(image)

    def _erased(self, image: np.ndarray) -> np.ndarray:
        """Applies timm's erasing. It draws normalised values, which become pixels here."""
        canvas = torch.full((3, *image.shape[:2]), torch.nan, dtype=torch.float32, device="cpu")
        values = self._erasing(canvas).permute(1, 2, 0).numpy()
        erased = ~np.isnan(values)
        if not erased.any():
            return image
        pixels = np.rint(255.0 * (values * self.std + self.mean)[erased])
        image = image.copy()
        image[erased] = pixels.clip(0, 255).astype(np.uint8)
        return image


def _timm(module: str):
    """Imports a module of `timm.data`."""
    from importlib import import_module

    try:
        return import_module(f"timm.data.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "timm").partition(".")[0]
        raise ImportError(f'augment: it needs {missing}: pip install "revit-fast[train]"') from error


def _timm_transforms(augment: Augment, image_px: int, mean: Sequence[float], interpolation: str) -> tuple:
    """timm's transforms of geometry and of colour."""
    factory = _timm("transforms_factory")
    try:
        crop, colour, _ = factory.transforms_imagenet_train(
            image_px,
            scale=augment.scale,
            ratio=augment.ratio,
            train_crop_mode=augment.crop if augment.crop in TIMM_CROPS else None,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,
            auto_augment=augment.auto_augment,
            interpolation=interpolation,
            mean=tuple(mean),
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"auto_augment: timm does not know {augment.auto_augment!r} ({type(error).__name__}: {error}); "
            "give for instance 'rand-m9-mstd0.5-inc1', or None"
        ) from error
    posterize = _timm("auto_augment").posterize
    for transform in colour.transforms:
        for op in (*getattr(transform, "ops", ()), *chain(*getattr(transform, "policy", ()))):
            if op.aug_fn is posterize:
                op.aug_fn = partial(_posterized, posterize)
    return crop, colour


def _posterized(posterize: Callable, image: Image.Image, bits: int, **options) -> Image.Image:
    """timm's posterize. At full strength it keeps no bits, which gave black until Pillow 12 and is an error since."""
    return image.point(lambda _: 0) if bits < 1 else posterize(image, bits, **options)

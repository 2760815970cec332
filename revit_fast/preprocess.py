"""From images to the patch rows of one pack, each image at the grid that a policy gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_fast import ops
from revit_fast.costs import forward_macs
from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.images import ImageError, ImageSource, name_of, read_rgb
from revit_fast.model import ReViT
from revit_fast.packing import PackedBatch
from revit_fast.policies import Evidence, Policy, PolicySpec, grey_entropy, make_policy
from revit_fast.settings import DEIT_CROP_PCT, IMAGENET_MEAN, IMAGENET_STD, input_settings
from revit_fast.tla import TokenLengthAssigner

ENTROPY_PX = 64
"""Side of the thumbnail whose entropy is taken where there is no assigner to take it from."""


@lru_cache(maxsize=1024)  # images of one size are many
def eval_box(height: int, width: int, image_px: int, crop_pct: float) -> tuple[float, float, float, float]:
    """The region, (left, upper, right, lower) in source pixels, that timm's evaluation transform shows the model.

    timm scales the shorter side to `floor(image_px / crop_pct)`, the longer in proportion, rounded down, and cuts a
    centred square of `image_px`, its corner rounded to a pixel. Resizing this region is the same as that, without
    computing what is cut away: the filter takes the same source pixels with the same weights, up to the rounding of the
    region's edges to float32 and, where their order differs, of the image between the two passes.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        image_px: side of the square that the model sees.
        crop_pct: share of the scaled shorter side that is kept, in (0, 1].
    """
    scaled = math.floor(image_px / crop_pct)
    shorter, longer = min(height, width), max(height, width)
    longer_scaled = int(scaled * longer / shorter)
    out_height, out_width = (scaled, longer_scaled) if height <= width else (longer_scaled, scaled)
    top, left = (round((side - image_px) / 2.0) for side in (out_height, out_width))
    # Multiplied first: an edge of the image is hit exactly.
    right, bottom = (left + image_px) * width / out_width, (top + image_px) * height / out_height
    return left * width / out_width, top * height / out_height, min(right, width), min(bottom, height)


MAX_ENLARGEMENT = 100.0
RATIO_STEP = 1e-5
"""How closely the ratio is searched, and the smallest one."""


@lru_cache(maxsize=1024)
def aspect_grid(
    height: int, width: int, max_tokens: int, patch_size: int = 16, max_ratio: float | None = None
) -> tuple[int, int]:
    """The grid (rows, columns) of an image that keeps its aspect ratio under a budget of tokens.

    The image is scaled by the largest ratio whose patches, cut-off ones at the right and lower edge counted as whole,
    are at most `max_tokens`. Resizing the image to the whole patches stretches it by less than one patch a side. The
    choice is exactly that of timm's NaFlex data pipeline (`get_image_size_for_seq`) and of SigLIP 2, its bisection with
    its steps included.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        max_tokens: patches at most.
        patch_size: P in pixels.
        max_ratio: scale by no more than this; 1 never enlarges. By default 100.

    Raises:
        ValueError: for an argument below 1 (`max_ratio`: not above 0), or an image whose shorter side would have to
            shrink below a hundred-thousandth.
    """
    given = {"height": height, "width": width, "max_tokens": max_tokens, "patch_size": patch_size}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value!r}")
    if max_ratio is not None and not max_ratio > 0:
        raise ValueError(f"max_ratio: expected a positive number or None, got {max_ratio!r}")

    def grid_at(ratio: float) -> tuple[int, int]:
        return max(math.ceil(height * ratio / patch_size), 1), max(math.ceil(width * ratio / patch_size), 1)

    low, high = RATIO_STEP / 10, MAX_ENLARGEMENT
    while high - low >= RATIO_STEP:
        middle = (low + high) / 2
        rows, columns = grid_at(middle)
        low, high = (middle, high) if rows * columns <= max_tokens else (low, middle)
    ratio = low if max_ratio is None else min(low, max_ratio)
    if ratio <= RATIO_STEP:
        raise ValueError(
            f"height, width: {height}x{width} pixels cannot be scaled to {max_tokens} patches of {patch_size}; "
            "resize the image first"
        )
    return grid_at(ratio)


class Assignment(NamedTuple):
    """The grids of a batch and why.

    Attributes:
        grids: patches a side of every image.
        probabilities: float `[B, n_lengths]` of the assigner, the longest length first; None where it was not asked.
        entropy: float `[B]` in bits, see `policies.grey_entropy`; None where it was not asked for.
    """

    grids: list[int]
    probabilities: np.ndarray | None
    entropy: np.ndarray | None = None


class Prepared(NamedTuple):
    """A batch for the model, and the grid of every image in it."""

    batch: PackedBatch
    grids: list[int]


ASPECTS = ("crop", "keep")


class AdaptivePreprocessor:
    """Images to one `PackedBatch`, each resized straight into its place at the grid that it is assigned.

    Defaults are those of DeiT's evaluation transform; crops are timm's, see `eval_box`. With `aspect="keep"` the model
    sees whole images in their own proportions instead: an image that is assigned a grid of `g` patches a side takes at
    most `g * g` tokens, in the grid that `aspect_grid` gives it.

    Args:
        tla: the assigner, in evaluation mode; None for policies that do without.
        grids: the model's configured grids; by default those of the assigner.
        patch_size: P of the model, in pixels.
        mean: of each channel, of pixels in [0, 1].
        std: of each channel, likewise.
        crop_pct: share of the scaled shorter side that the model sees; not used where aspect is "keep".
        aspect: "crop" (a centred square) or "keep".
        interpolation: "bicubic" or "bilinear".
        policy: how grids are chosen, see `revit_fast.policies.make_policy`.
        dtype: of the rows; uint8 leaves their normalisation to the model, which may be on a GPU.
        macs: multiply-adds of the model at each grid, for budgets of mean_gmacs.
        draft: decode JPEGs at a fraction of their size where the largest grid allows it: faster on large photographs,
            approximate (see `images.read_rgb`).
        exact: see `ops.resize_patchify`.

    Raises:
        TypeError, ValueError: for arguments that are not as above; for an assigner of other grids than the model's.
    """

    def __init__(
        self,
        tla: TokenLengthAssigner | None = None,
        *,
        grids: Sequence[int] | None = None,
        patch_size: int = 16,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        crop_pct: float = DEIT_CROP_PCT,
        aspect: str = "crop",
        interpolation: str = "bicubic",
        policy: PolicySpec = "argmax",
        dtype: torch.dtype = torch.float32,
        macs: Sequence[float] | None = None,
        draft: bool = False,
        exact: bool = True,
    ) -> None:
        if tla is not None and not isinstance(tla, TokenLengthAssigner):
            raise TypeError(f"tla: expected a TokenLengthAssigner or None, got {type(tla).__name__}")
        self.grids = check_grids(grids if grids is not None else tla.grids if tla is not None else DEFAULT_GRIDS)
        if tla is not None and tla.grids != self.grids:
            raise ValueError(
                f"tla: it assigns grids {tla.grids}, the model has {self.grids}; give the assigner that was trained "
                "for this model"
            )
        if not 0.0 < crop_pct <= 1.0:
            raise ValueError(f"crop_pct: expected a share in (0, 1], got {crop_pct!r}")
        if aspect not in ASPECTS:
            raise ValueError(f'aspect: expected "crop" or "keep", got {aspect!r}')
        self.aspect = aspect
        self.tla, self.patch_size, self.crop_pct, self.macs, self.draft = tla, patch_size, crop_pct, macs, draft
        self.options = {"mean": mean, "std": std, "interpolation": interpolation, "dtype": dtype, "exact": exact}
        self.policy = self._policy(policy)

    @classmethod
    def for_model(cls, model: ReViT, tla: TokenLengthAssigner | None = None, **options) -> AdaptivePreprocessor:
        """A preprocessor with the grids, patch size and timm settings (mean, std, crop, interpolation) of a model.

        Args:
            model: the model that batches are for.
            tla: the assigner.
            **options: arguments of the constructor that take the place of the model's.
        """
        own = input_settings(model) | {
            "grids": model.grids,
            "patch_size": model.patch_size,
            "dtype": torch.float32 if model.pos_embed.device.type == "cpu" else torch.uint8,
            "macs": [forward_macs(model, n) for n in model.lengths],
        }
        return cls(tla, **own | options)

    def _policy(self, spec: PolicySpec | Policy) -> Policy:
        calibration = self.tla.calibration if self.tla is not None else None
        policy = make_policy(spec, self.grids, calibration=calibration, macs=self.macs)
        if policy.needs == "probabilities" and self.tla is None:
            raise ValueError(f"policy: {policy.spec!r} needs an assigner; give tla, or a policy that does without")
        return policy

    def with_policy(self, policy: PolicySpec) -> AdaptivePreprocessor:
        """The same with another policy."""
        other = copy(self)
        other.policy = self._policy(policy)
        return other

    @property
    def draft_px(self) -> int | None:
        """Pixels of the shorter side that the largest grid needs, where JPEGs may be decoded smaller."""
        if not self.draft:
            return None
        share = self.crop_pct if self.aspect == "crop" else 1.0
        return math.floor(self.grids[0] * self.patch_size / share)

    def decode(self, source: ImageSource) -> np.ndarray:
        """The pixels of a source; raises `images.ImageError`."""
        return read_rgb(source, draft_px=self.draft_px)

    def assign(self, images: Sequence[np.ndarray], index: Sequence[int] | None = None) -> Assignment:
        """The grids of decoded images; for a cascade those that it begins with.

        Args:
            images: uint8 arrays `[H, W, 3]` or `[H, W]`.
            index: place of each in its stream; by default 0, 1, ...
        """
        index = np.arange(len(images)) if index is None else np.asarray(index)
        probabilities, entropy = self._evidence(images)
        chosen = self.policy.choose(Evidence(index, probabilities, entropy))
        return Assignment([self.grids[i] for i in chosen], probabilities, entropy)

    def _evidence(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Probabilities and entropy of every image, what the policy does not need being None."""
        if self.policy.needs is None:
            return None, None
        boxes = self.seen(images)
        if self.policy.needs == "probabilities":
            return self.tla.predict_proba(images, boxes).numpy(), None
        return None, self._entropy(images, boxes)

    def seen(self, images: Sequence[np.ndarray]) -> list[tuple[float, float, float, float]]:
        """What the assigner looks at: the region, in pixels, that the model sees of each image at the longest grid."""
        return [self._box(image, self.grids[0]) for image in images]

    def grid_hw(self, image: np.ndarray | Tensor, grid: int) -> tuple[int, int]:
        """Rows and columns of patches of a decoded image that was assigned `grid` patches a side."""
        if self.aspect == "crop":
            return grid, grid
        return aspect_grid(*image.shape[:2], grid * grid, self.patch_size)

    def _box(self, image: np.ndarray | Tensor, grid: int) -> tuple[float, float, float, float]:
        height, width = image.shape[:2]
        if self.aspect == "keep":
            return 0.0, 0.0, float(width), float(height)
        return eval_box(height, width, grid * self.patch_size, self.crop_pct)

    def _entropy(self, images: Sequence[np.ndarray], boxes: list) -> np.ndarray:
        if self.tla is not None:
            return self.tla.entropies(images, boxes)
        options = {"boxes": boxes, "interpolation": "bilinear", "dtype": torch.uint8}
        rows = ops.resize_patchify(images, ENTROPY_PX, ENTROPY_PX, **options).data
        return grey_entropy(rows.view(len(images), -1, 3).numpy())

    def calibrate(self, images: Sequence[ImageSource], labels: Sequence[int] | Tensor | None = None) -> None:
        """Calibrates the assigner on held-out images as the model will see them, and takes up what budgets need.

        Args:
            images: sources that the assigner was not trained on.
            labels: see `TokenLengthAssigner.calibrate`.

        Raises:
            ValueError: where there is no assigner.
            ImageError: for an image that cannot be read.
        """
        if self.tla is None:
            raise ValueError("tla: there is no assigner to calibrate")
        decoded = self._decoded(images)
        self.tla.calibrate(decoded, labels, boxes=self.seen(decoded))
        self.policy = self._policy(self.policy)

    def pack(self, images: Sequence[np.ndarray | Tensor], grids: Sequence[int]) -> PackedBatch:
        """Decoded images, each at its grid, as one pack of patch rows."""
        grids_hw = [self.grid_hw(image, grid) for image, grid in zip(images, grids, strict=True)]
        sizes = [(rows * self.patch_size, columns * self.patch_size) for rows, columns in grids_hw]
        boxes = [self._box(image, grid) for image, grid in zip(images, grids, strict=True)]
        lengths = [grid * grid for grid in self.grids]
        return ops.resize_patchify(images, sizes, self.patch_size, boxes=boxes, lengths=lengths, **self.options)

    def __call__(self, images: Sequence[ImageSource]) -> Prepared:
        """Decodes, assigns and packs a batch; unpacks as `batch, grids`.

        Args:
            images: paths, bytes of encoded files, PIL images, or uint8 arrays `[H, W, 3]` or `[H, W]`.

        Raises:
            ImageError: for an image that cannot be read, which it names; `AdaptivePipeline` goes on with the others.
            ValueError: for a cascade, which goes by what a model says.
        """
        self.policy.decides_before("a preprocessor")
        decoded = self._decoded(images)
        grids = self.assign(decoded).grids
        return Prepared(self.pack(decoded, grids), grids)

    def _decoded(self, images: Sequence[ImageSource]) -> list[np.ndarray]:
        if isinstance(images, (str, bytes, np.ndarray, Tensor)):
            raise TypeError(f"images: expected a list of images, got one {type(images).__name__}; wrap it: [image]")
        decoded = []
        for i, source in enumerate(images):
            try:
                decoded.append(self.decode(source))
            except ImageError as error:
                raise ImageError(f"images[{i}], {name_of(source)}: {error}") from error
        return decoded

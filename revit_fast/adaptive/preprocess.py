"""From images to the patch rows of one pack, each image at the grid that a policy gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_fast import ops
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.crops import aspect_grid, eval_box
from revit_fast.adaptive.policies import Evidence, Policy, PolicySpec, grey_entropy, make_policy
from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.io.images import ImageError, ImageSource, name_of, read_rgb
from revit_fast.models.folder import check_assigner
from revit_fast.models.macs import forward_macs
from revit_fast.models.settings import DEIT_CROP_PCT, IMAGENET_MEAN, IMAGENET_STD, input_settings
from revit_fast.models.vit import ReViT
from revit_fast.packing import PackedBatch

ENTROPY_PX = 64
"""Side of the thumbnail whose entropy is taken where there is no assigner to take it from."""


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
        policy: how grids are chosen, see `revit_fast.adaptive.policies.make_policy`.
        dtype: of the rows; uint8 leaves their normalisation to the model, which may be on a GPU.
        macs: multiply-adds of the model at each grid, for budgets of mean_gmacs.
        draft: decode JPEGs at a fraction of their size where the largest grid allows it: faster on large photographs,
            approximate (see `images.read_rgb`).

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
    ) -> None:
        given = grids if grids is not None else getattr(tla, "grids", DEFAULT_GRIDS)
        self.grids = check_grids(given)
        if tla is not None:
            check_assigner(tla, self.grids)
        if not 0.0 < crop_pct <= 1.0:
            raise ValueError(f"crop_pct: expected a share in (0, 1], got {crop_pct!r}")
        if aspect not in ASPECTS:
            raise ValueError(f'aspect: expected "crop" or "keep", got {aspect!r}')
        self.aspect = aspect
        self.tla, self.patch_size, self.crop_pct, self.macs, self.draft = tla, patch_size, crop_pct, macs, draft
        self.options = {"mean": mean, "std": std, "interpolation": interpolation, "dtype": dtype}
        self.policy = self._policy(policy)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Older pickles hold the option `exact`, which `resize_patchify` no longer takes.
        options = {name: value for name, value in state["options"].items() if name != "exact"}
        self.__dict__.update(state | {"options": options})

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

"""Preprocessing: images become the patch rows of one pack, each at the grid that a policy chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.crops import aspect_grid, eval_box
from revit_fast.adaptive.policies import Evidence, Policy, PolicySpec, grey_entropy, make_policy
from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.io.formats import check_formats
from revit_fast.io.held import own_pixels
from revit_fast.io.images import ImageError, ImageSource, check_sources, name_of, read_rgb
from revit_fast.models.folder import check_assigner
from revit_fast.models.macs import forward_macs
from revit_fast.models.settings import DEIT_CROP_PCT, IMAGENET_MEAN, IMAGENET_STD, input_settings
from revit_fast.models.vit import ReViT
from revit_fast.ops.resize import resize_patchify, resized_rows
from revit_fast.packing import PackedBatch

ENTROPY_PX = 64
"""Side, in pixels, of the thumbnail whose entropy is computed if there is no assigner."""


class Assignment(NamedTuple):
    """The grids of a batch and the evidence for them.

    Attributes:
        grids: patches per side, one number for each image.
        probabilities: the assigner's, float `[B, n_lengths]`, longest length first; None if the policy needs none.
        entropy: float `[B]` in bits, see `policies.grey_entropy`; None if the policy does not need it.
    """

    grids: list[int]
    probabilities: np.ndarray | None
    entropy: np.ndarray | None = None


class Prepared(NamedTuple):
    """A batch for the model, and the grid of each image in it."""

    batch: PackedBatch
    grids: list[int]


ASPECTS = ("crop", "keep")

MODEL_ATTRIBUTES = (
    "grids",
    "in_chans",
    "input_device",
    "num_classes",
    "num_prefix_tokens",
    "patch_size",
    "training",
)
"""What a pipeline reads of its model, with the meaning that it has in a `ReViT`."""


class AdaptivePreprocessor:
    """Turns images into one `PackedBatch`; resizes each image at its assigned grid directly into its place.

    Defaults are those of DeiT's evaluation transform; crops are timm's, see `eval_box`. With `aspect="keep"` the model
    sees whole images in their own proportions instead: an image that is assigned a grid of `g` patches per side takes
    at most `g * g` tokens, in the grid that `aspect_grid` returns.

    Args:
        tla: the assigner, in evaluation mode; None for policies that do not use one.
        grids: the model's configured grids; by default those of the assigner.
        patch_size: P of the model, in pixels.
        mean: channel means of pixels in [0, 1].
        std: channel standard deviations of pixels in [0, 1].
        crop_pct: share of the scaled shorter side that the model sees; not used if aspect is "keep".
        aspect: "crop" (a centred square) or "keep".
        interpolation: "bicubic" or "bilinear".
        policy: how grids are chosen, see `revit_fast.adaptive.policies.make_policy`.
        dtype: type of the rows; with uint8 the model normalises them, on a GPU if it is there.
        macs: multiply-adds of the model at each grid, for budgets of mean_gmacs.
        draft: decode JPEGs at a fraction of their size if the largest grid allows it: faster for large photographs, but
            approximate (see `images.read_rgb`).
        formats: Pillow's names of the image formats that may be read, such as ("JPEG", "PNG"); by default all but those
            that start other programs (EPS, WMF).

    Raises:
        TypeError, ValueError: if an argument is not as above, or the assigner's grids are not the model's.
    """

    MODEL = "ReViT"
    """Name of the model that takes the packs, for error messages."""

    formats: tuple[str, ...] | None = None  # older pickles hold none

    CLIPS = False
    """Whether the packs hold clips. A model that takes clips has the attribute `num_frames`, and no other has it."""

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
        formats: Sequence[str] | None = None,
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
        self.formats = check_formats(formats)
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
            model: the model that receives the batches.
            tla: the assigner.
            **options: arguments of the constructor; they replace the model's settings.
        """
        own = input_settings(model) | {
            "grids": model.grids,
            "patch_size": model.patch_size,
            "dtype": torch.float32 if model.pos_embed.device.type == "cpu" else torch.uint8,
            "macs": [forward_macs(model, n) for n in model.lengths],
        }
        return cls(tla, **own | options)

    def check_model(self, model: nn.Module) -> None:
        """Checks that a pipeline can run a model on what this preprocessor packs.

        The model need not be a `ReViT`. It must have the attributes `preprocess.MODEL_ATTRIBUTES`, and give logits
        `[B, num_classes]` for a pack on its `input_device`.

        Args:
            model: the model of the pipeline.

        Raises:
            TypeError: if the model lacks an attribute, or takes clips instead of images or images instead of clips.
            ValueError: if it is in training mode or does not take RGB, or if its grids or its patch size differ from
                the preprocessor's.
        """
        missing = [name for name in MODEL_ATTRIBUTES if not hasattr(model, name)]
        if missing or hasattr(model, "num_frames") != self.CLIPS:
            without = f", which has no {', '.join(missing)}" if missing else ""
            raise TypeError(f"model: expected a {self.MODEL}, got {type(model).__name__}{without}")
        if model.training:
            raise ValueError("model: expected evaluation mode; call model.eval()")
        if model.in_chans != 3:
            raise ValueError(
                f"model: images are read as RGB, but it takes {model.in_chans} channels; make it with in_chans=3 (timm "
                "adapts weights to that)"
            )
        for name in ("grids", "patch_size"):
            if getattr(self, name) != getattr(model, name):
                raise ValueError(
                    f"prep: its {name} {getattr(self, name)} differ from the model's {getattr(model, name)}; make it "
                    f"with {type(self).__name__}.for_model(model, ...)"
                )

    def _policy(self, spec: PolicySpec | Policy) -> Policy:
        calibration = self.tla.calibration if self.tla is not None else None
        policy = make_policy(spec, self.grids, calibration=calibration, macs=self.macs)
        if policy.needs == "probabilities" and self.tla is None:
            raise ValueError(f"policy: {policy.spec!r} needs an assigner; give tla, or a policy that does without")
        return policy

    def with_policy(self, policy: PolicySpec) -> AdaptivePreprocessor:
        """A copy of this preprocessor with another policy."""
        other = copy(self)
        other.policy = self._policy(policy)
        return other

    @property
    def draft_px(self) -> int | None:
        """Pixels of the shorter side that the largest grid needs; None if JPEGs must be decoded in full size."""
        if not self.draft:
            return None
        share = self.crop_pct if self.aspect == "crop" else 1.0
        return math.floor(self.grids[0] * self.patch_size / share)

    def decode(self, source: ImageSource) -> np.ndarray:
        """The pixels of a source; raises `images.ImageError` if it cannot be read."""
        return read_rgb(source, draft_px=self.draft_px, formats=self.formats)

    def assign(self, images: Sequence[np.ndarray], index: Sequence[int] | None = None) -> Assignment:
        """The grids of decoded images; for a cascade the grids that it starts with.

        Args:
            images: uint8 arrays `[H, W, 3]` or `[H, W]`.
            index: place of each image in its stream; by default 0, 1, ...
        """
        index = np.arange(len(images)) if index is None else np.asarray(index)
        probabilities, entropy = self._evidence(images)
        chosen = self.policy.choose(Evidence(index, probabilities, entropy))
        return Assignment([self.grids[i] for i in chosen], probabilities, entropy)

    def _evidence(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Probabilities and entropy of each image; a value that the policy does not need is None."""
        if self.policy.needs is None:
            return None, None
        boxes = self.seen(images)
        if self.policy.needs == "probabilities":
            return self.tla.predict_proba(images, boxes).numpy(), None
        return None, self._entropy(images, boxes)

    def seen(self, images: Sequence[np.ndarray]) -> list[tuple[float, float, float, float]]:
        """The region of each image, in pixels, that the assigner sees: what the model sees at the longest grid."""
        return [self._box(image, self.grids[0]) for image in images]

    def grid_hw(self, image: np.ndarray | Tensor, grid: int) -> tuple[int, int]:
        """Rows and columns of patches of a decoded image that was assigned `grid` patches per side."""
        if self.aspect == "crop":
            return grid, grid
        return aspect_grid(*image.shape[:2], grid * grid, self.patch_size)

    def n_patches(self, grid_hw: tuple[int, int]) -> int:
        """Number of patches of an image of this grid (rows, columns)."""
        rows, columns = grid_hw
        return rows * columns

    def _box(self, image: np.ndarray | Tensor, grid: int) -> tuple[float, float, float, float]:
        height, width = image.shape[:2]
        if self.aspect == "keep":
            return 0.0, 0.0, float(width), float(height)
        return eval_box(height, width, grid * self.patch_size, self.crop_pct)

    def _entropy(self, images: Sequence[np.ndarray], boxes: list) -> np.ndarray:
        if self.tla is not None:
            return self.tla.entropies(images, boxes)
        options = {"boxes": boxes, "interpolation": "bilinear", "dtype": torch.uint8}
        rows, _ = resized_rows(images, ENTROPY_PX, ENTROPY_PX, **options)
        return grey_entropy(rows.view(len(images), -1, 3).numpy())

    def calibrate(self, images: Sequence[ImageSource], labels: Sequence[int] | Tensor | None = None) -> None:
        """Calibrates the assigner on held-out images as the model will see them, and updates the policy.

        Args:
            images: sources of images that the assigner was not trained on.
            labels: see `TokenLengthAssigner.calibrate`.

        Raises:
            ValueError: if there is no assigner.
            ImageError: if an image cannot be read.
        """
        if self.tla is None:
            raise ValueError("tla: there is no assigner to calibrate")
        decoded = self._decoded(images)
        self.tla.calibrate(decoded, labels, boxes=self.seen(decoded))
        self.policy = self._policy(self.policy)

    def pack(self, images: Sequence[np.ndarray | Tensor], grids: Sequence[int | tuple[int, int]]) -> PackedBatch:
        """One pack of patch rows of decoded images, each resized to its grid.

        Args:
            images: uint8 arrays `[H, W, 3]` or `[H, W]`.
            grids: for each image patches per side, or the tuple (rows, columns) that `grid_hw` gave for them.

        Raises:
            ValueError: if the numbers of images and grids differ, or a grid is not a square although aspect is "crop".
        """
        return resize_patchify(images, patch_size=self.patch_size, **self._targets(images, grids), **self.options)

    def _targets(self, images: Sequence[np.ndarray | Tensor], grids: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """The arguments of `resize_patchify` that follow from the grids of some images."""
        sizes, boxes = [], []
        for image, grid in zip(images, grids, strict=True):
            rows, columns = grid if isinstance(grid, tuple) else self.grid_hw(image, grid)
            if self.aspect == "crop" and rows != columns:
                raise ValueError(f'grids: images are cropped to squares (aspect="crop"), got a grid {rows}x{columns}')
            sizes.append((rows * self.patch_size, columns * self.patch_size))
            boxes.append(self._box(image, rows))
        return {"sizes": sizes, "boxes": boxes, "lengths": [grid * grid for grid in self.grids]}

    def __call__(self, images: Sequence[ImageSource]) -> Prepared:
        """Decodes, assigns and packs a batch; the result unpacks as `batch, grids`.

        Args:
            images: paths, bytes of encoded files, PIL images, or uint8 arrays `[H, W, 3]` or `[H, W]`.

        Raises:
            ImageError: if an image cannot be read; the message names it. `AdaptivePipeline` continues with the others.
            ValueError: if the policy is a cascade, which needs the model's logits.
        """
        self.policy.decides_before("a preprocessor runs no model")
        decoded = self._decoded(images)
        grids = self.assign(decoded).grids
        return Prepared(self.pack(decoded, grids), grids)

    def _decoded(self, images: Sequence[ImageSource]) -> list[np.ndarray]:
        check_sources(images, "images")
        decoded, listed = [], isinstance(images, (list, tuple))
        for i, source in enumerate(images):
            try:
                pixels = self.decode(source)
                decoded.append(pixels if listed else own_pixels(pixels, source))
            except ImageError as error:
                raise ImageError(f"images[{i}], {name_of(source)}: {error}") from error
        return decoded

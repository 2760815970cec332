"""From a stream of clips to logits; a policy chooses the grid of each clip. The image pipeline over `PackedClips`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
import torch
from torch import Tensor

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.policies import PolicySpec
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.models.settings import input_settings
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.video.clips import PackedClips
from revit_fast.video.engine import optimize as optimized_copy
from revit_fast.video.model import TimeSformer
from revit_fast.video.reader import CLIPS, ClipSource, read_clip


def clip_macs(model: TimeSformer, n_patches: int, n_frames: int) -> int:
    """Multiply-adds of a forward pass over one clip: linear layers and the products of attention.

    Every block counts in full, although the last one computes only what the class token needs.

    Args:
        model: the model.
        n_patches: patches of a frame.
        n_frames: frames of the clip.
    """
    n_rows, c = n_patches * n_frames, model.embed_dim
    linear = sum(p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2 and "norm" not in name)
    sequence = n_rows + 1 if model.joint else n_patches + 1
    spatial = 2 * sequence**2 * c * (1 if model.joint else n_frames)
    temporal = 0 if model.joint else 2 * n_patches * n_frames**2 * c
    embed = n_rows * model.patch_embed.proj.weight.numel()
    return embed + (n_rows + 1) * linear + len(model.blocks) * (spatial + temporal) + c * model.num_classes


class ClipPreprocessor(AdaptivePreprocessor):
    """Packs clips into one `PackedClips`; each frame is resized straight into its rows, at the grid of its clip.

    A clip has one grid. The assigner works on images, so it is asked about every frame that the model will see. The
    mean of its probabilities decides, or for the policy "entropy" the mean of the frames' entropies. This rule is ours,
    not a paper's.

    Args:
        tla: see `AdaptivePreprocessor`.
        n_frames: frames of every clip, spread evenly over it.
        **options: further arguments of `AdaptivePreprocessor`.

    Raises:
        TypeError, ValueError: as in `AdaptivePreprocessor`, and if `n_frames` is below 1.
    """

    MODEL = "TimeSformer"
    CLIPS = True

    def __init__(self, tla: TokenLengthAssigner | None = None, *, n_frames: int = 8, **options) -> None:
        super().__init__(tla, **options)
        if not isinstance(n_frames, int) or n_frames < 1:
            raise ValueError(f"n_frames: expected an int of at least 1, got {n_frames!r}")
        if self.draft:
            raise ValueError("draft: JPEGs are decoded at a fraction of their size, clips are not; leave it out")
        if self.formats is not None:
            raise ValueError("formats: they are image formats, clips have none of them; leave it out")
        if self.aspect != "crop":
            raise ValueError(f"aspect: clips are cropped to squares, got {self.aspect!r}; leave it out")
        self.n_frames = n_frames

    @classmethod
    def for_model(cls, model: TimeSformer, tla: TokenLengthAssigner | None = None, **options) -> ClipPreprocessor:
        """A preprocessor with a model's grids, frame count, patch size and settings (mean, std, crop, interpolation).

        Args:
            model: the model that will run on the clips.
            tla: the assigner.
            **options: arguments of the constructor that replace the model's values.
        """
        n_frames = options.get("n_frames", model.num_frames)
        own = input_settings(model) | {
            "grids": model.grids,
            "patch_size": model.patch_size,
            "n_frames": n_frames,
            "dtype": torch.float32 if model.pos_embed.device.type == "cpu" else torch.uint8,
            "macs": [clip_macs(model, n, n_frames) for n in model.lengths],
        }
        return cls(tla, **own | options)

    def decode(self, source: ClipSource) -> np.ndarray:
        """The frames `[F, H, W, 3]` of a source; raises `reader.ClipError`."""
        return read_clip(source, self.n_frames)

    def calibrate(self, images: Sequence, labels: Sequence[int] | Tensor | None = None) -> None:
        """Always raises a ValueError: an assigner is calibrated on images."""
        raise ValueError("images: an assigner is calibrated on images; use AdaptivePreprocessor.calibrate on frames")

    def _evidence(self, clips: Sequence[np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The evidence for every clip: the mean over its frames."""
        ends = np.cumsum([len(clip) for clip in clips])[:-1]
        found = super()._evidence([frame for clip in clips for frame in clip])
        return tuple(
            None if values is None else np.stack([part.mean(axis=0) for part in np.split(values, ends)])
            for values in found
        )

    def n_patches(self, grid_hw: tuple[int, int]) -> int:
        """Number of patches of all frames of a clip whose frames have this grid (rows, columns)."""
        return super().n_patches(grid_hw) * self.n_frames

    def _box(self, image: np.ndarray | Tensor, grid: int) -> tuple[float, float, float, float]:
        """The region that the model sees of a frame, or of every frame of a clip."""
        return eval_box(*image.shape[-3:-1], grid * self.patch_size, self.crop_pct)

    def pack(self, clips: Sequence[np.ndarray], grids: Sequence[int | tuple[int, int]]) -> PackedClips:
        """Packs decoded clips, each at its grid, as patch rows.

        Args:
            clips: uint8 frames `[F, H, W, 3]`.
            grids: see `AdaptivePreprocessor.pack`.
        """
        targets = self._targets(clips, grids)
        return PackedClips.from_frames(clips, patch_size=self.patch_size, **targets, **self.options)


class ClipPipeline(AdaptivePipeline):
    """Turns clips into logits; the preprocessor's policy chooses the number of tokens of each clip.

    The same as `AdaptivePipeline`, over a `TimeSformer` and a `ClipPreprocessor`; sources are paths, bytes or uint8
    frames `[F, H, W, 3]`.
    """

    KIND = CLIPS


def pipeline(
    model: TimeSformer,
    assigner: TokenLengthAssigner | str | PathLike | None = None,
    *,
    policy: PolicySpec | None = None,
    labels: Sequence[str] | None = None,
    token_budget: int = 4096,
    **options,
) -> ClipPipeline:
    """A pipeline over an optimised copy of a model, ready to be called with clips.

    Args:
        model: the model.
        assigner: a `TokenLengthAssigner`, or a file that one was saved to.
        policy: see `policies.make_policy`; by default "argmax", or the longest grid without an assigner.
        labels: names of the classes.
        token_budget: maximum number of tokens of a pack.
        **options: further arguments of `ClipPreprocessor` (n_frames, mean, ...).

    Raises:
        TypeError, ValueError, FileNotFoundError: if something cannot be loaded, or the parts do not fit together.
    """
    if isinstance(assigner, (str, PathLike)):
        assigner = TokenLengthAssigner.load(assigner)
    policy = policy or ("argmax" if assigner is not None else ("fixed", model.grids[0]))
    prep = ClipPreprocessor.for_model(model, assigner, policy=policy, **options)
    return ClipPipeline(optimized_copy(model), prep, token_budget=token_budget, labels=labels)

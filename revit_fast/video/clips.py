"""The pack of clips: frames of all clips as one tensor of patch rows, and the row order that each attention needs.

A clip of F frames at a grid of n patches has three orders of rows:

| order | rows | used by |
| --- | --- | --- |
| frames | frame after frame, n patches each | the resize, the embedding |
| stream | patch after patch, F frames each; after all clips one class token per clip | temporal attention, layers |
| space | frame after frame: a copy of the class token, then the n patches | spatial attention |

Layers other than attention process each row by itself, so rows stay in the order of the stream. Temporal attention
reads the stream in place, because the frames of a patch are one sequence there. Spatial attention reads a gathered
copy, and a second gather brings its result back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_fast.ops.resize import resize_patchify
from revit_fast.packing import Layout, PackedBatch, PackPlan, cached_tensors, cumulative
from revit_fast.packing.tensors import as_list, check_plain

Grid = tuple[int, int]


class ClipLayout(NamedTuple):
    """Layouts and index tensors that the layers need besides the rows. T = Tp + B: patch rows, then class tokens.

    Attributes:
        stream: layout of the stream for norms: B sequences of a clip's patch rows, then B sequences of a class token.
        temporal: layout of the stream for temporal attention: per patch a sequence of F rows; class tokens are padding.
        spatial: layout of the rows in space order: one sequence per frame, or one per clip in joint attention.
        classes: layout of the class tokens alone: B sequences of one row.
        class_queries: layout of the class tokens' queries: one row for each sequence of `spatial`.
        from_frames: int64 `[Tp]`, for each patch row of the stream its row in the order of frames.
        time: int64 `[Tp]`, the frame of each patch row of the stream, counted within its clip.
        to_space: int64 `[Ts]`, for each row in space order its row in the stream.
        to_stream: int64 `[T]`, for each row of the stream its row in space order; for a class token its first copy.
        class_rows: int64 `[n_copies]`, rows of the class tokens' copies in space order, clip after clip.
        copies: int32 `[B + 1]`, cumulative number of copies per clip.
        n_patch_rows: Tp, the number of patch rows.
    """

    stream: Layout
    temporal: Layout
    spatial: Layout
    classes: Layout
    class_queries: Layout
    from_frames: Tensor
    time: Tensor
    to_space: Tensor
    to_stream: Tensor
    class_rows: Tensor
    copies: Tensor
    n_patch_rows: int


@cached_tensors(maxsize=64)
def clip_layout(
    grids: tuple[Grid, ...], n_frames: tuple[int, ...], lengths: tuple[int, ...], joint: bool, device: torch.device
) -> ClipLayout:
    """The layout of a pack of clips, built on the host once and shared by all packs of the same shapes.

    Args:
        grids: (rows, columns) of patches of every clip.
        n_frames: number of frames of every clip.
        lengths: configured lengths, in patches per frame; a clip gets the index of the nearest.
        joint: whether spatial attention sees a clip as one sequence instead of a frame at a time.
        device: device of the index tensors.
    """
    n_patches = [h * w for h, w in grids]
    n_rows = [n * f for n, f in zip(n_patches, n_frames, strict=True)]
    first_class = sum(n_rows)
    from_frames, time, to_space, to_stream, class_rows = [], [], [], [], []
    row = space_row = 0
    for clip, (n, frames) in enumerate(zip(n_patches, n_frames, strict=True)):
        # Rows of the stream: `stream` is [n, F]; `sequences`, those of spatial attention, is [sequences, rows].
        stream = row + np.arange(n * frames).reshape(n, frames)
        from_frames.append(row + np.arange(n * frames).reshape(frames, n).T.ravel())
        time.append(np.tile(np.arange(frames), n))
        sequences = stream.reshape(1, -1) if joint else stream.T
        with_class = np.pad(sequences, ((0, 0), (1, 0)), constant_values=first_class + clip)
        place = space_row + np.arange(with_class.size).reshape(with_class.shape)
        to_space.append(with_class.ravel())
        to_stream.append(place[:, 1:].ravel() if joint else place[:, 1:].T.ravel())
        class_rows.append(place[:, 0])
        row, space_row = row + n * frames, space_row + with_class.size
    n_copies = [len(rows) for rows in class_rows]
    to_stream += [rows[:1] for rows in class_rows]
    index = PackPlan.of(n_patches, lengths, grids=grids).length_index
    n_clips = len(grids)

    def layout(seqlens: Sequence[int], length_index: Sequence[int], n_padding: int = 0) -> Layout:
        return PackPlan(tuple(seqlens), tuple(length_index), n_padding=n_padding).layout(device)

    def rows_of(parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    with torch.inference_mode(False):  # a pack made for inference must serve training too
        by_copy = np.repeat(index, n_copies).tolist()
        spatial = np.repeat([1 + r // c for r, c in zip(n_rows, n_copies, strict=True)], n_copies).tolist()
        return ClipLayout(
            stream=layout([*n_rows, *[1] * n_clips], [*index, *index]),
            temporal=layout(np.repeat(n_frames, n_patches).tolist(), np.repeat(index, n_patches).tolist(), n_clips),
            spatial=layout(spatial, by_copy),
            classes=layout([1] * n_clips, index),
            class_queries=layout([1] * sum(n_copies), by_copy),
            from_frames=rows_of(from_frames),
            time=rows_of(time),
            to_space=rows_of(to_space),
            to_stream=rows_of(to_stream),
            class_rows=rows_of(class_rows),
            copies=cumulative(n_copies).to(device),
            n_patch_rows=first_class,
        )


@dataclass(frozen=True, eq=False)
class PackedClips:
    """Clips of any grids and frame counts as one tensor of patch rows.

    Attributes:
        frames: patch rows of all frames, clip after clip; each sequence is one frame.
        n_frames: number of frames of every clip, at least 1; all frames of a clip have the same grid.

    Raises:
        TypeError: if `frames` is not a `PackedBatch`.
        ValueError: if it holds tokens or has no grids, or if its frames do not match `n_frames`.
    """

    frames: PackedBatch
    n_frames: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.frames, PackedBatch):
            raise TypeError(f"frames: expected a PackedBatch of patch rows, got {type(self.frames).__name__}")
        object.__setattr__(self, "n_frames", tuple(int(n) for n in self.n_frames))
        if self.frames.n_prefix or self.frames.grids is None:
            raise ValueError("frames: expected patch rows with their grids, not tokens; see ops.resize_patchify")
        if any(n < 1 for n in self.n_frames) or sum(self.n_frames) != len(self.frames):
            raise ValueError(
                f"n_frames: expected at least 1 frame a clip and {len(self.frames)} in all, got {self.n_frames}"
            )
        for clip, grids in enumerate(self._grids_of_frames()):
            if len(set(grids)) > 1 or 0 in grids[0]:
                raise ValueError(f"frames: clip {clip} has frames of grids {sorted(set(grids))}; give one, not empty")

    def _grids_of_frames(self) -> list[tuple[Grid, ...]]:
        ends = np.cumsum(self.n_frames, dtype=int).tolist()
        return [self.frames.grids[end - n : end] for end, n in zip(ends, self.n_frames, strict=True)]

    @property
    def grids(self) -> tuple[Grid, ...]:
        """(rows, columns) of patches of every clip."""
        return tuple(grids[0] for grids in self._grids_of_frames())

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self.frames.device

    def __len__(self) -> int:
        return len(self.n_frames)

    @classmethod
    def from_list(
        cls, clips: Sequence[Tensor], patch_size: int, *, lengths: Sequence[int] | None = None
    ) -> PackedClips:
        """Packs normalised clips of any sizes.

        Args:
            clips: tensors `[F, 3, gh*P, gw*P]`, same dtype and device.
            patch_size: P, in pixels.
            lengths: see `PackedBatch.from_rows`.
        """
        clips = as_list(clips)
        for i, clip in enumerate(clips):
            if isinstance(clip, Tensor):
                check_plain(f"clips[{i}]", clip)
            if not isinstance(clip, Tensor) or clip.dim() != 4 or clip.shape[0] < 1:
                got = tuple(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
                raise ValueError(f"clips[{i}]: expected a tensor [F, 3, H, W] of at least one frame, got {got}")
        if not clips:
            raise ValueError("clips: expected at least one clip, got an empty list")
        frames = [frame for clip in clips for frame in clip]
        batch = PackedBatch.from_images(frames, patch_size, lengths=lengths)
        return cls(batch, tuple(clip.shape[0] for clip in clips))

    @classmethod
    def from_frames(
        cls,
        clips: Sequence[np.ndarray | Tensor],
        sizes: Sequence[int | tuple[int, int]],
        patch_size: int,
        *,
        boxes: Sequence[tuple[float, float, float, float] | None] | None = None,
        **options,
    ) -> PackedClips:
        """Resizes, normalises and packs decoded clips; each frame is written straight into its rows.

        Args:
            clips: uint8 arrays or CPU tensors `[F, H, W, 3]`.
            sizes: target size of every clip in pixels, (height, width) or a square's side, multiples of `patch_size`.
            patch_size: P, in pixels.
            boxes: region of every clip's frames, None for the whole frame; by default whole frames.
            **options: further arguments of `ops.resize_patchify`.

        Raises:
            TypeError, ValueError: if an argument is not as described above.
        """
        clips = list(clips)
        for i, clip in enumerate(clips):
            if getattr(clip, "ndim", None) != 4 or clip.shape[0] < 1:
                shape = tuple(getattr(clip, "shape", ())) or type(clip).__name__
                raise ValueError(f"clips[{i}]: expected uint8 frames [F, H, W, 3], at least one, got {shape}")
        n_frames = tuple(clip.shape[0] for clip in clips)
        boxes = [None] * len(clips) if boxes is None else boxes
        for name, values in (("sizes", sizes), ("boxes", boxes)):
            if len(values) != len(clips):
                raise ValueError(f"{name}: expected {len(clips)}, one per clip, got {len(values)}")

        def by_frame(values: Sequence) -> list:
            return [value for value, n in zip(values, n_frames, strict=True) for _ in range(n)]

        frames = [frame for clip in clips for frame in clip]
        batch = resize_patchify(frames, by_frame(sizes), patch_size, boxes=by_frame(boxes), **options)
        return cls(batch, n_frames)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedClips:
        """The same clips on `device`."""
        return replace(self, frames=self.frames.to(device, non_blocking))

    def pin_memory(self) -> PackedClips:
        """The same clips in page-locked memory; see `PackedBatch.pin_memory`."""
        return replace(self, frames=self.frames.pin_memory())

    def layout(self, lengths: Sequence[int], joint: bool = False) -> ClipLayout:
        """Index tensors on the device of the rows; see `clip_layout`."""
        return clip_layout(self.grids, self.n_frames, tuple(lengths), joint, self.device)

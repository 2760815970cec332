"""Batches for training and evaluation: every image at several grids, in one pack.

A batch depends only on the set, the settings, the seed, the epoch and the number of the batch. An epoch therefore has
the same batches, bit for bit, if it is resumed, prepared by workers or divided among ranks.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from revit_fast import ops
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.grids import check_grids
from revit_fast.io.images import ImageError
from revit_fast.io.names import on_one_line
from revit_fast.io.threads import Process, check_compute_threads
from revit_fast.packing import PackedBatch
from revit_fast.train.augment import Augmenter, Draws, batch_seeds
from revit_fast.train.config import Augment
from revit_fast.train.data import ImageSet

__all__ = ["Augment", "Batch", "EvalLoader", "TrainLoader", "UnreadableError"]

NAMED_UNREADABLE = 5
"""Number of unreadable images that an error lists."""


class UnreadableError(RuntimeError):
    """More images of a set are unreadable than is allowed."""


class Batch(NamedTuple):
    """B images, each at every view.

    Attributes:
        images: patch rows, length-major: all images at the first view, then all at the second, ...
        target: int64 `[B]`, or float32 `[B, n_classes]` with mixup, cutmix or smoothing.
        index: int64 `[B]`, the place of every image in its set.
        unreadable: name and reason of each image that was left out of this batch.
    """

    images: PackedBatch
    target: Tensor
    index: Tensor
    unreadable: list[tuple[str, str]]

    def parts(self, n_images: int) -> list[Batch]:
        """Divides the batch into the fewest batches of at most `n_images` images; sizes differ by at most one image.

        The first of them has the list of unreadable images.
        """
        n_parts = -(-len(self.target) // n_images)
        if n_parts <= 1:
            return [self]
        places = np.array_split(np.arange(len(self.target)), n_parts)
        views = np.arange(len(self.images)).reshape(-1, len(self.target))
        return [
            Batch(
                self.images.select(views[:, some].ravel().tolist()),
                self.target[some[0] : some[-1] + 1],
                self.index[some[0] : some[-1] + 1],
                [] if i else self.unreadable,
            )
            for i, some in enumerate(places)
        ]


class TrainLoader:
    """Shuffled and augmented batches with every image at all grids.

    `augment` makes the longest view of an image, and shorter views are resized from it. The random numbers of an image
    depend only on (seed, epoch, its place in the set), those of a batch's mixture only on (seed, epoch, number of the
    batch in the epoch over all ranks). The states of the global random generators do not change.

    Batch b of rank r is batch `b * world_size + r` of the same loader with one rank. Without `drop_last`, images that
    do not fill another batch on every rank are divided evenly into a last batch, or left out if they are fewer than the
    ranks.

    An image that cannot be read is left out of its batch and listed in it. A batch without any readable image raises an
    `UnreadableError`: replacements would be used twice, and a skipped batch would leave the ranks out of step.

    Args:
        images: the set.
        grids: patches a side of every view, strictly decreasing.
        patch_size: P, in pixels.
        batch_size: images per batch and rank.
        augment: see `Augment`.
        mean: mean of each channel for pixels in [0, 1].
        std: standard deviation of each channel for pixels in [0, 1].
        interpolation: "bicubic" or "bilinear".
        seed: seed of all random numbers, 0 or more.
        workers: processes that prepare batches; 0: this process prepares them.
        rank: rank of this process.
        world_size: number of processes that share an epoch's images.
        views: indices into `grids` of the views that this process needs, ascending; by default all. The mixture and the
            augmentation do not depend on it, so length-parallel ranks give different views of the same images if each
            of them has rank 0 and world_size 1.
        max_unreadable: share of the set that may be unreadable before an `UnreadableError` is raised.
        drop_last: whether images that do not fill a batch are left out.
        dtype: dtype of the patch rows; with uint8 the model normalises them, possibly on a GPU.

    Attributes:
        unreadable: reason for every image that could not be read so far, by name.

    Raises:
        TypeError, ValueError: if an argument is not as described above, or the set is too small for one batch on every
            rank.
        RuntimeError: in a process that was forked from one that had computed on several threads.
        ImportError: if `augment` needs timm and it is not installed.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        grids: Sequence[int],
        patch_size: int,
        batch_size: int,
        augment: Augment,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: Sequence[int] | None = None,
        max_unreadable: float = 0.01,
        drop_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_compute_threads("images")
        self.grids = check_grids(grids)
        for name, value, least in (
            ("patch_size", patch_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("workers", workers, 0),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
        ):
            _check_int(name, value, least)
        if rank >= world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} for world_size {world_size}, got {rank}")
        if not isinstance(augment, Augment):
            raise TypeError(f"augment: expected an Augment such as Augment() or Augment.light(), got {augment!r}")
        self.views = _check_views(views, len(self.grids))
        self.images, self.patch_size, self.batch_size, self.augment = images, patch_size, batch_size, augment
        self.seed, self.workers, self.rank, self.world_size = seed, workers, rank, world_size
        self.max_unreadable, self.drop_last = _check_share(max_unreadable), drop_last
        self.unreadable: dict[str, str] = {}
        self._options = {"mean": mean, "std": std, "interpolation": interpolation, "dtype": dtype}
        self._pack(
            [torch.zeros(1, 1, 3, dtype=torch.uint8, device="cpu")]
        )  # raises resize_patchify's errors for wrong options
        self._augmenter = Augmenter(
            augment,
            image_px=self.grids[0] * patch_size,
            n_classes=len(images.classes),
            mean=mean,
            std=std,
            interpolation=interpolation,
        )
        if len(self) == 0:
            fix = "a smaller batch_size" + (" or drop_last=False" if len(images) >= world_size and drop_last else "")
            raise ValueError(
                f"batch_size: {len(images)} images give no batch of {batch_size} on {world_size} ranks; give {fix}"
            )

    def __len__(self) -> int:
        """Number of batches per epoch on every rank."""
        rounds, rest = divmod(len(self.images), self.batch_size * self.world_size)
        return rounds + (not self.drop_last and rest >= self.world_size)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_batch` on.

        Args:
            epoch: 0 or more.
            first_batch: 0 to the number of batches; the latter gives no batch.

        Raises:
            ValueError: if an argument is not as described above.
            UnreadableError: while the iterator is consumed, see the class.
            RuntimeError: while it is consumed, in a process that was forked since it began.
        """
        _check_int("epoch", epoch, 0)
        _check_int("first_batch", first_batch, 0)
        if first_batch > len(self):
            raise ValueError(f"first_batch: expected 0 to {len(self)}, the batches of an epoch, got {first_batch}")
        places = self._places(epoch)
        draws = Draws.of_epoch(self.seed, epoch, len(self.images))
        make = partial(self._batch, epoch, places, draws)
        limit = self.max_unreadable * len(self.images)
        return _counted(_prepared(make, range(first_batch, len(self)), self.workers), self.unreadable, limit)

    def _places(self, epoch: int) -> list[np.ndarray]:
        """Places of the images in each of this rank's batches."""
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.images))
        n = self.batch_size * self.world_size
        whole = len(order) // n * n
        places = list(order[:whole].reshape(-1, self.world_size, self.batch_size)[:, self.rank])
        rest = order[whole:]
        return places + ([np.array_split(rest, self.world_size)[self.rank]] if len(places) < len(self) else [])

    def _batch(self, epoch: int, places: list[np.ndarray], draws: Draws, b: int) -> Batch:
        """Batch b of this rank."""
        decoded, index, unreadable = _read(self.images, places[b])
        if not decoded:
            name, reason = unreadable[0]
            raise UnreadableError(
                f"images: none of the {len(unreadable)} images of batch {b} of epoch {epoch} can be read, first "
                f"{on_one_line(name)}: {reason}; check that the set is still there"
            )
        labels = torch.from_numpy(self.images.labels[index])
        longest = self._augmenter.views(decoded, draws.at(index))
        seeds = batch_seeds(self.seed, epoch, b * self.world_size + self.rank)
        longest, target = self._augmenter.mixed(longest, labels, seeds)
        return Batch(self._pack(list(longest)), target, torch.from_numpy(index), unreadable)

    def _pack(self, longest: list[Tensor]) -> PackedBatch:
        """One pack of all views, resized from the longest views, each uint8 `[S, S, 3]`."""
        sizes = [self.grids[view] * self.patch_size for view in self.views for _ in longest]
        lengths = [grid * grid for grid in self.grids]
        return ops.resize_patchify(longest * len(self.views), sizes, self.patch_size, lengths=lengths, **self._options)


class EvalLoader:
    """All images of a set in order and without augmentation, each at every grid.

    An `AdaptivePreprocessor` resizes every view directly from the source, so that the accuracy is that of a deployed
    pipeline. Unreadable images are left out and listed; a batch without any readable image is left out.

    Args:
        images: the set.
        grids: patches a side of every view, strictly decreasing.
        patch_size: P, in pixels.
        batch_size: images per batch.
        mean: mean of each channel for pixels in [0, 1].
        std: standard deviation of each channel for pixels in [0, 1].
        crop_pct: share of the scaled shorter side that the model sees, as in timm.
        interpolation: "bicubic" or "bilinear".
        workers: processes that prepare batches; 0: this process prepares them.
        max_unreadable: share of the set that may be unreadable before an `UnreadableError` is raised.
        dtype: dtype of the patch rows; with uint8 the model normalises them.

    Attributes:
        unreadable: reason for every image that could not be read so far, by name.

    Raises:
        TypeError, ValueError: if an argument is not as described above.
        RuntimeError: as in `TrainLoader`.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        grids: Sequence[int],
        patch_size: int,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
        workers: int = 0,
        max_unreadable: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_compute_threads("images")
        for name, value, least in (
            ("patch_size", patch_size, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
        ):
            _check_int(name, value, least)
        self.grids = check_grids(grids)
        self.images, self.batch_size, self.workers = images, batch_size, workers
        self.max_unreadable = _check_share(max_unreadable)
        self.unreadable: dict[str, str] = {}
        self.prep = AdaptivePreprocessor(
            grids=grids,
            patch_size=patch_size,
            mean=mean,
            std=std,
            crop_pct=crop_pct,
            interpolation=interpolation,
            policy=("fixed", self.grids[0]),
            dtype=dtype,
        )
        self._pack([np.zeros((1, 1, 3), dtype=np.uint8)])  # raises resize_patchify's errors for wrong options

    def __len__(self) -> int:
        """Number of batches, including those without a readable image."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        limit = self.max_unreadable * len(self.images)
        batches = _counted(_prepared(self._batch, range(len(self)), self.workers), self.unreadable, limit)
        return (batch for batch in batches if batch.images is not None)

    def _batch(self, b: int) -> Batch:
        places = np.arange(b * self.batch_size, min((b + 1) * self.batch_size, len(self.images)))
        decoded, index, unreadable = _read(self.images, places)
        target = torch.from_numpy(self.images.labels[index])
        return Batch(self._pack(decoded) if decoded else None, target, torch.from_numpy(index), unreadable)

    def _pack(self, decoded: list[np.ndarray]) -> PackedBatch:
        grids = [grid for grid in self.grids for _ in decoded]
        return self.prep.pack(decoded * len(self.grids), grids)


def _read(images: ImageSet, places: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, list[tuple[str, str]]]:
    """Readable images among those at `places`, their places, and names of the others with the reasons."""
    decoded, index, unreadable = [], [], []
    for i in places.tolist():
        try:
            decoded.append(images.image(i))
            index.append(i)
        except ImageError as error:
            unreadable.append((images.name(i), str(error)))
    return decoded, np.array(index, dtype=np.int64), unreadable


def _counted(batches: Iterable[Batch], known: dict[str, str], limit: float) -> Iterator[Batch]:
    """Gives the batches; raises an error once more than `limit` different images are unreadable, and after a fork."""
    process = Process("this iterator of batches", "begin an epoch here")
    for batch in batches:
        known.update(batch.unreadable)
        if len(known) > limit:
            listed = "; ".join(f"{on_one_line(name)}: {reason}" for name, reason in [*known.items()][:NAMED_UNREADABLE])
            more = f"; and {len(known) - NAMED_UNREADABLE} more" if len(known) > NAMED_UNREADABLE else ""
            raise UnreadableError(
                f"images: {len(known)} cannot be read, more than max_unreadable allows ({limit:g} of this set): "
                f"{listed}{more}; repair them, raise max_unreadable, or start another run without them"
            )
        yield batch
        process.check("images")


class _Made:
    """A data set that makes batches by number, for torch's DataLoader."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make

    def __getitem__(self, b: int) -> Batch:
        return self.make(b)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _prepared(make: Callable[[int], Batch], numbers: range, workers: int) -> Iterator[Batch]:
    """Batches of the given numbers in order, made by worker processes or here."""
    if workers == 0 or not numbers:
        return map(make, numbers)
    from torch.utils.data import DataLoader

    # The DataLoader draws from its generator, which must not be the global one. Its own collate_fn would convert
    # batches.
    return iter(
        DataLoader(
            _Made(make),
            batch_size=None,
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            worker_init_fn=_leave_ctrl_c,
        )
    )


def _leave_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too; the process that uses them decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of {least} or more, got {value!r}")


def _check_share(share: float) -> float:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"max_unreadable: expected a share in [0, 1], got {share!r}")
    return share


def _check_views(views: Sequence[int] | None, n: int) -> tuple[int, ...]:
    views = tuple(range(n)) if views is None else tuple(views)
    if not views or sorted(set(views)) != list(views) or not 0 <= views[0] <= views[-1] < n:
        raise ValueError(f"views: expected ascending indices of the {n} grids, 0 to {n - 1}, got {views}")
    return views

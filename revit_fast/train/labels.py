"""Token-length labels: the lengths at which a model classifies an image correctly, and the smallest of them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.grids import check_grids
from revit_fast.inference.inference_copy import InferenceCopy
from revit_fast.inference.optimize import optimize
from revit_fast.io.atomic import replaced
from revit_fast.io.images import ImageError
from revit_fast.io.names import csv_line, decoded, from_text, shortened, whole_number
from revit_fast.models.vit import ReViT
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.data import ImageSet, k_folds

RULES = ("smallest", "stable")
UNSOLVED = ("longest", "shortest", "drop")

FORMAT = "revit-fast length labels 1"
"""What the first line of a file of versions before says."""

SAID = ("rule", "unsolved", "images")
"""Columns of a file of labels that are the same in every line."""

CHUNK = 256
"""Number of images that are decoded at a time."""

PACK_TOKENS = 4096
"""Approximate number of patch tokens in a forward pass; results do not depend on it."""


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for every image of a set at every length.

    Attributes:
        grids: grids of the model, the longest first.
        logits: float32 `[n_lengths, N, n_classes]`; NaN for images that could not be read.
        unreadable: reason for every image that could not be read, by its place.
    """

    grids: tuple[int, ...]
    logits: np.ndarray = field(repr=False)
    unreadable: Mapping[int, str] = field(default_factory=dict)

    @property
    def readable(self) -> np.ndarray:
        """Whether each image could be read, bool `[N]`."""
        readable = np.ones(self.logits.shape[1], dtype=bool)
        readable[list(self.unreadable)] = False
        return readable

    def subset(self, places: np.ndarray) -> Predictions:
        """The predictions for the images at `places`, which must be readable ones."""
        return Predictions(self.grids, self.logits[:, places])

    def correct(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whether the best class is the right one, bool `[n_lengths, N]`; False if the logits are not finite.

        Args:
            labels: right class of every image, int `[N]`.
        """
        labels = np.asarray(labels)
        if labels.shape != self.logits.shape[1:2]:
            raise ValueError(
                f"labels: expected one class for each of {self.logits.shape[1]} images, got {labels.shape}"
            )
        return (self.logits.argmax(axis=2) == labels) & np.isfinite(self.logits).all(axis=2)

    def probability(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """The probability of the right class, float32 `[n_lengths, N]`; 0 if the logits are not finite.

        Its mean over images estimates a calibrated model's accuracy with less noise than the share of correct images.

        Args:
            labels: right class of every image, int `[N]`.
        """
        finite = np.isfinite(self.logits).all(axis=2)
        logits = np.where(finite[..., None], self.logits, 0.0).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=2, keepdims=True))
        of_right = np.take_along_axis(odds, np.asarray(labels)[None, :, None], axis=2)[..., 0]
        return np.where(finite, of_right / odds.sum(axis=2), 0.0).astype(np.float32)

    def sufficiency(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        """How close each length comes to the longest, float32 `[n_lengths, N]` in [0, 1]; 1 for the longest.

        It is one minus the fall of the right class's probability. It is also 1 if that probability is 0 at all lengths.

        Args:
            labels: right class of every image, int `[N]`.
        """
        probability = self.probability(labels)
        return 1.0 - np.maximum(probability[:1] - probability, 0.0)


def predict_lengths(
    model: ReViT,
    images: ImageSet,
    *,
    settings: Mapping[str, Any] | None = None,
    pack_tokens: int = PACK_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """The logits of every image at every length, bitwise those of an `AdaptivePipeline` at fixed grids (on a CPU).

    Each image is decoded once, and no augmentation is applied: these are the predictions of a deployed model.

    Args:
        model: a `ReViT`, of which an optimised copy is made, or such a copy.
        images: the set.
        settings: preprocessing that replaces the model's, see `AdaptivePreprocessor.for_model`.
        pack_tokens: approximate number of patch tokens in a forward pass.
        progress: called after every forward pass with the number of finished images, whose lengths count as parts of
            an image, and the number of all images.

    Returns:
        The predictions. An image that cannot be read is listed and does not affect the others.
    """
    fast = model if isinstance(model, InferenceCopy) else optimize(model)
    prep = AdaptivePreprocessor.for_model(fast, policy=("fixed", fast.grids[0]), **dict(settings or {}))
    pipe = AdaptivePipeline(fast, prep)
    logits = np.full((len(fast.grids), len(images), fast.num_classes), np.nan, dtype=np.float32)
    unreadable: dict[int, str] = {}
    for places, pixels in decoded_chunks(images, unreadable):
        first, end = int(places[0]), int(places[-1]) + 1
        n_tokens, n_passed = len(pixels) * sum(grid * grid for grid in fast.grids), 0
        for length, grid in enumerate(fast.grids):
            per_pack = max(1, pack_tokens // (grid * grid))
            for begin in range(0, len(pixels), per_pack):
                some = pixels[begin : begin + per_pack]
                result = pipe.logits(prep.pack(some, [grid] * len(some)))
                logits[length, places[begin : begin + per_pack]] = result.numpy()
                n_passed += len(some) * grid * grid
                if progress is not None:
                    progress(first + (end - first) * n_passed // n_tokens, len(images))
    return Predictions(fast.grids, logits, unreadable)


def decoded_chunks(images: ImageSet, unreadable: dict[int, str]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Places and pixels of the readable images, a bounded number at a time; the others go to `unreadable`."""
    for begin in range(0, len(images), CHUNK):
        places, pixels = [], []
        for i in range(begin, min(begin + CHUNK, len(images))):
            try:
                pixels.append(images.image(i))
                places.append(i)
            except ImageError as error:
                unreadable[i] = str(error)
        if places:
            yield np.array(places), pixels


def length_labels(correct: np.ndarray, rule: str = "smallest", unsolved: str = "longest") -> np.ndarray:
    """Index of the smallest sufficient length of every image, int64 `[N]`, 0 the longest; -1 for dropped images.

    Args:
        correct: bool `[n_lengths, N]`, whether each length classifies an image correctly, the longest first.
        rule: "smallest": the shortest length that is right (the paper's); "stable": the shortest that is right together
            with all longer ones.
        unsolved: label of an image for which no length satisfies the rule: "longest", "shortest" or "drop".

    Raises:
        ValueError: for another rule or shape.
    """
    correct = np.asarray(correct, dtype=bool)
    if correct.ndim != 2 or len(correct) == 0:
        raise ValueError(f"correct: expected bool [n_lengths, N], got {list(correct.shape)}")
    for name, value, legal in (("rule", rule, RULES), ("unsolved", unsolved, UNSOLVED)):
        if value not in legal:
            raise ValueError(f"{name}: expected one of {', '.join(legal)}, got {value!r}")
    holds = satisfying(correct, rule)
    shortest = len(correct) - 1
    labels = shortest - holds[::-1].argmax(axis=0)
    labels[~holds.any(axis=0)] = {"longest": 0, "shortest": shortest, "drop": -1}[unsolved]
    return labels.astype(np.int64)


def satisfying(correct: np.ndarray, rule: str) -> np.ndarray:
    """Whether each length satisfies the rule, bool `[n_lengths, N]`."""
    return np.logical_and.accumulate(correct, axis=0) if rule == "stable" else correct


@dataclass(frozen=True)
class LengthLabels:
    """Token-length labels of a set, which can be saved to a file.

    Attributes:
        grids: grids of the model, the longest first.
        names: names of the images.
        labels: int64 `[N]`, index of the smallest sufficient length; -1 for images to be left out.
        correct: bool `[n_lengths, N]`, whether each length classifies an image correctly.
        rule: see `length_labels`.
        unsolved: see `length_labels`.
    """

    grids: tuple[int, ...]
    names: tuple[str, ...]
    labels: np.ndarray = field(repr=False)
    correct: np.ndarray = field(repr=False)
    rule: str = "smallest"
    unsolved: str = "longest"

    @classmethod
    def of(
        cls, predictions: Predictions, images: ImageSet, rule: str = "smallest", unsolved: str = "longest"
    ) -> LengthLabels:
        """The labels that follow from a model's predictions; images that could not be read are left out."""
        correct = predictions.correct(images.labels)
        labels = length_labels(correct, rule, unsolved)
        labels[~predictions.readable] = -1
        names = tuple(images.name(i) for i in range(len(images)))
        return cls(predictions.grids, names, labels, correct, rule, unsolved)

    @property
    def histogram(self) -> np.ndarray:
        """Number of images with each label, int `[n_lengths]`, the longest first."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.grids))

    @property
    def unsolved_share(self) -> float:
        """Share of the images for which no length satisfies the rule."""
        return float(np.mean(~satisfying(self.correct, self.rule).any(axis=0))) if len(self.names) else 0.0

    def summary(self) -> str:
        """Histogram, accuracies and share of unsolved images, in a few lines of text."""
        counts, kept = self.histogram, max(self.histogram.sum(), 1)
        lines = [f"{len(self.names)} images, rule {self.rule}, unsolved {self.unsolved}"]
        for grid, count, right in zip(self.grids, counts, self.correct, strict=True):
            lines.append(f"{grid:>3}x{grid:<3} {count:>7} labels ({count / kept:6.1%})   accuracy {right.mean():6.2%}")
        dropped = int((self.labels < 0).sum())
        lines.append(f"unsolved {self.unsolved_share:.2%}" + (f", {dropped} left out" if dropped else ""))
        return "\n".join(lines)

    def of_images(self, images: ImageSet) -> np.ndarray:
        """Labels `[N]` of a set, found by the names of its images.

        Raises:
            ValueError: if an image has no label, or two labels have the same name.
        """
        place = {name: i for i, name in enumerate(self.names)}
        if len(place) < len(self.names):
            raise ValueError("labels: two images have the same name, so that labels cannot be told apart")
        names = [images.name(i) for i in range(len(images))]
        missing = [name for name in names if name not in place]
        if missing:
            known = self.names[0] if self.names else "none"
            raise ValueError(
                f"labels: {len(missing)} of {len(names)} images have no label, the first {missing[0]!r}; make the "
                f"labels of the same images (and split), or of all; the first label is of {known!r}"
            )
        return self.labels[[place[name] for name in names]]

    def save(self, path: str | os.PathLike) -> None:
        """Writes a CSV file, all or nothing, with a header and one line per image.

        Columns are name, label (empty for images left out), grid, and `right_GRID` (0 or 1) for every grid; then, the
        same in every line, rule, unsolved, and images, their number, by which a file that is cut short is noticed.
        """
        with replaced(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(csv_line(_columns(self.grids)))
            for name, label, right in zip(self.names, self.labels.tolist(), self.correct.T, strict=True):
                chosen = [label, self.grids[label]] if label >= 0 else ["", ""]
                file.write(csv_line([name, *chosen, *map(int, right), self.rule, self.unsolved, len(self.names)]))

    @classmethod
    def load(cls, path: str | os.PathLike) -> LengthLabels:
        """Reads a file that `save` wrote, also one of versions before, which begins with a line `# {JSON}`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds something else, or fewer images than it says; the message names the line.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"labels: there is no file {path}")
        try:
            file = io.StringIO(decoded(Path(path).read_bytes()), newline="")
        except ValueError as error:
            raise ValueError(f"labels: {path}: {error}") from error
        head = _read_head(file.readline(), path) if file.getvalue()[:1] in ("", "#") else None
        rows, n_before = csv.reader(file), int(head is not None)  # lines before those that `rows` counts
        names, labels, correct, said = [], [], [], set()
        try:
            header = next(rows, [])
            grids = _grids_in(header) if head is None else head[0]
            if header != _columns(grids)[: None if head is None else -len(SAID)]:
                raise ValueError(
                    f"labels: {path}, line {1 + n_before}: expected name,label,grid and right_GRID for "
                    f"{grids or 'every grid'}"
                )
            for row in rows:
                own = row if head is not None else row[: -len(SAID)]
                label, right = _read_row(own, grids, f"{path}, line {rows.line_num + n_before}")
                names.append(from_text(row[0]))
                labels.append(label)
                correct.append(right)
                said.add(tuple(row[len(own) :]))
            rule, unsolved, n_images = _read_said(said, path) if head is None else head[1:]
        except csv.Error as error:
            raise ValueError(f"labels: {path}, line {rows.line_num + n_before}: no CSV: {error}") from error
        if n_images not in (None, len(names)):
            raise ValueError(f"labels: {path} is cut short: it holds {len(names)} of {n_images} images; make it again")
        correct = np.array(correct, dtype=bool).reshape(-1, len(grids)).T
        return cls(grids, tuple(names), np.array(labels, dtype=np.int64), correct, rule, unsolved)


def _columns(grids: Sequence[int]) -> list[str]:
    return ["name", "label", "grid", *(f"right_{grid}" for grid in grids), *SAID]


def _grids_in(header: Sequence[str]) -> tuple[int, ...]:
    """The grids that a header names, as far as they are numbers."""
    named = (whole_number(column.removeprefix("right_")) for column in header[3 : -len(SAID)])
    return tuple(grid for grid in named if grid)


def _read_said(said: set[tuple[str, ...]], path: str | os.PathLike) -> tuple[str, str, int]:
    """Rule, unsolved and number of images, of which every line must say the same."""
    if not said:
        raise ValueError(f"labels: {path} is cut short: it holds no image; make it again")
    rule, unsolved, n_images = found = min(said)
    legal = rule in RULES and unsolved in UNSOLVED and whole_number(n_images) is not None
    if len(said) > 1 or not legal:
        raise ValueError(
            f"labels: {path}: expected one {', '.join(SAID)} in all lines, of {', '.join(RULES)} and "
            f"{', '.join(UNSOLVED)}, got {shortened(','.join(found))}; make it again"
        )
    return rule, unsolved, int(n_images)


def _read_head(line: str, path: str | os.PathLike) -> tuple[tuple[int, ...], str, str, int | None]:
    """Grids, rule, unsolved and the number of images, which older files do not say."""
    if not line:
        raise ValueError(f"labels: {path} is empty; make it again with `revit-fast label`")
    try:
        head = json.loads(line.removeprefix("# "))
        for key, legal in (("format", (FORMAT,)), ("rule", RULES), ("unsolved", UNSOLVED)):
            if head.get(key) not in legal:
                raise ValueError(f"{key}: expected {' or '.join(legal)}, got {head.get(key)!r}")
        return check_grids(head["grids"]), head["rule"], head["unsolved"], head.get("images")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"labels: {path}, line 1: not a file that `revit-fast label` wrote: {error}") from error


def _read_row(row: list[str], grids: tuple[int, ...], where: str) -> tuple[int, list[bool]]:
    try:
        label = int(row[1]) if row[1] else -1
        right = [{"0": False, "1": True}[value] for value in row[3:]]
        if -1 <= label < len(grids) == len(right) and row[2] == (str(grids[label]) if label >= 0 else ""):
            return label, right
    except (ValueError, KeyError, IndexError):
        pass
    raise ValueError(
        f"labels: {where}: expected a name, an index into {list(grids)} with its grid (or neither), and 0 or 1 for "
        f"every grid, got {shortened(','.join(row))}"
    )


def cross_fit(
    images: ImageSet,
    k: int,
    seed: int,
    train_fn: Callable[[ImageSet], ReViT],
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predictions for every image by a model that was not trained on it.

    A model memorises its own training images, at short lengths too, so that labels from them would be too short.

    Args:
        images: the set.
        k: number of parts of the set, and of models; each model is trained on all parts but one.
        seed: seed of the parts.
        train_fn: function that trains a model on the given images.
        settings: see `predict_lengths`.
        progress: called with the number of finished parts and the number of all parts.

    Raises:
        ValueError: if the models differ in grids or classes.
    """
    folds = k_folds(images, k, seed)
    whole: Predictions | None = None
    unreadable: dict[int, str] = {}
    for done, held_out in enumerate(folds, 1):
        rest = np.setdiff1d(np.arange(len(images)), held_out)
        part = predict_lengths(train_fn(images.subset(rest)), images.subset(held_out), settings=settings)
        if whole is None:
            shape = (len(part.grids), len(images), part.logits.shape[2])
            whole = Predictions(part.grids, np.full(shape, np.nan, dtype=np.float32), unreadable)
        if part.grids != whole.grids or part.logits.shape[2] != whole.logits.shape[2]:
            raise ValueError(
                f"train_fn: expected models of the same grids and classes, got {whole.grids}, {whole.logits.shape[2]} "
                f"and {part.grids}, {part.logits.shape[2]}"
            )
        whole.logits[:, held_out] = part.logits
        unreadable.update({int(held_out[i]): reason for i, reason in part.unreadable.items()})
        if progress is not None:
            progress(done, len(folds))
    return whole

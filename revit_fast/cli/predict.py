"""`revit-fast predict`: image files to classes, in packed batches."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import TextIO

import torch
from torch import Tensor

import revit_fast
from revit_fast import PackedBatch, ops
from revit_fast.cli import UsageError
from revit_fast.cli.report import FORMATS, BarProgress, Prediction, Progress, on_one_line, open_output, write
from revit_fast.images import Decoded, find_images, read_ahead

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEIT_CROP_PCT = 0.9

MAX_DECODERS = 8
"""Decoding threads at most: each may hold two decoded images."""


def centre_box(width: int, height: int, crop_pct: float) -> tuple[float, float, float, float]:
    """The centred square of `crop_pct` times the shorter side, as Pillow's (left, upper, right, lower).

    Resizing this box to n pixels is timm's evaluation transform (shorter side to n / crop_pct, then a centre crop of n)
    without the rounding of the size in between.
    """
    side = min(width, height) * crop_pct
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


class Preparer:
    """Turns decoded images into normalised patch rows, each at the next grid of a cycle."""

    def __init__(self, model, grids: Sequence[int], exact: bool):
        config = model.pretrained_cfg or {}
        interpolation = config.get("interpolation")
        self.patch_size, self.n_prefix = model.patch_size, model.num_prefix_tokens
        self.crop_pct = config.get("crop_pct") or DEIT_CROP_PCT
        self.grids = itertools.cycle(grids)
        self.options = {
            "mean": config.get("mean") or IMAGENET_MEAN,
            "std": config.get("std") or IMAGENET_STD,
            "interpolation": interpolation if interpolation in ("bicubic", "bilinear") else "bicubic",
            "exact": exact,
        }

    def __call__(self, decoded: Decoded) -> tuple[Prediction, Tensor | None]:
        """The prediction to be filled in and the rows `[grid², P·P·3]`, None for an image that could not be read."""
        grid = next(self.grids)  # taken even if there is no image, so that a damaged file moves no other's grid
        if decoded.image is None:
            return Prediction(decoded.path, error=decoded.error), None
        begin = time.perf_counter()
        height, width = decoded.image.shape[:2]
        box = centre_box(width, height, self.crop_pct)
        image_px = grid * self.patch_size
        packed = ops.resize_patchify(
            [decoded.image], (image_px, image_px), self.patch_size, boxes=[box], **self.options
        )
        ms = decoded.ms + 1e3 * (time.perf_counter() - begin)
        return Prediction(decoded.path, grid=grid, n_tokens=grid * grid + self.n_prefix, ms=ms), packed.data


def predict_batches(
    model, prepared: Iterable[tuple[Prediction, Tensor | None]], batch_tokens: int, top_k: int
) -> Iterator[list[Prediction]]:
    """Fills in predictions by one packed forward per batch; yields them in order, a batch at a time.

    Args:
        model: called with a `PackedBatch`, returns logits `[B, n_classes]`.
        prepared: predictions with their patch rows, None for errors, which only pass through.
        batch_tokens: images are packed until the next would exceed it; a larger image goes alone.
        top_k: classes to report.
    """
    batch: list[tuple[Prediction, Tensor | None]] = []
    n_tokens = 0
    for item in prepared:
        if n_tokens and n_tokens + item[0].n_tokens > batch_tokens:
            yield _forward(model, batch, top_k)
            batch, n_tokens = [], 0
        batch.append(item)
        n_tokens += item[0].n_tokens
        if not n_tokens:  # nothing but errors so far: no reason to hold them back
            yield [item[0]]
            batch = []
    if batch:
        yield _forward(model, batch, top_k)


def _forward(model, batch: list[tuple[Prediction, Tensor | None]], top_k: int) -> list[Prediction]:
    """One packed forward over the images of a batch; its time is shared out by tokens."""
    images = [(prediction, rows) for prediction, rows in batch if rows is not None]
    begin = time.perf_counter()
    with torch.inference_mode():
        lengths = [grid * grid for grid in model.grids]
        grids = [(prediction.grid, prediction.grid) for prediction, _ in images]
        logits = model(PackedBatch.from_list([rows for _, rows in images], grids=grids, lengths=lengths))
        probabilities, classes = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    ms_per_token = 1e3 * (time.perf_counter() - begin) / sum(prediction.n_tokens for prediction, _ in images)
    rows = zip(images, classes.tolist(), probabilities.tolist(), strict=True)
    for (prediction, _), indices, values in rows:
        prediction.ms += ms_per_token * prediction.n_tokens
        prediction.top = list(zip(indices, values, strict=True))
        if any(value != value for value in values):
            prediction.error = "the model's output is not a number"
    return [prediction for prediction, _ in batch]


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast predict`; 0, or 1 if any image failed."""
    with warnings.catch_warnings():
        # Pillow warns of large images and odd metadata; what it cannot read becomes an error of that image.
        warnings.filterwarnings("ignore", module="PIL")
        with open_output(args.output) as stream:
            return _predict(args, stream)


def _predict(args: argparse.Namespace, stream: TextIO) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args)
    grids = model.grids if args.grid == "mixed" else (args.grid,)
    if not set(grids) <= set(model.grids):
        raise UsageError(f"--grid: expected mixed or one of the model's {list(model.grids)}, got {args.grid}")
    top_k = min(args.top_k, model.num_classes)
    labels = read_labels(args.labels, model.num_classes) if args.labels else None
    text = FORMATS[args.format](top_k, labels.__getitem__ if labels else int)

    is_shown = stream.isatty()
    progress = BarProgress(sum(1 for _ in find_images(args.paths))) if sys.stderr.isatty() else Progress()
    decoded = read_ahead(find_images(args.paths), min(torch.get_num_threads(), MAX_DECODERS))
    prepared = map(Preparer(model, grids, args.exact), decoded)
    try:
        write(stream, text.header())
        for predictions in predict_batches(model, prepared, args.batch_tokens, top_k):
            with progress.aside() if is_shown else nullcontext():
                write(stream, "".join(map(text.row, predictions)))
            progress.update(predictions)
            for p in predictions:
                if p.error is not None and not (is_shown and args.format == "table"):
                    progress.say(f"error: {on_one_line(p.path)}: {on_one_line(p.error)}")
    finally:
        decoded.close()
        progress.close()
        write(stream, text.footer())
        progress.say(progress.summary())
    return 1 if progress.n_errors else 0


def load_model(args: argparse.Namespace):
    """The model in evaluation mode; what is wrong with its name or weights is a usage error."""
    if args.weights is None:
        print("warning: random weights: predictions are meaningless; give --weights FILE", file=sys.stderr)
    import_module("timm")  # create_model needs it; where it is missing, main says what to install
    try:
        model = revit_fast.create_model(args.model, weights=args.weights).eval()
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(str(error)) from error
    if model.num_classes < 1:
        raise UsageError(f"--model: {args.model} has no classifier to predict with")
    return model


def read_labels(path: str, n_classes: int) -> list[str]:
    """One class name per line, in the order of the model's classes."""
    try:
        with open(path, encoding="utf-8") as file:
            labels = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels: cannot read {path}: {error}") from error
    if len(labels) != n_classes:
        raise UsageError(f"--labels: the model has {n_classes} classes, but {path} has {len(labels)} lines")
    return labels

"""Trains an adaptive model that can be deployed from labelled images, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import PolicySpec
from revit_fast.io import names
from revit_fast.io.atomic import replaced, write_json
from revit_fast.models.vit import ReViT
from revit_fast.streaming.bundle import read_bundle, save_bundle
from revit_fast.streaming.pipeline import pipeline
from revit_fast.train.assigner import calibrate_on, train_assigner
from revit_fast.train.checks import (
    check_goal,
    check_lengths,
    check_outputs,
    rehearse_predictions,
    try_assigner,
)
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ImageSet
from revit_fast.train.evaluate import default_policies, evaluate, threshold_for
from revit_fast.train.labels import LengthLabels, predict_lengths
from revit_fast.train.log import percentages
from revit_fast.train.modes import in_training_modes
from revit_fast.train.pace import Pace
from revit_fast.train.report import Report
from revit_fast.train.run import BUNDLE, train
from revit_fast.train.splits import open_splits, warn_of_few
from revit_fast.train.stopping import stoppable
from revit_fast.train.timing import measure

TRAIN, LABELS, REPORT = "train", "labels.csv", "report"

GOAL = "fit.json"
"""File in the folder with the arguments of `fit` that are not those of the training."""

MAX_DROP = 0.003
ASSIGNER_IMAGES, LEAST_EPOCHS, MOST_EPOCHS = 500_000, 8, 30
"""Total number of thumbnails that an assigner is trained on, and the bounds of its number of epochs."""

MAX_SKEW = 0.02
"""Largest lead in accuracy on training over held-out images at which training images still teach an assigner."""

TIMED_IMAGES = 1024


@in_training_modes
def fit(
    config: TrainConfig,
    folder: Path,
    *,
    assigner: Mapping[str, Any] | None = None,
    budget: dict[str, float] | None = None,
    max_drop: float = MAX_DROP,
    device: str = "cpu",
    timed_images: int = TIMED_IMAGES,
    terminal: TextIO | None = None,
) -> Report | None:
    """Trains a model and its assigner, finds the threshold, evaluates, and writes a bundle.

    `splits.open_splits` says which images train the model, calibrate the assigner and are reported on; `fit_assigner`
    says which train the assigner. An interrupted run is resumed. The files in `folder` are `train/` (see
    `trainer.Trainer`), `fit.json` (the arguments that are not those of the training), `labels.csv`, `bundle/` (see
    `bundle.save_bundle`), and, if there are images for a report, `report.md`, `report.json` and, with matplotlib,
    `report.png`.

    What a later stage would refuse is refused before the training: arguments, test images, places for files.

    Args:
        config: configuration of the model's training; a `held_out_share` of 0 holds out the validation split, or
            `splits.HELD_OUT_SHARE` of the training images if there is none.
        folder: folder for all files.
        assigner: arguments of `TokenLengthAssigner`; by default those that `TokenLengthAssigner.for_model` chooses.
        budget: {"mean_tokens": n} or {"mean_gmacs": g} that the threshold keeps; None: `max_drop` decides.
        max_drop: accuracy, as a share, that the adaptive model may lose against the longest length.
        device: device for the training.
        timed_images: number of test images with which throughput is measured; 0: it is not measured.
        terminal: where progress is printed; None: nowhere.

    Returns:
        The evaluation; None if there are no images for a report.

    Raises:
        ValueError: under torchrun with several processes, because the steps after the training need a single process;
            for arguments, images or places that a later stage would refuse.
        Interrupted: after SIGINT or SIGTERM; the same call goes on.
        others: see `run.train`, `train_assigner` and `save_bundle`.
    """
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    if n_processes > 1:
        raise ValueError(
            f"fit: runs as one process, got {n_processes}; start `revit-fast train` with torchrun, then "
            "`train-assigner`, `calibrate` and `evaluate` without"
        )
    say = partial(names.say, terminal)
    config, images, held_out, test, text = open_splits(config.resolved())

    def check(model: ReViT, images: ImageSet, held_out: ImageSet) -> None:
        check_lengths(model, images, held_out)
        check_goal(model, budget, max_drop)
        if device != "cpu":
            rehearse_predictions(model.cpu())
        write_json(folder / GOAL, _goal(assigner, budget, max_drop))
        say(text)
        if (warning := warn_of_few(len(held_out))) is not None:
            say(warning)

    if assigner:
        try_assigner(config.grids, assigner)
    check_outputs(folder, (GOAL, LABELS, *(f"{REPORT}.{suffix}" for suffix in ("json", "md", "png"))), BUNDLE)
    train(config, folder / TRAIN, device=device, resume=True, terminal=terminal, sets=(images, held_out), check=check)
    with stoppable(say) as stop, stop.at_once():
        return _finished(config, folder, images, held_out, test, assigner, budget, max_drop, timed_images, say)


def _finished(
    config: TrainConfig,
    folder: Path,
    images: ImageSet,
    held_out: ImageSet,
    test: ImageSet | None,
    assigner: Mapping[str, Any] | None,
    budget: dict[str, float] | None,
    max_drop: float,
    timed_images: int,
    say: Callable[[str], None],
) -> Report | None:
    """The stages after the training, see `fit`; a signal ends them at once, because all files are written whole."""
    trained = read_bundle(folder / TRAIN / BUNDLE)
    model = trained.model
    tla, right, labels = fit_assigner(model, images, held_out, seed=config.seed, options=assigner, say=say)
    labels.save(folder / LABELS)
    try:
        policy = ("threshold", threshold_for(model, tla.calibration, right, budget, max_drop))
    except ValueError as error:  # only the trained assigner shows it; what has been trained is not lost
        policy = ("fixed", model.grids[0])
        say(f"warning: {error}; the bundle gives every image the longest grid")
    own = {"classes": trained.classes, "settings": trained.settings}
    save_bundle(folder / BUNDLE, model, tla, policy=policy, **own)
    report = None if test is None else _evaluated(model, tla, policy, test, timed_images, say)
    if report is None:
        say("no test split: nothing is evaluated")
    else:
        _write(report, folder, say)
        card = f"Trained by revit-fast on {len(images)} images. On the test split:\n\n{report.table()}"
        save_bundle(folder / BUNDLE, model, tla, policy=policy, card=card, **own)
    say(f"done: revit-fast predict IMAGES --model {folder / BUNDLE}")
    return report


def _goal(assigner: Mapping[str, Any] | None, budget: dict[str, float] | None, max_drop: float) -> dict[str, Any]:
    """The arguments that differ from the defaults."""
    given = {"assigner": dict(assigner or {}), "budget": budget}
    given["max_drop"] = None if budget is not None or max_drop == MAX_DROP else max_drop
    return {name: value for name, value in given.items() if value not in (None, {})}


@in_training_modes
def fit_assigner(
    model: ReViT,
    images: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[TokenLengthAssigner, np.ndarray, LengthLabels]:
    """Trains an assigner on the labels of one image set and calibrates it on those of another.

    The assigner is trained on the model's own training images, which are many, if the model's accuracy on them is at
    most `MAX_SKEW` above that on held-out images. Otherwise their labels would be too short, and it is trained on four
    fifths of the held-out images. In both cases it is calibrated on held-out images that it was not trained on. It
    learns by how much the probability of the right class falls at shorter lengths (`Predictions.sufficiency`); the
    label says this less precisely. The label of an image that no length classifies correctly is the shortest length,
    because more tokens would not help.

    Args:
        model: the trained model.
        images: images that the model was trained on.
        held_out: images that the model was not trained on.
        seed: seed of the assigner's weights and training.
        options: see `assigner` of `fit`.
        say: function that prints a line of progress.

    Returns:
        The assigner; the probability of the right class `[n_lengths, N]` for the calibration images; the labels of the
        images that it was trained on.
    """
    say(f"predicting {len(images)} training and {len(held_out)} held-out images at every grid")
    stage = partial(Pace, say)
    seen = predict_lengths(model, images, progress=stage("predicted training images"))
    unseen = predict_lengths(model, held_out, progress=stage("predicted held-out images"))
    rates = [p.correct(s.labels)[:, p.readable].mean(axis=1) for p, s in ((seen, images), (unseen, held_out))]
    by_grid = "/".join(map(str, model.grids))
    say(f"right at {by_grid}: training images {percentages(rates[0])}, held-out ones {percentages(rates[1])}")
    learns_from_seen = rates[0][0] - rates[1][0] <= MAX_SKEW
    lesson, teachers = (seen, images) if learns_from_seen else (unseen, held_out)
    labels = LengthLabels.of(lesson, teachers, unsolved="shortest")
    say(labels.summary())
    torch.manual_seed(seed)
    tla = TokenLengthAssigner(model.grids, **options) if options else TokenLengthAssigner.for_model(model)
    epochs = min(max(ASSIGNER_IMAGES // len(teachers), LEAST_EPOCHS), MOST_EPOCHS)
    history = train_assigner(
        tla,
        teachers,
        labels.labels,
        model=model,
        sufficiency=lesson.sufficiency(teachers.labels),
        objective="suffices",
        epochs=epochs,
        seed=seed,
        stage=stage,
    )
    best = history.epochs[history.best - 1]
    say(
        f"assigner: epoch {history.best} of {len(history.epochs)}, right for {best.held_out_accuracy:.1%} of "
        f"{len(history.held_out)} images, {max(history.label_shares):.1%} by chance"
    )
    if history.collapsed:
        say("warning: argmax gives every image the same grid; the threshold may still tell them apart")
    right = unseen.probability(held_out.labels)
    places = history.held_out if not learns_from_seen else calibrate_on(tla, held_out, model, unseen, stage)
    if (warning := warn_of_few(len(places))) is not None:
        say(warning)
    return tla, right[:, places], labels


def _evaluated(
    model: ReViT,
    tla: TokenLengthAssigner,
    policy: PolicySpec,
    test: ImageSet,
    timed_images: int,
    say: Callable[[str], None],
) -> Report:
    say(f"evaluating on {len(test)} images")
    predictions = predict_lengths(model, test, progress=Pace(say, "predicted test images"))
    report = evaluate(model, tla, test, policies=[*default_policies(), policy], match=policy, predictions=predictions)
    if timed_images:
        readable = np.flatnonzero(predictions.readable)[:timed_images]
        pixels = [test.image(int(i)) for i in readable]
        report = measure(report, pipeline(model, tla, policy=policy), pixels)
    return report


def _write(report: Report, folder: Path, say: Callable[[str], None]) -> None:
    report.save(folder / f"{REPORT}.json")
    with replaced(folder / f"{REPORT}.md") as temporary:
        temporary.write_text(report.table(), encoding="utf-8")
    try:
        report.plot(folder / f"{REPORT}.png")
    except ImportError as error:
        say(f"{REPORT}.png is left out; {error}")

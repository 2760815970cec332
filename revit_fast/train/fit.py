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
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.environment import cpu_name
from revit_fast.inference.optimize import optimize
from revit_fast.io import names
from revit_fast.io.atomic import replaced, write_json
from revit_fast.models.vit import ReViT
from revit_fast.streaming.bundle import read_bundle, save_bundle
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.assigner import calibrate_on, train_assigner
from revit_fast.train.checks import (
    check_goal,
    check_lengths,
    check_outputs,
    rehearse_predictions,
    try_assigner,
)
from revit_fast.train.config import TrainConfig
from revit_fast.train.contest import Timing, hold, report_on
from revit_fast.train.data import ImageSet
from revit_fast.train.kept import Kept
from revit_fast.train.labels import LengthLabels, Predictions
from revit_fast.train.log import percentages
from revit_fast.train.modes import in_training_modes
from revit_fast.train.pace import Pace
from revit_fast.train.report import Report
from revit_fast.train.run import BUNDLE, train
from revit_fast.train.splits import open_splits, warn_of_few
from revit_fast.train.stopping import stoppable
from revit_fast.train.timing import ROUNDS, rates

TRAIN, LABELS, REPORT, KEPT = "train", "labels.csv", "report", "predictions"

GOAL = "fit.json"
"""File in the folder with the arguments of `fit` that are not those of the training."""

MAX_DROP = 0.003
ASSIGNER_IMAGES, LEAST_EPOCHS, MOST_EPOCHS = 500_000, 8, 30
"""Total number of thumbnails that an assigner is trained on, and the bounds of its number of epochs."""

MAX_SKEW = 0.02
"""Largest lead in accuracy on training over held-out images at which training images still teach an assigner."""

TIMED_IMAGES = 1024

TIMED_S = 60.0
"""About how long the measurement of throughput may take, in seconds."""


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
    """Trains a model and its assigner, finds the policy that wins on held-out images, evaluates, and writes a bundle.

    `splits.open_splits` says which images train the model, calibrate the assigner and are reported on; `fit_assigner`
    says which train the assigner. On the calibration images compete the fixed lengths, the assigner's threshold, the
    cascade and the assigned cascade that keep the goal (`contest.hold`); the bundle takes the winner. An interrupted
    run is resumed. The files in `folder` are `train/` (see `trainer.Trainer`), `fit.json` (the arguments that are not
    those of the training), `predictions/` (see `kept.Kept`), `labels.csv`, `bundle/` (see `bundle.save_bundle`), and,
    if there are images for a report, `report.md`, `report.json` and, with matplotlib, `report.png`.

    What a later stage would refuse is refused before the training: arguments, test images, places for files.

    Args:
        config: configuration of the model's training; a `held_out_share` of 0 holds out the validation split, or
            `splits.HELD_OUT_SHARE` of the training images if there is none.
        folder: folder for all files.
        assigner: arguments of `TokenLengthAssigner`; by default those that `TokenLengthAssigner.for_model` chooses.
        budget: {"mean_tokens": n} or {"mean_gmacs": g} that the threshold keeps; None: `max_drop` decides.
        max_drop: accuracy, as a share, that the adaptive model may lose against the longest length.
        device: device for the training.
        timed_images: largest number of held-out images with which throughput is measured; 0: it is not measured.
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
    fast = optimize(model)
    kept = Kept(folder / KEPT, fast, say=say)

    def make() -> tuple[TokenLengthAssigner, np.ndarray]:
        tla, places, labels = fit_assigner(
            model, images, held_out, kept.predictions, seed=config.seed, options=assigner, say=say
        )
        labels.save(folder / LABELS)
        return tla, places

    tla, places = kept.assigner([assigner, config.seed], (images, held_out), make)
    judge, predictions = held_out.subset(places), kept.predictions("held-out", held_out).subset(places)
    time = partial(_timed, fast, tla, judge, timed_images, kept) if timed_images else None
    contest = hold(fast, tla, judge, predictions, budget=budget, max_drop=max_drop, time=time, say=say)
    own = {"classes": trained.classes, "settings": trained.settings, "policy": contest.policy}
    data = f"Trained by revit-fast on {len(images):,} images of {len(trained.classes)} classes."
    report = None
    if test is None:
        shown = report_on(fast, tla, judge, predictions, contest, default=False)
        say(f"no test split: nothing else is evaluated. {shown.verdict}")
        of = f"the {len(judge):,} held-out images that chose the policy, which flatter it"
    else:
        save_bundle(folder / BUNDLE, model, tla, **own)
        say(f"evaluating on {len(test)} images")
        shown = report = report_on(fast, tla, test, kept.predictions("test", test), contest, default=True)
        _write(report, folder, say)
        of = f"{len(test):,} test images; the policy was chosen on {len(judge):,} held-out ones"
    card = f"{data} The results are of {of}.\n\n{shown.table()}"
    save_bundle(folder / BUNDLE, model, tla, card=card, **own)
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
    predict: Callable[[str, ImageSet], Predictions],
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
        predict: function that gives the model's predictions for a set, by its name, "training" or "held-out".
        seed: seed of the assigner's weights and training.
        options: see `assigner` of `fit`.
        say: function that prints a line of progress.

    Returns:
        The assigner; the places in `held_out` of the images that it was calibrated on; the labels of the images that it
        was trained on.
    """
    say(f"predicting {len(images)} training and {len(held_out)} held-out images at every grid")
    stage = partial(Pace, say)
    seen, unseen = predict("training", images), predict("held-out", held_out)
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
    places = calibrate_on(tla, held_out, model, unseen, stage) if learns_from_seen else history.held_out
    if (warning := warn_of_few(len(places))) is not None:
        say(warning)
    return tla, places, labels


def _timed(
    fast: ReViT, tla: TokenLengthAssigner, images: ImageSet, most: int, kept: Kept, policies: dict[str, PolicySpec]
) -> Timing:
    """The throughput of policies by name, on at most `most` of the images."""

    def measure() -> Timing:
        prep = AdaptivePreprocessor.for_model(fast, tla, policy=("fixed", fast.grids[0]))
        pixels = [images.image(i) for i in range(min(most, len(images)))]
        return rates(policies, AdaptivePipeline(fast, prep), pixels, seconds=TIMED_S)

    about = [list(policies.values()), len(images), most, ROUNDS, TIMED_S, cpu_name(), torch.get_num_threads()]
    return kept.times(about, measure)


def _write(report: Report, folder: Path, say: Callable[[str], None]) -> None:
    report.save(folder / f"{REPORT}.json")
    with replaced(folder / f"{REPORT}.md") as temporary:
        temporary.write_text(report.table(), encoding="utf-8")
    try:
        report.plot(folder / f"{REPORT}.png")
    except ImportError as error:
        say(f"{REPORT}.png is left out; {error}")

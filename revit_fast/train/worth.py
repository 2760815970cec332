"""What could be gained by giving every image its own length, said before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.inference.optimize import OptimizedReViT
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.data import ImageSet
from revit_fast.train.evaluate import evaluate
from revit_fast.train.labels import predict_lengths
from revit_fast.train.report import Report, Row
from revit_fast.train.timing import rates
from revit_fast.train.verdict import EQUAL, FEW, with_verdict

BOUNDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences at which the cascades stop."""

TIMED_S, TIMED_IMAGES = 30.0, 256

WORTH = 0.1
"""Share of the multiply-adds that must be saved, with no more than `EQUAL` of accuracy lost, to be worth a training."""


def worth_it(
    fast: OptimizedReViT,
    images: ImageSet,
    *,
    trained: bool,
    seconds: float | None = TIMED_S,
    unreadable: dict[int, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """What a model gives at each length on some images, and what choosing lengths could gain; minutes, no training.

    The rows are the fixed lengths, random lengths, the entropy heuristic, confidence cascades and the oracle, which
    takes the smallest length that is right: no assigner of this model can do better.

    Args:
        fast: the optimised model.
        images: labelled images that the model was not trained on.
        trained: whether the model was trained at its shorter lengths. A plain ViT was not.
        seconds: about how long throughput is measured; None: it is not measured.
        unreadable: takes the reason for every image that could not be read, by its place.
        progress: see `predict_lengths`.

    Returns:
        The report, with a verdict.
    """
    predictions = predict_lengths(fast, images, progress=progress)
    if unreadable is not None:
        unreadable.update(predictions.unreadable)
    report = evaluate(fast, None, images, cascade=BOUNDS, predictions=predictions)
    if seconds is not None:
        prep = AdaptivePreprocessor.for_model(fast, policy=("fixed", fast.grids[0]))
        places = np.flatnonzero(predictions.readable)[:TIMED_IMAGES]
        pixels = [images.image(int(i)) for i in places]
        policies = {row.name: row.policy for row in report.rows if row.kind in ("fixed", "cascade", "oracle")}
        report = report.with_times(*rates(policies, AdaptivePipeline(fast, prep), pixels, seconds=seconds))
    taken = with_verdict(report).taken
    return replace(report, verdict=prospects(report, trained), taken=taken)


def prospects(report: Report, trained: bool) -> str:
    """One paragraph: what is to be gained at most, what a cascade gains already, and whether a training is worth it.

    Args:
        report: the report, whose rows are those of `worth_it`.
        trained: see `worth_it`.
    """
    fixed = [r for r in report.rows if r.kind == "fixed"]
    longest, oracle = fixed[0], report.row("oracle")
    enough = longest.accuracy - EQUAL
    good = min((r for r in fixed if r.accuracy >= enough), key=lambda r: r.gmacs)
    cascades = [r for r in report.rows if r.kind == "cascade" and r.accuracy >= enough]
    cascade = min(cascades, key=lambda r: r.gmacs, default=None)
    room = 1 - oracle.gmacs / good.gmacs
    if good is fixed[-1]:
        said = f"It is not worth it: the shortest length, {good.name}, loses at most half a point to the longest."
    elif cascade is not None and cascade.gmacs <= (1 - WORTH) * good.gmacs and not _slower(cascade, good):
        saved = 1 - cascade.gmacs / good.gmacs
        said = f"It is worth it: {cascade.name} already saves {saved:.0%} of the multiply-adds of {good.name}."
    elif room >= WORTH:
        said = (
            f"It may be worth it: a perfect choice saves {room:.0%} of the multiply-adds of {good.name}, but no "
            f"cascade of this model saves {WORTH:.0%} yet."
        )
    else:
        said = f"It is not worth it: even a perfect choice saves only {max(room, 0):.0%} against {good.name}."
    facts = [f"On {report.n_images:,} images {longest.name} gets {longest.accuracy:.2%} right"]
    facts += [_against(row, longest) for row in fixed[1:]]
    bound = f"The oracle, a bound that no assigner of this model passes: {_against(oracle, longest)}."
    text = f"{said} {', '.join(facts)}. {bound}"
    text += (
        f" Without training: {_against(cascade, longest)}." if cascade is not None else " No cascade is as accurate."
    )
    if not trained:
        text += (
            " This model was not trained at its shorter lengths. Training them raises their accuracy as a rule: take "
            "these numbers as a lower bound of what a trained model gains."
        )
    low, high = fixed[-1].interval
    if report.n_images < FEW:
        text += f" These are few images: differences below about {50 * (high - low):.1f} points do not show."
    return text


def _against(row: Row, longest: Row) -> str:
    """A row's accuracy and cost against those of the longest length."""
    ends = f" ({100 * row.interval[0]:+.2f} to {100 * row.interval[1]:+.2f})" if row.interval else ""
    speed = "" if row.time is None else f" and {row.time.ratio:.2f} times its images/s"
    cost = f"{row.gmacs / longest.gmacs:.0%} of its multiply-adds"
    return f"{row.name} {100 * row.difference:+.2f} points{ends} at {cost}{speed}"


def _slower(row: Row, other: Row) -> bool:
    return row.time is not None and row.time.images_per_s <= other.time.images_per_s

"""The policies that could be deployed, found and compared on held-out images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import PolicySpec, confidence, make_policy
from revit_fast.models.macs import forward_macs
from revit_fast.models.vit import ReViT
from revit_fast.train.choice import HeldOut, Option, cascade_for, costs_of, spent, winner
from revit_fast.train.data import ImageSet
from revit_fast.train.evaluate import default_policies, evaluate, name_of_policy, threshold_for
from revit_fast.train.labels import Predictions
from revit_fast.train.report import Report, Time
from revit_fast.train.verdict import option_of, with_verdict

Timing = tuple[Mapping[str, Time], Mapping[str, Any]]


class Contest(NamedTuple):
    """The result of a contest.

    Attributes:
        policies: the policies that took part, by their names in reports: every fixed length, then those that keep the
            goal by the assigner, by the model's confidence, and by both.
        policy: the winner, see `choice.winner`.
        timing: times by name, and the machine; None if nothing was measured.
    """

    policies: dict[str, PolicySpec]
    policy: PolicySpec
    timing: Timing | None


def hold(
    model: ReViT,
    tla: TokenLengthAssigner,
    images: ImageSet,
    predictions: Predictions,
    *,
    budget: Mapping[str, float] | None = None,
    max_drop: float = 0.0,
    time: Callable[[dict[str, PolicySpec]], Timing] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Contest:
    """Finds the policies that keep a goal on held-out images, and the one that wins there.

    Args:
        model: the model.
        tla: its assigner, calibrated on these images, in this order.
        images: images that neither the model nor the assigner was trained on, all readable.
        predictions: the model's predictions for them.
        budget: see `evaluate.threshold_for`.
        max_drop: see `evaluate.threshold_for`.
        time: function that measures policies by name.
        say: function that prints a line.
    """
    right = predictions.probability(images.labels)
    gmacs = [forward_macs(model, n) / 1e9 for n in model.lengths]
    costs, limit = costs_of(budget, model.lengths, gmacs), None if budget is None else next(iter(budget.values()))
    held_out = HeldOut(tla.calibration.suffices, confidence(predictions.logits), right, costs)
    found: list[PolicySpec] = [("fixed", grid) for grid in model.grids]
    for way in (
        lambda: ("threshold", threshold_for(model, tla.calibration, right, budget, max_drop)),
        partial(cascade_for, held_out, limit, max_drop, assigned=False),
        partial(cascade_for, held_out, limit, max_drop, assigned=True),
    ):
        try:
            found.append(way())
        except ValueError as error:  # only the trained model shows it; what has been trained is not lost
            say(f"warning: {error}; that policy is left out")
    policies = {name_of_policy(spec, spec[0] not in ("fixed", "cascade")): spec for spec in found}
    timing = None if time is None else time(policies)
    options = []
    for name, spec in policies.items():
        policy = make_policy(spec, model.grids)
        first, last = held_out.lengths(policy.threshold or 0.0, policy.bound or 0.0)
        if spec[0] == "fixed":
            first = last = np.full(len(images), model.grids.index(spec[1]))
        asked = tla.macs / 1e9 if policy.needs == "probabilities" else 0.0
        own = right[last, np.arange(len(images))], float(spent(gmacs, first, last).mean() + asked)
        speed = None if timing is None else timing[0][name].images_per_s
        options.append(Option(spec, *own, float(spent(costs, first, last).mean()), speed))
    won = winner(options, limit, max_drop).policy
    say(f"held-out images ({len(images)}): {option_of(won)} wins among {', '.join(policies)}")
    return Contest(policies, won, timing)


def report_on(
    model: ReViT,
    tla: TokenLengthAssigner,
    images: ImageSet,
    predictions: Predictions,
    contest: Contest,
    *,
    default: bool,
) -> Report:
    """The evaluation of a contest's policies on some images, with the verdict.

    Args:
        model: see `evaluate`.
        tla: see `evaluate`.
        images: see `evaluate`.
        predictions: see `evaluate`.
        contest: the contest.
        default: whether `evaluate`'s own thresholds are evaluated, too.
    """
    given = [spec for name, spec in contest.policies.items() if name.startswith("TLA ")]
    bounds = [spec[1] for spec in contest.policies.values() if spec[0] == "cascade"]
    more = {} if default else {"cascade": ()}
    specs = [*(default_policies() if default else ()), *given, *(("cascade", bound) for bound in bounds)]
    match = given[0] if given else "argmax"
    report = evaluate(model, tla, images, policies=specs, match=match, predictions=predictions, **more)
    if contest.timing is not None:
        report = report.with_times(*contest.timing)
    return with_verdict(report, taken=contest.policy, among=tuple(contest.policies))

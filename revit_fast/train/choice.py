"""The choice of a policy on held-out images: the thresholds of a cascade, and which way to choose lengths wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from revit_fast.adaptive.policies import PolicySpec, last_length, smallest_sufficient
from revit_fast.train.statistics import mean_interval

MAX_CANDIDATES = 1000
"""Largest number of values of a threshold that are tried."""

LEAST_SAVING = 0.05
"""Share of a fixed length's multiply-adds that a choice for every image must save. To choose takes time, too."""


class HeldOut(NamedTuple):
    """What is known of held-out images, N of them, and of the model's lengths, the longest first.

    Attributes:
        suffices: P(label <= length) by the assigner, `[N, n_lengths]`.
        sureness: the model's largest class probability, `[n_lengths, N]`.
        right: `[n_lengths, N]`: the probability of the right class, or bool, whether the class is right.
        costs: cost of an image at each length, decreasing, `[n_lengths]`.
    """

    suffices: np.ndarray
    sureness: np.ndarray
    right: np.ndarray
    costs: Sequence[float]

    def lengths(self, threshold: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Index `[N]` of the lengths at which an assigned cascade begins and ends."""
        first = smallest_sufficient(self.suffices, threshold)
        return first, last_length(first, self.sureness, confidence)


class Option(NamedTuple):
    """A way to choose lengths, and what it does for held-out images.

    Attributes:
        policy: the policy.
        right: what an image's last length gives it, see `HeldOut.right`, `[N]`.
        gmacs: mean multiply-adds of an image, in billions, with those of the assigner if it is used.
        cost: mean cost of an image as the budget counts it; None without a budget.
        images_per_s: measured throughput; None if it was not measured.
    """

    policy: PolicySpec
    right: np.ndarray
    gmacs: float
    cost: float | None = None
    images_per_s: float | None = None

    @property
    def is_fixed(self) -> bool:
        return self.policy[0] == "fixed"


def candidates(values: np.ndarray) -> np.ndarray:
    """Thresholds to try, ascending: 0, 1 and the values at which the choice for an image changes, thinned by rank."""
    found = np.unique(np.concatenate([[0.0, 1.0], values.ravel()]))
    if len(found) <= MAX_CANDIDATES:
        return found
    return found[np.linspace(0, len(found) - 1, MAX_CANDIDATES).round().astype(int)]


def spent(costs: Sequence[float] | np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Cost of every image, `[N]`, that runs at the lengths from `first` to the longer `last`, each in its own pass."""
    n = len(costs)
    return np.array([[sum(costs[j : i + 1]) for j in range(n)] for i in range(n)], dtype=np.float64)[first, last]


def means(held_out: HeldOut, thresholds: np.ndarray, confidences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over images of `right` and of the cost at every pair of thresholds, each `[n_thresholds, n_confidences]`.

    The lengths at which an image begins and ends are the same in a rectangle of pairs. The rectangles are added by
    their corners, and the sums of the corners over both axes are the totals.

    Args:
        held_out: images and lengths.
        thresholds: values of θ, ascending.
        confidences: values of p, ascending.
    """
    n_lengths, n_images = held_out.sureness.shape
    corners = np.zeros((2, len(thresholds) + 1, len(confidences) + 1))
    for first in range(n_lengths):
        # θ from which on the next shorter length does not suffice, and from which on this one does not.
        low, high = (
            np.searchsorted(thresholds, held_out.suffices[:, i], "right")
            if i < n_lengths
            else np.zeros(n_images, dtype=int)
            for i in (first + 1, first)
        )
        begin, best, cost = np.zeros(n_images, dtype=int), np.full(n_images, -np.inf), 0.0
        for last in range(first, -1, -1):
            best, cost = np.maximum(best, held_out.sureness[last]), cost + held_out.costs[last]
            end = np.searchsorted(confidences, best, "right") if last else np.full(n_images, len(confidences))
            for row, column, sign in ((low, begin, 1), (low, end, -1), (high, begin, -1), (high, end, 1)):
                np.add.at(corners[0], (row, column), sign * held_out.right[last].astype(np.float64))
                np.add.at(corners[1], (row, column), sign * cost)
            begin = end
    right, costs = corners.cumsum(axis=1).cumsum(axis=2)[:, :-1, :-1] / n_images
    return right, costs


def cascade_for(held_out: HeldOut, budget: float | None, max_drop: float, *, assigned: bool) -> PolicySpec:
    """The cascade that keeps a goal on held-out images; an assigned one's two thresholds are chosen together.

    Up to `MAX_CANDIDATES` values of each threshold are tried, all in pairs.

    Args:
        held_out: images and lengths.
        budget: largest mean cost of an image: among the cascades that keep it, the most is right; None: `max_drop`
            decides.
        max_drop: share that may be lost of the mean of `right` at the longest length. The cascade is the cheapest one
            that loses no more, as all with larger thresholds do: what keeps it by chance is rejected.
        assigned: whether the assigner chooses the first length; otherwise it is the shortest.

    Raises:
        ValueError: if no cascade keeps the goal.
    """
    thresholds = candidates(held_out.suffices[:, 1:]) if assigned else np.zeros(1)
    confidences = candidates(held_out.sureness[1:])
    right, costs = means(held_out, thresholds, confidences)
    if budget is None:
        keeps = right >= held_out.right[0].mean() - max_drop - 1e-12
        for axis in (0, 1):
            keeps = np.flip(np.logical_and.accumulate(np.flip(keeps, axis), axis=axis), axis)
    else:
        within = costs <= budget * (1 + 1e-12)
        keeps = within & (right >= np.max(right, where=within, initial=-np.inf) - 1e-12)
    if not keeps.any():
        raise ValueError(
            "drop: even θ = 1 and p = 1 lose more" if budget is None else f"budget: no cascade costs {budget:g}"
        )
    i, j = np.unravel_index(np.where(keeps, costs, np.inf).argmin(), costs.shape)
    if not assigned:
        return "cascade", float(confidences[j])
    return "assigned-cascade", {"threshold": float(thresholds[i]), "confidence": float(confidences[j])}


def winner(options: Sequence[Option], budget: float | None, max_drop: float) -> Option:
    """The option to deploy.

    Without a budget: the fixed length with the fewest multiply-adds that loses at most `max_drop` of the mean of
    `right` at the longest length. A choice for every image wins against it if it, too, loses no more, saves
    `LEAST_SAVING` of the multiply-adds, and is faster where that was measured. Of several the cheapest wins, or a
    cascade, which needs no assigner, if the cheapest one does not save `LEAST_SAVING` against it.

    With a budget: the fixed length with the largest mean of `right` within the budget. A choice for every image within
    the budget wins against it if the 95 % interval of its lead lies above zero.

    Args:
        options: the options; the first is the longest fixed length.
        budget: largest `Option.cost`; None: `max_drop` decides.
        max_drop: see above.
    """
    if budget is None:
        kept = [o for o in options if o.right.mean() >= options[0].right.mean() - max_drop - 1e-12]
        kept.sort(key=lambda o: o.gmacs)
        fixed = next(o for o in kept if o.is_fixed)
        rivals = [o for o in kept if not o.is_fixed and o.gmacs <= (1 - LEAST_SAVING) * fixed.gmacs]
        rivals = [o for o in rivals if o.images_per_s is None or o.images_per_s > fixed.images_per_s]
        near = [o for o in rivals if rivals[0].gmacs > (1 - LEAST_SAVING) * o.gmacs]
        rivals = [o for o in near if o.policy[0] == "cascade"] or rivals
    else:
        kept = [o for o in options if o.cost <= budget * (1 + 1e-12)]
        kept.sort(key=lambda o: -o.right.mean())
        fixed = next(o for o in kept if o.is_fixed)
        rivals = [o for o in kept if not o.is_fixed and mean_interval(o.right - fixed.right)[0] > 0]
    return rivals[0] if rivals else fixed


def costs_of(goal: Mapping[str, float] | None, tokens: Sequence[float], gmacs: Sequence[float]) -> Sequence[float]:
    """Cost of an image at each length as a budget counts it; in multiply-adds without one."""
    return tokens if goal is not None and "mean_tokens" in goal else gmacs

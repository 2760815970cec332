"""Compares an adaptive model with fixed lengths and simple ways to choose lengths, in accuracy, cost and time.

All accuracies follow from one set of predictions at every length. Time is measured separately, see `timing.measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import (
    Calibration,
    Evidence,
    Policy,
    PolicySpec,
    confidence,
    last_length,
    make_policy,
    smallest_sufficient,
)
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.inference.inference_copy import dtype_name
from revit_fast.models.macs import forward_macs
from revit_fast.models.vit import ReViT
from revit_fast.train.choice import candidates, spent
from revit_fast.train.data import ImageSet
from revit_fast.train.labels import UNSOLVED, Predictions, decoded_chunks, length_labels, predict_lengths
from revit_fast.train.report import Report, Row
from revit_fast.train.statistics import mcnemar, paired_interval

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds θ of the assigner's policies, and confidence bounds of the cascade."""

N_RANDOM = 10
"""Number of seeds of the random baseline."""


def evaluate(
    model: ReViT,
    tla: TokenLengthAssigner | None,
    images: ImageSet,
    *,
    policies: Sequence[PolicySpec] | None = None,
    cascade: Sequence[float] = THRESHOLDS,
    settings: Mapping[str, Any] | None = None,
    predictions: Predictions | None = None,
    unsolved: str = "longest",
    match: PolicySpec = "argmax",
    n_random: int = N_RANDOM,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Accuracy and cost of every policy and of the baselines.

    The baselines are:

    - fixed: every length alone;
    - random: random lengths with the shares that the policy `match` gives (mean over seeds);
    - oracle: the smallest length that classifies the image correctly;
    - cascade: longer and longer lengths run until the largest class probability reaches a bound, and all of them cost;
    - entropy: images with higher entropy of grey values get longer lengths, with the shares that `match` gives.

    Args:
        model: the `ReViT`, of which an optimised copy is made, or such a copy.
        tla: its assigner; None: only baselines are reported, random and entropy with equal shares.
        images: labelled images that neither the model nor the assigner was trained on.
        policies: policies of the assigner and others, see `policies.make_policy`; by default `default_policies`.
        cascade: bounds of the confidence cascade.
        settings: preprocessing that replaces the model's.
        predictions: result of `predict_lengths` for this model and these images, if it is known already.
        unsolved: the oracle's length for an image that no length classifies correctly, see `labels.length_labels`.
        match: policy whose shares the random and entropy baselines take, usually the one to be deployed.
        n_random: number of seeds of the random baseline, at least 5.
        progress: see `predict_lengths`.

    Raises:
        ValueError: if predictions, model and images do not fit each other, or no image can be read.
    """
    if n_random < 5:
        raise ValueError(f"n_random: expected at least 5 seeds, got {n_random}")
    prep = AdaptivePreprocessor.for_model(model, tla, policy=("fixed", model.grids[0]), **dict(settings or {}))
    specs = [] if tla is None else [*(default_policies() if policies is None else policies), match]
    *made, matched = [
        make_policy(spec, model.grids, calibration=tla.calibration, macs=prep.macs) for spec in specs
    ] or [None]
    for bound in cascade:
        if not 0.0 <= bound <= 1.0:
            raise ValueError(f"cascade: expected bounds in [0, 1], got {bound!r}")
    if unsolved not in UNSOLVED:
        raise ValueError(f"unsolved: expected one of {', '.join(UNSOLVED)}, got {unsolved!r}")
    if predictions is None:
        predictions = predict_lengths(model, images, settings=settings, progress=progress)
    if predictions.grids != model.grids or predictions.logits.shape[1] != len(images):
        raise ValueError(
            f"predictions: of {predictions.logits.shape[1]} images at grids {predictions.grids}; expected "
            f"{len(images)} images at {model.grids}"
        )
    keep = predictions.readable
    if not keep.any():
        raise ValueError(f"images: none of {len(images)} can be read; the first: {predictions.unreadable[0]}")
    evidence = gather_evidence(prep, images)
    tally = _Tally(model, predictions.correct(images.labels)[:, keep], 0 if tla is None else tla.macs)
    sureness = confidence(predictions.logits[:, keep])
    for i, grid in enumerate(model.grids):
        tally.add(name_of_policy(("fixed", grid)), "fixed", tally.all_at(i), ("fixed", grid))
    shares = np.full(len(model.grids), 1 / len(model.grids))
    cascades = [make_policy(("cascade", float(bound)), model.grids) for bound in cascade]
    for policy in made:
        if policy.bound is not None and policy.threshold is None:
            cascades.append(policy)
        else:
            tally.add_policy(policy, *_lengths(policy, evidence, sureness))
    if matched is not None:
        shares = np.bincount(_lengths(matched, evidence, sureness)[1], minlength=len(shares)) / len(evidence.index)
    tally.add_random(shares, n_random, model.grids)
    by_entropy, bits = matched_entropy(evidence.entropy, shares)
    tally.add("entropy", "entropy", by_entropy, ("entropy", bits))
    for policy in cascades:
        tally.add_policy(policy, *_lengths(policy, evidence, sureness))
    oracle = length_labels(tally.correct, "smallest", "longest" if unsolved == "drop" else unsolved)
    tally.add("oracle", "oracle", oracle, ("fixed", [model.grids[i] for i in oracle]))
    return Report(
        rows=tuple(tally.rows.values()),
        right=tally.right,
        correct=tally.correct,
        grids=model.grids,
        n_images=int(keep.sum()),
        n_unreadable=len(predictions.unreadable),
        n_classes=model.num_classes,
        label_shares=tuple((np.bincount(oracle, minlength=len(model.grids)) / len(oracle)).tolist()),
        unsolved_share=float((~tally.correct.any(axis=0)).mean()),
        assigner_gmacs=tally.assigner_gmacs,
        dtype=dtype_name(model),
    )


def default_policies() -> list[PolicySpec]:
    """argmax and the thresholds of `THRESHOLDS`."""
    return ["argmax", *(("threshold", θ) for θ in THRESHOLDS)]


def name_of_policy(spec: PolicySpec, asks_assigner: bool = False) -> str:
    """The name of a policy in a report."""
    name, argument = spec if isinstance(spec, (tuple, list)) else (spec, None)
    if name == "cascade":
        return f"cascade {argument:g}"
    if name == "fixed" and isinstance(argument, (int, np.integer)):
        return f"fixed {argument}x{argument}"
    if isinstance(argument, Mapping):
        argument = ", ".join(f"{key} {value:g}" for key, value in argument.items() if isinstance(value, (int, float)))
    if isinstance(argument, float):
        argument = f"{argument:.6g}"
    return ("TLA " if asks_assigner else "policy ") + (name if argument is None else f"{name} {argument}")


def _lengths(policy: Policy, evidence: Evidence, sureness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index `[N]` of the lengths at which a policy begins and ends; only cascades go on after the first."""
    first = policy.choose(evidence)
    return first, first if policy.bound is None else last_length(first, sureness, policy.bound)


def gather_evidence(prep: AdaptivePreprocessor, images: ImageSet) -> Evidence:
    """The inputs of policies for every readable image, bitwise as in a pipeline (on a CPU)."""
    probabilities, entropy, index = [], [], []
    by_entropy = prep.with_policy("entropy")
    by_assigner = None if prep.tla is None else prep.with_policy("argmax")
    for places, pixels in decoded_chunks(images, {}):
        index.append(places)
        entropy.append(by_entropy.assign(pixels).entropy)
        if by_assigner is not None:
            probabilities.append(by_assigner.assign(pixels).probabilities)
    found = np.concatenate(probabilities) if probabilities else None
    return Evidence(np.concatenate(index), found, np.concatenate(entropy))


def matched_entropy(entropy: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Lengths `[N]` by falling entropy, with the given shares of images, and the entropies at their boundaries.

    With these entropies the policy ("entropy", bits) makes the same choice, up to ties.
    """
    falling = np.argsort(-entropy, kind="stable")
    ends = np.rint(np.cumsum(shares) * len(entropy)).astype(int)
    chosen = np.empty(len(entropy), dtype=np.int64)
    chosen[falling] = np.searchsorted(ends[:-1], np.arange(len(entropy)), side="right")
    ordered = entropy[falling]
    bits = [float(ordered[end - 1]) if end > 0 else float(np.nextafter(ordered[0], np.inf)) for end in ends[:-1]]
    return chosen, bits


def threshold_for(
    model: ReViT,
    calibration: Calibration,
    right: np.ndarray,
    budget: Mapping[str, float] | None,
    max_drop: float,
) -> float:
    """The threshold θ that keeps a budget, or without one an accuracy, on an assigner's calibration images.

    Args:
        model: the assigner's model.
        calibration: calibration of the assigner.
        right: results for the calibration images, see `threshold_for_drop`.
        budget: {"mean_tokens": n} or {"mean_gmacs": g}; None: `max_drop` decides.
        max_drop: see `threshold_for_drop`.

    Raises:
        ValueError: if no θ keeps it.
    """
    if budget is None:
        return threshold_for_drop(calibration, right, max_drop)
    macs = [forward_macs(model, n) for n in model.lengths]
    return make_policy(("budget", budget), model.grids, calibration=calibration, macs=macs).threshold


def threshold_for_drop(calibration: Calibration, right: np.ndarray, drop: float) -> float:
    """The smallest θ for which, as for all larger θ, accuracy is at most `drop` below that of the longest length.

    Up to `choice.MAX_CANDIDATES` values are tried. The condition on larger θ rejects a θ that keeps the accuracy by
    chance.

    Args:
        calibration: calibration of the assigner on these images.
        right: `[n_lengths, N]` for the same images: bool, whether a length classifies an image correctly, or the
            probability of the right class (`Predictions.probability`), whose mean is less noisy.
        drop: accuracy that may be lost, as a share: 0.01 is one per cent.

    Raises:
        ValueError: if no θ keeps it.
    """
    if right.shape != calibration.suffices.shape[::-1]:
        raise ValueError(
            f"right: expected {list(calibration.suffices.shape[::-1])}, one column for every image that the "
            f"assigner was calibrated on, got {list(right.shape)}"
        )
    right = right.astype(np.float64)
    columns, kept = np.arange(right.shape[1]), None
    least = right[0].mean() - drop - 1e-12
    for θ in candidates(calibration.suffices[:, 1:])[::-1]:
        if right[smallest_sufficient(calibration.suffices, θ), columns].mean() < least:
            break
        kept = float(θ)
    if kept is None:
        raise ValueError(
            f"drop: even θ = 1 loses more than {drop:.2%} of accuracy; allow more, or use the longest grid for all"
        )
    return kept


class _Tally:
    """Computes the cost and the accuracy of choices of lengths, and collects their rows by name.

    Args:
        model: model whose costs are counted.
        correct: bool `[n_lengths, N]`, whether a length classifies an image correctly.
        assigner_macs: multiply-adds of the assigner for one image.

    Attributes:
        rows: rows by name; one that is there already is not computed again.
        right: whether each image is classified correctly, bool `[N]`, by the row's name.
    """

    def __init__(self, model: ReViT, correct: np.ndarray, assigner_macs: int) -> None:
        self.correct, self.assigner_gmacs = correct, assigner_macs / 1e9
        self.tokens = np.array(model.lengths, dtype=float)
        self.gmacs = np.array([forward_macs(model, n) / 1e9 for n in model.lengths])
        self.images = np.arange(correct.shape[1])
        self.solvable = correct.any(axis=0).mean()
        self.rows: dict[str, Row] = {}
        self.right: dict[str, np.ndarray] = {}

    def all_at(self, length: int) -> np.ndarray:
        return np.full(len(self.images), length)

    def add_policy(self, policy: Policy, first: np.ndarray, last: np.ndarray) -> None:
        """Adds the row of a policy; `first` and `last` as `_lengths` returns them."""
        asks = policy.needs == "probabilities"
        kind = "assigner" if policy.bound is None else "cascade" if policy.threshold is None else "assigned-cascade"
        self.add(name_of_policy(policy.spec, asks), kind, last, policy.spec, first=first, asks_assigner=asks)

    def add(
        self,
        name: str,
        kind: str,
        last: np.ndarray,
        policy: PolicySpec | None,
        *,
        first: np.ndarray | None = None,
        asks_assigner: bool = False,
    ) -> None:
        """Adds the row of a choice: int `[N]`, the lengths that decide, and those that ran first if they differ."""
        if name not in self.rows:
            self.rows[name] = self._row(name, kind, last, last if first is None else first, policy, asks_assigner)
            self.right[name] = self.correct[last, self.images]

    def add_random(self, shares: np.ndarray, n_seeds: int, grids: tuple[int, ...]) -> None:
        """Adds the mean over seeds. It is not tested against the longest length: that would test a single draw."""
        drawn = []
        for seed in range(n_seeds):
            policy = make_policy(("random", {"seed": seed, "shares": shares.tolist()}), grids)
            chosen = policy.choose(Evidence(self.images))
            drawn.append(self._row("random", "random", chosen, chosen, policy.spec, False))
        means = {name: float(np.mean([getattr(r, name) for r in drawn])) for name in ("accuracy", "tokens", "gmacs")}
        mean_shares = tuple(np.mean([r.shares for r in drawn], axis=0).tolist())
        difference = means["accuracy"] - float(self.correct[0].mean())
        policy = drawn[0].policy
        self.rows["random"] = Row("random", "random", **means, shares=mean_shares, difference=difference, policy=policy)

    def _row(self, name, kind, last, first, policy, asks_assigner) -> Row:
        right = self.correct[last, self.images]
        shares = np.bincount(last, minlength=len(self.tokens)) / len(last)
        by_chance = shares @ self.correct.mean(axis=1)
        room = self.solvable - by_chance
        itself = bool((last == 0).all())
        gain = None if kind == "fixed" or room <= 0 else float((right.mean() - by_chance) / room)
        return Row(
            name,
            kind,
            float(right.mean()),
            float(spent(self.tokens, first, last).mean()),
            float(spent(self.gmacs, first, last).mean() + asks_assigner * self.assigner_gmacs),
            tuple(shares.tolist()),
            float(right.mean() - self.correct[0].mean()),
            interval=None if itself else paired_interval(right, self.correct[0]),
            p_value=None if itself else mcnemar(right, self.correct[0]),
            captured=gain,
            policy=policy,
        )

"""Compares an adaptive model with fixed lengths and simple ways to choose lengths, in accuracy, cost and time.

All accuracies follow from one set of predictions at every length. Time is measured separately, see `timing.measure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import Calibration, Evidence, PolicySpec, confidence, make_policy, smallest_sufficient
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.inference.inference_copy import dtype_name
from revit_fast.models.macs import forward_macs
from revit_fast.models.vit import ReViT
from revit_fast.train.data import ImageSet
from revit_fast.train.labels import UNSOLVED, Predictions, decoded_chunks, length_labels, predict_lengths
from revit_fast.train.report import Report, Row
from revit_fast.train.statistics import mcnemar, paired_interval

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds θ of the assigner's policies, and confidence bounds of the cascade."""

N_RANDOM = 10
"""Number of seeds of the random baseline."""

MAX_CANDIDATES = 1000
"""Largest number of thresholds that are tried for an accuracy drop."""


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
        policies: policies of the assigner, see `policies.make_policy`; by default `default_policies`.
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
    rows = [tally.row(f"fixed {g}x{g}", "fixed", tally.all_at(i), ("fixed", g)) for i, g in enumerate(model.grids)]
    shares = np.full(len(model.grids), 1 / len(model.grids))
    for policy in made:
        chosen, asks = policy.choose(evidence), policy.needs == "probabilities"
        rows.append(tally.row(name_of_policy(policy.spec, asks), "assigner", chosen, policy.spec, asks))
    if matched is not None:
        shares = np.bincount(matched.choose(evidence), minlength=len(model.grids)) / len(evidence.index)
    rows.append(tally.random_row(shares, n_random, model.grids))
    by_entropy, bits = matched_entropy(evidence.entropy, shares)
    rows.append(tally.row("entropy", "entropy", by_entropy, ("entropy", bits)))
    sureness = confidence(predictions.logits[:, keep])
    rows += [tally.cascade_row(bound, sureness) for bound in cascade]
    oracle = length_labels(tally.correct, "smallest", "longest" if unsolved == "drop" else unsolved)
    rows.append(tally.row("oracle", "oracle", oracle, ("fixed", [model.grids[i] for i in oracle])))
    return Report(
        rows=tuple(rows),
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


def name_of_policy(spec: PolicySpec, asks_assigner: bool) -> str:
    """The name of a policy in a report."""
    name, argument = spec if isinstance(spec, (tuple, list)) else (spec, None)
    if isinstance(argument, Mapping):
        argument = ", ".join(f"{key} {value:g}" for key, value in argument.items() if isinstance(value, (int, float)))
    if isinstance(argument, float):
        argument = f"{argument:.6g}"
    return ("TLA " if asks_assigner else "policy ") + (name if argument is None else f"{name} {argument}")


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

    Up to `MAX_CANDIDATES` values are tried. The condition on larger θ rejects a θ that keeps the accuracy by chance.

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
    candidates = np.unique(np.concatenate([[0.0, 1.0], calibration.suffices[:, 1:].ravel()]))
    if len(candidates) > MAX_CANDIDATES:
        candidates = candidates[np.linspace(0, len(candidates) - 1, MAX_CANDIDATES).round().astype(int)]
    columns, kept = np.arange(right.shape[1]), None
    least = right[0].mean() - drop - 1e-12
    for θ in candidates[::-1]:
        if right[smallest_sufficient(calibration.suffices, θ), columns].mean() < least:
            break
        kept = float(θ)
    if kept is None:
        raise ValueError(
            f"drop: even θ = 1 loses more than {drop:.2%} of accuracy; allow more, or use the longest grid for all"
        )
    return kept


class _Tally:
    """Computes the cost and the accuracy of choices of lengths.

    Args:
        model: model whose costs are counted.
        correct: bool `[n_lengths, N]`, whether a length classifies an image correctly.
        assigner_macs: multiply-adds of the assigner for one image.
    """

    def __init__(self, model: ReViT, correct: np.ndarray, assigner_macs: int) -> None:
        self.correct, self.assigner_gmacs = correct, assigner_macs / 1e9
        self.tokens = np.array(model.lengths, dtype=float)
        self.gmacs = np.array([forward_macs(model, n) / 1e9 for n in model.lengths])
        self.images = np.arange(correct.shape[1])
        self.solvable = correct.any(axis=0).mean()

    def all_at(self, length: int) -> np.ndarray:
        return np.full(len(self.images), length)

    def row(
        self, name: str, kind: str, chosen: np.ndarray, policy: PolicySpec | None, asks_assigner: bool = False
    ) -> Row:
        """The row of a choice, int `[N]`, whose cost is that of the chosen lengths alone."""
        gmacs = self.gmacs[chosen].mean() + asks_assigner * self.assigner_gmacs
        return self._row(name, kind, chosen, self.tokens[chosen].mean(), gmacs, policy)

    def cascade_row(self, bound: float, sureness: np.ndarray) -> Row:
        """The row of a cascade from the shortest length up; its cost includes all lengths that it ran."""
        stops = sureness >= bound
        stops[0] = True
        chosen = len(stops) - 1 - stops[::-1].argmax(axis=0)
        spent = [costs[::-1].cumsum()[::-1][chosen].mean() for costs in (self.tokens, self.gmacs)]
        return self._row(f"cascade {bound:g}", "cascade", chosen, *spent, ("cascade", float(bound)))

    def random_row(self, shares: np.ndarray, n_seeds: int, grids: tuple[int, ...]) -> Row:
        """The mean over seeds. There is no test against the longest length: a test would be one of a single draw."""
        drawn = []
        for seed in range(n_seeds):
            policy = make_policy(("random", {"seed": seed, "shares": shares.tolist()}), grids)
            drawn.append(self.row("random", "random", policy.choose(Evidence(self.images)), policy.spec))
        means = {name: float(np.mean([getattr(r, name) for r in drawn])) for name in ("accuracy", "tokens", "gmacs")}
        mean_shares = tuple(np.mean([r.shares for r in drawn], axis=0).tolist())
        difference = means["accuracy"] - float(self.correct[0].mean())
        return Row("random", "random", **means, shares=mean_shares, difference=difference, policy=drawn[0].policy)

    def _row(self, name, kind, chosen, tokens, gmacs, policy) -> Row:
        right = self.correct[chosen, self.images]
        shares = np.bincount(chosen, minlength=len(self.tokens)) / len(chosen)
        by_chance = shares @ self.correct.mean(axis=1)
        room = self.solvable - by_chance
        itself = bool((chosen == 0).all())
        gain = None if kind == "fixed" or room <= 0 else float((right.mean() - by_chance) / room)
        return Row(
            name,
            kind,
            float(right.mean()),
            float(tokens),
            float(gmacs),
            tuple(shares.tolist()),
            float(right.mean() - self.correct[0].mean()),
            interval=None if itself else paired_interval(right, self.correct[0]),
            p_value=None if itself else mcnemar(right, self.correct[0]),
            captured=gain,
            policy=policy,
        )

"""Policies: they choose the grid of an image from the assigner's probabilities or other evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from revit_fast.grids import check_grids

POLICIES = ("argmax", "threshold", "budget", "cascade", "assigned-cascade", "fixed", "cycle", "random", "entropy")
ASSIGNED_CASCADE = ("threshold", "confidence")
"""The two numbers of an assigned cascade: θ of the assigner, and p of the model."""

BUDGETS = ("mean_tokens", "mean_gmacs")

PolicySpec = str | tuple[str, Any]


class Evidence(NamedTuple):
    """The values that a policy may use, for a batch of B images.

    Attributes:
        index: int `[B]`, place of each image in its stream.
        probabilities: the assigner's, float `[B, n_lengths]`, longest length first; None if the policy needs none.
        entropy: float `[B]`, see `grey_entropy`; None if the policy does not need it.
    """

    index: np.ndarray
    probabilities: np.ndarray | None = None
    entropy: np.ndarray | None = None


@dataclass(frozen=True)
class Calibration:
    """Values of an assigner that were fitted to held-out images.

    Attributes:
        temperature: divisor of the assigner's logits.
        suffices: float32 `[n_images, n_lengths]`, P(label <= length) of every held-out image. The cost of any threshold
            follows from it.
        entropies: `[n_lengths - 1]`, decreasing bounds: an image whose entropy reaches the first gets the longest grid,
            and so on.

    Raises:
        ValueError: for NaN, or a temperature that is not positive and finite.
    """

    temperature: float
    suffices: np.ndarray = field(repr=False)
    entropies: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"calibration: expected a positive, finite temperature, got {self.temperature}")
        for name in ("suffices", "entropies"):
            if np.isnan(getattr(self, name)).any():
                raise ValueError(f"calibration: {name} holds NaN; check the assigner's weights, and calibrate it again")

    def shares(self, threshold: float) -> np.ndarray:
        """Share `[n_lengths]` of the held-out images that get each length at a threshold."""
        chosen = smallest_sufficient(self.suffices, threshold)
        return np.bincount(chosen, minlength=self.suffices.shape[1]) / len(chosen)

    def threshold_for(self, costs: Sequence[float], budget: float, name: str) -> float:
        """The largest threshold whose mean cost over the held-out images is at most `budget`.

        Args:
            costs: cost of an image at each length, decreasing.
            budget: largest mean cost of an image.
            name: name of the budget, for the error message.

        Raises:
            ValueError: if even the shortest length costs more.
        """
        if budget < costs[-1]:
            raise ValueError(
                f"policy: {name} {budget:g} is below the cost of the shortest length; expected {costs[-1]:g} (every "
                f"image at the shortest length) to {costs[0]:g} (every image at the longest)"
            )
        # The choice of an image changes only at the values of its `suffices`: these are the candidates.
        candidates = np.unique(np.concatenate([[0.0, 1.0], self.suffices[:, 1:].ravel()]))
        low, high = 0, len(candidates) - 1  # mean cost grows with the threshold
        while low < high:
            middle = (low + high + 1) // 2
            if self.shares(candidates[middle]) @ np.asarray(costs) <= budget:
                low = middle
            else:
                high = middle - 1
        return float(candidates[low])


def suffices(probabilities: np.ndarray) -> np.ndarray:
    """P(label <= length) `[B, n_lengths]`: the probability that a length is long enough; 1 for the longest."""
    # Rounded sums may exceed 1. No length could reach such a value as a threshold.
    cumulative = np.ascontiguousarray(probabilities[:, ::-1].cumsum(axis=1)[:, ::-1].clip(max=1.0))
    cumulative[:, 0] = 1.0
    return cumulative


def smallest_sufficient(suffices: np.ndarray, threshold: float) -> np.ndarray:
    """Index `[B]` of the smallest length that suffices with at least this probability."""
    n_lengths = suffices.shape[1]
    return n_lengths - 1 - (suffices[:, ::-1] >= threshold).argmax(axis=1)


def last_length(first: np.ndarray, sureness: np.ndarray, bound: float) -> np.ndarray:
    """Index `[B]` of the length at which a cascade ends: the first one, from `first` to longer ones, that is sure.

    Args:
        first: index `[B]` of the length that the cascade begins with.
        sureness: the largest class probability at each length, `[n_lengths, B]`, the longest length first.
        bound: probability from which on the model is sure; an image that reaches it nowhere ends at the longest length.
    """
    ends = sureness >= bound
    ends[0] = True
    ends &= np.arange(len(ends))[:, None] <= first
    return len(ends) - 1 - ends[::-1].argmax(axis=0)


def confidence(logits: np.ndarray) -> np.ndarray:
    """The largest class probability `[...]` of logits `[..., n_classes]`; 0 if the logits are not numbers."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.nan_to_num(1.0 / odds.sum(axis=-1), nan=0.0)


def grey_entropy(rows: np.ndarray) -> np.ndarray:
    """Shannon entropy in bits (0 to 8) of the grey values of each image.

    Args:
        rows: uint8 `[B, n, 3]`, the RGB pixels of each image in any order.
    """
    grey = (rows.astype(np.uint16) @ np.array([77, 150, 29], dtype=np.uint16)) >> 8  # BT.601, as in Pillow's mode "L"
    offset = 256 * np.arange(len(grey))[:, None]
    counts = np.bincount((grey + offset).ravel(), minlength=256 * len(grey)).reshape(-1, 256)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return 0.0 - (share * np.log2(np.where(share > 0, share, 1.0))).sum(axis=1)  # a flat image gets 0, not -0


def uniform(seed: int, index: np.ndarray) -> np.ndarray:
    """A random number in [0, 1) for each place in a stream, the same in every run, batch and process (splitmix64)."""
    with np.errstate(over="ignore"):
        z = (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) / float(1 << 53)


@dataclass(frozen=True)
class Policy:
    """A rule that chooses grids. The grid of an image never depends on its batch. Policies can be pickled.

    Attributes:
        spec: the specification that the policy was made from.
        needs: the evidence that the policy uses: "probabilities", "entropy" or None.
        choose: function from `Evidence` to int `[B]`, indices of lengths; 0 is the longest.
        threshold: value that P(label <= length) must reach, given or found for a budget; None for policies without one.
        bits: decreasing entropies that separate the lengths; None for other policies.
        bound: confidence at which a cascade stops; `choose` returns the length that it starts with. None for other
            policies, which decide before the model runs.
    """

    spec: PolicySpec
    needs: str | None
    choose: Any = field(repr=False)
    threshold: float | None = None
    bits: tuple[float, ...] | None = None
    bound: float | None = None

    def decides_before(self, what: str) -> None:
        """Raises a ValueError if grids are not known before the model has run.

        Args:
            what: why there are no logits to decide by, for the message.
        """
        if self.bound is not None:
            raise ValueError(
                f"policy: {self.spec!r} decides by the model's own logits, and {what}; call a pipeline, or take "
                "another policy"
            )


def make_policy(
    spec: PolicySpec | Policy,
    grids: Sequence[int],
    *,
    calibration: Calibration | None = None,
    macs: Sequence[float] | None = None,
) -> Policy:
    """Makes a policy from its specification. An image whose probabilities or entropy are NaN gets the longest grid.

    Args:
        spec: one of
            "argmax": the most probable length; a tie goes to the longer one;
            ("threshold", θ): the smallest length with P(label <= length) >= θ;
            ("budget", mean_tokens) or ("budget", {"mean_tokens": n}) or ("budget", {"mean_gmacs": g}): the largest
            threshold whose mean cost over the assigner's held-out images is within the budget; only patch tokens count;
            ("cascade", p): the shortest length first, then longer ones, each in its own pass, until the largest class
            probability is at least p. It needs no assigner, and the cost includes every pass (as Wang et al., arXiv
            2105.15075, without their reuse of features);
            ("assigned-cascade", {"threshold": θ, "confidence": p}), or ("assigned-cascade", (θ, p)): a cascade that
            begins with the length of ("threshold", θ) and goes on as ("cascade", p);
            ("fixed", grid): one grid for all images, or ("fixed", [grid, ...]): one for each image of a stream;
            "cycle": the grids in turn;
            "random", or ("random", {"seed": s, "shares": [p, ...]}): depends only on the image's place in its stream;
            "entropy", or ("entropy", [bits, ...]): depends on the entropy of grey values; an image that reaches the
            first bound gets the longest grid.
        grids: the grids to choose from.
        calibration: the assigner's calibration, for "budget" and for the default bits of "entropy".
        macs: multiply-adds of the model for an image of each grid, for mean_gmacs.

    Raises:
        TypeError, ValueError: if the specification has another form, or the policy needs something that is missing.
    """
    if isinstance(spec, Policy):
        spec = spec.spec
    grids = check_grids(grids)
    name, argument = spec if isinstance(spec, (tuple, list)) and len(spec) == 2 else (spec, None)
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, alone or with its argument, got {spec!r}")
    if argument is not None and name in ("argmax", "cycle"):
        raise ValueError(f"policy: {name} takes no argument, got {argument!r}")
    n_lengths = len(grids)
    if name == "argmax":
        return Policy(spec, "probabilities", _most_probable)
    if name == "cycle":
        return Policy(spec, None, partial(_in_turn, n_lengths=n_lengths))
    if name == "fixed":
        return Policy(spec, None, _fixed(argument, grids))
    if name == "cascade":
        if not isinstance(argument, Real) or not 0.0 <= argument <= 1.0:
            raise ValueError(f'policy: expected ("cascade", p) with a probability p in [0, 1], got {spec!r}')
        return Policy(spec, None, partial(_the_same, chosen=n_lengths - 1), bound=float(argument))
    if name == "assigned-cascade":
        θ, p = _assigned_cascade(argument)
        return Policy(spec, "probabilities", partial(_by_threshold, threshold=θ), threshold=θ, bound=p)
    if name == "random":
        return Policy(spec, None, _random(argument, n_lengths))
    if name == "entropy":
        bits = _entropy_bits(argument, n_lengths, calibration)
        return Policy(spec, "entropy", partial(_by_entropy, bits=bits), bits=tuple(bits.tolist()))
    threshold = argument if name == "threshold" else _budget_threshold(argument, grids, calibration, macs)
    if not isinstance(threshold, Real) or not 0.0 <= threshold <= 1.0:
        raise ValueError(f'policy: expected ("threshold", θ) with θ in [0, 1], got {spec!r}')
    threshold = float(threshold)
    return Policy(spec, "probabilities", partial(_by_threshold, threshold=threshold), threshold=threshold)


def _most_probable(evidence: Evidence) -> np.ndarray:
    return _longest_without_numbers(evidence, evidence.probabilities.argmax(axis=1))


def _by_threshold(evidence: Evidence, threshold: float) -> np.ndarray:
    return _longest_without_numbers(evidence, smallest_sufficient(suffices(evidence.probabilities), threshold))


def _longest_without_numbers(evidence: Evidence, chosen: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(evidence.probabilities).any(axis=1), 0, chosen)


def _by_entropy(evidence: Evidence, bits: np.ndarray) -> np.ndarray:
    return (evidence.entropy[:, None] < bits).sum(axis=1)


def _in_turn(evidence: Evidence, n_lengths: int) -> np.ndarray:
    return evidence.index % n_lengths


def _the_same(evidence: Evidence, chosen: int) -> np.ndarray:
    return np.full(evidence.index.shape, chosen)


def _one_each(evidence: Evidence, chosen: np.ndarray) -> np.ndarray:
    if evidence.index.size and evidence.index.max() >= len(chosen):
        raise ValueError(f"policy: {len(chosen)} fixed grids, but image {evidence.index.max()} came")
    return chosen[evidence.index]


def _at_random(evidence: Evidence, seed: int, bounds: np.ndarray) -> np.ndarray:
    return np.searchsorted(bounds, uniform(seed, evidence.index), side="right")


def _fixed(argument, grids: tuple[int, ...]):
    given = [argument] if isinstance(argument, (int, np.integer)) else argument
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, str) or len(given) == 0:
        raise TypeError(f'policy: expected ("fixed", grid) or one grid per image, got {argument!r}')
    unknown = sorted({int(g) for g in given} - set(grids))
    if unknown:
        raise ValueError(f"policy: fixed grids {unknown} are not among the configured {list(grids)}")
    index = np.array([grids.index(int(g)) for g in given])
    return partial(_one_each, chosen=index) if given is argument else partial(_the_same, chosen=index[0])


def _assigned_cascade(argument) -> tuple[float, float]:
    if isinstance(argument, Mapping) and set(argument) == set(ASSIGNED_CASCADE):
        argument = [argument[name] for name in ASSIGNED_CASCADE]
    pair = argument if isinstance(argument, (tuple, list)) and len(argument) == 2 else (None, None)
    if not all(isinstance(value, Real) and 0.0 <= value <= 1.0 for value in pair):
        raise ValueError(
            'policy: expected ("assigned-cascade", {"threshold": θ, "confidence": p}) with θ and p in [0, 1], got '
            f"{argument!r}"
        )
    return float(pair[0]), float(pair[1])


def _random(argument, n_lengths: int):
    options = {"seed": 0, "shares": [1 / n_lengths] * n_lengths}
    if argument is not None:
        if not isinstance(argument, Mapping) or not set(argument) <= set(options):
            raise ValueError(f'policy: expected ("random", {{"seed": int, "shares": [...]}}), got {argument!r}')
        options |= argument
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ValueError(f"policy: expected a seed from 0 to 2**64 - 1, got {seed!r}")
    shares = np.asarray(options["shares"], dtype=np.float64)
    if shares.shape != (n_lengths,) or not (shares >= 0).all() or not math.isclose(shares.sum(), 1.0, abs_tol=1e-6):
        raise ValueError(f"policy: expected {n_lengths} shares that sum to 1, got {options['shares']!r}")
    return partial(_at_random, seed=int(seed), bounds=shares.cumsum()[:-1])


def _entropy_bits(argument, n_lengths: int, calibration: Calibration | None) -> np.ndarray:
    if argument is None:
        # There are no held-out images. A flat image has 0 bits, photographs have about 7.
        equal_parts = tuple(8.0 * (n_lengths - i) / n_lengths for i in range(1, n_lengths))
        argument = calibration.entropies if calibration else equal_parts
    bits = np.asarray(argument, dtype=np.float64)
    if bits.shape != (n_lengths - 1,) or np.isnan(bits).any() or not (np.diff(bits) <= 0).all():
        raise ValueError(f"policy: expected {n_lengths - 1} decreasing entropies in bits, got {argument!r}")
    return bits


def _budget_threshold(argument, grids, calibration: Calibration | None, macs: Sequence[float] | None) -> float:
    kind, budget = "mean_tokens", argument
    if isinstance(argument, Mapping) and len(argument) == 1:
        ((kind, budget),) = argument.items()
    if kind not in BUDGETS or not isinstance(budget, Real) or not math.isfinite(budget):
        raise ValueError(f'policy: expected ("budget", {{"mean_tokens" or "mean_gmacs": number}}), got {argument!r}')
    if calibration is None:
        raise ValueError(
            "policy: a budget needs an assigner calibrated on held-out images; call assigner.calibrate(images)"
        )
    if kind == "mean_tokens":
        costs = [float(g * g) for g in grids]
    elif macs is None:
        raise ValueError(
            "policy: mean_gmacs needs the model's cost; make the preprocessor with for_model, or give macs"
        )
    else:
        costs = [m / 1e9 for m in macs]
    return calibration.threshold_for(costs, budget, kind)

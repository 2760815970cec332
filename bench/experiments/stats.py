"""Statistics over seeds and raters, on which the claims of reports are based."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import chisquare, contingency, quantile_test, sem, t
from statsmodels.stats import inter_rater

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Values over seeds.

    Attributes:
        mean: mean of the values; None if there are none.
        sd: their standard deviation (n - 1); None for fewer than two.
        n: number of values.
    """

    mean: float | None
    sd: float | None
    n: int


class Effect(NamedTuple):
    """Mean of the differences between two variants, paired by seed.

    Attributes:
        mean: mean of the differences; None if no seed has both variants.
        low: lower end of the 95 % t interval; None for fewer than two pairs.
        high: its upper end.
        n: number of pairs.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero: only then does a report claim an effect.

        An interval without width does not count. Where all seeds give the same difference (for example, because all
        models always predict the same class), nothing is known about how much another seed would differ.
        """
        return self.low is not None and self.low < self.high and (self.low > 0 or self.high < 0)

    @classmethod
    def of_json(cls, values: Sequence[Any]) -> Effect:
        """The effect that was written to JSON as a list."""
        return cls(*values)


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of the values that are not None."""
    found = np.array([v for v in values if v is not None], dtype=np.float64)
    sd = float(found.std(ddof=1)) if len(found) > 1 else None
    return Spread(float(found.mean()) if len(found) else None, sd, len(found))


def paired(values: Sequence[float | None], reference: Sequence[float | None], resolution: float = 0.0) -> Effect:
    """The differences `values - reference`, seed by seed, with Student's interval of their mean.

    Args:
        values: values of one variant by seed; seeds that lack either value (a run that diverged) are left out.
        reference: values of the other variant.
        resolution: step to which values are rounded. The interval is wider by one step on either side, so that equal
            rounded values do not look certain.
    """
    pairs = [(a, b) for a, b in zip(values, reference, strict=True) if a is not None and b is not None]
    differences = np.array([a - b for a, b in pairs], dtype=np.float64)
    n = len(differences)
    if n < 2:
        return Effect(float(differences[0]) if n else None, None, None, n)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1) * sem(differences)) + resolution
    mean = float(differences.mean())
    return Effect(mean, mean - half, mean + half, n)


def median_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Median of independent values and the ends of its 95 % interval, by order statistics.

    It holds for every distribution. None for fewer than six values: not even the smallest and the largest enclose the
    median with that confidence.
    """
    low, high = quantile_test(values, p=0.5).confidence_interval(CONFIDENCE)
    return None if math.isnan(low) else (float(np.median(values)), float(low), float(high))


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the items to which two raters give the same category."""
    return float(np.mean(a == b))


def cohen_kappa(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cohen's kappa: agreement of two raters beyond chance; None if all ratings are the same category.

    Args:
        a: int `[N]`, categories that one rater gives.
        b: int `[N]`, categories that the other gives.
    """
    if len(np.unique([a, b])) < 2:
        return None
    table, _ = inter_rater.to_table(np.stack([a, b], axis=1))
    return float(inter_rater.cohens_kappa(table, return_results=False))


def fleiss_kappa(ratings: np.ndarray) -> float | None:
    """Fleiss' kappa of `[n_raters, N]` categories; None for one rater, or if all ratings are the same category."""
    if len(ratings) < 2 or len(np.unique(ratings)) < 2:
        return None
    counts, _ = inter_rater.aggregate_raters(ratings.T)
    return float(inter_rater.fleiss_kappa(counts))


class Association(NamedTuple):
    """Test that two variables are independent.

    Attributes:
        statistic: Pearson's chi-square, summed over strata.
        p: p-value of the permutation test.
        cramers_v: size of the association in the table of all strata, 0 to 1; 0 if either variable is constant.
    """

    statistic: float
    p: float
    cramers_v: float


def association(
    categories: np.ndarray,
    lengths: np.ndarray,
    strata: np.ndarray | None = None,
    n_permutations: int = 1000,
    seed: int = 0,
) -> Association:
    """Tests whether lengths depend on the category, by permuting categories within strata.

    Args:
        categories: int `[N]`.
        lengths: int `[N]`.
        strata: int `[N]`: images of one stratum are alike in all but the category; None: one stratum.
        n_permutations: number of permutations that p is estimated from; p is at least 1 / (n_permutations + 1).
        seed: seed of the permutations.
    """
    strata = np.zeros(len(categories), dtype=np.int64) if strata is None else np.unique(strata, return_inverse=True)[1]
    k, m, s = int(categories.max()) + 1, int(lengths.max()) + 1, int(strata.max()) + 1
    base = strata * (k * m) + lengths
    rng = np.random.default_rng(seed)
    order = np.argsort(strata, kind="stable")
    ends = np.cumsum(np.bincount(strata, minlength=s))[:-1]

    def tables(of: np.ndarray) -> np.ndarray:
        """Counts `[s, k, m]` of categories and lengths in every stratum."""
        return np.bincount(base + of * m, minlength=s * k * m).reshape(s, k, m)

    expected = np.stack([contingency.expected_freq(table) for table in tables(categories)])
    possible = expected > 0  # the same for every permutation, which keeps rows and columns of each stratum

    def statistic(of: np.ndarray) -> float:
        return float(chisquare(tables(of)[possible], expected[possible]).statistic)

    observed, reached = statistic(categories), 0
    for _ in range(n_permutations):
        shuffled = np.empty_like(categories)
        shuffled[order] = np.concatenate([rng.permutation(part) for part in np.split(categories[order], ends)])
        reached += statistic(shuffled) >= observed - 1e-9
    table = contingency.crosstab(categories, lengths).count
    v = float(contingency.association(table, method="cramer")) if min(table.shape) > 1 else 0.0
    return Association(observed, (reached + 1) / (n_permutations + 1), v)

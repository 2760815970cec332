"""Statistics over seeds and raters: what an experiment may claim, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Values over seeds.

    Attributes:
        mean: of the values; None where there are none.
        sd: their standard deviation (n - 1); None for fewer than two.
        n: values.
    """

    mean: float | None
    sd: float | None
    n: int


class Effect(NamedTuple):
    """Mean of the differences between two variants, paired by seed.

    Attributes:
        mean: of the differences; None where no seed has both.
        low: end of the 95 % t interval; None for fewer than two pairs.
        high: its other end.
        n: pairs.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero: only then is there an effect to speak of.

        An interval of no width is none: where all seeds give the same difference (all models that always say one class
        do, for instance), they say nothing of how much another seed would differ.
        """
        return self.low is not None and self.low < self.high and (self.low > 0 or self.high < 0)

    @classmethod
    def of_json(cls, values: Sequence[Any]) -> Effect:
        """What JSON has made a list."""
        return cls(*values)


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation of the values that are there."""
    found = np.array([v for v in values if v is not None], dtype=np.float64)
    sd = float(found.std(ddof=1)) if len(found) > 1 else None
    return Spread(float(found.mean()) if len(found) else None, sd, len(found))


def paired(values: Sequence[float | None], reference: Sequence[float | None], resolution: float = 0.0) -> Effect:
    """The differences `values - reference`, seed by seed, with Student's interval of their mean.

    Args:
        values: of one variant by seed; seeds that lack either value (a run that diverged) are left out.
        reference: of the other.
        resolution: steps in which values are known: the interval is wider by one on either side, so that values that
            seeds share by rounding are no certainty.
    """
    pairs = [(a, b) for a, b in zip(values, reference, strict=True) if a is not None and b is not None]
    differences = np.array([a - b for a, b in pairs], dtype=np.float64)
    n = len(differences)
    if n < 2:
        return Effect(float(differences[0]) if n else None, None, None, n)
    from scipy.stats import t

    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * float(differences.std(ddof=1)) / math.sqrt(n) + resolution
    mean = float(differences.mean())
    return Effect(mean, mean - half, mean + half, n)


def median_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Median of independent values and the ends of its 95 % interval, by order statistics, whatever their distribution.

    None for fewer than six values: not even the least and the largest enclose the median with that confidence.
    """
    from scipy.stats import binom

    ordered = np.sort(values)
    k = int(binom.ppf((1 - CONFIDENCE) / 2, len(ordered), 0.5))
    return (float(np.median(ordered)), float(ordered[k - 1]), float(ordered[-k])) if k > 0 else None


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the items to which two raters give the same category."""
    return float(np.mean(a == b))


def cohen_kappa(a: np.ndarray, b: np.ndarray, n_categories: int) -> float | None:
    """Cohen's kappa: agreement of two raters beyond chance; None where both always give the same one category.

    Args:
        a: int `[N]`, categories that one rater gives.
        b: int `[N]`, those of the other.
        n_categories: K.
    """
    shares = [np.bincount(x, minlength=n_categories) / len(x) for x in (a, b)]
    by_chance = float(shares[0] @ shares[1])
    return None if by_chance >= 1.0 else (agreement(a, b) - by_chance) / (1.0 - by_chance)


def fleiss_kappa(ratings: np.ndarray, n_categories: int) -> float | None:
    """Fleiss' kappa of `[n_raters, N]` categories; None for one rater, or where all ratings are the same category."""
    n_raters, n_items = ratings.shape
    if n_raters < 2:
        return None
    counts = np.stack([(ratings == k).sum(axis=0) for k in range(n_categories)], axis=1)
    agreeing = (counts * (counts - 1)).sum(axis=1) / (n_raters * (n_raters - 1))
    shares = counts.sum(axis=0) / (n_raters * n_items)
    by_chance = float((shares**2).sum())
    return None if by_chance >= 1.0 else (float(agreeing.mean()) - by_chance) / (1.0 - by_chance)


class Association(NamedTuple):
    """Test that two variables have nothing to do with each other.

    Attributes:
        statistic: Pearson's chi-square, summed over strata.
        p: of the permutation test.
        cramers_v: size of the association in the table of all strata, 0 to 1.
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
    """Whether lengths depend on the category: categories are permuted, within strata where there are any.

    Args:
        categories: int `[N]`.
        lengths: int `[N]`.
        strata: int `[N]`: images of one stratum are alike in all but the category; None: one stratum.
        n_permutations: that p is estimated from; it is at least 1 / (n_permutations + 1).
        seed: of the permutations.
    """
    strata = np.zeros(len(categories), dtype=np.int64) if strata is None else np.unique(strata, return_inverse=True)[1]
    k, m, s = int(categories.max()) + 1, int(lengths.max()) + 1, int(strata.max()) + 1
    base = strata * (k * m) + lengths
    rng = np.random.default_rng(seed)
    order = np.argsort(strata, kind="stable")
    ends = np.cumsum(np.bincount(strata, minlength=s))[:-1]

    def statistic(of: np.ndarray) -> float:
        return float(sum(map(chi_square, np.bincount(base + of * m, minlength=s * k * m).reshape(s, k, m))))

    observed, reached = statistic(categories), 0
    for _ in range(n_permutations):
        shuffled = np.empty_like(categories)
        shuffled[order] = np.concatenate([rng.permutation(part) for part in np.split(categories[order], ends)])
        reached += statistic(shuffled) >= observed - 1e-9
    table = np.bincount(categories * m + lengths, minlength=k * m).reshape(k, m)
    rows, columns = (int((table.sum(axis=axis) > 0).sum()) for axis in (1, 0))
    freedom = min(rows, columns) - 1
    v = math.sqrt(chi_square(table) / (len(categories) * freedom)) if freedom > 0 else 0.0
    return Association(observed, (reached + 1) / (n_permutations + 1), v)


def chi_square(table: np.ndarray) -> float:
    """Pearson's statistic of a table of counts; empty rows and columns count for nothing."""
    total = table.sum()
    if total == 0:
        return 0.0
    expected = table.sum(axis=1, keepdims=True) * (table.sum(axis=0, keepdims=True) / total)
    return float(((table - expected) ** 2 / np.where(expected > 0, expected, 1.0)).sum())

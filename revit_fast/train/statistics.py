"""Comparing two classifiers on the same images."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binomtest, norm


def mcnemar(right: np.ndarray, reference: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test that two classifiers are right equally often.

    It is the binomial test on the images where only one classifier is right: either one is, with probability one half.

    Args:
        right: bool `[N]`, whether one classifier is right.
        reference: bool `[N]`, whether the other is right.
    """
    more, fewer = _only_one_right(right, reference)
    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def paired_interval(right: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same images (Agresti and Min 2005).

    It is Wald's interval after half an image is added to each of the four cells of the table (each classifier right or
    wrong). It therefore has a positive width even if the two never differ, and it is valid for few images.

    Args:
        right: bool `[N]`, whether one classifier is right.
        reference: bool `[N]`, whether the other is right; its accuracy is subtracted.
    """
    more, fewer = (count + 0.5 for count in _only_one_right(right, reference))
    n = len(right) + 2
    difference = (more - fewer) / n
    low, high = norm.interval(0.95, difference, math.sqrt(((more + fewer) / n - difference**2) / n))
    return max(float(low), -1.0), min(float(high), 1.0)


def mean_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of paired differences `[N]` (normal); from -inf to inf if there are fewer than two."""
    if len(differences) < 2:
        return -math.inf, math.inf
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    if error == 0:
        return float(mean), float(mean)
    low, high = norm.interval(0.95, mean, error)
    return float(low), float(high)


def _only_one_right(right: np.ndarray, reference: np.ndarray) -> tuple[int, int]:
    """The number of images where only the first is right, and the number where only the second is right."""
    return int((right & ~reference).sum()), int((reference & ~right).sum())

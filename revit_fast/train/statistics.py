"""Comparing two classifiers on the same images."""

from __future__ import annotations

import math

import numpy as np

Z_95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


def mcnemar(right: np.ndarray, reference: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test that two classifiers are right equally often.

    Among the images where only one is right, each would be so with probability one half.

    Args:
        right: bool `[N]`, whether one is right.
        reference: bool `[N]`, whether the other is.
    """
    more, fewer = int((right & ~reference).sum()), int((reference & ~right).sum())
    n, least = more + fewer, min(more, fewer)
    term, total = 1, 0
    for k in range(least + 1):
        total += term
        term = term * (n - k) // (k + 1)  # C(n, k + 1)
    return min(1.0, 2 * total / 2**n)


def paired_interval(right: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same images (Agresti and Min 2005).

    Wald's interval after half an image is added to each of the four cells: it neither collapses where the two never
    differ, nor needs many images.

    Args:
        right: bool `[N]`, whether one is right.
        reference: bool `[N]`, whether the other is; the difference is the first minus this.
    """
    n = len(right) + 2
    more, fewer = (right & ~reference).sum() + 0.5, (reference & ~right).sum() + 0.5
    difference = (more - fewer) / n
    half = Z_95 * math.sqrt(max(more + fewer - (more - fewer) ** 2 / n, 0.0)) / n
    return max(float(difference - half), -1.0), min(float(difference + half), 1.0)

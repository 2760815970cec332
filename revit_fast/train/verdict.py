"""Says in words whether adaptive lengths pay for a model on some images, and what to take instead if they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from revit_fast.adaptive.policies import PolicySpec
from revit_fast.train.report import Report, Row
from revit_fast.train.statistics import mean_interval, paired_interval

EQUAL = 0.005
"""Difference in accuracy that counts as none."""

FEW = 500
"""Number of images below which the verdict says how small a difference does not show."""

ADAPTIVE = ("assigner", "cascade", "assigned-cascade")
"""Kinds of rows that choose a length for every image."""


def with_verdict(report: Report, *, taken: PolicySpec | None = None, among: Sequence[str] | None = None) -> Report:
    """The report with a verdict: whether adaptive lengths pay on its images, with 95 % intervals, and what to take.

    Adaptive lengths pay if a policy is cheaper than the longest length, or shown to be more accurate; is faster where
    that was measured; and is shown to be more accurate than the best fixed length that costs no more and than random
    lengths with the same shares. They do not pay if it is not cheaper, not faster, or not more accurate than one of
    these two by over `EQUAL`. Otherwise the images cannot tell.

    Args:
        report: result of `evaluate`, or a copy with times.
        taken: the policy that was chosen before, on other images. If it chooses a length for every image, the verdict
            is about it. Otherwise it is about the best row.
        among: names of the rows that the verdict may be about, all chosen before, on other images; by default those of
            all fixed lengths and all policies that choose a length for every image.

    Returns:
        The report. Its `taken` is the row of `taken` with `among`, and otherwise the one that the verdict says to take.
    """
    rows = [r for r in report.rows if r.kind in ("fixed", *ADAPTIVE) and (among is None or r.name in among)]
    adaptive = [r for r in rows if r.kind in ADAPTIVE]
    if not adaptive:
        return report
    adaptive = [r for r in adaptive if max(r.shares) < 1.0] or adaptive  # others are a fixed length in disguise
    chosen = next((r for r in rows if taken is not None and _same(r.policy, taken)), None)
    judged = chosen if chosen in adaptive else _best(adaptive, report.rows[0])
    outcome, text, take = _judge(report, rows, judged)
    picked = {r.name for r in (judged, take) if among is None and r in adaptive and r is not chosen}
    if picked:
        best = " and ".join(sorted(picked))
        text += f" (On these images {best} did best of {len(adaptive)}; on others expect a little less.)"
    if among is not None and chosen is not None and take is not chosen:
        text += f" The bundle takes {_said(chosen)}, which won on the held-out images."
    if outcome == "cannot tell" or report.n_images < FEW:
        low, high = _interval(report, judged, report.rows[0])
        few = "few images: " if report.n_images < FEW else ""
        text += f" {_begun(few)}{report.n_images:,} do not show differences below about {50 * (high - low):.1f} points."
    return replace(report, verdict=text, taken=(take if among is None or chosen is None else chosen).name)


def option_of(policy: PolicySpec) -> str:
    """The option of the command line for a policy."""
    name, argument = policy if isinstance(policy, (tuple, list)) else (policy, None)
    if argument is None:
        return f"--policy {name}"
    if name == "fixed":
        return f"--grid {argument}"
    if name == "budget":
        ((kind, value),) = argument.items() if isinstance(argument, dict) else [("mean_tokens", argument)]
        return f"--budget {value:g}{'gmacs' if kind == 'mean_gmacs' else ''}"
    values = argument.values() if isinstance(argument, dict) else [argument]
    return f"--policy {name}:{','.join(f'{value:.6g}' for value in values)}"


def _judge(report: Report, rows: list[Row], judged: Row) -> tuple[str, str, Row]:
    """The outcome, what is said of it, and the row to take."""
    longest = report.rows[0]
    cheaper = [r for r in rows if r.kind == "fixed" and r.gmacs <= judged.gmacs and r is not longest]
    fixed = max(cheaper, key=lambda r: (r.accuracy, -r.gmacs)) if cheaper else None
    about = (
        f"{judged.name} gets {judged.accuracy:.2%} right at {judged.gmacs / longest.gmacs:.0%} of the multiply-adds of "
        f"{longest.name}{_speed(judged)}, {_points(report, judged, longest)} points from it."
    )
    over_random = _from_random(report, judged)
    against, simple = [("random lengths with the same shares", over_random)], longest
    if fixed is not None:
        over_fixed = _of(report, judged, fixed)
        against.insert(0, (f"{fixed.name}, the best fixed length at no more cost{_speed(fixed)}", over_fixed))
        simple = longest if over_fixed[1][0] > 0 else fixed
    about += f" It is {' and '.join(f'{_signed(*values)} points from {name}' for name, values in against)}."
    is_better = _interval(report, judged, longest)[0] > 0
    is_slower = judged.time is not None and judged.time.ratio <= 1
    if not is_better and (is_slower or judged.gmacs >= longest.gmacs):
        why = f"{judged.name} is not {'faster' if is_slower else 'cheaper'} than {longest.name}, nor shown to be better"
        return "no", f"Adaptive lengths do not pay here: {why}. {about} Take {_said(simple)}.", simple
    if all(interval[0] > 0 for _, (_, interval) in against):
        text, cascade = f"Adaptive lengths pay here. {about}", _cheaper_cascade(rows, judged)
        if cascade is not None:
            text += (
                f" {_begun(cascade.name)} costs {cascade.gmacs / judged.gmacs:.0%} of that{_speed(cascade)}, is "
                f"{_points(report, cascade, judged)} points from it, and needs no assigner."
            )
        return "yes", f"{text} Take {_said(cascade or judged)}.", cascade or judged
    why = "random lengths with the same shares are as accurate" if over_random[1][1] <= EQUAL else ""
    if fixed is not None and over_fixed[1][1] <= EQUAL:
        why = f"{fixed.name} costs less and is as accurate"
    if why:
        return "no", f"Adaptive lengths do not pay here: {why}. {about} Take {_said(simple)}.", simple
    text = f"No difference could be shown that makes adaptive lengths pay here, nor that they do not. {about}"
    return "cannot tell", f"{text} Until more images tell, take {_said(simple)}, which is simpler.", simple


def _best(adaptive: list[Row], longest: Row) -> Row:
    """The cheapest row that is as accurate as the longest length up to `EQUAL`, else the most accurate one."""
    good = [r for r in adaptive if r.accuracy >= longest.accuracy - EQUAL]
    return min(good, key=lambda r: r.gmacs) if good else max(adaptive, key=lambda r: r.accuracy)


def _cheaper_cascade(rows: list[Row], judged: Row) -> Row | None:
    """The cheapest cascade that costs no more than the judged row and is as accurate; None if there is none."""
    found = [r for r in rows if r.kind == "cascade" and r is not judged and r.gmacs <= judged.gmacs]
    found = [r for r in found if r.accuracy >= judged.accuracy and (r.time is None or r.time.ratio > judged.time.ratio)]
    return min(found, key=lambda r: r.gmacs, default=None)


def _of(report: Report, row: Row, other: Row) -> tuple[float, tuple[float, float]]:
    return row.accuracy - other.accuracy, _interval(report, row, other)


def _interval(report: Report, row: Row, other: Row) -> tuple[float, float]:
    return paired_interval(report.right[row.name], report.right[other.name])


def _from_random(report: Report, row: Row) -> tuple[float, tuple[float, float]]:
    """The difference to the expected accuracy of random lengths that decide for the same shares of the images."""
    differences = report.right[row.name] - np.asarray(row.shares) @ report.correct
    return float(differences.mean()), mean_interval(differences)


def _points(report: Report, row: Row, other: Row) -> str:
    return _signed(*_of(report, row, other))


def _signed(difference: float, interval: tuple[float, float]) -> str:
    return f"{100 * difference:+.2f} ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"


def _speed(row: Row) -> str:
    if row.time is None:
        return ""
    low, high = row.time.ratio_quartiles
    return f" and {row.time.ratio:.2f} times its images/s (quartiles {low:.2f} to {high:.2f})"


def _said(row: Row) -> str:
    return f"{row.name} (`{option_of(row.policy)}`)"


def _begun(name: str) -> str:
    return name[:1].upper() + name[1:]


def _same(a: PolicySpec | None, b: PolicySpec) -> bool:
    a, b = (tuple(spec) if isinstance(spec, list) else spec for spec in (a, b))
    return a == b

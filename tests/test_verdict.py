"""The verdict on adaptive lengths, case by case, on reports whose images are made by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_models import drawn

import revit_fast as rf
from revit_fast.train.data import ArrayImages
from revit_fast.train.evaluate import evaluate
from revit_fast.train.labels import Predictions
from revit_fast.train.report import Report, Row, Time
from revit_fast.train.statistics import mean_interval, paired_interval
from revit_fast.train.verdict import option_of, with_verdict
from revit_fast.train.worth import prospects

COSTS = {"fixed 14x14": 1.0, "fixed 7x7": 0.2}


def report_of(n, longest, shortest, chosen, gmacs, *, cascade=None, rates=None):
    """A report of n images: how many the two lengths get right, and for which images the policy takes the longest.

    Args:
        n: number of images; those that a length gets right are the first ones.
        longest: how many 14x14 gets right.
        shortest: how many 7x7 gets right.
        chosen: bool `[n]`, whether the policy "TLA threshold 0.5" takes 14x14.
        gmacs: the policy's cost.
        cascade: (number of images right, cost) of "cascade 0.9".
        rates: images/s of 14x14, 7x7, the policy and the cascade.
    """
    correct = np.arange(n) < np.array([[longest], [shortest]])
    right = {"fixed 14x14": correct[0], "fixed 7x7": correct[1], "TLA threshold 0.5": np.where(chosen, *correct)}
    costs = COSTS | {"TLA threshold 0.5": gmacs}
    policies = [("fixed", 14), ("fixed", 7), ("threshold", 0.5)]
    if cascade:
        right["cascade 0.9"], costs["cascade 0.9"] = np.arange(n) < cascade[0], cascade[1]
        policies.append(("cascade", 0.9))
    rows = []
    for i, (name, one) in enumerate(right.items()):
        share = {"fixed 14x14": 1.0, "fixed 7x7": 0.0}.get(name, float(np.mean(chosen)))
        kind = {"fixed": "fixed", "threshold": "assigner", "cascade": "cascade"}[policies[i][0]]
        time = (
            None if rates is None else Time(rates[i], (rates[i],) * 2, rates[i] / rates[0], (rates[i] / rates[0],) * 2)
        )
        difference = one.mean() - correct[0].mean()
        numbers = float(one.mean()), 0.0, costs[name], (share, 1 - share), float(difference)
        rows.append(Row(name, kind, *numbers, policy=policies[i], time=time, interval=paired_interval(one, correct[0])))
    return Report(tuple(rows), (14, 7), n, 0, 2, (0.5, 0.5), 0.1, 0.0, "float32", {}, right=right, correct=correct)


def first(n, k):
    return np.arange(n) < k


N = 2000
HARD = (np.arange(N) >= 1400) & (np.arange(N) < 1800)
"""The images that only the longest length gets right, of 1,800 and 1,400."""


@pytest.mark.parametrize(
    ("report", "taken", "said"),
    [
        (report_of(N, 1800, 1400, HARD, 0.5), "TLA threshold 0.5", r"Adaptive lengths pay here\. .*\+20\.00 \("),
        (
            report_of(N, 1800, 1400, HARD, 0.5, cascade=(1800, 0.4)),
            "cascade 0.9",
            r"pay here\. .*Cascade 0\.9 costs 80%",
        ),
        (report_of(N, 1800, 1400, HARD, 0.5, cascade=(1700, 0.4)), "TLA threshold 0.5", r"pay here"),
        (
            report_of(N, 1800, 1800, HARD, 0.5),
            "fixed 7x7",
            r"do not pay here: fixed 7x7 costs less and is as accurate\. .*Take fixed 7x7 \(`--grid 7`\)\.",
        ),
        (
            report_of(N, 1800, 1400, HARD, 1.1),
            "fixed 14x14",
            r"is not cheaper than fixed 14x14, nor shown to be better",
        ),
        (
            report_of(N, 1800, 1400, HARD, 0.5, rates=(100, 300, 90)),
            "fixed 14x14",
            r"is not faster than fixed 14x14.* 0\.90 times its images/s",
        ),
        (
            report_of(40, 32, 30, first(40, 31) & ~first(40, 30), 0.5),
            "fixed 7x7",
            r"No difference could be shown .* Until more images tell, take fixed 7x7 .* Few images: 40 do not show "
            r"differences below about \d+\.\d points\.",
        ),
        # Better than the shortest length, but whoever draws half of the images does as well.
        (
            report_of(N, 1800, 1400, np.arange(N) % 2 == 0, 0.6),
            "fixed 14x14",
            r"No difference could be shown .*\+10\.00 .* points from fixed 7x7.* \+0\.00 .* points from random lengths",
        ),
        (
            report_of(40 * N, 72000, 56000, np.arange(40 * N) % 2 == 0, 0.6),
            "fixed 14x14",
            r"do not pay here: random lengths with the same shares are as accurate",
        ),
    ],
    ids=["wins", "cascade", "worse-cascade", "loses", "costs", "slow", "few", "chance", "chance-shown"],
)
def test_cases(report, taken, said):
    import re

    got = with_verdict(report, taken=("threshold", 0.5))
    assert re.search(said, got.verdict), got.verdict
    assert got.taken == taken
    assert got.table().endswith(f"**Verdict.** {got.verdict}\n")
    json.dumps(got.to_json())
    assert "right" not in got.to_json()


def test_the_numbers_are_those_of_the_statistics():
    report = report_of(N, 1800, 1400, HARD, 0.5)
    text = with_verdict(report, taken=("threshold", 0.5)).verdict
    low, high = paired_interval(report.right["TLA threshold 0.5"], report.right["fixed 7x7"])
    assert f"+20.00 ({100 * low:+.2f} to {100 * high:+.2f}) points from fixed 7x7" in text
    by_chance = 0.2 * report.correct[0] + 0.8 * report.correct[1]
    low, high = mean_interval(report.right["TLA threshold 0.5"] - by_chance)
    assert f"+16.00 ({100 * low:+.2f} to {100 * high:+.2f}) points from random lengths" in text


def test_what_the_bundle_takes_is_marked_and_said():
    names = ("fixed 14x14", "fixed 7x7", "TLA threshold 0.5")
    report = with_verdict(report_of(N, 1800, 1400, HARD, 0.5), taken=("fixed", 7), among=names)
    assert report.taken == "fixed 7x7"
    assert "The bundle takes fixed 7x7 (`--grid 7`), which won on the held-out images." in report.verdict
    report = with_verdict(report_of(N, 1800, 1400, HARD, 0.5), taken=["fixed", 7])
    assert report.taken == "TLA threshold 0.5"
    assert with_verdict(report_of(N, 1800, 1400, HARD, 0.5, cascade=(1800, 0.4))).taken == "cascade 0.9"
    assert "On these images TLA threshold 0.5 did best of 1; on others expect a little less." in report.verdict


def test_a_policy_that_gives_every_image_the_same_length_is_not_what_the_verdict_is_about():
    """The cascade of `report_of` has the shares of the policy; with all at the shortest it is cheapest and as good."""
    report = report_of(N, 1800, 1800, HARD, 0.5, cascade=(1800, 0.2))
    *others, cascade = report.rows
    same = replace(report, rows=(*others, replace(cascade, shares=(0.0, 1.0))))
    assert " cascade 0.9 gets 90.00% right" in with_verdict(report).verdict
    assert " TLA threshold 0.5 gets 90.00% right" in with_verdict(same).verdict


def test_without_a_choice_there_is_no_verdict():
    report = report_of(N, 1800, 1400, HARD, 0.5)
    only = with_verdict(report, among=("fixed 14x14", "fixed 7x7"))
    assert only.verdict is None


@pytest.mark.parametrize(
    ("policy", "option"),
    [
        (("fixed", 7), "--grid 7"),
        (("threshold", 0.97738), "--policy threshold:0.97738"),
        (("cascade", 0.9), "--policy cascade:0.9"),
        (("assigned-cascade", {"threshold": 0.5, "confidence": 0.25}), "--policy assigned-cascade:0.5,0.25"),
        ("argmax", "--policy argmax"),
        (("budget", {"mean_gmacs": 2.5}), "--budget 2.5gmacs"),
        (("budget", {"mean_tokens": 90.0}), "--budget 90"),
    ],
)
def test_options(policy, option):
    from revit_fast.cli import build_parser

    assert option_of(policy) == option
    args = build_parser().parse_args(["predict", "a.png", *option.split()])
    assert (args.policy or (("fixed", args.grid) if args.grid else ("budget", args.budget))) == policy


def logits_of(n, seed, gain):
    """Logits of a model whose shorter lengths are right for a share of the images, and sure if they are."""
    rng = np.random.default_rng(seed)
    margin = rng.uniform(0.5, 4, (3, n)) * np.where(rng.random((3, n)) < np.array(gain)[:, None], 1, -0.3)
    return np.stack([margin, np.zeros((3, n))], axis=2).astype(np.float32)


@pytest.mark.parametrize(
    ("gain", "trained", "said"),
    [
        ((0.9, 0.85, 0.8), True, "It is worth it: cascade"),
        ((0.9, 0.9, 0.9), True, "It is not worth it: the shortest length, fixed 2x2, loses at most half a point to"),
        ((0.9, 0.5, 0.5), False, "take these numbers as a lower bound of what a trained model gains"),
    ],
)
def test_prospects(gain, trained, said):
    model = drawn(rf.ReViT(grids=(4, 3, 2), patch_size=2, num_classes=2, embed_dim=16, depth=1, num_heads=2)).eval()
    n = 2000
    logits = logits_of(n, 0, gain)
    if gain[1] == gain[0]:
        logits[1:] = logits[0]
    images = ArrayImages(np.zeros((n, 4, 4), np.uint8), np.zeros(n, int), ["a", "b"])
    report = evaluate(model, None, images, predictions=Predictions(model.grids, logits), cascade=(0.7, 0.9))
    text = prospects(report, trained)
    assert said in text
    assert ("lower bound" in text) == (not trained)
    assert f"On 2,000 images fixed 4x4 gets {report.rows[0].accuracy:.2%} right, fixed 3x3 " in text

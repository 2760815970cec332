"""Policies against what they promise, written out per image."""

import itertools
import pickle

import numpy as np
import pytest

from revit_fast.adaptive.policies import (
    Calibration,
    Evidence,
    confidence,
    grey_entropy,
    last_length,
    make_policy,
    smallest_sufficient,
    suffices,
    uniform,
)

GRIDS = (14, 10, 7)
RNG = np.random.default_rng(0)
PROBABILITIES = RNG.dirichlet([0.7, 0.7, 0.7], size=500).astype(np.float32)
INDEX = np.arange(500)
CALIBRATION = Calibration(1.0, suffices(PROBABILITIES), (7.0, 5.0))


def chosen(spec, index=INDEX, probabilities=PROBABILITIES, entropy=None, **options):
    return make_policy(spec, GRIDS, **options).choose(Evidence(index, probabilities, entropy))


def test_argmax_takes_the_longer_of_equals():
    p = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [0.1, 0.45, 0.45]], np.float32)
    assert chosen("argmax", np.arange(3), p).tolist() == [1, 0, 1]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_threshold_takes_the_smallest_that_suffices(threshold):
    for p, got in zip(PROBABILITIES.astype(np.float64), chosen(("threshold", threshold)), strict=True):
        enough = [i for i in range(3) if i == 0 or p[i:].sum() >= threshold - 1e-6]
        surely = [i for i in range(3) if i == 0 or p[i:].sum() >= threshold + 1e-6]
        assert max(surely) <= got <= max(enough)


def test_threshold_grows_with_caution():
    lengths = [chosen(("threshold", t)) for t in np.linspace(0, 1, 21)]
    assert all((a >= b).all() for a, b in itertools.pairwise(lengths))
    assert (lengths[0] == 2).all()


def test_probabilities_that_do_not_sum_to_one_leave_the_longest():
    assert smallest_sufficient(suffices(np.array([[0.3, 0.3, 0.3]])), 1.0).tolist() == [0]


@pytest.mark.parametrize("budget", [49, 60, 77.5, 100, 150, 196])
def test_budget_is_spent_and_kept(budget):
    costs = np.array([196.0, 100.0, 49.0])
    mean = costs[chosen(("budget", budget), calibration=CALIBRATION)].mean()
    assert mean <= budget + 1e-9
    threshold = CALIBRATION.threshold_for(costs, budget, "mean_tokens")
    above = np.nextafter(np.float32(threshold), np.float32(2))
    if above <= 1:
        assert costs[smallest_sufficient(CALIBRATION.suffices, above)].mean() > budget, "a little more would fit"
    assert CALIBRATION.shares(threshold) @ costs == pytest.approx(mean)


def test_a_budget_for_all_images_at_the_longest_where_rounded_sums_exceed_one():
    half = np.float32(0.5 + 2**-24)
    sure = np.array([[0, half, half], [1, 0, 0]], np.float32)
    assert half + half > 1
    calibration = Calibration(1.0, suffices(sure), (7.0, 5.0))
    assert make_policy(("budget", 196), GRIDS, calibration=calibration).threshold == 1.0


def test_budget_in_gmacs():
    macs = [4.6e9, 2.27e9, 1.1e9]
    got = chosen(("budget", {"mean_gmacs": 2.0}), calibration=CALIBRATION, macs=macs)
    assert 1.9 < np.array(macs)[got].mean() / 1e9 <= 2.0


def test_fixed_cycle():
    assert set(chosen(("fixed", 10))) == {1}
    assert chosen(("fixed", [7, 14, 10]), np.array([2, 0])).tolist() == [1, 2]
    assert chosen("cycle", np.array([0, 1, 2, 3, 7])).tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="3 fixed grids, but image 3"):
        chosen(("fixed", [7, 14, 10]), np.array([3]))


class TestRandom:
    def test_by_place_alone(self):
        together = chosen("random")
        assert [chosen("random", np.array([i]))[0] for i in INDEX[:50]] == together[:50].tolist()
        assert (chosen(("random", {"seed": 1})) != together).mean() > 0.5

    def test_shares(self):
        index = np.arange(200_000)
        shares = [0.2, 0.5, 0.3]
        got = np.bincount(chosen(("random", {"shares": shares}), index), minlength=3) / len(index)
        np.testing.assert_allclose(got, shares, atol=0.005)

    def test_uniform(self):
        values = uniform(0, np.arange(100_000))
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 100, "chi-square of 49 degrees of freedom"
        neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
        assert abs(neighbours) < 0.01


def test_cascade_begins_with_the_shortest():
    policy = make_policy(("cascade", 0.9), GRIDS)
    assert policy.choose(Evidence(INDEX)).tolist() == [2] * 500
    assert (policy.needs, policy.bound) == (None, 0.9)
    make_policy(("threshold", 0.9), GRIDS).decides_before("anything")


def test_an_assigned_cascade_begins_as_its_threshold():
    spec = ("assigned-cascade", {"threshold": 0.6, "confidence": 0.9})
    policy = make_policy(spec, GRIDS)
    assert policy.choose(Evidence(INDEX, PROBABILITIES)).tolist() == chosen(("threshold", 0.6)).tolist()
    assert (policy.needs, policy.threshold, policy.bound) == ("probabilities", 0.6, 0.9)
    for pair in (0.6, 0.9), [0.6, 0.9]:
        other = make_policy(("assigned-cascade", pair), GRIDS)
        assert (other.threshold, other.bound) == (0.6, 0.9)


def test_where_a_cascade_ends():
    rng = np.random.default_rng(0)
    first, sureness = rng.integers(0, 3, 200), rng.random((3, 200)).round(1)
    for i, got in enumerate(last_length(first, sureness, 0.6)):
        length = first[i]
        while length > 0 and sureness[length, i] < 0.6:
            length -= 1
        assert got == length


EVERY = [
    "argmax",
    ("threshold", 0.8),
    ("budget", 90),
    ("cascade", 0.9),
    ("assigned-cascade", {"threshold": 0.8, "confidence": 0.9}),
    ("fixed", 10),
    ("fixed", [14, 7] * 250),
    "cycle",
    ("random", {"seed": 3}),
    "entropy",
]


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_pickled_it_chooses_the_same(spec):
    policy = make_policy(spec, GRIDS, calibration=CALIBRATION)
    evidence = Evidence(INDEX, PROBABILITIES, np.linspace(0, 8, 500))
    assert pickle.loads(pickle.dumps(policy)).choose(evidence).tolist() == policy.choose(evidence).tolist()


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        (("threshold", np.float32(0.5)), ("threshold", 0.5)),
        (("budget", np.int64(90)), ("budget", 90)),
        (("budget", {"mean_tokens": np.float32(90)}), ("budget", 90)),
        (("cascade", np.float32(0.5)), ("cascade", 0.5)),
    ],
)
def test_numbers_of_numpy(spec, plain):
    got, expected = (make_policy(s, GRIDS, calibration=CALIBRATION) for s in (spec, plain))
    assert (got.threshold, got.bound) == (expected.threshold, expected.bound)


def test_confidence():
    logits = np.array([[[0.0, np.log(3.0)], [1000.0, 0.0], [np.nan, 1.0]]], dtype=np.float32)
    assert confidence(logits)[0].tolist() == pytest.approx([0.75, 1.0, 0.0])
    assert confidence(logits[0, 0]) == pytest.approx(0.75)


class TestEntropy:
    def test_of_grey_values(self):
        flat = np.full((64, 3), 90, np.uint8)
        halves = np.repeat(np.array([[0] * 3, [255] * 3], np.uint8), 32, axis=0)
        every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        np.testing.assert_allclose(grey_entropy(np.stack([flat, halves])), [0, 1])
        np.testing.assert_allclose(grey_entropy(every[None]), [8])

    def test_thresholds(self):
        entropy = np.array([0, 4.99, 5, 6.99, 7, 8])
        assert chosen(("entropy", [7, 5]), entropy=entropy).tolist() == [2, 2, 1, 1, 0, 0]
        assert chosen("entropy", entropy=entropy, calibration=CALIBRATION).tolist() == [2, 2, 1, 1, 0, 0]
        assert chosen("entropy", entropy=np.array([0.0, 2.7, 5.4])).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("best", "argmax, threshold"),
        (("argmax", 1), "no argument"),
        (("threshold", 1.5), r"\[0, 1\]"),
        (("threshold", float("nan")), r"\[0, 1\]"),
        ("threshold", r"\[0, 1\]"),
        ("cascade", r"probability p in \[0, 1\]"),
        (("cascade", -0.1), r"probability p in \[0, 1\]"),
        ("assigned-cascade", r"θ and p in \[0, 1\], got None"),
        (("assigned-cascade", 0.5), r"θ and p in \[0, 1\], got 0\.5"),
        (("assigned-cascade", (0.5, 1.5)), r"θ and p in \[0, 1\]"),
        (("assigned-cascade", {"threshold": 0.5}), r"θ and p in \[0, 1\]"),
        (("assigned-cascade", {"threshold": 0.5, "confidence": float("nan")}), r"θ and p in \[0, 1\]"),
        (("fixed", 8), r"\[8\] are not among"),
        (("fixed", [14, 9]), r"\[9\] are not among"),
        (("random", {"share": [1]}), "shares"),
        (("random", {"seed": -1}), "seed from 0 to .*, got -1"),
        (("random", {"seed": "x"}), "seed from 0 to .*, got 'x'"),
        (("random", {"shares": [0.5, 0.5]}), "3 shares"),
        (("random", {"shares": [0.5, 0.6, -0.1]}), "3 shares"),
        (("entropy", [5, 7]), "decreasing"),
        (("entropy", [5]), "2 decreasing"),
        (("budget", 100), "calibrate"),
        (("budget", {"watts": 3}), "mean_tokens"),
        (("budget", "lots"), "mean_tokens"),
        (("budget", {"mean_gmacs": 2.0}), "calibrate"),
    ],
)
def test_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        make_policy(spec, GRIDS)


def test_budgets_refused():
    with pytest.raises(ValueError, match=r"expected 49 .* to 196"):
        make_policy(("budget", 40), GRIDS, calibration=CALIBRATION)
    with pytest.raises(ValueError, match="macs"):
        make_policy(("budget", {"mean_gmacs": 2.0}), GRIDS, calibration=CALIBRATION)
    with pytest.raises(TypeError, match="fixed"):
        make_policy(("fixed", None), GRIDS)

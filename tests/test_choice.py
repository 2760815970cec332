"""The choice of thresholds and of the policy to deploy, against every pair tried by hand."""

import numpy as np
import pytest

from revit_fast.train import choice
from revit_fast.train.choice import HeldOut, Option, candidates, cascade_for, means, spent, winner
from revit_fast.train.statistics import mean_interval

COSTS = (9.0, 5.0, 2.0)


def held_out(n=40, seed=0):
    """Random images; values repeat, so that thresholds meet several images at once."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([1, 1, 1], n).round(2)
    suffices = np.stack([np.ones(n), 1 - p[:, 0], p[:, 2]], axis=1).astype(np.float32)
    sureness = rng.uniform(0.3, 1, (3, n)).round(2)
    right = np.sort(rng.uniform(0, 1, (3, n)), axis=0)[::-1] - 0.1 * rng.uniform(0, 1, (3, n))
    return HeldOut(suffices, sureness, right, COSTS)


def by_hand(held, θ, p):
    """Mean of `right` and mean cost, image by image, as a pipeline does it."""
    right = cost = 0.0
    for i in range(held.sureness.shape[1]):
        length = max(j for j in range(3) if j == 0 or held.suffices[i, j] >= np.float32(θ))
        cost += held.costs[length]
        while length > 0 and held.sureness[length, i] < p:
            length -= 1
            cost += held.costs[length]
        right += held.right[length, i]
    return right / held.sureness.shape[1], cost / held.sureness.shape[1]


def test_the_means_of_every_pair():
    held = held_out()
    θs, ps = candidates(held.suffices[:, 1:])[::4], np.append(candidates(held.sureness[1:])[::5], 1.5)
    right, cost = means(held, θs, ps)
    expected = np.array([[by_hand(held, θ, p) for p in ps] for θ in θs])
    np.testing.assert_allclose(right, expected[..., 0], rtol=1e-12)
    np.testing.assert_allclose(cost, expected[..., 1], rtol=1e-12)


@pytest.mark.parametrize("assigned", [True, False])
@pytest.mark.parametrize(("budget", "drop"), [(None, 0.0), (None, 0.02), (None, 0.9), (3.0, 0.0), (8.0, 0.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cascade_that_keeps_a_goal(assigned, budget, drop, seed):
    held = held_out(15, seed)
    θs = candidates(held.suffices[:, 1:]) if assigned else [0.0]
    pairs = {(θ, p): by_hand(held, θ, p) for θ in θs for p in candidates(held.sureness[1:])}
    if budget is None:
        least = held.right[0].mean() - drop - 1e-9
        bad = [pair for pair, (right, _) in pairs.items() if right < least]
        kept = [pair for pair in pairs if not any(θ >= pair[0] and p >= pair[1] for θ, p in bad)]
    else:
        within = [pair for pair in pairs if pairs[pair][1] <= budget + 1e-9]
        most = max(pairs[pair][0] for pair in within)
        kept = [pair for pair in within if pairs[pair][0] >= most - 1e-9]
    if not kept:  # an image is sure at once that the longest length would get right
        with pytest.raises(ValueError, match="drop: even θ = 1 and p = 1 lose more"):
            cascade_for(held, budget, drop, assigned=assigned)
        return
    name, argument = cascade_for(held, budget, drop, assigned=assigned)
    got = (argument["threshold"], argument["confidence"]) if assigned else (0.0, argument)
    assert name == ("assigned-cascade" if assigned else "cascade")
    assert got in kept
    assert pairs[got][1] == pytest.approx(min(pairs[pair][1] for pair in kept))


def test_many_values_are_thinned(monkeypatch):
    monkeypatch.setattr(choice, "MAX_CANDIDATES", 5)
    assert candidates(np.linspace(0, 1, 101)).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_what_cannot_be_kept_is_refused():
    held = held_out()
    worse = held._replace(right=held.right[::-1], suffices=np.ones_like(held.suffices), sureness=np.ones((3, 40)))
    with pytest.raises(ValueError, match="drop: even θ = 1 and p = 1 lose more"):
        cascade_for(worse._replace(right=np.array([[1.0] * 40, [0.5] * 40, [0.1] * 40])), None, 0.0, assigned=True)
    with pytest.raises(ValueError, match="budget: no cascade costs 1"):
        cascade_for(held, 1.0, 0.0, assigned=False)


def test_spent():
    first, last = np.array([2, 2, 2, 1, 0]), np.array([2, 1, 0, 0, 0])
    assert spent(COSTS, first, last).tolist() == [2, 7, 16, 14, 9]


def test_mean_interval():
    assert mean_interval(np.array([1.0, 3.0])) == pytest.approx((2 - 1.959964, 2 + 1.959964), abs=1e-5)
    assert mean_interval(np.zeros(5)) == (0, 0)
    assert mean_interval(np.ones(1)) == (-np.inf, np.inf)


RIGHT = np.array([1.0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
LESS = np.array([1.0, 1, 1, 0, 0, 0, 0, 0, 0, 0])


class TestWinner:
    """Lengths of 10 and 4 GMACs; the shorter one loses .3 of .6."""

    def options(self, *more):
        return [Option(("fixed", 14), RIGHT, 10.0, 10.0, 100.0), Option(("fixed", 7), LESS, 4.0, 4.0, 250.0), *more]

    @pytest.mark.parametrize(
        ("gmacs", "images_per_s", "drop", "expected"),
        [
            (5.0, 150.0, 0.0, "threshold"),
            (5.0, None, 0.0, "threshold"),
            (5.0, 90.0, 0.0, "fixed"),  # not faster than the longest
            (9.6, 150.0, 0.0, "fixed"),  # saves too little
            (5.0, 150.0, 0.3, "fixed"),  # the shortest keeps the goal, and is cheaper
        ],
    )
    def test_without_a_budget(self, gmacs, images_per_s, drop, expected):
        won = winner(self.options(Option(("threshold", 0.5), RIGHT, gmacs, gmacs, images_per_s)), None, drop)
        assert won.policy[0] == expected
        assert won.policy != ("fixed", 7) or drop == 0.3

    @pytest.mark.parametrize(("right", "expected"), [(LESS + 0.1, "cascade"), (RIGHT[::-1], "fixed"), (LESS, "fixed")])
    def test_with_a_budget(self, right, expected):
        """A lead counts if its interval is above zero."""
        won = winner(self.options(Option(("cascade", 0.5), right, 6.0, 6.0)), 7.0, 0.0)
        assert won.policy == {"cascade": ("cascade", 0.5), "fixed": ("fixed", 7)}[expected]

    @pytest.mark.parametrize(("gmacs", "expected"), [(4.9, "cascade"), (4.7, "threshold")])
    def test_a_cascade_that_costs_little_more(self, gmacs, expected):
        more = [Option(("threshold", 0.5), RIGHT, gmacs), Option(("cascade", 0.9), RIGHT, 5.0)]
        assert winner(self.options(*more), None, 0.0).policy[0] == expected

    def test_the_cheapest_of_several(self):
        more = [Option(("threshold", 0.5), RIGHT, 5.0), Option(("cascade", 0.9), RIGHT, 3.0)]
        more += [Option(("cascade", 0.1), LESS, 1.0)]
        assert winner(self.options(*more), None, 0.01).policy == ("cascade", 0.9)

"""The token-budget batcher under random streams: nothing lost or doubled, budgets kept, waits bounded."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revit_fast.streaming.batching import TokenBudgetBatcher

ITEMS = st.lists(st.tuples(st.sampled_from([0, 1, 50, 101, 197, 4000]), st.floats(0, 0.2)), max_size=200)


@settings(max_examples=300, deadline=None)
@given(
    items=ITEMS,
    budget=st.sampled_from([1, 50, 197, 250, 1000]),
    max_open=st.integers(1, 4),
    max_behind=st.integers(1, 30),
    max_wait_s=st.sampled_from([0.0, 0.1, 1.0, math.inf]),
)
def test_properties(items, budget, max_open, max_behind, max_wait_s):
    bounds = {"max_wait_s": max_wait_s, "max_behind": max_behind, "max_open": max_open}
    batcher = TokenBudgetBatcher(budget, **bounds)
    now, came, out = 0.0, [], []

    def receive(batches):
        for batch in batches:
            assert batch, "no batch is empty"
            assert batch == sorted(batch), "within a batch items keep their order"
            assert sum(items[i][0] for i in batch) <= budget or len(batch) == 1
            assert all(now - came[i] <= max_wait_s + 1e-9 for i in batch), "nothing waits beyond its time"
            out.extend(batch)

    for i, (n_tokens, gap) in enumerate(items):
        # Time passes; whoever runs the batcher looks after it at each deadline.
        while batcher.deadline <= now + gap:
            now = max(now, batcher.deadline)
            batches = batcher.expired(now)
            assert batches, "a deadline that has come hands something out"
            receive(batches)
        now += gap
        came.append(now)
        receive(batcher.add(i, n_tokens, now))
        waiting = set(range(i + 1)) - set(out)
        assert len(waiting) == len(batcher)
        assert all(i - w < max_behind for w in waiting), "nothing is overtaken by too many"
        assert len(batcher._open) <= max_open
    rest = batcher.flush()
    out.extend(i for batch in rest for i in batch)
    assert sorted(out) == list(range(len(items))), "nothing is lost or doubled"
    assert len(batcher) == 0
    assert batcher.deadline == math.inf


def fed(batcher, tokens, **options):
    return [batch for i, n in enumerate(tokens) for batch in batcher.add(i, n, **options)]


def test_first_fit_fills_gaps():
    batcher = TokenBudgetBatcher(298, min_tokens=50)
    assert fed(batcher, [197, 101]) == [[0, 1]], "full at once"
    assert fed(batcher, [197, 197, 50, 101, 50]) == [[1, 3], [0, 2, 4]]


def test_a_batch_without_room_for_the_smallest_is_full():
    assert fed(TokenBudgetBatcher(246, min_tokens=50), [197]) == [[0]]
    assert fed(TokenBudgetBatcher(247, min_tokens=50), [197]) == []


def test_bytes():
    batcher = TokenBudgetBatcher(10**6, max_bytes=100)
    assert fed(batcher, [1, 1, 1], n_bytes=40) == [[0, 1, 2]]
    assert fed(batcher, [1], n_bytes=1000) == [[0]], "one item larger than the bound goes alone"
    assert fed(batcher, [1, 1], n_bytes=40) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("token_budget", "min_tokens", "max_behind", "max_open", "max_bytes")),
        *((name, math.nan) for name in ("token_budget", "max_wait_s")),
        ("max_wait_s", -1.0),
    ],
)
def test_bounds(name, value):
    with pytest.raises(ValueError, match=name):
        TokenBudgetBatcher(**{"token_budget": 10} | {name: value})

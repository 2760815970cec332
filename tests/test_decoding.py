"""Decoding ahead: order, how far ahead, deadlines, errors of the sources, and what is left behind when it ends."""

import math
import threading
import time

import numpy as np
import pytest

from revit_fast.io.images import ImageError
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.decoding import CHUNK, MORE_SMALL, SMALL_BYTES, Decoders

PIXELS = np.zeros((2, 2, 3), np.uint8)


def decode(source):
    if isinstance(source, str):
        raise ImageError(source)
    return np.full_like(PIXELS, source % 256)


def read_all(decoders):
    end, items = None, []
    while end is None:
        chunk, end = decoders.chunk(math.inf)
        assert len(chunk) <= CHUNK + MORE_SMALL
        items += chunk
    return items, end


@pytest.fixture
def make():
    made = []

    def make(sources, decode=decode, n_workers=2):
        made.append(Decoders(sources, decode, n_workers, StageTimes()))
        return made[-1]

    yield make
    for decoders in made:
        decoders.close()


def test_order_and_errors(make):
    sources = list(range(100))
    sources[40] = "torn"
    items, end = read_all(make(sources, n_workers=4))
    assert [(i.index, i.source) for i in items] == list(enumerate(sources))
    assert end.error is None
    for item in items:
        decoded = item.decoded.result()
        if item.source == "torn":
            assert decoded.image is None
            assert decoded.error == "torn: torn"
        else:
            assert decoded.error is None
            assert decoded.image[0, 0, 0] == item.source
            assert decoded.ms >= 0


LARGE = np.zeros(SMALL_BYTES + 1, dtype=np.uint8)


@pytest.mark.parametrize("n_workers", [1, 3])
@pytest.mark.parametrize("n_small", [0, 200, math.inf], ids=["large", "small, then large", "small"])
def test_never_far_ahead(make, n_workers, n_small):
    """Many small images at a time, few large ones, also where small ones came before them."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    decoders = make(endless(), lambda i: PIXELS if i <= n_small else LARGE, n_workers=n_workers)
    consumed, largest = 0, 0
    for _ in range(40):
        chunk = decoders.chunk(math.inf)[0]
        consumed += len(chunk)
        largest = max(largest, len(chunk))
        time.sleep(0.002)
        more = MORE_SMALL if consumed < n_small + MORE_SMALL and n_small else 0
        assert len(chunk) <= CHUNK + MORE_SMALL
        assert taken <= consumed + 2 * n_workers + CHUNK + more + 1, "the one more waits for leave"
    assert largest <= CHUNK or n_small
    assert largest > CHUNK or not n_small


def test_an_error_of_the_sources_comes_after_what_came_before_it(make):
    def broken():
        yield from range(5)
        raise KeyError("sources")

    items, end = read_all(make(broken()))
    assert [i.source for i in items] == list(range(5))
    assert isinstance(end.error, KeyError)


def test_deadline(make):
    release = threading.Event()

    def slow(source):
        release.wait(20)
        return PIXELS

    decoders = make([1], slow)
    begin = time.perf_counter()
    assert decoders.chunk(begin + 0.05) == ([], None)
    assert time.perf_counter() - begin >= 0.05
    release.set()
    assert [i.source for i in decoders.chunk(math.inf)[0]] == [1]


def test_closing_early_ends_the_threads(make):
    def names():
        return {t.name for t in threading.enumerate() if t.name.startswith("revit-fast")}

    before = names()
    decoders = make(iter(range(10**6)))
    decoders.chunk(math.inf)
    decoders.close()
    end = time.perf_counter() + 10
    while names() - before and time.perf_counter() < end:
        time.sleep(0.01)
    assert not names() - before

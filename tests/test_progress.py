"""Progress: lines by a clock that the test sets; the bar is tested with the commands, on a pseudo-terminal."""

import io
import sys

import pytest
from terminals import terminal

from revit_fast.io.progress import Progress


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def progress_of(clock, total, **options):
    stream = io.StringIO()
    return Progress("images", total, stream=stream, clock=clock, now=lambda: clock() - 1000, **options), stream


def test_a_line_every_ten_seconds(clock, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    progress, stream = progress_of(clock, 400)
    with progress:
        for second in range(1, 41):
            clock.seconds += 1
            progress(second * 5, note="5.0 images/s")
    assert stream.getvalue().splitlines() == [
        f"{5 * s} of 400 images ({5 * s / 400:.0%}), 5.0 images/s, ends at {progress_end(80)}, in 0:0{left}"
        for s, left in ((10, "1:10"), (20, "1:00"), (30, "0:50"), (40, "0:40"))
    ]


def progress_end(seconds):
    from datetime import datetime

    return f"{datetime.fromtimestamp(seconds):%H:%M:%S}"


def test_what_nobody_knows_is_left_out(clock):
    progress, stream = progress_of(clock, None)
    clock.seconds += 10
    progress(3)
    assert stream.getvalue() == "3 images\n"
    clock.seconds += 10
    progress(0, 7)
    assert stream.getvalue() == "3 images\n0 of 7 images (0%)\n"


def test_the_total_is_counted_once_and_only_for_a_line(clock):
    counted = []
    progress, stream = progress_of(clock, lambda: counted.append(1) or 20)
    progress(1)
    assert not counted
    for _ in range(2):
        clock.seconds += 10
        progress(10)
    assert len(counted) == 1
    assert stream.getvalue().count("10 of 20 images (50%)") == 2


@pytest.mark.parametrize("rich", ["there", "missing"])
def test_a_terminal_gets_a_bar_if_rich_is_there(clock, monkeypatch, rich):
    if rich == "missing":
        monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("TERM", "xterm")
    with (
        terminal() as (stream, chunks),
        Progress("images", 4, stream=stream, clock=clock) as progress,
    ):
        progress(1)
        clock.seconds += 10
        progress(2)
    shown = b"".join(chunks).decode()
    assert ("2 of 4 images (50%)" in shown) == (rich == "missing")
    assert ("2/4" in shown) == (rich == "there")
    assert rich == "missing" or shown.rstrip().endswith("\x1b[2K"), "the bar is cleared"

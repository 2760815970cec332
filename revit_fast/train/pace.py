"""How far a stage of a run is, and when it ends: lines by seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta

EVERY_S = 10.0
"""Seconds between two lines of a stage."""


class Pace:
    """Prints how far a stage is, at most every `EVERY_S` seconds; a shorter stage prints nothing.

    Args:
        say: function that prints a line.
        stage: what is done, in words.
        clock: function that gives the time in seconds.
    """

    def __init__(self, say: Callable[[str], None], stage: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._stage, self._clock = say, stage, clock
        self._begin = self._said = clock()

    def __call__(self, done: int, total: int) -> None:
        """Reports that `done` of `total` parts are done."""
        now = self._clock()
        if done and now - self._said >= EVERY_S:
            self._said = now
            left = ahead((now - self._begin) / done * (total - done))
            self._say(f"{self._stage}: {done} of {total} ({done / total:.0%}), {left}")


def ahead(seconds: float) -> str:
    """A time that is left and the clock time of its end, such as "2 min 05 s left, until 14:05"."""
    now = datetime.now()
    try:
        end = now + timedelta(seconds=seconds)
    except OverflowError:
        return f"{duration(seconds)} left"
    return f"{duration(seconds)} left, until {end:%H:%M}" + (f" on {end:%d %b %Y}" if end.date() != now.date() else "")


def duration(seconds: float) -> str:
    """Seconds in words, such as "2 min 05 s"."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"

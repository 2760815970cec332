"""The progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TextIO

EVERY_S = 10.0
"""Seconds between two lines."""

HIDDEN_S = 0.1
"""Shortest time, in seconds, that the bar stays hidden for something else, so that it does not flicker between rows."""


class Progress:
    """Says how much of a run is done: a context manager, at whose end the bar is cleared.

    On a terminal it is a bar. Without one, or without rich, it is a line every `EVERY_S` seconds with what is done, of
    how many, the share, and when the run will end at this rate. Calls show what is done, so a callback
    `progress(done, total)` can be an instance.

    Args:
        noun: what is counted, such as "images".
        total: their number, or a function that counts them, which is called before the first report; None if nobody
            knows.
        stream: where to report; by default stderr.
        clock: the time in seconds, from any zero.
        now: the time of day in seconds since 1970.
    """

    def __init__(
        self,
        noun: str,
        total: int | Callable[[], int | None] | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.noun, self._total, self._clock, self._now = noun, total, clock, now
        self._stream = sys.stderr if stream is None else stream
        self._bar = _bar_on(self._stream)
        self._begin = clock()
        self._shown = self._begin if self._bar is None else -math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def total(self) -> int | None:
        """The number of all; None if nobody knows it."""
        if callable(self._total):
            self._total = self._total()
        return self._total

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return max(self._clock() - self._begin, 1e-9)

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Reports what is done, if it is time to.

        Args:
            done: how many are done.
            total: the number of all, where it was not known before.
            note: further text, such as a rate.
        """
        if total is not None:
            self._total = total
        moment = self._clock()
        if self._bar is not None:
            if self._bar.live.is_started or moment - self._shown >= HIDDEN_S:
                self._bar.update(self._bar.task_ids[0], completed=done, total=self.total, description=note)
                self._bar.start()
        elif moment - self._shown >= EVERY_S:
            self._shown = moment
            self.say(self.line(done, note))

    def line(self, done: int, note: str = "") -> str:
        """What is done, in words."""
        total, seconds = self.total, self.seconds
        if not total or done > total:
            return ", ".join(filter(None, (f"{done} {self.noun}", note)))
        parts = [f"{done} of {total} {self.noun} ({done / total:.0%})", note]
        if done:
            left = timedelta(seconds=round((total - done) * seconds / done))
            parts.append(f"ends at {datetime.fromtimestamp(self._now()) + left:%H:%M:%S}, in {left}")
        return ", ".join(filter(None, parts))

    def say(self, text: str) -> None:
        """Prints a line."""
        with self.aside():
            print(text, file=self._stream, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context in which something else may print to the terminal: the bar is hidden until a later report."""
        self.close()
        yield
        if self._bar is not None:
            self._shown = self._clock()

    def close(self) -> None:
        """Clears the bar."""
        if self._bar is not None:
            self._bar.stop()


def _bar_on(stream: TextIO):
    """A bar of rich, not yet shown; None where the stream is no terminal that can clear it, or rich is missing."""
    if not stream.isatty():
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:  # an optional package
        return None
    console = Console(file=stream)
    if not console.is_interactive:
        return None
    bar = progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        # Otherwise rich would send stdout to this console, even where it is a file.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("", total=None)
    return bar

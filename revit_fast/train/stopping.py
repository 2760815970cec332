"""How a run ends before its last update: by a signal, or by a loss that is not finite."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite; the weights were not updated with it, and the last checkpoint is kept."""


class Interrupted(RuntimeError):
    """The run was asked to stop; it wrote a checkpoint first."""


SAME_S = 1.0
"""Seconds in which a second SIGINT counts as the first: some launchers send a Ctrl-C to a process that the terminal has
sent it to already."""


@contextmanager
def signals_call(stop: Callable[[int], None]) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM only call `stop` with their number; no effect outside the main thread.

    A second SIGINT, over `SAME_S` seconds after the first, raises a KeyboardInterrupt at once.
    """
    before, first_s = {}, math.inf

    def handle(number: int, frame: object) -> None:
        nonlocal first_s
        if number == signal.SIGINT:
            if time.monotonic() - first_s > SAME_S:
                raise KeyboardInterrupt
            first_s = min(first_s, time.monotonic())
        stop(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

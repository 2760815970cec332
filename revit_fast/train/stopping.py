"""How a run ends before its last update: by a signal, or by a loss that is not finite."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite; the weights were not updated with it, and the last checkpoint is kept."""


class Interrupted(RuntimeError):
    """The run was asked to stop; it wrote a checkpoint first."""


@contextmanager
def signals_call(stop: Callable[[int], None]) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM only call `stop` with their number; no effect outside the main thread."""
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: stop(number))
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

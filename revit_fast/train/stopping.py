"""How a run ends before its last update: by a signal, or by a loss that is not finite."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class NotFiniteError(RuntimeError):
    """The loss became NaN or infinite; the weights were not updated with it, and the last checkpoint is kept."""


class Interrupted(RuntimeError):
    """The run was asked to stop; what it needs to go on is saved."""


SAME_S = 1.0
"""Seconds in which a second SIGINT counts as the first: some launchers send a Ctrl-C to a process that the terminal has
sent it to already."""

GRACE_S = 2.0
"""Seconds after a second Ctrl-C in which the process may end in order; then it ends at once."""

HANDLED = (signal.SIGINT, signal.SIGTERM)


class _Presses:
    """Tells a second Ctrl-C from the first."""

    def __init__(self) -> None:
        self._first_s = math.inf

    def again(self, number: int) -> bool:
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        again = now - self._first_s > SAME_S
        self._first_s = min(self._first_s, now)
        return again


class Stop:
    """What signals have asked of a run, see `stoppable`.

    Attributes:
        number: number of the first signal; None if none has come.
        quits: whether a second Ctrl-C has come, after which nothing more is saved.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.quits = False
        self._at_once, self._presses = False, _Presses()

    @property
    def asked(self) -> bool:
        """Whether the run is to save what it has, and to stop."""
        return self.number is not None and not self.quits

    def check(self) -> None:
        """Raises a KeyboardInterrupt if the run was asked to stop."""
        if self.number is not None:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises a KeyboardInterrupt wherever the run is; one that came before, here."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: object) -> None:
        again, first = self._presses.again(number), self.number is None
        self.number, self.quits = number if first else self.number, self.quits or again
        if again or (first and self._at_once):
            raise KeyboardInterrupt


@contextmanager
def stoppable(say: Callable[[str], None], where: Callable[[], str] = lambda: "") -> Iterator[Stop]:
    """Context in which SIGINT and SIGTERM ask a run to stop; no effect outside the main thread.

    The first signal is acknowledged at once by a line. Another thread prints it, because Python runs a handler only
    when the main thread is back from C++ code, such as a backward pass. A second SIGINT, over `SAME_S` seconds after
    the first, raises a KeyboardInterrupt. If the context is still open `GRACE_S` seconds later, the process ends.

    Args:
        say: function that prints a line.
        where: words that follow "stopped by SIGINT" in the message.

    Raises:
        Interrupted: in the place of the KeyboardInterrupt with which `Stop` ends the context, unless it quits.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    answers = threading.Thread(target=_acknowledge, args=(reading, say), daemon=True)
    answers.start()
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, stop._handle) for number in HANDLED}
    try:
        yield stop
    except KeyboardInterrupt:
        if not stop.asked:
            raise
        raise Interrupted(f"stopped by {signal.Signals(stop.number).name}{where()}; resume to go on") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writing.close()  # ends the thread, after what it has to say
        answers.join(GRACE_S)


def _acknowledge(signals: socket.socket, say: Callable[[str], None]) -> None:
    """Answers the signals whose numbers are written to a socket."""
    presses, first, quits_s = _Presses(), True, math.inf
    with signals, suppress(TimeoutError):
        while received := signals.recv(1):
            number, again = received[0], presses.again(received[0])
            if again and quits_s == math.inf:
                say("quitting")
                quits_s = time.monotonic() + GRACE_S
            elif first and number in HANDLED:
                first = False
                say(f"{signal.Signals(number).name}: stopping; a second Ctrl-C quits at once")
            if quits_s < math.inf:
                signals.settimeout(max(quits_s - time.monotonic(), 1e-3))
        return
    os._exit(128 + signal.SIGINT)

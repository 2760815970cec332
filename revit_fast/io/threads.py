"""Threads that end with the work that needs them, or with the process; and what a fork leaves of them.

At its end the interpreter stops threads wherever they are. One that is inside of PyTorch then aborts the process. So
every `Carrier` that still runs is asked to end, and waited for, before that.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any

import torch

EXIT_S = 30.0
"""Longest time, in seconds, that the end of the process waits for a thread that computes."""

SOURCE_S = 0.5
"""Longest time, in seconds, that leaving waits for a thread in somebody's iterator, which may wait for ever."""

_running: set[Carrier] = set()


class Carrier:
    """A thread that takes items from an iterable and hands them on until they end, fail, or nobody wants more of them.

    A generator is closed when nothing more is taken from it, by the thread that iterated it.

    Args:
        name: the thread's name.
        items: what to iterate.
        hand_on: called with every item, in the thread.
        ended: called in the thread after the last item, with the exception of `items` or `hand_on`, or None.
        room: has a permit for every item that may be handed on. One is taken before the item is handed on.
        wake: called by `stop`, so that `items` give an item or end.
        patience_s: longest time, in seconds, that the end of the process waits for the thread.
    """

    def __init__(
        self,
        name: str,
        items: Iterable[Any],
        hand_on: Callable[[Any], object],
        ended: Callable[[BaseException | None], object],
        *,
        room: threading.Semaphore | None = None,
        wake: Callable[[], object] = lambda: None,
        patience_s: float = SOURCE_S,
    ) -> None:
        self._items, self._hand_on, self._ended = items, hand_on, ended
        self._room, self._wake, self.patience_s = room, wake, patience_s
        self._stopped = False
        self._thread = threading.Thread(target=self._carry, name=name, daemon=True)
        _running.add(self)
        try:
            self._thread.start()
        except BaseException:
            _running.discard(self)
            raise

    def _carry(self) -> None:
        items, error = None, None
        try:
            items = iter(self._items)
            for item in items:
                if self._room is not None:
                    self._room.acquire()
                    if self._stopped:
                        break
                self._hand_on(item)
                if self._stopped:
                    break
        except BaseException as raised:
            error = raised
        try:
            self._ended(error)
            if isinstance(items, Generator):
                items.close()  # nobody waits for what it raises: `threading.excepthook` shows it
        finally:
            _running.discard(self)

    def stop(self) -> None:
        """Asks the thread to end after the item that it works on; does not wait for it."""
        self._stopped = True
        if self._room is not None:
            self._room.release()
        self._wake()

    def join(self, timeout_s: float | None = None) -> None:
        """Waits until the thread has ended, at most `timeout_s` seconds; the thread itself does not wait."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)


@atexit.register
def _end_all() -> None:
    """Ends all threads before the interpreter does."""
    carriers = [*_running]
    for carrier in carriers:
        carrier.stop()
    for carrier in carriers:
        end = time.monotonic() + carrier.patience_s
        while carrier._thread.is_alive() and (left_s := end - time.monotonic()) > 0:
            with suppress(KeyboardInterrupt):  # the time is bounded, and leaving earlier could abort the process
                carrier.join(left_s)


class Process:
    """The process that something with threads was made in: a fork copies the object, and none of its threads.

    Args:
        what: what was made, with its article.
        fix: what to do in the child.
    """

    def __init__(self, what: str, fix: str) -> None:
        self._what, self._fix, self._id = what, fix, os.getpid()

    def is_here(self) -> bool:
        """Whether this is that process."""
        return os.getpid() == self._id

    def check(self, name: str) -> None:
        """Raises a RuntimeError, which begins with `name`, in any other process."""
        if not self.is_here():
            raise RuntimeError(
                f"{name}: {self._what} was made before os.fork(), and its threads are in process {self._id} alone, not "
                f"in this one ({os.getpid()}); {self._fix}"
            )


_computed = _lost = False


def check_compute_threads(name: str) -> None:
    """Notes that this process is about to compute on PyTorch's threads; refuses that if a fork has lost them.

    OpenMP believes that its threads still exist in the child, and waits for them for ever.

    Raises:
        RuntimeError: begins with `name`, if this process was forked from one that had called this function before with
            several compute threads, and has several itself.
    """
    global _computed
    if torch.get_num_threads() == 1:
        return
    if _lost:
        raise RuntimeError(
            f"{name}: this process was forked from one that had computed on several threads, which do not exist here "
            "and would be waited for without end; call torch.set_num_threads(1) first, or start the process by "
            'multiprocessing.get_context("spawn")'
        )
    _computed = True


def _after_fork() -> None:
    global _lost
    _lost = _lost or _computed
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

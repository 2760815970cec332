"""A pipeline that runs in a thread and takes images from any other thread."""

from __future__ import annotations

import queue
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from revit_fast.io.held import Held, held
from revit_fast.io.images import ImageSource, Source
from revit_fast.io.threads import EXIT_S, SOURCE_S, Carrier, Process
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.results import Result

CANCELLED = Source("cancelled", "nobody waits for its result")
"""Stands in for an image whose future was cancelled; its result is dropped."""


class Session:
    """A pipeline that runs in its own thread on images submitted from any thread.

    `with` closes it: it finishes all submitted images, or, if the block ends by an exception, cancels those that wait.
    Unless it is closed, it cancels them when the process ends; if nobody refers to it any more, it finishes them.

    Args:
        pipe: the `AdaptivePipeline`; its `max_wait_s` is the longest time that an image waits for others.
        times: collects the time of each stage.
        copy: False if arrays, buffers and PIL images stay unchanged from `submit` to their results; they are not copied
            then.
    """

    def __init__(
        self, pipe: Callable[..., Iterator[Result]], times: StageTimes | None = None, *, copy: bool = True
    ) -> None:
        self._inbox, self._feeders = _Inbox(copy), []
        inbox = self._inbox
        self._thread = Carrier(
            "revit-fast-session",
            pipe(inbox.submitted(), times=times),
            inbox.deliver,
            inbox.ended,
            wake=lambda: inbox.close("the session is closed"),
            patience_s=EXIT_S,
        )

    def submit(self, source: ImageSource) -> Future[Result]:
        """Submits an image and returns its future result. An image that cannot be read gives a result with an error.

        An array, buffer or PIL image may be changed as soon as this returns, unless the session has `copy=False`.

        Raises:
            RuntimeError: if the session is closed, its pipeline has failed, or it was made before a fork.
        """
        return self._inbox.submit(source)

    def submit_all(
        self,
        sources: Iterable[ImageSource],
        room: threading.Semaphore,
        submitted: Callable[[Future[Result]], object],
        ended: Callable[[BaseException | None], object],
    ) -> None:
        """Submits the images of an iterable, which a thread of its own iterates, until the session is closed.

        Args:
            sources: images.
            room: has a permit for every image that may be submitted.
            submitted: called in that thread with every future.
            ended: called in that thread at the end, with the exception of the iterable, or None.
        """
        submit = self._inbox.submit
        self._feeders.append(Carrier("revit-fast-submit", sources, lambda s: submitted(submit(s)), ended, room=room))

    def close(self, *, cancel: bool = False, wait: bool = True) -> None:
        """Finishes all submitted images and ends the thread; does nothing in a process that was forked.

        Args:
            cancel: cancel the images that wait, instead of finishing them.
            wait: wait until that is done.
        """
        if not self._inbox.process.is_here():
            return
        self._inbox.close("the session is closed")
        for feeder in self._feeders:
            feeder.stop()
        if cancel:
            self._thread.stop()
        if wait:
            for feeder in self._feeders:
                feeder.join(SOURCE_S)
            self._thread.join()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(cancel=kind is not None)

    def __del__(self) -> None:
        if hasattr(self, "_thread") and self.closed is None:  # it has none if the constructor failed
            self.close(wait=False)
            warnings.warn("a Session was never closed; use `with pipe.session() as session`", ResourceWarning, 2, self)

    @property
    def closed(self) -> str | None:
        """The reason why nothing can be submitted any more; None while the session runs."""
        return self._inbox.closed

    def __len__(self) -> int:
        """Number of images that wait for their results."""
        return len(self._inbox.waiting)


class _Inbox:
    """What a session shares with its threads. They do not refer to the session itself, so that it can be dropped."""

    def __init__(self, copy: bool) -> None:
        self.process = Process("this session", "make a session of its own in each process")
        self.waiting: deque[_Pending] = deque()
        self.closed: str | None = None
        self._copy = copy
        self._sources: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._end = object()

    def submit(self, source: ImageSource) -> Future[Result]:
        self.process.check("submit")
        future = _Pending(self.process)
        taken = held(source, copy=self._copy)
        with self._lock:  # `waiting` must have the order of the queue, because results do
            if self.closed is not None:
                raise RuntimeError(f"submit: {self.closed}")
            self.waiting.append(future)
            self._sources.put((taken, future))
        return future

    def close(self, reason: str) -> None:
        """Takes no more images."""
        with self._lock:
            if self.closed is None:
                self.closed = reason
                self._sources.put(self._end)

    def submitted(self) -> Iterator[Held]:
        """The sources in their order; one that nobody waits for any more is not read, and takes no part in a pack."""
        while (item := self._sources.get()) is not self._end:
            source, future = item
            yield held(CANCELLED) if future.cancelled() else source

    def deliver(self, result: Result) -> None:
        future = self.waiting.popleft()
        if future.set_running_or_notify_cancel():
            future.set_result(result)

    def ended(self, error: BaseException | None) -> None:
        """Leaves no future pending: the pipeline has failed, or was stopped before it had finished everything."""
        if error is not None:
            with self._lock:
                self.closed = f"its pipeline failed: {error}"
        while self.waiting:
            future = self.waiting.popleft()
            if error is None:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_exception(error)


class _Pending(Future):
    """A future that is never waited for in a forked process, where nobody would finish it."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def result(self, timeout: float | None = None) -> Result:
        if not self.done():
            self._process.check("result")
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if not self.done():
            self._process.check("exception")
        return super().exception(timeout)

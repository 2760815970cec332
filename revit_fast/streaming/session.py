"""A pipeline that runs in a thread and takes images from any other thread."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from revit_fast.io.held import Held, held
from revit_fast.io.images import ImageSource
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.results import Result


class Session:
    """A pipeline that runs in its own thread on images submitted from any thread.

    Args:
        pipe: the `AdaptivePipeline`; its `max_wait_s` is the longest time that an image waits for others.
        times: collects the time of each stage.
        copy: False if arrays, buffers and PIL images stay unchanged from `submit` to their results; they are not copied
            then.
    """

    def __init__(
        self, pipe: Callable[..., Iterator[Result]], times: StageTimes | None = None, *, copy: bool = True
    ) -> None:
        self._pipe, self._times, self._copy = pipe, times, copy
        self._sources: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: deque[Future[Result]] = deque()
        self._lock = threading.Lock()
        self._end = object()
        self._closed: str | None = None
        self._thread = threading.Thread(target=self._serve, name="revit-fast-session", daemon=True)
        self._thread.start()

    def submit(self, source: ImageSource) -> Future[Result]:
        """Submits an image and returns its future result. An image that cannot be read gives a result with an error.

        An array, buffer or PIL image may be changed as soon as this returns, unless the session has `copy=False`.

        Raises:
            RuntimeError: if the session is closed or its pipeline has failed.
        """
        future: Future[Result] = Future()
        taken = held(source, copy=self._copy)
        with self._lock:  # `_waiting` must have the order of the queue, because results do
            if self._closed is not None:
                raise RuntimeError(f"submit: {self._closed}")
            self._waiting.append(future)
            self._sources.put(taken)
        return future

    def close(self) -> None:
        """Finishes all submitted images and ends the thread."""
        with self._lock:
            if self._closed is None:
                self._closed = "the session is closed"
                self._sources.put(self._end)
        self._thread.join()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def closed(self) -> str | None:
        """The reason why nothing can be submitted any more; None while the session runs."""
        return self._closed

    def __len__(self) -> int:
        """Number of images that wait for their results."""
        return len(self._waiting)

    def _submitted(self) -> Iterator[Held]:
        while (source := self._sources.get()) is not self._end:
            yield source

    def _serve(self) -> None:
        try:
            for result in self._pipe(self._submitted(), times=self._times):
                future = self._waiting.popleft()
                if future.set_running_or_notify_cancel():
                    future.set_result(result)
        except BaseException as error:
            with self._lock:
                self._closed = f"its pipeline failed: {error}"
            for future in self._waiting:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            self._waiting.clear()

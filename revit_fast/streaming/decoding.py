"""Decodes a stream of images on threads, in order, a bounded number ahead of the consumer."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from revit_fast.io.held import Held, held, own_pixels
from revit_fast.io.images import ImageError, ImageSource
from revit_fast.io.threads import SOURCE_S, Carrier, Process, check_compute_threads
from revit_fast.io.trace import StageTimes

MAX_DECODERS = 8
"""Largest default number of decoding threads."""

CHUNK = 16
"""Largest number of decoded images in one chunk."""

SMALL_BYTES, MORE_SMALL = 1 << 17, 48
"""Images of at most `SMALL_BYTES` bytes are small. While images are small, `MORE_SMALL` more of them are decoded ahead
and put into a chunk: for a group of 16, the overhead of assigning would exceed the computation."""


def default_decoders() -> int:
    """The number of PyTorch's compute threads, at most `MAX_DECODERS`."""
    return min(torch.get_num_threads(), MAX_DECODERS)


def copies(sources: object, copy: bool) -> bool:
    """Whether sources are copied: not out of a list or tuple, where no producer runs between the items."""
    return copy and type(sources) not in (list, tuple)


class Decoded(NamedTuple):
    """The pixels of an image, or the reason why there are none, and the decoding time in milliseconds."""

    image: np.ndarray | None
    error: str | None
    ms: float


class Done:
    """A finished future that holds a result."""

    __slots__ = ("_value",)

    def __init__(self, value: Decoded) -> None:
        self._value = value

    def result(self, timeout: float | None = None) -> Decoded:
        return self._value

    def exception(self, timeout: float | None = None) -> None:
        return None


class Fed(NamedTuple):
    """A source that was submitted for decoding, with its future result."""

    index: int
    source: ImageSource
    decoded: Future[Decoded] | Done


class End(NamedTuple):
    """The end of the sources; `error` is the exception that their iterator raised, if any."""

    error: BaseException | None = None


class Decoders:
    """Decodes a stream of sources on threads, in order, a bounded number ahead of the consumer.

    Args:
        sources: a separate thread iterates them. `chunk` itself iterates a list or tuple, which never blocks: a thread
            would compete with the consumer's Python for the interpreter and with its kernels for a core. A `Held` is
            taken as it is. A generator is closed at the end, by the thread that iterated it.
        decode: function from a source to pixels; raises `ImageError`.
        n_workers: number of decoding threads.
        times: records the time of each decoding.
        first_index: index of the first source.
        copy: whether to copy what the producer of the sources could change, see `io.held`, before the next source is
            asked for. Nothing out of a list or tuple is copied: no producer runs between its items.

    Raises:
        RuntimeError: if this process was forked from one that computed on several threads; and from `chunk`, in a
            process that was forked since.
    """

    def __init__(
        self,
        sources: Iterable[ImageSource],
        decode: Callable[[ImageSource], np.ndarray],
        n_workers: int,
        times: StageTimes,
        first_index: int = 0,
        *,
        copy: bool = True,
    ) -> None:
        check_compute_threads("sources")
        self._process = Process("this stream of results", "call the pipeline again here, with sources of this process")
        self._decode, self._times = decode, times
        self._fed: queue.SimpleQueue[Fed | End] = queue.SimpleQueue()
        self._head: Fed | End | None = None
        self._ahead = threading.Semaphore(2 * n_workers + CHUNK)
        self._more = 0  # further images that may be decoded ahead, after as many small ones
        self._copy = copies(sources, copy)
        self._pool = ThreadPoolExecutor(n_workers, thread_name_prefix="revit-fast-decode")
        self._listed = enumerate(sources, first_index) if isinstance(sources, (list, tuple)) else None
        self._feeder = None
        if self._listed is None:
            places = itertools.count(first_index)
            self._feeder = Carrier(
                "revit-fast-feed",
                sources,
                lambda source: self._put(next(places), source),
                lambda error: self._fed.put(End(error)),  # the consumer of the results raises it again
                room=self._ahead,
            )

    def _feed_listed(self) -> None:
        """Submits sources of a list, as many as may be decoded ahead."""
        while self._listed is not None and self._ahead.acquire(blocking=False):
            item = next(self._listed, None)
            if item is None:
                self._listed = None
                self._fed.put(End())
            else:
                self._put(*item)

    def _put(self, index: int, source: ImageSource) -> None:
        copy = self._copy and not isinstance(source, Held)
        # Handing an array to another thread would cost more than checking it here. That also spares a copy of clips,
        # of which only some frames are taken.
        there = isinstance(source.kept if isinstance(source, Held) else source, (np.ndarray, torch.Tensor))
        taken = source if isinstance(source, Held) else held(source, copy=copy and not there)
        decoded = None
        if not there:
            with suppress(RuntimeError):  # the main thread has ended, and the pool with it; this thread goes on
                decoded = self._pool.submit(self._run, index, taken)
        self._fed.put(Fed(index, taken.source, decoded or Done(self._run(index, taken, copy))))

    def _run(self, index: int, taken: Held, copy: bool = False) -> Decoded:
        image, reason, begin = None, None, time.perf_counter()
        with self._times.span("decode", index=index):
            try:
                image = self._decode(taken.kept)
                if copy:
                    image = own_pixels(image, taken.kept)
            except ImageError as error:
                reason = f"{taken.name}: {error}"
        return Decoded(image, reason, 1e3 * (time.perf_counter() - begin))

    def check_process(self) -> None:
        """Raises a RuntimeError in a process that was forked since."""
        self._process.check("sources")

    def chunk(self, deadline: float) -> tuple[list[Fed], End | None]:
        """Waits until `deadline` (`time.perf_counter`) for a decoded source, then also takes the next decoded ones.

        Returns:
            At most `CHUNK` sources (`MORE_SMALL` more if they are small), none if the deadline came first; and the end,
            if it was reached.
        """
        self.check_process()
        chunk: list[Fed] = []
        item = self._next(max(0.0, deadline - time.perf_counter()))
        while item is not None:
            if isinstance(item, End):
                return chunk, item
            chunk.append(item)
            item = self._next(0.0) if len(chunk) < CHUNK + self._more else None
        return chunk, None

    def _next(self, timeout_s: float) -> Fed | End | None:
        """The next source when it is decoded; None if that takes longer than `timeout_s`."""
        end = time.perf_counter() + timeout_s

        def left() -> float | None:
            return None if math.isinf(timeout_s) else max(0.0, end - time.perf_counter())

        try:
            if self._head is None:
                self._feed_listed()
                self._head = self._fed.get(timeout=left())
            if isinstance(self._head, Fed):
                self._head.decoded.exception(timeout=left())
                self._make_room(self._head.decoded)
        except (queue.Empty, FutureTimeout):
            return None
        head, self._head = self._head, None
        return head

    def _make_room(self, decoded: Future[Decoded] | Done) -> None:
        """Allows one more source to be decoded when one is consumed; two after a small image, none after a larger one.

        The number of images decoded ahead thus grows by at most `MORE_SMALL` while images are small, and shrinks again
        while they are larger.
        """
        image = None if decoded.exception() else decoded.result().image
        small = image is None or image.nbytes <= SMALL_BYTES
        change = 1 if small and self._more < MORE_SMALL else -1 if not small and self._more > 0 else 0
        self._more += change
        if 1 + change:
            self._ahead.release(1 + change)

    def close(self) -> None:
        """Stops feeding and decoding. Decodings that have started still finish.

        Waits until a generator of sources is closed, but not long if it is busy: it is then closed by its thread later.
        """
        if not self._process.is_here():
            return
        if self._feeder is not None:
            self._feeder.stop()
            self._feeder.join(SOURCE_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

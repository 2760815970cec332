"""Host memory that a device copies from while the host goes on.

What a call copies to the device is first written into buffers of our own. So a call does not wait for its copies, and
the caller may write to its tensors again as soon as the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

N_BUFFERS = 2
"""Buffers that take turns: the host writes one while the device still has to copy the other."""


class Event(Protocol):
    """A place in the device's queue, as `torch.cuda.Event`."""

    def record(self) -> None:
        """Marks the end of the queue."""

    def synchronize(self) -> None:
        """Waits until the device has passed the mark; returns at once if there is none."""


class Buffer:
    """The host memory of one batch.

    Args:
        allocate: makes memory of some bytes, uint8 `[n]`, that the device can copy from.
        event: marks the last copy from this buffer.
    """

    def __init__(self, allocate: Callable[[int], Tensor], event: Event) -> None:
        self._allocate, self._event = allocate, event
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
        self._n_used = 0

    @contextmanager
    def turn(self) -> Iterator[Buffer]:
        """A turn of this buffer: it begins when the copies of the last turn are done, the only thing that it waits for.

        All copies have been queued when it ends.
        """
        self._event.synchronize()
        self._n_used = 0
        try:
            yield self
        finally:
            self._event.record()

    def part(self, n: int, dtype: torch.dtype) -> Tensor:
        """Memory for `n` elements, whatever it holds, that nothing else gets in this turn."""
        k = self._n_used
        self._n_used += 1
        memory, part = self._parts.get(k, (None, None))
        if part is not None and part.dtype == dtype and part.shape[0] == n:  # as in the last turn
            return part
        n_bytes = n * dtype.itemsize
        if memory is None or memory.shape[0] < n_bytes:  # page-locking is slow, so there is room to grow
            memory = self._allocate(1 << max(n_bytes - 1, 0).bit_length())
        part = memory[:n_bytes].view(dtype)
        self._parts[k] = memory, part
        return part


def staging(allocate: Callable[[int], Tensor], event: Callable[[], Event]) -> Iterator[Buffer]:
    """The buffers in turn, without end; see `Buffer`."""
    return cycle([Buffer(allocate, event()) for _ in range(N_BUFFERS)])

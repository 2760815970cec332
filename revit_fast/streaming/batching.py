"""Groups a stream of images into batches by their tokens: first fit, with a bounded wait."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _OpenBatch(Generic[Item]):
    """A batch that can still take items, its deadline, and the number of items seen when its oldest item came."""

    deadline: float
    first: int
    items: list[Item] = field(default_factory=list)
    n_tokens: int = 0
    n_bytes: int = 0


class TokenBudgetBatcher(Generic[Item]):
    """Puts each item into the first open batch that has room for its tokens.

    A batch is closed and returned when no further item can fit, or when its oldest item has waited long enough (by time
    or by the number of items since). If too many batches are open or waiting items hold too many bytes, the oldest
    batch is closed. An item larger than the budget gets its own batch. The caller passes the time, so that waits can be
    tested and replayed.

    Args:
        token_budget: largest number of tokens in a batch.
        min_tokens: tokens of the smallest possible item: a batch with less room than that is full.
        max_wait_s: longest wait of an item in seconds, if `expired` is called in time.
        max_behind: largest number of later items that may pass a waiting item.
        max_open: largest number of open batches.
        max_bytes: largest memory of waiting items in bytes; a single larger item is still accepted.

    Raises:
        ValueError: if a bound is below 1 (`max_wait_s`: below 0).
    """

    def __init__(
        self,
        token_budget: int,
        *,
        min_tokens: int = 1,
        max_wait_s: float = math.inf,
        max_behind: int = 256,
        max_open: int = 2,
        max_bytes: float = math.inf,
    ) -> None:
        bounds = {"token_budget": token_budget, "min_tokens": min_tokens, "max_behind": max_behind}
        for name, value in (bounds | {"max_open": max_open, "max_bytes": max_bytes}).items():
            if not value >= 1:
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        if not max_wait_s >= 0:
            raise ValueError(f"max_wait_s: expected at least 0, got {max_wait_s!r}")
        self.token_budget, self.min_tokens, self.max_wait_s = token_budget, min_tokens, max_wait_s
        self.max_behind, self.max_open, self.max_bytes = max_behind, max_open, max_bytes
        self._open: list[_OpenBatch[Item]] = []  # sorted by their oldest items
        self._n_seen = 0

    def __len__(self) -> int:
        """Number of waiting items."""
        return sum(len(batch.items) for batch in self._open)

    @property
    def deadline(self) -> float:
        """The time at which `expired` returns a batch; infinite if no item waits."""
        return self._open[0].deadline if self._open else math.inf

    def add(self, item: Item, n_tokens: int, now: float = 0.0, n_bytes: int = 0) -> list[list[Item]]:
        """Adds an item and returns the batches that are now closed, oldest first."""
        self._n_seen += 1
        batch = next((b for b in self._open if b.n_tokens + n_tokens <= self.token_budget), None)
        if batch is None:
            batch = _OpenBatch(now + self.max_wait_s, self._n_seen)
            self._open.append(batch)
        batch.items.append(item)
        batch.n_tokens += n_tokens
        batch.n_bytes += n_bytes
        return self._close(now)

    def expired(self, now: float) -> list[list[Item]]:
        """Closes and returns the batches whose oldest item has waited `max_wait_s` at time `now`."""
        return self._close(now)

    def flush(self) -> list[list[Item]]:
        """Closes and returns all open batches."""
        batches, self._open = self._open, []
        return [batch.items for batch in batches]

    def _close(self, now: float) -> list[list[Item]]:
        kept, closed, n_bytes = [], [], sum(batch.n_bytes for batch in self._open)
        for i, batch in enumerate(self._open):
            crowded = len(self._open) - len(closed) > self.max_open or n_bytes > self.max_bytes
            full = self.token_budget - batch.n_tokens < self.min_tokens
            waited = now >= batch.deadline or self._n_seen - batch.first >= self.max_behind
            if full or waited or (crowded and len(closed) == i):
                closed.append(batch.items)
                n_bytes -= batch.n_bytes
            else:
                kept.append(batch)
        self._open = kept
        return closed

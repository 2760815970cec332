"""Records time spans by stage and thread, and writes them to a file for Perfetto and Chrome's tracing page."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from revit_fast.io.atomic import replaced


class StageTimes:
    """Sums the seconds spent in each stage over all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def span(self, stage: str, **details: object) -> Iterator[None]:
        """Adds the time of a `with` block to a stage; traces show `details`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._record(stage, begin, time.perf_counter(), details)

    def _record(self, stage: str, begin: float, end: float, details: dict) -> None:
        with self._lock:
            self.seconds[stage] += end - begin


class Trace(StageTimes):
    """A `StageTimes` that also keeps each span, for `save`.

    Args:
        max_events: largest number of spans to keep, the first ones of a run; later ones are only counted.
    """

    def __init__(self, max_events: int = 1_000_000) -> None:
        super().__init__()
        self.max_events = max_events
        self.n_dropped = 0
        self._events: list[dict] = []
        self._begin = time.perf_counter()

    def _record(self, stage: str, begin: float, end: float, details: dict) -> None:
        super()._record(stage, begin, end, details)
        thread = threading.current_thread()
        with self._lock:
            if len(self._events) >= self.max_events:
                self.n_dropped += 1
                return
            self._events.append(
                {
                    "name": stage,
                    "ph": "X",
                    "ts": 1e6 * (begin - self._begin),
                    "dur": 1e6 * (end - begin),
                    "pid": os.getpid(),
                    "tid": thread.name,
                    "args": details,
                }
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the spans in the Trace Event Format (JSON), completely or not at all."""
        with self._lock:
            numbers = {name: i for i, name in enumerate(dict.fromkeys(event["tid"] for event in self._events))}
            names = [
                {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": number, "args": {"name": name}}
                for name, number in numbers.items()
            ]
            events = names + [{**event, "tid": numbers[event["tid"]]} for event in self._events]
            content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"dropped": self.n_dropped}}
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

"""Timing candidates in alternation, by the wall clock or by the events of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class WallClock:
    """Seconds on the host."""

    def seconds(self, run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


class CpuClock:
    """Times a call by the processor time of this process; the time of other programs does not count."""

    def seconds(self, run: Callable[[], object]) -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin


class DeviceClock:
    """Seconds on a GPU between two events around a call.

    Before each call a buffer larger than any L2 cache is overwritten, so that inputs come from memory. Then the GPU
    waits for about a millisecond, in which the host queues the call. So launching is timed only if it takes longer.
    """

    def __init__(self, flush_bytes: int = 512 << 20, wait_cycles: int = 2_000_000) -> None:
        self.flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
        self.wait_cycles = wait_cycles

    def seconds(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(self.wait_cycles)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class HostClock(WallClock):
    """Seconds on the host until a call returns; the GPU is idle at its beginning, so that the call need not wait."""

    def seconds(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return super().seconds(run)


class CallClock(DeviceClock):
    """Seconds on the host from a call to the end of its work on a GPU that was idle; the L2 is overwritten before."""

    def seconds(self, run: Callable[[], object]) -> float:
        self.flush.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - begin


def take_turns(
    candidates: dict[str, Callable[[int], object]],
    rounds: int,
    pause_s: float = 0.0,
    clock: WallClock | CpuClock | DeviceClock | None = None,
) -> dict[str, list[float]]:
    """Seconds of every candidate in each round, called with the round's number. The order reverses every round."""
    clock = clock or WallClock()
    samples = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in candidates if turn % 2 == 0 else reversed(candidates):
            if pause_s:
                time.sleep(pause_s)
            samples[name].append(clock.seconds(lambda run=candidates[name], turn=turn: run(turn)))
    return samples

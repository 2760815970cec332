"""Comparisons whose candidates take turns, reported through pytest-benchmark.

A shared machine drifts by tens of percent within a minute, so timing one candidate after another compares the machine
with itself. Here all candidates of a case run in alternation. Each test then replays its candidate's samples into
pytest-benchmark through a clock that only the replay advances, so its statistics, groups and JSON work as usual.
A ratio table is written to `bench/results/` at the end. The allocator keeps freed pages for all candidates, as after
`optimize` (see `report.machine_header`); the operators alone do not ask for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from bench.report import error_text, header_line, machine_header, spread_ms, write
from bench.turns import take_turns


class ReplayClock:
    """A clock that moves only when `advance` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()
HEADER = pytest.StashKey[dict]()


@dataclass
class Comparison:
    """One case: candidates that compute the same thing.

    Attributes:
        group: pytest-benchmark's group.
        case: name of the case within the group.
        candidates: name -> function of the round number (rotate the inputs by it); "ours" must be among them.
        check: asserts that a candidate's output is right, given (name, output), before anything is timed; returns its
            error (see `model_work.relative_error`), or None if it computes something else.
        precision: of inputs and results.
        threads: threads that torch may use.
        rounds: turns that each candidate takes.
        pause_s: rest before each turn, for candidates whose spinning threads would take cores from the next candidate.
    """

    group: str
    case: str
    candidates: dict[str, Callable[[int], object]]
    check: Callable[[str, object], float | None]
    precision: str
    threads: int = 2
    rounds: int = 31
    pause_s: float = 0.0
    errors: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def run(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            for name, candidate in self.candidates.items():
                self.errors[name] = self.check(name, candidate(0))
                candidate(1)
            self.samples = take_turns(self.candidates, self.rounds, self.pause_s)
        finally:
            torch.set_num_threads(before)

    def rows(self) -> list[dict]:
        ours_ms, _ = spread_ms(self.samples["ours"])
        rows = []
        for name, samples in self.samples.items():
            median_ms, quartiles_ms = spread_ms(samples)
            rows.append(
                {
                    "group": self.group,
                    "case": self.case,
                    "candidate": name,
                    "precision": self.precision,
                    "error": self.errors[name],
                    "median_ms": median_ms,
                    "quartiles_ms": quartiles_ms,
                    "ratio_to_ours": median_ms / ours_ms,
                    "threads": self.threads,
                    "rounds": self.rounds,
                }
            )
        return rows


FINISHED: dict[tuple[str, str], Comparison] = {}


@pytest.fixture
def replay(benchmark):
    """`replay(build, candidate)`: measures the case that `build()` returns, once, and reports one candidate of it."""

    def run(build: Callable[[], Comparison], candidate: str) -> None:
        key = (build.__module__, build.__qualname__)
        if key not in FINISHED:
            comparison = build()
            comparison.run()
            FINISHED[key] = comparison
        comparison = FINISHED[key]
        samples = iter(comparison.samples[candidate])
        benchmark.group = f"{comparison.group}: {comparison.case}"
        benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=comparison.rounds)

    return run


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def markdown(header: dict, rows: list[dict]) -> str:
    lines = [header_line(header), ""]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [
            f"## {group}",
            "",
            "| case | candidate | precision | error | median ms | quartiles ms | time ÷ ours |",
            "|---|---|---|--:|--:|--:|--:|",
        ]
        for row in rows:
            if row["group"] == group:
                low, high = row["quartiles_ms"]
                lines.append(
                    f"| {row['case']} | {row['candidate']} | {row['precision']} | {error_text(row['error'])} "
                    f"| {row['median_ms']:.3f} | {low:.3f}–{high:.3f} | {row['ratio_to_ours']:.2f} |"
                )
        lines.append("")
    return "\n".join(lines)


def pytest_sessionstart(session):
    session.config.stash[HEADER] = machine_header()


def pytest_sessionfinish(session):
    rows = [row for comparison in FINISHED.values() for row in comparison.rows()]
    if not rows:
        return
    header = session.config.stash[HEADER]
    table = markdown(header, rows)
    write("ratios", header, {"results": rows}, table)
    print("\n\n" + table)

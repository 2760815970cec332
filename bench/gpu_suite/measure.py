"""Checks and times cases: the error rule against float64 first, then candidates in turns, beside measured ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.error_rule import Errors, assert_as_accurate
from bench.gpu_suite.step import Context
from bench.report import spread_ms
from bench.turns import take_turns

Outputs = tuple[Tensor, ...]
Run = Callable[[int], Outputs | Tensor]

ROUNDS = {True: (5, 41), False: (1, 1)}
"""Fewest and most turns of a candidate, on a GPU and in the interpreter."""

FLUSH_S = 2e-3
"""About what a turn costs besides the call: overwriting the L2 and waiting."""

SPENT = "not measured: the step's time is spent"


@dataclass
class Case:
    """Candidates that compute the same outputs.

    Attributes:
        group: heading of the table.
        name: name of the case.
        candidates: name -> builds a function of the round's number; if it raises, the peer is listed with the reason.
            Names that begin with "ours" are ours. The others are compared with `base`.
        truth: outputs of round 0 in float64.
        same_dtype: outputs of round 0 by plain PyTorch in the dtype of the candidates.
        n_bytes: least number of bytes that must move.
        n_flops: floating-point operations of the useful work.
        base: candidate that ratios compare with.
        whole_calls: whether the wall time from a call to its end is measured too.
        facts: further columns of every row.
    """

    group: str
    name: str
    candidates: dict[str, Callable[[], Run]]
    truth: Callable[[], Outputs]
    same_dtype: Callable[[], Outputs]
    n_bytes: int = 0
    n_flops: int = 0
    base: str = "ours"
    whole_calls: bool = False
    facts: dict[str, object] = field(default_factory=dict)


def errors_of(outputs: Outputs | Tensor, same_dtype: Outputs, truth: Outputs) -> Errors:
    """The errors of the output that is nearest to its bound.

    Raises:
        AssertionError: if an output breaks the error rule.
    """
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = [
        assert_as_accurate(ours.detach(), same.detach(), exact.detach(), f"wrong: output {i}")
        for i, (ours, same, exact) in enumerate(zip(outputs, same_dtype, truth, strict=True))
    ]
    return max(found, key=lambda errors: errors.ours / errors.allowed if errors.allowed else 0.0)


def one_line(error: Exception) -> str:
    text = (str(error).strip() or "no message").split("\n")[0][:160]
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


class Bench:
    """Runs cases within a step's time and keeps their rows after each."""

    def __init__(self, context: Context) -> None:
        context.require_device()
        self.context = context
        self.clock, self.call_clock = context.clocks()
        self.rows: list[dict] = []
        self.ceilings: dict[str, float] = {}
        self._copies: dict[int, float] = {}

    def measure_ceilings(self, dtype: torch.dtype) -> None:
        """Measures the best rates at which this machine copies and multiplies, in the same way as the candidates."""
        n_bytes, n = (1 << 30, 8192) if self.context.on_gpu else (1 << 20, 128)
        a, b = (torch.randn(n, n, device=self.context.device).to(dtype) for _ in range(2))
        seconds = self._seconds({"matmul": lambda _: a @ b})["matmul"]
        self.ceilings = {"bytes_per_s": self.copy_rate(n_bytes), "flops_per_s": 2 * n**3 / seconds}
        self.context.say(
            f"ceilings: copy {self.ceilings['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"{str(dtype)[6:]} matmul {self.ceilings['flops_per_s'] / 1e12:.3f} TFLOP/s"
        )
        self.context.keep(ceilings=self.ceilings)

    def copy_rate(self, n_bytes: int) -> float:
        """Bytes per second, read and written, of a copy of so many bytes."""
        if n_bytes not in self._copies:
            source = torch.zeros(n_bytes, dtype=torch.uint8, device=self.context.device)
            target = torch.empty_like(source)
            seconds = self._seconds({"copy": lambda _: target.copy_(source)})["copy"]
            self._copies[n_bytes] = 2 * n_bytes / seconds
        return self._copies[n_bytes]

    def _seconds(self, runs: dict[str, Callable[[int], object]]) -> dict[str, float]:
        for run in runs.values():
            run(0)
        samples = take_turns(runs, 11, clock=self.clock)
        return {name: spread_ms(times)[0] / 1e3 for name, times in samples.items()}

    def run_all(self, cases: Sequence[Callable[[], Case]]) -> list[str]:
        """Builds, checks and times cases in order, and returns what failed of ours."""
        for i, build in enumerate(cases):
            try:
                self.run(build(), len(cases) - i)
            except Exception as error:  # what no candidate is to blame for, such as memory for the inputs
                self.rows.append(
                    {"group": "Inputs", "case": f"case {i}", "candidate": "ours", "reason": one_line(error)}
                )
                self.context.say(f"case {i} could not be built: {one_line(error)}")
            self.context.keep(results=self.rows)
            if self.context.on_gpu:
                torch.cuda.empty_cache()
        return self.failures()

    def run(self, case: Case, n_left: int) -> None:
        """Checks and times one case; `n_left` cases, this one included, share the rest of the time."""
        self.context.say(f"{case.group}: {case.name}")
        if self.context.left_s() <= 0:
            self._keep(case, dict.fromkeys(case.candidates, SPENT), {}, {}, {})
            return
        deadline = time.monotonic() + self.context.left_s() / n_left
        truth, same_dtype = case.truth(), case.same_dtype()
        ready: dict[str, Run] = {}
        reasons: dict[str, str] = {}
        errors: dict[str, Errors] = {}
        longest: dict[str, float] = {}
        for name, build in case.candidates.items():
            if self.context.left_s() <= 0:
                reasons[name] = SPENT
                continue
            try:
                run = build()
                errors[name] = errors_of(run(0), same_dtype, truth)
                longest[name] = self.clock.seconds(lambda run=run: run(1))
                ready[name] = run
            except Exception as error:  # a peer may fail in any way; it is listed with its message
                reasons[name] = one_line(error)
                self.context.say(f"  {name}: {reasons[name]}")
        samples, calls = self._turns(ready, longest, deadline, case.whole_calls)
        self._keep(case, reasons, errors, samples, calls)

    def _turns(self, ready: dict[str, Run], longest: dict[str, float], deadline: float, whole_calls: bool):
        """Seconds of each candidate by the device's clock, and by the wall if asked for."""
        if not ready:
            return {}, {}
        fewest, most = ROUNDS[self.context.on_gpu]
        left = max(deadline - time.monotonic(), 0) / (2 if whole_calls else 1)
        rounds = min(max(int(left / (sum(longest.values()) + FLUSH_S * len(ready))), fewest), most)
        samples = take_turns(ready, rounds, clock=self.clock)
        return samples, take_turns(ready, rounds, clock=self.call_clock) if whole_calls else {}

    def _keep(self, case: Case, reasons, errors, samples, calls) -> None:
        ours_ms = spread_ms(samples[case.base])[0] if case.base in samples else None
        for name in case.candidates:
            row = {"group": case.group, "case": case.name, "candidate": name, "reason": reasons.get(name), **case.facts}
            if name in errors:
                row |= {"max_error": errors[name].ours, "allowed_error": errors[name].allowed}
            if name in samples:
                median_ms, quartiles_ms = spread_ms(samples[name])
                row |= {
                    "median_ms": median_ms,
                    "quartiles_ms": quartiles_ms,
                    "rounds": len(samples[name]),
                    "ratio_to_ours": None if ours_ms is None else median_ms / ours_ms,
                }
                for unit, work in (("bytes_per_s", case.n_bytes), ("flops_per_s", case.n_flops)):
                    if work:
                        row[unit] = work / (median_ms / 1e3)
                        row[f"{unit}_of_ceiling"] = row[unit] / self.ceilings[unit]
                if case.n_bytes:
                    row["bytes_per_s_of_copy_of_this_size"] = row["bytes_per_s"] / self.copy_rate(case.n_bytes // 2)
            if name in calls:
                row["call_median_ms"], row["call_quartiles_ms"] = spread_ms(calls[name])
            self.rows.append(row)

    def failures(self) -> list[str]:
        """Candidates of ours that failed or were wrong. What the time did not reach is not among them."""
        return [
            f"{row['group']}: {row['case']}: {row['candidate']}: {row['reason']}"
            for row in self.rows
            if row["candidate"].startswith("ours") and row["reason"] not in (None, SPENT)
        ]

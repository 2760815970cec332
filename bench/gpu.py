"""Checks and times everything on a GPU in one run: numerics first, then times beside every peer that is installed.

Run: python -m bench.gpu [--budget-s 420]; tables go to bench/results/gpu.md and gpu.json.

`TRITON_INTERPRET=1 python -m bench.gpu --device interpreter` runs the whole program on tiny sizes, in Triton's
interpreter and with the wall clock. It shows that the program works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from bench.gpu_cases import Case, Setting, all_cases
from bench.report import RESULTS, header_line, machine_header, spread_ms, write
from bench.turns import DeviceClock, WallClock, take_turns
from revit_fast.inference import cuda_graphs
from revit_fast.ops import _triton
from tests.helpers import assert_as_accurate

MEANINGLESS = (
    "THESE TIMES MEAN NOTHING: Triton's interpreter on a CPU, tiny sizes. Only that the program runs is shown."
)

ROUNDS = {"cuda": (5, 61), "interpreter": (2, 2)}
"""Fewest and most turns of a candidate."""


def setting(device: str) -> Setting:
    """16 images at 14x14, 24 at 10x10 and 24 at 7x7 of DeiT-S in bfloat16; for the interpreter four small images.

    The error rule compares two maxima. Over a few dozen rows they depend on luck, so the small images have 119 rows.
    """
    if device == "cuda":
        return Setting(torch.device("cuda"), torch.bfloat16, counts=(16, 24, 24))
    return Setting(
        torch.device("cpu"),
        torch.float32,
        counts=(1, 2, 1),
        grids=(7, 5, 4),
        heads=2,
        head_dim=16,
        depth=1,
        patch=4,
        n_sets=2,
        compiled=False,
    )


def error_of(outputs, case_truth, case_same_dtype) -> str | None:
    """Why a candidate's outputs break the error rule; None if they keep it."""
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    try:
        for i, (ours, same, truth) in enumerate(zip(outputs, case_same_dtype, case_truth, strict=True)):
            assert_as_accurate(ours.detach(), same.detach(), truth.detach(), f"output {i}")
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:160]}"


class Bench:
    """Runs cases within a time budget and keeps their results."""

    def __init__(self, clock: WallClock | DeviceClock, budget_s: float, rounds: tuple[int, int]) -> None:
        self.clock = clock
        self.rounds = rounds
        self.begin = time.monotonic()
        self.budget_s = budget_s
        self.rows: list[dict] = []
        self.notes: dict[str, object] = {}
        self.ceilings: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{time.monotonic() - self.begin:6.1f} s] {text}", flush=True)

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget_s - (time.monotonic() - self.begin)

    def measure_ceilings(self, s: Setting) -> None:
        """Measures the best rates at which this machine copies and multiplies, in the same way as the candidates."""
        on_gpu = s.device.type == "cuda"
        n_bytes, n = (1 << 30, 8192) if on_gpu else (1 << 20, 128)
        source = torch.empty(n_bytes, dtype=torch.uint8, device=s.device)
        target = torch.empty_like(source)
        a, b = (s.randn(n, n, seed=i) for i in range(2))
        runs = {"copy": lambda _: target.copy_(source), "matmul": lambda _: a @ b}
        for run in runs.values():
            run(0)
        samples = take_turns(runs, 11, clock=self.clock)
        median = {name: spread_ms(times)[0] / 1e3 for name, times in samples.items()}
        self.ceilings = {"bytes_per_s": 2 * n_bytes / median["copy"], "flops_per_s": 2 * n**3 / median["matmul"]}
        self.say(
            f"ceilings: copy {self.ceilings['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"{str(s.dtype)[6:]} matmul {self.ceilings['flops_per_s'] / 1e12:.3f} TFLOP/s"
        )

    def run(self, case: Case, n_left: int) -> None:
        """Checks and times one case; `n_left` cases, this one included, share the rest of the budget."""
        self.say(f"{case.group}: {case.name}")
        if self.left_s() <= 0:
            self._keep(case, {name: "not measured: the time budget is spent" for name in case.candidates}, {})
            return
        deadline = time.monotonic() + self.left_s() / n_left
        truth, same_dtype = case.truth(), case.same_dtype()
        ready: dict[str, Callable] = {}
        reasons: dict[str, str] = {}
        longest: dict[str, float] = {}
        for name, build in case.candidates.items():
            try:
                run = build()
                reason = error_of(run(0), truth, same_dtype)
                if reason is None:
                    run(1)
                    longest[name] = self.clock.seconds(lambda run=run: run(2))
            except Exception as error:  # a peer may fail in any way; it is listed with its message
                reason = one_line(error)
            if reason is None:
                ready[name] = run
            else:
                reasons[name] = reason
                self.say(f"  {name}: {reason}")
        samples: dict[str, list[float]] = {}
        if ready:
            flush_s = 2e-3 * len(ready)
            rounds = int(max(deadline - time.monotonic(), 0) / (sum(longest.values()) + flush_s))
            samples = take_turns(ready, min(max(rounds, self.rounds[0]), self.rounds[1]), clock=self.clock)
        self._keep(case, reasons, samples)
        for name, note in case.notes.items():
            self.notes[name] = note() if callable(note) else note

    def _keep(self, case: Case, reasons: dict[str, str], samples: dict[str, list[float]]) -> None:
        ours_ms = spread_ms(samples["ours"])[0] if "ours" in samples else None
        for name in case.candidates:
            row = {"group": case.group, "case": case.name, "candidate": name, "reason": reasons.get(name)}
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
            self.rows.append(row)

    def failures(self) -> list[str]:
        """Candidates of ours that failed or were wrong."""
        return [
            f"{row['group']}: {row['case']}: {row['candidate']}: {row['reason']}"
            for row in self.rows
            if row["candidate"].startswith("ours") and row["reason"] and "time budget" not in row["reason"]
        ]

    def launch_share(self) -> float | None:
        """Share of the packed forward's time that its CUDA graph saves: the cost of launching."""
        times = {row["candidate"]: row.get("median_ms") for row in self.rows if row["group"] == "Whole model"}
        eager, graph = times.get("ours"), times.get("ours, graph")
        return None if not eager or not graph else 1 - graph / eager


def markdown(header: dict, bench: Bench, warning: str | None) -> str:
    """The whole result as text."""
    ceilings = bench.ceilings
    lines = [header_line(header), ""]
    lines += [f"**{warning}**", ""] if warning else []
    lines += [
        f"Ceilings measured in this run: copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s, matmul "
        f"{ceilings['flops_per_s'] / 1e12:.3f} TFLOP/s. Medians over rotated inputs, candidates in turns; every "
        "candidate kept the error rule against the float64 reference, or has no time.",
        "",
    ]
    for group in dict.fromkeys(row["group"] for row in bench.rows):
        lines += [
            f"## {group}",
            "",
            "| case | candidate | median ms | quartiles ms | time ÷ ours | GB/s (of copy) | TFLOP/s (of matmul) |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        lines += [table_row(row) for row in bench.rows if row["group"] == group]
        lines.append("")
    launches = bench.notes.get("launches")
    if launches is not None:
        kernels = ", ".join(f"{name} {count}" for name, count in sorted(launches.items()))
        share = bench.launch_share()
        lines += [
            f"Triton launches of one packed forward, beside PyTorch's own: {sum(launches.values())} ({kernels}).",
            "Share of the eager forward's time that the graph saves: "
            + ("not measured." if share is None else f"{share:.0%}."),
            "",
        ]
    return "\n".join(lines)


def table_row(row: dict) -> str:
    """One line of a table; a candidate without a time says why."""
    if row["reason"]:
        reason = row["reason"].replace("|", "\\|")
        return f"| {row['case']} | {row['candidate']} | {reason} | | | | |"
    low, high = row["quartiles_ms"]
    ratio = "" if row["ratio_to_ours"] is None else f"{row['ratio_to_ours']:.2f}"
    rates = [
        f"{row[unit] / scale:.3g} ({row[unit + '_of_ceiling']:.0%})" if unit in row else ""
        for unit, scale in (("bytes_per_s", 1e9), ("flops_per_s", 1e12))
    ]
    return (
        f"| {row['case']} | {row['candidate']} | {row['median_ms']:.4f} | {low:.4f}–{high:.4f} | {ratio} "
        f"| {rates[0]} | {rates[1]} |"
    )


def prepare(device: str) -> WallClock | DeviceClock:
    """Sets the kernels up for a device and returns its clock."""
    if device == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("--device interpreter needs TRITON_INTERPRET=1 in the environment")
        _triton.register("CPU")
        cuda_graphs.BACKENDS["cpu"] = cuda_graphs.DirectCalls
        return WallClock()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("--device cuda: unset TRITON_INTERPRET")
    if not torch.cuda.is_available():
        raise SystemExit(
            "no GPU that torch can use. To see the program run without one: "
            "TRITON_INTERPRET=1 python -m bench.gpu --device interpreter"
        )
    return DeviceClock()


def main(arguments: list[str] | None = None) -> int:
    """Runs the bench; returns 1 if a candidate of ours failed or was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "interpreter"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=420, help="seconds after which no further case is begun")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args(arguments)

    clock = prepare(options.device)
    warning = MEANINGLESS if options.device == "interpreter" else None
    header = machine_header() | {"triton": triton.__version__}
    header["device"] = options.device if warning else torch.cuda.get_device_name()
    if warning:
        print(f"{'!' * len(warning)}\n{warning}\n{'!' * len(warning)}", flush=True)
    bench = Bench(clock, options.budget_s, ROUNDS[options.device])
    bench.say(header_line(header))
    s = setting(options.device)
    bench.measure_ceilings(s)
    cases = list(all_cases(s))
    for i, case in enumerate(cases):
        bench.run(case, len(cases) - i)
    name = "gpu" if warning is None else "gpu-interpreter"
    table = markdown(header, bench, warning)
    content = {"warning": warning, "ceilings": bench.ceilings, "results": bench.rows, **bench.notes}
    write(name, header, content | {"launch_share": bench.launch_share()}, table, options.out)
    print(f"\n{table}")
    if warning:
        print(warning)
    for failure in bench.failures():
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if bench.failures() else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What the compiler makes of every GPU kernel, on a machine without a GPU: `python -m bench.gpu_code`.

Prints, as Markdown, a table of the machine code per kernel and chip, then the estimate of `bench/issue_cycles.py` for
the attention forward pass: cycles of one multiprocessor per thousand useful FLOP of one sequence and head. Useful are
the 4 L² D of its L rows; rows and keys that only pad a tile are cost without use. Three kernels stand side by side:
the schedule that the launcher chooses, our streaming schedule at the same length, and the best configuration of
`bench/tutorial_attention.py`. Where a chip's table has but one schedule for a length, the first two are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import gpu_launches
from bench.gpu_launches import DTYPES, HEAD_DIMS, N_HEADS, Case, Compilation, schedule_of
from bench.issue_cycles import Estimate, estimate
from bench.machine_code import Code, compile_launch
from bench.tutorial_attention import configurations, tutorial_attention
from revit_fast.atomic import replaced
from revit_fast.kernels.launch import TARGETS, Launch, record

ESTIMATED_SEQLENS = (50, 101, 197)
KINDS_SHOWN = ("tensor", "fp32", "exp", "integer", "barrier")
MARKS = ("<!-- python -m bench.gpu_code -->", "<!-- end -->")
PADDING_KERNEL = "attention_padding_kernel"


@dataclass(frozen=True)
class Workload:
    """What one program of an attention forward kernel does for a sequence.

    Attributes:
        iterations: how often each of its loops over blocks of keys runs, in order.
        macs: multiply-adds of its two products, padding included.
        staged_bytes: keys and values that it needs, padding included.
    """

    iterations: tuple[int, ...]
    macs: int
    staged_bytes: int


def workload(launch: Launch, seqlen: int) -> Workload:
    """The loops of our forward kernels and of the tutorial's, from their constants.

    The short kernel has none. The others walk over whole blocks of keys and then over what is left of one, if anything,
    for every step of BLOCK_M rows through the tile.
    """
    constants = launch.constants
    dim = constants["BLOCK_D"] if "BLOCK_D" in constants else sum(width for _, width in constants["DIM_PARTS"])
    rows = constants.get("TILE", constants["BLOCK_M"])
    steps = rows // constants["BLOCK_M"]
    if "KEY_BLOCKS" in constants:
        iterations, keys = (), sum(width for block in constants["KEY_BLOCKS"] for _, width, _ in block)
    else:
        block = constants["BLOCK_N"]
        one_step = (seqlen // block, int(seqlen % block > 0))
        iterations, keys = one_step * steps, block * sum(one_step)
    return Workload(iterations, 2 * rows * keys * dim, 2 * keys * dim * 2 * steps)


@dataclass(frozen=True)
class Estimated:
    """The estimate for all programs of one head of one sequence.

    Attributes:
        kilo_flop_cycles: cycles per thousand useful FLOP.
        issue_cycles: the same, of the instructions' issue alone.
        bound: the unit that decides.
        what: the configuration.
        programs_per_sm: how many a multiprocessor holds, which the estimate does not weigh.
    """

    kilo_flop_cycles: float
    issue_cycles: float
    bound: str
    what: str
    programs_per_sm: int


def _estimated(launches: Sequence[Launch], codes: Sequence[Code], seqlen: int, head_dim: int, what: str) -> Estimated:
    per_kilo_flop = 1000 / (4 * seqlen**2 * head_dim)
    total = issue = 0.0
    programs: list[Estimate] = []
    for launch, code in zip(launches, codes, strict=True):
        load = workload(launch, seqlen)
        program = estimate(code, load.iterations, load.macs, load.staged_bytes)
        programs.append(program)
        total += launch.grid[0] * program.cycles * per_kilo_flop
        issue += launch.grid[0] * program.units["issue"] * per_kilo_flop
    return Estimated(total, issue, programs[0].bound, what, min(code.programs_per_sm for code in codes))


def estimate_ours(target: str, head_dim: int, seqlen: int, variant: str = "", dtype: str = "bf16") -> Estimated:
    """Our forward kernel: the launcher's choice, or with `variant="streaming"` that schedule."""
    case = Case("attention", "fwd", dtype, head_dim, seqlen, variant)
    launches = [x for x in case.launches(TARGETS[target]) if x.kernel.__name__ != PADDING_KERNEL]
    codes = [compile_launch(launch, TARGETS[target]) for launch in launches]
    first = launches[0]
    what = f"{schedule_of(first)} {first.constants['BLOCK_M']} rows, {first.num_warps} warps"
    return _estimated(launches, codes, seqlen, head_dim, what)


def tutorial_launch(target: str, head_dim: int, seqlen: int, configuration: dict[str, int], dtype: str) -> Launch:
    """The tutorial's kernel for one sequence."""
    with FakeTensorMode(), record(target) as launches:
        qkv = torch.empty(seqlen, 3, N_HEADS, head_dim, dtype=DTYPES[dtype], device="cuda")
        cu_seqlens = torch.empty(2, dtype=torch.int32, device="cuda")
        tutorial_attention(*qkv.unbind(1), cu_seqlens, seqlen, head_dim**-0.5, configuration)
    return launches[0]


def estimate_tutorial(
    target: str, head_dim: int, seqlen: int, by: str = "issue_cycles", dtype: str = "bf16"
) -> Estimated:
    """The best of the tutorial's own configurations that fit the chip's shared memory, by one of the estimates."""
    found = []
    for configuration in configurations(TARGETS[target], head_dim):
        launch = tutorial_launch(target, head_dim, seqlen, configuration, dtype)
        code = compile_launch(launch, TARGETS[target])
        if code.programs_per_sm > 0 and code.shared_bytes <= TARGETS[target].shared_bytes:
            c = configuration
            what = f"{c['BLOCK_M']} × {c['BLOCK_N']}, {c['num_stages']} stages, {c['num_warps']} warps"
            found.append(_estimated([launch], [code], seqlen, head_dim, what))
    return min(found, key=lambda estimated: getattr(estimated, by))


def code_row(compilation: Compilation, code: Code) -> str:
    """A row of the table of machine code."""
    launch, case, mix = compilation.launch, compilation.case, code.mix
    widths = code.global_widths()
    wide = sum(n for (_, width), n in widths.items() if width >= 16)
    shared = mix["shared load"] + mix["shared store"]
    cells = [
        code.kernel.removesuffix("_kernel"), case.direction, case.dtype, case.size, schedule_of(launch) or "–",
        case.seqlen if case.op == "attention" else "–", compilation.target, code.num_warps, code.registers,
        f"{code.spilled_registers} / {code.stack_bytes}", f"{code.shared_bytes / 1024:.1f}", code.programs_per_sm,
        sum(mix.values()), *(mix[kind] for kind in KINDS_SHOWN), f"{wide} / {sum(widths.values())}", shared,
    ]  # fmt: skip
    return _row(cells)


CODE_HEADER = [
    "kernel", "pass", "dtype", "D or C", "schedule", "L", "chip", "warps", "registers", "spills / stack B", "shared KB",
    "programs per SM", "instructions", *KINDS_SHOWN, "16-byte / global", "shared",
]  # fmt: skip


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _header(names: Sequence[str]) -> str:
    return f"{_row(names)}\n{_row(['---'] * len(names))}"


def _estimate_cell(estimated: Estimated | str) -> str:
    if isinstance(estimated, str):
        return estimated
    e = estimated
    return f"{e.issue_cycles:.3f} ({e.bound} {e.kilo_flop_cycles:.3f}; {e.what}; {e.programs_per_sm} per SM)"


def _or_reason(future: Future[Estimated]) -> Estimated | str:
    try:
        return future.result()
    except NotImplementedError as reason:
        return f"no estimate: {reason}"


Report = Callable[[str], None]
"""Takes the next line of the report."""


def report_estimates(report: Report, targets: Sequence[str], head_dims: Sequence[int], jobs: int) -> None:
    """The table of estimates, a line as soon as it is known."""
    with gpu_launches.pool(jobs) as pool:
        rows = []
        for target in targets:
            for head_dim in head_dims:
                for seqlen in ESTIMATED_SEQLENS:
                    point = (target, head_dim, seqlen)
                    candidates = (
                        estimate_ours,
                        partial(estimate_ours, variant="streaming"),
                        estimate_tutorial,
                        partial(estimate_tutorial, by="kilo_flop_cycles"),
                    )
                    rows.append((point, [pool.submit(candidate, *point) for candidate in candidates]))
        tutorials = ("tutorial, best by issue", "tutorial, best by busiest unit")
        report(_header(["chip", "D", "L", "chosen schedule", "streaming schedule", *tutorials]))
        for point, futures in rows:
            report(_row([*point, *(_estimate_cell(_or_reason(future)) for future in futures)]))


def report_codes(report: Report, codes: dict[Compilation, Future[Code]]) -> None:
    """The table of machine code, a line as soon as it is known."""
    report(_header(CODE_HEADER))
    for compilation, future in codes.items():
        report(code_row(compilation, future.result()))


def replace_section(page: Path, lines: Sequence[str]) -> None:
    """Puts a report between the marks that a page has for it."""
    text = page.read_text()
    for mark in MARKS:
        if text.count(mark) != 1:
            raise ValueError(f"{page}: expected the mark {mark} once, found it {text.count(mark)} times")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    section = "\n".join([MARKS[0], *lines, MARKS[1]])
    _write(page, f"{before}{section}{after}".encode())


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replaced(path) as unfinished:
        unfinished.write_bytes(content)


def emit(folder: Path, codes: dict[Compilation, Future[Code]]) -> None:
    """Writes every binary and `manifest.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for compilation, future in codes.items():
        launch, case = compilation.launch, compilation.case
        name = f"{compilation}.{'hsaco' if TARGETS[compilation.target].backend == 'hip' else 'cubin'}"
        _write(folder / name, future.result().binary)
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        manifest.append(
            {
                "file": name,
                "kernel": launch.kernel.__name__,
                "pass": case.direction,
                "target": compilation.target,
                "dtype": case.dtype,
                "head_dim": case.size if case.op == "attention" else None,
                "schedule": schedule_of(launch) or None,
                "options": options | {k: v for k, v in launch.constants.items()},
            }
        )
    _write(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    print(f"{len(manifest)} binaries and manifest.json in {folder}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_code", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="chips")
    parser.add_argument("--kernels", default="", help="regular expression that kernel names must match")
    parser.add_argument("--all", action="store_true", help="every dtype and size in the table, not bf16 with 64 or 384")
    parser.add_argument("--emit", type=Path, metavar="DIR", help="write every binary and manifest.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS, help="of the estimate")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="put the report into a page, between its marks")
    parser.add_argument("--no-estimate", action="store_true", help="leave out the estimate of issue cycles")
    args = parser.parse_args()

    shown = [c for c in gpu_launches.cases() if c.dtype == "bf16" and c.size in (64, 384) and not c.variant]
    wanted = gpu_launches.compilations(gpu_launches.cases() if args.all or args.emit else shown, args.targets)
    wanted = [c for c in wanted if re.search(args.kernels, c.kernel)]
    lines: list[str] = []

    def report(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    report(f"Triton {triton.__version__}, PyTorch {torch.__version__}, {gpu_launches.assemblers()}.\n")
    with gpu_launches.pool(args.jobs) as pool:
        codes = gpu_launches.submit(pool, wanted)
        report_codes(report, {c: code for c, code in codes.items() if args.all or c.case in shown})
        if args.emit:
            emit(args.emit, codes)
    if not args.no_estimate and re.search(args.kernels, "attention_short_forward_kernel"):
        report("")
        report_estimates(report, args.targets, args.head_dims, args.jobs)
    if args.docs:
        replace_section(args.docs, lines)


if __name__ == "__main__":
    main()

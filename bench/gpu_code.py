"""Compiles every GPU kernel on a machine without a GPU and describes its machine code: `python -m bench.gpu_code`.

The command prints a Markdown table with one row per kernel and chip: registers, spills, shared memory, and how many
instructions of each kind the code has. `--emit DIR` also writes every binary and a manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
import triton

from bench import gpu_launches
from bench.files import replace_section
from bench.gpu_launches import Compilation, schedule_of
from bench.machine_code import Code
from revit_fast.io.atomic import replaced
from revit_fast.kernels.launch import TARGETS

KINDS_SHOWN = ("tensor", "fp32", "exp", "integer", "barrier")
MARKS = ("<!-- python -m bench.gpu_code -->", "<!-- end -->")


def code_row(compilation: Compilation, code: Code) -> str:
    """One row of the table."""
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


Report = Callable[[str], None]
"""A function that receives the report line by line."""


def report_codes(report: Report, codes: dict[Compilation, Future[Code]]) -> None:
    """Reports the table. Each row is reported as soon as its kernel is compiled."""
    report(_header(CODE_HEADER))
    for compilation, future in codes.items():
        report(code_row(compilation, future.result()))


def _write(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all."""
    with replaced(path) as unfinished:
        unfinished.write_bytes(content)


def emit(folder: Path, codes: dict[Compilation, Future[Code]]) -> None:
    """Writes every binary and a `manifest.json` that describes them."""
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
                "head_dim": case.size if case.op in ("attention", "rotary") else None,
                "schedule": schedule_of(launch) or None,
                "options": options | {k: v for k, v in launch.constants.items()},
            }
        )
    _write(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    print(f"{len(manifest)} binaries and manifest.json in {folder}")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_code", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="chips to compile for")
    parser.add_argument("--kernels", default="", help="regular expression to search for in the kernels' names")
    parser.add_argument("--all", action="store_true", help="show every dtype and size, not only bf16 with 64 or 384")
    parser.add_argument("--emit", type=Path, metavar="DIR", help="write every binary and manifest.json into DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of compiler processes")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="replace the table between the marks of PAGE")
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
    if args.docs:
        replace_section(args.docs, MARKS, lines)


if __name__ == "__main__":
    main()

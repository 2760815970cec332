"""Fuzzing: damaged image files through decode and pack, random requests to the HTTP service.

Run: python -m bench.fuzz [--minutes 30] [--parts decode http] [--seed 0] [--out bench/results]

The time is shared among the parts. The counts go to the standard output and to `fuzz.json` and `fuzz.md` in the output
folder, where the inputs of findings are kept as `*.bin`. The exit code is 1 if there are findings. `bench.fuzz.decode`
and `bench.fuzz.http` say what counts as one. The part `http` needs `pip install "revit-fast[serve]"`.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from bench.report import RESULTS, header_line, machine_header, write

PARTS = ("decode", "http")


def table_of(found: dict[str, dict]) -> str:
    """Counts and findings as Markdown."""
    lines = ["| part | outcome | inputs |", "| --- | --- | --- |"]
    for part, counts in found.items():
        lines += [f"| {part} | {outcome} | {n} |" for outcome, n in counts["outcomes"].items()]
        lines += [f"| {part} | **all** | {counts['inputs']} |"]
        lines += [f"| {part} | **findings** | {len(counts['findings'])} |"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="time of all parts together (default %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    header = machine_header()
    seconds = 60 * args.minutes / len(args.parts)
    found = {
        part: import_module(f"bench.fuzz.{part}").fuzz(args.seed, args.out, seconds=seconds) for part in args.parts
    }
    table = table_of(found)
    write("fuzz", header, {"seed": args.seed, "minutes": args.minutes, **found}, table, args.out)
    print(header_line(header), table, sep="\n\n")
    for counts in found.values():
        for finding in counts["findings"]:
            print(f"{finding['file']}: {finding['finding']}")
    return int(any(counts["findings"] for counts in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

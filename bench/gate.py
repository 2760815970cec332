"""A gate against slower kernels: the instructions and stores that each executes, against those in `gate.json`.

Seconds drift by tens of percent on a shared machine, so a tight threshold on them would give false alarms. The number
of instructions that a kernel executes for given inputs is exact: callgrind counts the same number in every run. The
instructions show a loop that is no longer vectorised, or a matrix that is packed twice. The stores show a spilled
accumulator, which adds few instructions but much waiting to a long loop. Cache misses do not show; `make bench` is for
those.

`python -m bench.gate` compiles `gate.cpp` with the kernels and counts one call of each case. Exit status: 0 if all is
well; 1 if a case needs over a tenth more than recorded, or is not recorded; 2 if nothing could be counted. `--update`
records the counts. The gate needs only Python, valgrind and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_suffix(".json")
BUILD = ROOT / "build" / "gate"

ISA = "avx2"
"""Instruction set of the kernels that are counted: the best that valgrind can execute."""

FLAGS = ("-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi", "-Wno-unknown-pragmas")
"""Flags of setup.py that affect the kernels' machine code."""
PYTHON_FLAGS = ("-fPIC", "-fwrapv", "-DNDEBUG")
"""Flags that building a Python extension adds."""

CACHES = ("--cache-sim=yes", "--I1=32768,8,64", "--D1=32768,8,64", "--LL=8388608,16,64")
"""Callgrind counts stores only if it simulates caches. The misses are not used, so any sizes do. The sizes are fixed
because callgrind cannot simulate those of some machines."""

MEASURED = "revit_gate_measured"
"""Function of gate.cpp during which callgrind counts."""

LOSS_PERCENT = 10
"""A case fails if it needs over this many percent more instructions or stores than recorded."""
GAIN_PERCENT = 5
"""A case that needs over this many percent fewer should be recorded again, so that a later loss is noticed."""

GATED = ("instructions", "stores")
"""Fields of `Count` that must not grow."""


class GateError(Exception):
    """Why nothing can be counted or compared, and what to do about it."""


@dataclass(frozen=True)
class Count:
    """Counts of one call of a kernel.

    Attributes:
        instructions: executed instructions.
        stores: instructions among them that write memory; one that writes in two pieces counts twice.
        work: useful floating-point operations, or bytes that the call must read and write.
        unit: unit of `work`, "FLOP" or "byte".
    """

    instructions: int
    stores: int
    work: int
    unit: str

    @property
    def per_thousand(self) -> float:
        """Instructions per 1000 units of work."""
        return 1000 * self.instructions / self.work


@dataclass(frozen=True)
class Record:
    """Counts of this run, or recorded counts of an earlier run.

    Attributes:
        isa: instruction set of the kernels.
        compiler: "gcc" or "clang".
        version: version of the compiler, such as "12.2.0".
        cases: counts of the cases, by name.
    """

    isa: str
    compiler: str
    version: str
    cases: Mapping[str, Count]


@dataclass(frozen=True)
class Row:
    """One case beside its record.

    Attributes:
        case: name of the case.
        now: counts of this run; None if the case is recorded, but no longer exists.
        before: recorded counts; None if the case is not recorded.
    """

    case: str
    now: Count | None
    before: Count | None

    def change_percent(self, field: str) -> float | None:
        """Change of a field of `Count` from the record, in percent; None if the two are not the same case."""
        if self.now is None or self.before is None or self.is_other_work:
            return None
        now, before = getattr(self.now, field), getattr(self.before, field)
        return 100 * (now - before) / before

    @property
    def is_other_work(self) -> bool:
        """Whether the case does another amount of work than the one that is recorded under its name."""
        both = self.now is not None and self.before is not None
        return both and (self.now.work, self.now.unit) != (self.before.work, self.before.unit)

    @property
    def failure(self) -> str | None:
        """Why this case fails; None if it passes."""
        if self.now is None:
            return "is recorded, but not among the cases any more: record them with --update"
        if self.before is None:
            return "is not recorded: record it with --update"
        if self.is_other_work:
            return (
                f"does {self.now.work} {self.now.unit}, recorded are {self.before.work} {self.before.unit}: not the "
                "same case, record it with --update"
            )
        losses = [(field, self.change_percent(field)) for field in GATED]
        said = [f"{change:.1f} % more {field}" for field, change in losses if change > LOSS_PERCENT]
        return f"needs {' and '.join(said)} than recorded" if said else None

    @property
    def gain(self) -> str | None:
        """A message if the case got clearly better, else None."""
        gains = [(field, self.change_percent(field)) for field in GATED]
        said = [f"{-change:.1f} % fewer {field}" for field, change in gains if change and change < -GAIN_PERCENT]
        return f"needs {' and '.join(said)} than recorded: record it with --update" if said else None


def compare(before: Mapping[str, Count], now: Mapping[str, Count]) -> list[Row]:
    """One row for every case of either record, in the order of `now`."""
    return [Row(case, now.get(case), before.get(case)) for case in [*now, *sorted(set(before) - set(now))]]


def compiler_notice(before: Record, now: Record) -> str | None:
    """A message if the counts come from another compiler than the recorded ones, else None."""
    major = [(record.compiler, record.version.split(".")[0]) for record in (before, now)]
    if major[0] == major[1]:
        return None
    return (
        f"compiled by {now.compiler} {now.version}, but recorded with {before.compiler} {before.version}: changes are "
        "those of the compiler as well as of the kernels (CXX=... names another one)"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    cells = [("case", "instructions", "per 1000", "", "change", "stores", "change")]
    for row in rows:
        now = row.now
        counts = [f"{now.instructions:,}", f"{now.per_thousand:.1f}", f"{now.stores:,}"] if now else ["-"] * 3
        changes = [row.change_percent(field) for field in GATED]
        changed = ["-" if change is None else f"{change:+.2f} %" for change in changes]
        cells.append((row.case, *counts[:2], (now or row.before).unit, changed[0], counts[2], changed[1]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        padded[0], padded[3] = line[0].ljust(widths[0]), line[3].ljust(widths[3])
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def load(path: Path) -> Record:
    """Reads a record.

    Raises:
        GateError: if there is no such file, or it does not hold a record.
    """
    try:
        fields = json.loads(path.read_text())
        cases = {name: Count(**count) for name, count in fields.pop("cases").items()}
        record = Record(**fields, cases=cases)
        numbers = [n for count in cases.values() for n in (count.instructions, count.stores, count.work)]
        texts = [record.isa, record.compiler, record.version, *(count.unit for count in cases.values())]
        if not all(type(n) is int and n > 0 for n in numbers) or not all(isinstance(text, str) for text in texts):
            raise ValueError("instructions, stores and work must be positive integers, all else text")
        if record.isa != ISA:
            raise ValueError(f"isa is {record.isa}, but {ISA} kernels are counted")
        return record
    except FileNotFoundError as error:
        raise GateError(f"{path} does not exist: record it with `python -m bench.gate --update`") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GateError(
            f"{path} does not hold recorded counts ({type(error).__name__}: {error}): restore it, or record it anew "
            "with `python -m bench.gate --update`"
        ) from error


def save(record: Record, path: Path) -> None:
    """Writes the record as a whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(record), indent=1) + "\n")
    unfinished.replace(path)


def check_machine(machine: str, cpu_flags: set[str], valgrind: str | None) -> None:
    """Raises GateError if the kernels cannot be counted on this machine.

    Args:
        machine: as `platform.machine()` names it.
        cpu_flags: flags of /proc/cpuinfo.
        valgrind: path of the program, if there is one.
    """
    if machine not in ("x86_64", "AMD64") or not {"avx2", "fma"} <= cpu_flags:
        raise GateError(
            f"the counts are those of x86-64 with AVX2 and FMA, which this machine ({machine}) does not execute: run "
            "the gate on one that does"
        )
    if valgrind is None:
        raise GateError("there is no valgrind on PATH, which counts the instructions: apt-get install valgrind")


def cpu_flags() -> set[str]:
    """Features of the processor; none if the system does not report them."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return set(found[1].split()) if found else set()


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Runs a command with additional environment variables and returns its standard output.

    Raises:
        GateError: if it cannot be started, fails or hangs; the message has the end of its output.
    """
    line = shlex.join(map(str, command))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GateError(f"{line}: {error}") from error
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-3000:]
        raise GateError(f"{line} failed with exit status {done.returncode}:\n{said}")
    return done.stdout


def find_compiler() -> tuple[list[str], str, str]:
    """The C++ compiler's command, its name and its version."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise GateError("there is no C++ compiler: apt-get install g++, or name one in CXX")
    command = shlex.split(found)
    name = "clang" if "clang" in run([*command, "--version"]) else "gcc"
    return command, name, run([*command, "-dumpfullversion" if name == "gcc" else "-dumpversion"]).strip()


def build(compiler: Sequence[str], folder: Path) -> Path:
    """Compiles gate.cpp and the kernels of `ISA`. Returns the program."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *PYTHON_FLAGS, f"-I{ROOT / 'csrc'}", f"-DREVIT_GATE_ISA={ISA}"]

    def compile_source(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([*compiler, *flags, "-c", source, "-o", target])
        return target

    # All sources except those of other instruction sets and the choice of a set.
    sources = [ROOT / "bench" / "gate.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    sources = [s for s in sources if s.stem == f"isa_{ISA}" or not s.stem.startswith(("isa_", "dispatch"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    program = folder / "gate"
    run([*compiler, *objects, "-o", program])
    return program


def count(program: Path, case: str, folder: Path) -> Count:
    """Runs one case under callgrind, whose profile stays in `folder`."""
    profile = folder / f"{case.replace(' ', '-')}.callgrind"
    options = ["--collect-atstart=no", f"--toggle-collect={MEASURED}", f"--callgrind-out-file={profile}", *CACHES]
    # No string instructions in memset and memcpy: every byte of theirs would count as an instruction.
    said = run(["valgrind", "-q", "--tool=callgrind", *options, program, case], GLIBC_TUNABLES="glibc.cpu.hwcaps=-ERMS")
    work, unit = said.split()
    lines = dict(line.split(": ", 1) for line in profile.read_text().splitlines() if ": " in line)
    totals = dict(zip(lines["events"].split(), map(int, lines["totals"].split()), strict=False))  # zeros are left out
    if not totals.get("Ir"):
        raise GateError(f"callgrind counted nothing in {case!r}: does gate.cpp still call {MEASURED}?")
    return Count(totals["Ir"], totals["Dw"], int(work), unit)


def measure() -> Record:
    """Counts every case."""
    check_machine(platform.machine(), cpu_flags(), shutil.which("valgrind"))
    command, compiler, version = find_compiler()
    program = build(command, BUILD)
    cases = run([program]).splitlines()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = pool.map(lambda case: count(program, case, BUILD), cases)
        return Record(ISA, compiler, version, dict(zip(cases, counts, strict=True)))


def report(before: Record, now: Record) -> bool:
    """Prints the comparison. Returns whether the gate is passed."""
    rows = compare(before.cases, now.cases)
    print(table(rows))
    if notice := compiler_notice(before, now):
        print(f"note: {notice}")
    for row in rows:
        if row.gain:
            print(f"better: {row.case!r} {row.gain}")
    failures = [row for row in rows if row.failure]
    for row in failures:
        print(f"FAILED: {row.case!r} {row.failure}")
    if any(row.change_percent(GATED[0]) is not None for row in failures):
        print(f"`callgrind_annotate {BUILD.relative_to(ROOT)}/CASE.callgrind` shows where instructions go")
    return not failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help=f"record the counts in {RECORD.name}")
    update = parser.parse_args(arguments).update
    try:
        if not update:
            before = load(RECORD)  # before compiling, in case the file cannot be read
            return 0 if report(before, measure()) else 1
        try:
            before = load(RECORD).cases
        except GateError:
            before = {}
        now = measure()
        print(table(compare(before, now.cases)))
        save(now, RECORD)
        print(f"recorded in {RECORD.relative_to(ROOT)}")
        return 0
    except GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Tables of the suite's results, as Markdown for the documentation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bench.files import replace_section
from bench.gpu_suite.steps import STEPS

MARKS = ("<!-- python -m bench.gpu_suite -->", "<!-- end of bench.gpu_suite -->")

N_KERNELS = 12
"""Kernels of a profile that are shown; the others are in its file."""


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; columns but the first are aligned to the right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (names, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "| --- |" + " --: |" * (len(names) - 1), *lines[1:], ""]


def share(row: dict, key: str) -> str:
    return f"{row[key]:.0%}" if row.get(key) is not None else ""


def number(row: dict, key: str, form: str = ".4g", scale: float = 1.0) -> str:
    return format(row[key] / scale, form) if row.get(key) is not None else ""


def spread(row: dict, key: str) -> str:
    """Median and quartiles."""
    low, high = row.get(f"{key}quartiles_ms", (None, None))
    return "" if low is None else f"{row[f'{key}median_ms']:.4g} ({low:.4g}–{high:.4g})"


def measured(result: dict) -> Iterator[str]:
    """One table for each group of cases; a candidate without a time says why."""
    rows = result.get("results", [])
    ceilings = result.get("ceilings")
    if ceilings:
        yield (
            f"Ceilings of this step: copy {ceilings['bytes_per_s'] / 1e9:.0f} GB/s, matmul "
            f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s."
        )
        yield ""
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        calls, n_bytes, n_flops = (
            any(key in row for row in of_group) for key in ("call_median_ms", "bytes_per_s", "flops_per_s")
        )
        names = ["case and candidate", "dtype", "error (allowed)", "GPU ms (quartiles)", "÷ ours"]
        names += ["call to end ms"] * calls + ["GB/s", "of copy", "of a copy of this size"] * n_bytes
        names += ["TFLOP/s", "of matmul"] * n_flops

        def cells(row: dict, calls=calls, n_bytes=n_bytes, n_flops=n_flops) -> list[str]:
            error = f"{row['max_error']:.2g} ({row['allowed_error']:.2g})" if "max_error" in row else ""
            found = [f"{row['case']}: {row['candidate']}", row.get("dtype", ""), error]
            found += [row["reason"] or spread(row, ""), number(row, "ratio_to_ours", ".2f")]
            found += [spread(row, "call_")] * calls
            if n_bytes:
                found += [number(row, "bytes_per_s", ".0f", 1e9), share(row, "bytes_per_s_of_ceiling")]
                found += [share(row, "bytes_per_s_of_copy_of_this_size")]
            if n_flops:
                found += [number(row, "flops_per_s", ".4g", 1e12), share(row, "flops_per_s_of_ceiling")]
            return found

        yield from table(names, map(cells, of_group))


def tested(result: dict) -> Iterator[str]:
    """Counts of every group of tests, and what failed."""
    groups = result.get("groups", [])
    outcomes = ("passed", "failed", "skipped")
    yield from table(
        ["tests", "state", *outcomes, "seconds"],
        (
            [g["group"], g["state"], *(g.get("counts", {}).get(k, 0) for k in outcomes), number(g, "seconds", ".0f")]
            for g in groups
        ),
    )
    failed = [line for g in groups for line in g.get("failed", [])]
    yield from (f"- `{line['test']}`: {' '.join(line['reason'].split())[:200]}" for line in failed)
    yield from [""] * bool(failed)


def profiled(result: dict) -> Iterator[str]:
    """The longest kernels of every profile, and the host's times."""
    for found in result.get("profiles", []):
        kernels = found["kernels"]
        yield (
            f"{found['model']}, {found['mode']}: {sum(k['count'] for k in kernels)} kernels, "
            f"{found['total_us'] / 1e3:.3f} ms in them."
        )
        yield ""
        rows = ([k["kernel"][:80], k["count"], f"{k['us']:.1f}", f"{k['share']:.1%}"] for k in kernels[:N_KERNELS])
        yield from table(["kernel", "launches", "µs", "share"], rows)
    host = result.get("host_ms", {})
    if host:
        yield f"The host's part of a call, µs (quartiles); the device is `{result['host_device']}`."
        yield ""
        parts = next(iter(host.values()))

        def us(median_ms: float, quartiles_ms: list[float]) -> str:
            return f"{1e3 * median_ms:.0f} ({1e3 * quartiles_ms[0]:.0f}–{1e3 * quartiles_ms[1]:.0f})"

        yield from table(["part", *host], ([part, *(us(*host[mix][part]) for mix in host)] for part in parts))


def entry(row: dict) -> str:
    """The entry of the tables of tiles that a row of the tuning is about."""
    return f"{row['target']}, {'D up to ' + str(row['bound']) if row['bound'] else 'float32'}, {row['field']}"


def tuned(result: dict) -> Iterator[str]:
    """The fastest tiles of every entry and length; then all values over their lengths, fastest first."""
    rows = result.get("winners", [])
    yield from table(
        ["entry", "L", "chosen", "fastest", "time of the chosen ÷ fastest", "quartiles apart"],
        (
            [entry(r), r["seqlen"], r["chosen"], r["fastest"], f"{r['gain']:.3f}", "yes" if r["clear"] else "no"]
            for r in rows
        ),
    )
    means = sorted(result.get("over_lengths", []), key=lambda r: (r["bound"], r["field"], r["ratio"]))
    yield from table(
        ["entry", "value", "lengths", "time ÷ chosen, mean"],
        ([entry(r), r["value"], r["lengths"], f"{r['ratio']:.3f}"] for r in means),
    )
    absent = [row for row in result.get("results", []) if row["reason"]]
    yield from (f"- {row['case']}: {row['candidate']}: {row['reason']}" for row in absent)
    yield ""


def compiled(result: dict) -> Iterator[str]:
    """What was compiled beforehand."""
    if result.get("why"):
        yield result["why"]
    else:
        yield (
            f"{result.get('compiled', 0)} of {result.get('launches', 0)} launches for {result.get('target')}, "
            f"{result.get('compiler_s', 0):.0f} s of compilers in {result.get('wall_s', 0):.0f} s."
        )
    yield ""


SECTIONS: dict[str, Callable[[dict], Iterator[str]]] = {
    "compile": compiled,
    "tests": tested,
    "model": measured,
    "attention": measured,
    "rows": measured,
    "profile": profiled,
    "tuning": tuned,
}


def lines_of(folder: Path) -> list[str]:
    """All tables of a folder of results.

    Raises:
        ValueError: if the folder has no result.
    """
    results = {s.name: json.loads(path.read_text()) for s in STEPS if (path := folder / f"{s.name}.json").exists()}
    if not results:
        raise ValueError(f"{folder}: no results; expected one of {', '.join(f'{s.name}.json' for s in STEPS)}")
    summary = json.loads((folder / "suite.json").read_text())["steps"] if (folder / "suite.json").exists() else {}
    first = next(iter(results.values()))
    lines = [" · ".join(f"{key} {value}" for key, value in first["machine"].items()), ""]
    lines += [f"**{first['warning']}**", ""] if first["warning"] else []
    steps = ([name, s["state"], number(s, "seconds", ".0f"), s["planned_minutes"]] for name, s in summary.items())
    lines += table(["step", "state", "seconds", "planned minutes"], steps)
    for step in STEPS:
        if step.name in results:
            result = results[step.name]
            cache = result["compilations"]
            lines += [f"### {step.name.capitalize()}", "", f"{step.about[0].upper()}{step.about[1:]}.", ""]
            lines += [f"Kernels from Triton's cache: {cache['from_cache']}; compiled anew: {cache['anew']}.", ""]
            lines += SECTIONS[step.name](result)
    return lines


def update(page: Path, folder: Path) -> None:
    """Replaces the tables between the marks of a page by those of a folder of results."""
    replace_section(page, MARKS, lines_of(folder))

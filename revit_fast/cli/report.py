"""The output of commands on images: results as a table, JSON or CSV, and progress on stderr."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TextIO

from revit_fast.cli.arguments import UsageError, check_file
from revit_fast.cli.pipelines import ignore_pillow_warnings
from revit_fast.io.atomic import replaced
from revit_fast.io.finding import IMAGES, STDIN, Kind, PassedOver, find_images
from revit_fast.io.images import name_of
from revit_fast.io.names import csv_line, dumps, on_one_line, write
from revit_fast.io.progress import Progress
from revit_fast.io.trace import StageTimes, Trace
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result


@dataclass
class Prediction:
    """The report of one image: an error, or its grid, tokens, milliseconds and best classes."""

    path: str
    error: str | None = None
    grid: int = 0
    n_tokens: int = 0
    ms: float = 0.0
    top: list[dict] = field(default_factory=list)
    lengths: list[float] | None = None


def prediction_of(result: Result, top_k: int) -> Prediction:
    """The report of a pipeline's result; `lengths` are the assigner's probabilities, the longest length first."""
    path = name_of(result.source)
    if result.error is not None:
        return Prediction(path, error=result.reason)
    lengths = None if result.probabilities is None else result.probabilities.tolist()
    return Prediction(path, None, result.grid, result.n_tokens, result.ms, result.top(top_k), lengths)


class TableFormat:
    """Aligned lines; long paths are not cut, so that they can be copied.

    Args:
        top_k: number of classes per image.
        grids: grids for which the assigner gives probabilities.
        threshold: θ that P(label <= grid), a sum of these probabilities, must reach; None for other policies.
    """

    def __init__(self, top_k: int, grids: Sequence[int] = (), threshold: float | None = None):
        self.top_k, self.grids = top_k, grids
        self.theta = "" if threshold is None else f"  {threshold:<6.3f}"

    def header(self) -> str:
        lengths = "".join(f"  P({grid})".ljust(8) for grid in self.grids) + ("  θ     " if self.theta else "")
        return f"{'grid':>4} {'tokens':>6} {'ms':>8}{lengths}  {'path':<40}  {f'top-{self.top_k}' * (self.top_k > 0)}\n"

    def row(self, p: Prediction) -> str:
        path = on_one_line(p.path)
        if p.error is not None:
            lengths = f"  {'-':<6}" * (len(self.grids) + bool(self.theta))
            return f"{'-':>4} {'-':>6} {'-':>8}{lengths}  {path:<40}  error: {on_one_line(p.error)}\n"
        lengths = "".join(f"  {probability:<6.3f}" for probability in p.lengths or ()) + self.theta
        top = ", ".join(f"{entry['label']} {entry['score']:.3f}" for entry in p.top)
        return f"{p.grid:>4} {p.n_tokens:>6} {p.ms:>8.1f}{lengths}  {path:<40}  {on_one_line(top)}\n"

    def footer(self) -> str:
        return ""


class JsonFormat:
    """One JSON array with one object per line, which is valid even if the run ends early."""

    def __init__(self, top_k: int, grids: Sequence[int] = (), threshold: float | None = None):
        self.top_k, self.grids, self.threshold, self.comma = top_k, grids, threshold, " "

    def header(self) -> str:
        return "[\n"

    def row(self, p: Prediction) -> str:
        record: dict[str, Any] = {"path": p.path}
        if p.error is not None:
            record["error"] = p.error
        else:
            record |= {"grid": p.grid, "tokens": p.n_tokens, "ms": round(p.ms, 3)}
            if p.lengths is not None:
                named = zip(self.grids, p.lengths, strict=True)
                record["lengths"] = {str(grid): round(probability, 6) for grid, probability in named}
            if self.threshold is not None:
                record["threshold"] = self.threshold
            if self.top_k:
                record["top"] = [{"class": entry["label"], "probability": entry["score"]} for entry in p.top]
        comma, self.comma = self.comma, ","
        return f"{comma}{dumps(record, allow_nan=False)}\n"

    def footer(self) -> str:
        return "]\n"


class CsvFormat:
    """A header and one row per image, with errors in the last column."""

    def __init__(self, top_k: int, grids: Sequence[int] = (), threshold: float | None = None):
        self.top_k, self.grids, self.threshold = top_k, grids, [] if threshold is None else [threshold]

    def header(self) -> str:
        lengths = [*(f"p_{grid}" for grid in self.grids), *["threshold"] * len(self.threshold)]
        classes = [f"{kind}_{rank}" for rank in range(1, self.top_k + 1) for kind in ("class", "prob")]
        return csv_line(["path", "grid", "tokens", "ms", *lengths, *classes, "error"])

    def row(self, p: Prediction) -> str:
        if p.error is not None:
            return csv_line([p.path, *[""] * (3 + len(self.grids) + len(self.threshold) + 2 * self.top_k), p.error])
        lengths = [*(round(probability, 6) for probability in p.lengths or ()), *self.threshold]
        top = [value for entry in p.top for value in (entry["label"], entry["score"])]
        return csv_line([p.path, p.grid, p.n_tokens, round(p.ms, 3), *lengths, *top, ""])

    def footer(self) -> str:
        return ""


FORMATS = {"table": TableFormat, "json": JsonFormat, "csv": CsvFormat}


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that takes its place only when everything is written."""
    if path is None:
        yield sys.stdout
        return
    with ExitStack() as stack:
        try:
            written = stack.enter_context(replaced(path))
            file = stack.enter_context(open(written, "w", encoding="utf-8", newline=""))
        except OSError as error:
            raise UsageError(f"--output: cannot write {path}: {error.strerror}") from error
        yield file


class Counts:
    """The images that are finished, their tokens and their rates.

    Args:
        noun: word for the images.
    """

    def __init__(self, noun: str = "images"):
        self.noun = noun
        self.n_images = self.n_errors = self.n_tokens = 0
        self.begin = time.perf_counter()

    def add(self, result: Result) -> None:
        """Counts a finished image."""
        self.n_images += 1
        self.n_errors += result.error is not None
        self.n_tokens += result.n_tokens or 0

    def rates(self) -> str:
        """Throughput so far, without errors."""
        seconds = max(time.perf_counter() - self.begin, 1e-9)
        images_per_s = (self.n_images - self.n_errors) / seconds
        return f"{images_per_s:.1f} {self.noun}/s, {self.n_tokens / seconds:.0f} tokens/s"

    def summary(self) -> str:
        seconds = time.perf_counter() - self.begin
        return f"{self.n_images} {self.noun} ({self.n_errors} failed) in {seconds:.1f} s: {self.rates()}"


def say_passed(passed: PassedOver, kind: Kind = IMAGES) -> None:
    """Says on stderr which files in folders were passed over."""
    if passed:
        print(on_one_line(passed.line(kind)), file=sys.stderr, flush=True)


def open_results(args: argparse.Namespace) -> AbstractContextManager[TextIO]:
    """Opens the stream for results; raises a usage error if it, or the file of --trace, cannot be written."""
    if args.trace:
        check_file("--trace", args.trace)
    return open_output(args.output)


class Rows:
    """Where the results of a run go, one after another.

    Attributes:
        add: takes a result.
        on_terminal: whether they are printed on a terminal, where the progress bar has to make room.
        shows_errors: whether a person sees errors among them.
    """

    on_terminal = shows_errors = False

    def __init__(self, add: Callable[[Result], None]) -> None:
        self.add = add

    def begin(self) -> None:
        """Called before the first result."""

    def end(self) -> None:
        """Called after the last result, or when the run ends early."""


class TextRows(Rows):
    """Writes results as text.

    Args:
        stream: where to.
        text: the format, one of `FORMATS`.
    """

    def __init__(self, stream: TextIO, text: TableFormat | JsonFormat | CsvFormat) -> None:
        super().__init__(lambda result: write(stream, text.row(prediction_of(result, text.top_k))))
        self._stream, self._text = stream, text
        self.on_terminal = stream.isatty()
        self.shows_errors = self.on_terminal and isinstance(text, TableFormat)

    def begin(self) -> None:
        """Writes what stands before the results."""
        write(self._stream, self._text.header())

    def end(self) -> None:
        """Writes what stands after them."""
        write(self._stream, self._text.footer())


def write_results(
    args: argparse.Namespace,
    stream: TextIO,
    pipe: AdaptivePipeline,
    stage: Callable[..., Iterator[Result]],
    top_k: int,
    kind: Kind = IMAGES,
) -> int:
    """Writes the results of a pipeline's method for the files of the arguments; returns 0, or 1 if any file failed."""
    policy = pipe.prep.policy
    text = FORMATS[args.format](top_k, pipe.prep.grids if policy.needs == "probabilities" else (), policy.threshold)
    return run_stage(args, stage, TextRows(stream, text), kind)


def run_stage(args: argparse.Namespace, stage: Callable[..., Iterator[Result]], rows: Rows, kind: Kind = IMAGES) -> int:
    """Runs a pipeline's method on the files of the arguments, with progress; returns 0, or 1 if any file failed.

    Args:
        args: the arguments; paths and trace are read.
        stage: the method.
        rows: takes the results.
        kind: kind of the files.
    """
    ignore_pillow_warnings()
    passed = PassedOver()
    times = Trace() if args.trace else StageTimes()

    def n_files() -> int | None:
        return None if STDIN in args.paths else sum(1 for _ in find_images(args.paths, kind))

    rows.begin()
    counts, progress = Counts(kind.many), Progress(kind.many, n_files)
    progress(0)
    results = stage(find_images(args.paths, kind, passed), times=times)
    try:
        for result in results:
            with progress.aside() if rows.on_terminal else nullcontext():
                rows.add(result)
            counts.add(result)
            progress(counts.n_images, note=counts.rates())
            if result.error is not None and not rows.shows_errors:
                progress.say(f"error: {on_one_line(name_of(result.source))}: {on_one_line(result.reason)}")
    finally:
        results.close()
        progress.close()
        rows.end()
        say_passed(passed, kind)
        progress.say(counts.summary())
        if args.trace:
            times.save(args.trace)
    return 1 if counts.n_errors else 0

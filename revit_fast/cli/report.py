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
from revit_fast.io.images import IMAGES, Kind, find_images, name_of
from revit_fast.io.names import csv_line, dumps, on_one_line, write
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
    """

    def __init__(self, top_k: int, grids: Sequence[int] = ()):
        self.top_k, self.grids = top_k, grids

    def header(self) -> str:
        lengths = "".join(f"  P({grid})".ljust(8) for grid in self.grids)
        return f"{'grid':>4} {'tokens':>6} {'ms':>8}{lengths}  {'path':<40}  {f'top-{self.top_k}' * (self.top_k > 0)}\n"

    def row(self, p: Prediction) -> str:
        path = on_one_line(p.path)
        if p.error is not None:
            lengths = f"  {'-':<6}" * len(self.grids)
            return f"{'-':>4} {'-':>6} {'-':>8}{lengths}  {path:<40}  error: {on_one_line(p.error)}\n"
        lengths = "".join(f"  {probability:<6.3f}" for probability in p.lengths or ())
        top = ", ".join(f"{entry['label']} {entry['score']:.3f}" for entry in p.top)
        return f"{p.grid:>4} {p.n_tokens:>6} {p.ms:>8.1f}{lengths}  {path:<40}  {on_one_line(top)}\n"

    def footer(self) -> str:
        return ""


class JsonFormat:
    """One JSON array with one object per line, which is valid even if the run ends early."""

    def __init__(self, top_k: int, grids: Sequence[int] = ()):
        self.top_k, self.grids, self.comma = top_k, grids, " "

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
            if self.top_k:
                record["top"] = [{"class": entry["label"], "probability": entry["score"]} for entry in p.top]
        comma, self.comma = self.comma, ","
        return f"{comma}{dumps(record, allow_nan=False)}\n"

    def footer(self) -> str:
        return "]\n"


class CsvFormat:
    """A header and one row per image, with errors in the last column."""

    def __init__(self, top_k: int, grids: Sequence[int] = ()):
        self.top_k, self.grids = top_k, grids

    def header(self) -> str:
        lengths = [f"p_{grid}" for grid in self.grids]
        classes = [f"{kind}_{rank}" for rank in range(1, self.top_k + 1) for kind in ("class", "prob")]
        return csv_line(["path", "grid", "tokens", "ms", *lengths, *classes, "error"])

    def row(self, p: Prediction) -> str:
        if p.error is not None:
            return csv_line([p.path, *[""] * (3 + len(self.grids) + 2 * self.top_k), p.error])
        lengths = [round(probability, 6) for probability in p.lengths or ()]
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


class Progress:
    """Counts images and tokens, and reports them as plain lines every 100 images or 5 seconds.

    Args:
        noun: word for the images.
    """

    EVERY_IMAGES, EVERY_S = 100, 5.0

    def __init__(self, noun: str = "images"):
        self.noun = noun
        self.n_images = self.n_errors = self.n_tokens = 0
        self.begin = time.perf_counter()
        self._reported = (0, self.begin)

    def update(self, p: Prediction) -> None:
        """Counts a finished image."""
        self.n_images += 1
        self.n_errors += p.error is not None
        self.n_tokens += p.n_tokens
        self._show()

    def _show(self) -> None:
        count, now = self.n_images, time.perf_counter()
        if count - self._reported[0] >= self.EVERY_IMAGES or now - self._reported[1] >= self.EVERY_S:
            self._reported = (count, now)
            self.say(f"{count} {self.noun}, {self.rates()}")

    def rates(self) -> str:
        """Throughput so far, without errors."""
        seconds = max(time.perf_counter() - self.begin, 1e-9)
        images_per_s = (self.n_images - self.n_errors) / seconds
        return f"{images_per_s:.1f} {self.noun}/s, {self.n_tokens / seconds:.0f} tokens/s"

    def summary(self) -> str:
        seconds = time.perf_counter() - self.begin
        return f"{self.n_images} {self.noun} ({self.n_errors} failed) in {seconds:.1f} s: {self.rates()}"

    def say(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr, flush=True)

    def aside(self):
        """Context in which something else may print to the terminal."""
        return nullcontext()

    def close(self) -> None:
        """Ends the report; plain lines need nothing."""


class BarProgress(Progress):
    """Reports progress as a bar on a terminal."""

    def __init__(self, n_total: int, noun: str = "images"):
        super().__init__(noun)
        from rich import progress
        from rich.console import Console

        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TextColumn("{task.description}"))
        # By default rich redirects stdout to this console, even if stdout is a file.
        self.bar = progress.Progress(
            *columns,
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("", total=n_total)
        self.bar.start()

    def _show(self) -> None:
        self.bar.update(self.task, completed=self.n_images, description=self.rates())

    def say(self, text: str) -> None:
        with self.aside():
            super().say(text)

    @contextmanager
    def aside(self):
        self.bar.stop()
        yield
        self.bar.start()

    def close(self) -> None:
        self.bar.stop()


def open_results(args: argparse.Namespace) -> AbstractContextManager[TextIO]:
    """Opens the stream for results; raises a usage error if it, or the file of --trace, cannot be written."""
    if args.trace:
        check_file("--trace", args.trace)
    return open_output(args.output)


def write_results(
    args: argparse.Namespace,
    stream: TextIO,
    pipe: AdaptivePipeline,
    stage: Callable[..., Iterator[Result]],
    top_k: int,
    kind: Kind = IMAGES,
) -> int:
    """Writes the results of a pipeline's method for the files of the arguments; returns 0, or 1 if any file failed."""
    ignore_pillow_warnings()
    asks_assigner = pipe.prep.policy.needs == "probabilities"
    text = FORMATS[args.format](top_k, pipe.prep.grids if asks_assigner else ())
    times = Trace() if args.trace else StageTimes()
    is_shown = stream.isatty()
    n_files = sum(1 for _ in find_images(args.paths, kind)) if sys.stderr.isatty() else 0
    progress = BarProgress(n_files, kind.many) if sys.stderr.isatty() else Progress(kind.many)
    results = stage(find_images(args.paths, kind), times=times)
    try:
        write(stream, text.header())
        for result in results:
            p = prediction_of(result, top_k)
            with progress.aside() if is_shown else nullcontext():
                write(stream, text.row(p))
            progress.update(p)
            if p.error is not None and not (is_shown and args.format == "table"):
                progress.say(f"error: {on_one_line(p.path)}: {on_one_line(p.error)}")
    finally:
        results.close()
        progress.close()
        write(stream, text.footer())
        progress.say(progress.summary())
        if args.trace:
            times.save(args.trace)
    return 1 if progress.n_errors else 0

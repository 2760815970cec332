"""Runs a pipeline over many files on a Ray cluster, in parts that survive killed workers and interrupted runs.

The inputs are divided into parts of consecutive files. A part is one row of a Ray dataset; `map_batches` passes it to
an actor, which holds the pipeline (decoding threads, batches by tokens) and writes the part's results before it reports
them. A complete part is never computed again, neither after a worker was killed nor in a later run. A worker knows the
place of its part in the stream, so every image gets the same result as in a single process, bit for bit.

Needs Ray: `pip install "revit-fast[ray]"`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from revit_fast.deploy.results_folder import LOCK, Layout, PartReport, check_directory, claim
from revit_fast.io.images import Source
from revit_fast.io.locked import alone_in
from revit_fast.io.names import from_text, mapped, on_one_line, to_text
from revit_fast.streaming.decoding import default_decoders
from revit_fast.streaming.pipeline import AdaptivePipeline

MAX_TRIES = 5
"""Largest number of attempts at a part. If all of them killed their workers, the part is the cause and the run ends."""

START_TIMEOUT_S = 120.0
"""Longest time, in seconds, for the workers to start: the cluster may be busy, and the model must be loaded."""

VISIBLE_TIMEOUT_S = 30.0
"""Longest time, in seconds, until a worker's file is visible here: network file systems cache folder listings."""


class EngineError(RuntimeError):
    """A run that is not possible on this cluster, or ended early; complete parts are kept."""


@dataclass
class Summary:
    """Numbers of a run and of its directory.

    Attributes:
        images: number of images in all complete parts.
        errors: number of these images that could not be classified.
        tokens: tokens of these images that the model processed.
        n_parts: number of parts of the whole directory.
        n_computed: parts that this run computed; the others were complete before.
        seconds: duration of this run, including the start of the workers.
        busy_s: seconds that all workers together spent in the parts of this run.
        workers: number of workers of this run.
        threads: compute threads of each worker.
    """

    n_parts: int
    workers: int
    threads: int
    images: int = 0
    errors: int = 0
    tokens: int = 0
    n_computed: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0

    def add(self, report: PartReport, *, is_new: bool) -> None:
        """Adds the numbers of a complete part."""
        self.images += report.images
        self.errors += report.errors
        self.tokens += report.tokens
        if is_new:
            self.n_computed += 1
            self.busy_s += report.seconds


def threads_per_worker(cpus: Sequence[float], workers: int, threads: int | None = None) -> int:
    """The largest number of threads that every worker can have for itself.

    Args:
        cpus: number of CPUs of each node.
        workers: number of workers on all nodes together.
        threads: requested number of threads; by default as many as possible.

    Raises:
        EngineError: if there are not enough CPUs; the message says what is needed.
    """
    largest = int(max(cpus, default=0))
    for candidate in [threads] if threads is not None else range(largest, 0, -1):
        if sum(int(n // candidate) for n in cpus) >= workers:
            return candidate
    each = f"{threads} CPUs (--threads)" if threads is not None else "one CPU"
    have = " + ".join(f"{n:g}" for n in cpus) or "0"
    raise EngineError(
        f"workers: {workers} workers need {each} each on a node, the cluster has {have} CPUs; ask for fewer workers or "
        "threads, or add nodes"
    )


def reserved_cpus(threads: int) -> float:
    """Number of CPUs that Ray reserves for a worker: fewer than its threads.

    Ray Data runs its own tasks beside the workers. If the workers reserved every CPU, such a task would wait for a
    worker to end, and the workers for the task. So one CPU per worker stays free, or half of one at one thread.
    """
    return threads - 1 if threads > 1 else 0.5


class PartWorker:
    """The actor, which holds a pipeline and computes parts.

    Args:
        shared: a list with one reference to the pipeline. Ray does not resolve it, and each node fetches it once.
        layout: layout of the directory.
        threads: number of compute threads.
    """

    def __init__(self, shared: list, layout: Layout, threads: int) -> None:
        import ray

        warnings.filterwarnings("ignore", module="PIL")  # an image that Pillow cannot read gives an error in its result
        torch.set_num_threads(threads)
        self.pipe: AdaptivePipeline = ray.get(shared[0])
        self.pipe.n_decoders = default_decoders()
        self.layout = layout

    def __call__(self, parts: Any) -> Any:
        """Computes a part, given as a pyarrow table of one row (part, paths, read, errors).

        Returns:
            The number of the part and the reason of its failure, empty if it succeeded. An exception would arrive
            wrapped in Ray's own texts.
        """
        import pyarrow

        (part,) = mapped(parts.to_pylist(), from_text)
        failure = trace = ""
        try:
            self._compute(**part)
        except Exception as error:
            failure, trace = f"{type(error).__name__}: {to_text(str(error))}", to_text(traceback.format_exc())
        return pyarrow.table({"part": [part["part"]], "failure": [failure], "trace": [trace]})

    def _compute(self, part: int, paths: list[str], read: list[str], errors: list[str]) -> None:
        tries = self.layout.begin(part)
        if tries >= MAX_TRIES:
            raise EngineError(
                f"it ended its worker {tries} times (killed, or out of memory); it begins with {on_one_line(paths[0])}"
            )
        begin = time.perf_counter()
        sources = [Source(path, error or None) for path, error in zip(read, errors, strict=True)]
        results = self.pipe(sources, first_index=part * self.layout.part_images)
        records = [self.layout.record_of(result, path) for result, path in zip(results, paths, strict=True)]
        report = PartReport(
            part=part,
            images=len(records),
            errors=sum(record["error"] is not None for record in records),
            tokens=sum(record["tokens"] or 0 for record in records),
            seconds=time.perf_counter() - begin,
            pid=os.getpid(),
            node=socket.gethostname(),
        )
        self.layout.write(records, report)


def predict_dataset(
    pipe: AdaptivePipeline,
    sources: Iterable[str | PathLike | Source],
    output: str | PathLike,
    *,
    workers: int | None = None,
    threads: int | None = None,
    address: str | None = None,
    part_images: int = 512,
    part_format: str = "parquet",
    top_k: int = 5,
    logits: bool = False,
    start_timeout_s: float = START_TIMEOUT_S,
    on_part: Callable[[Summary], None] | None = None,
    on_damage: Callable[[str], None] = warnings.warn,
) -> Summary:
    """Classifies files on a Ray cluster and writes the results to a directory, see `revit_fast.deploy.results_folder`.

    Results equal those of `pipe(sources)`: the same records in the same order. Policies that depend on an image's place
    see its place among all sources. A second call with the same arguments computes the missing parts, and those whose
    files are empty or cut short.

    Relative paths are resolved once, here: workers read absolute ones.

    Args:
        pipe: the pipeline; each worker gets a copy.
        sources: paths, which every worker must be able to read. Each is looked at once (`os.stat`), so that a later
            call notices files that have changed.
        output: directory for the results, on a file system that every node and this process can access.
        workers: number of processes that hold the pipeline; by default one on each node.
        threads: threads of each worker; by default its share of its node.
        address: address of a running cluster, in the form that `ray.init` takes; by default the cluster that this
            process is connected to or that RAY_ADDRESS names, else a new one on this machine for this call.
        part_images: number of files in a part. A killed worker or an interrupted run loses at most one part per worker.
        part_format: "parquet" or "jsonl".
        top_k: number of classes to keep for each image; at most all classes.
        logits: whether to keep all logits, too.
        start_timeout_s: longest time for the workers to start, in seconds.
        on_part: called with the summary so far when a part is complete.
        on_damage: called with a line for every part that an earlier run completed and that is damaged now; it is
            computed again. By default it becomes a warning.

    Returns:
        The numbers of the run.

    Raises:
        EngineError: if the cluster cannot be reached or does not have enough CPUs; if a worker fails, or a part kills
            its worker `MAX_TRIES` times; if the results of a worker are not visible in `output` here.
        FileExistsError: if another run writes to `output`.
        ManifestError: if `output` contains results of another pipeline, other sources or other settings, or if files
            have changed since.
        TypeError, ValueError: if an argument is not as above.
    """
    import ray

    sources = [_as_source(source) for source in sources]
    layout = Layout(
        directory=os.fspath(output),
        part_images=part_images,
        part_format=part_format,
        top_k=min(top_k, pipe.model.num_classes),
        logits=logits,
        grids=pipe.prep.grids if pipe.prep.policy.needs == "probabilities" else (),
        has_labels=pipe.labels is not None,
    )
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    check_directory(layout.directory)
    begin = time.perf_counter()
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(address)
            stack.callback(ray.shutdown)
        cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
        workers = workers or max(1, sum(n >= 1 for n in cpus))
        threads = threads_per_worker(cpus, workers, threads)
        stack.enter_context(alone_in(layout.directory, LOCK, "writing results to"))
        read = claim(layout, pipe, sources)
        summary = Summary(-(-len(sources) // part_images), workers, threads)
        missing = []
        for part in range(summary.n_parts):
            report, damage = layout.inspect(part, layout.images_of(part, len(sources)))
            if damage:
                on_damage(f"output: {damage}: part {part} is computed again")
            if report is None:
                missing.append(part)
            else:
                summary.add(report, is_new=False)
        if missing:
            layout.clear_leftovers()
            rows = [_row(part, sources, read, part_images) for part in missing]
            for part in _computed(rows, pipe, layout, workers, threads, start_timeout_s):
                summary.add(_shown(layout, part, layout.images_of(part, len(sources))), is_new=True)
                summary.seconds = time.perf_counter() - begin
                if on_part is not None:
                    on_part(summary)
            layout.clear_leftovers()
        summary.seconds = time.perf_counter() - begin
        return summary


def _as_source(source: str | PathLike | Source) -> Source:
    if isinstance(source, Source):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"sources: expected paths, which workers can read, got {type(source).__name__}")
    return Source(os.fspath(source))


def _row(part: int, sources: list[Source], read: list[str], part_images: int) -> dict[str, Any]:
    places = slice(part * part_images, (part + 1) * part_images)
    row = {
        "part": part,
        "paths": [source.path for source in sources[places]],
        "read": read[places],
        "errors": [source.error or "" for source in sources[places]],
    }
    return mapped(row, to_text)  # Ray's tables hold UTF-8


def _connect(address: str | None) -> None:
    import ray

    try:
        ray.init(address, include_dashboard=None if address else False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(f"address: cannot reach a Ray cluster at {address}: {error}") from error


def _computed(rows, pipe: AdaptivePipeline, layout: Layout, workers: int, threads: int, start_timeout_s: float):
    """Computes the parts; yields the number of each when it is complete."""
    import ray
    import ray.data
    from ray.exceptions import GetTimeoutError, RayError

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = {name: value for name, value in os.environ.items() if name.startswith("REVIT_FAST_")}
    n_cpus = reserved_cpus(threads)
    shared = ray.put(pipe)  # kept until the end, because a restarted worker fetches it again
    parts = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        PartWorker,
        fn_constructor_args=([shared], layout, threads),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=n_cpus,
        runtime_env={"env_vars": {**settings, "OMP_NUM_THREADS": str(threads)}},
    )
    parts.context.wait_for_min_actors_s = start_timeout_s
    parts.context.enable_progress_bars = False
    parts.context.print_on_execution_start = False
    try:
        for row in parts.iter_rows():
            if row["failure"]:
                raise EngineError(
                    f"a worker failed at part {row['part']}: {row['failure']}; what is complete is kept: run again "
                    "once that is mended"
                ) from RuntimeError(row["trace"])
            yield row["part"]
    except GetTimeoutError as error:
        free = ray.available_resources().get("CPU", 0.0)
        total = ray.cluster_resources().get("CPU", 0.0)
        raise EngineError(
            f"workers: not all of {workers} workers had started after {start_timeout_s:g} s; they need {n_cpus:g} CPUs "
            f"each, {free:g} of the cluster's {total:g} are free; wait for other jobs, ask for fewer workers, or add "
            "nodes"
        ) from error
    except RayError as error:
        raise EngineError(f"the cluster failed: {error}; what is complete is kept: run again to go on") from error


def _shown(layout: Layout, part: int, n_records: int | None = None) -> PartReport:
    """Waits for the report of a part that a worker has completed with this number of records."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while (found := layout.inspect(part, n_records))[0] is None:
        if time.monotonic() > deadline:
            state = f"is not whole here ({found[1]})" if found[1] else "is not there"
            raise EngineError(
                f"output: a worker wrote {layout.part_path(part)}, which {state}; give a directory that every node "
                "mounts at the same path"
            )
        time.sleep(0.1)
    return found[0]

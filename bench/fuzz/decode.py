"""Damaged files through decode, resize and pack, beside good ones, in a process that may crash or hang.

Of every input one of two things is expected: an image, or one error. Its kind is `ImageError` with one of our own
sentences, or an error that a decoder raised. A finding is anything else: a crash, a hang, an exception that is no
`ImageError`, a programming error that began in a line of this package, or a good image whose result beside damaged ones
has other bits than alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from bench.fuzz.inputs import damaged_files, real_files

Work = Callable[[Connection], None]

BATCH = 12
"""Damaged files in a batch; after every third stands a good one."""
GOOD = ("jpeg", "png-RGB", "jpeg-exif", "png-L")
HANG_CPU_S = 5.0
"""Seconds of processor time after which a batch hangs: other work on the machine does not count."""
HANG_WALL_S = 120.0
"""Seconds after which a batch hangs that uses no processor."""
MAX_PIXELS = 2_000_000
"""Pillow's limit in the child; twice as many pixels are refused. It keeps damaged sizes from taking seconds."""
MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RecursionError, TypeError)
"""Types of programming errors. Decoders raise them for damaged files, this package must not."""


def small_pipe(**options):
    """A pipeline of a small random model with several lengths; `options` are those of `AdaptivePipeline`."""
    import torch

    import revit_fast as rf

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"num_classes": 10, "embed_dim": 24, "depth": 1, "num_heads": 3, "hidden_dim": 40}
    model = rf.optimize(rf.ReViT(grids=(6, 4, 2), patch_size=4, **sizes).eval())
    prep = rf.AdaptivePreprocessor.for_model(model, policy=("entropy", [5.0, 2.0]))
    return rf.AdaptivePipeline(model, prep, token_budget=100, n_decoders=2, **options)


def outcome_of(pipe, data: bytes) -> tuple[str, str | None]:
    """What decoding gives: its name for the counts, and a finding or None."""
    import revit_fast
    from revit_fast.io.images import ImageError

    try:
        pipe.prep.decode(data)
    except ImageError as error:
        cause = error.__cause__
        if cause is None:
            return "error: ImageError", None
        last = traceback.extract_tb(cause.__traceback__)[-1]
        mistake = isinstance(cause, MISTAKES) and Path(revit_fast.__file__).parent in Path(last.filename).parents
        where = f"{type(cause).__name__} at {Path(last.filename).name}:{last.lineno}: {cause}"
        return f"error: {type(cause).__name__}", where if mistake else None
    except BaseException as error:
        return f"raised {type(error).__name__}", f"no ImageError: {type(error).__name__}: {error}"
    return "image", None


def work(connection: Connection) -> None:
    """The child: answers each list of files with an outcome for each, and the findings by place."""
    from PIL import Image

    warnings.filterwarnings("ignore", module="PIL")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff comments on every damaged file
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    pipe, files = small_pipe(), real_files()
    good = [files[name] for name in GOOD]
    alone = [next(pipe([data])) for data in good]
    bits = [(r.grid, r.logits.numpy().tobytes()) for r in alone]
    connection.send("ready")
    while (batch := connection.recv()) is not None:
        outcomes = [outcome_of(pipe, data) for data in batch]
        findings = [(place, finding) for place, (_, finding) in enumerate(outcomes) if finding]
        mixed: list[tuple[int | None, bytes]] = []  # the place of a good one, None for a damaged one
        turns = itertools.cycle(range(len(good)))
        for place, data in enumerate(batch):
            mixed.append((None, data))
            if place % 3 == 2 or len(batch) == 1:
                mixed.append((turn := next(turns), good[turn]))
        try:
            results = list(pipe([data for _, data in mixed]))
            if [r.index for r in results] != list(range(len(mixed))):
                findings.append((0, f"results {[r.index for r in results]} of {len(mixed)} files"))
            expected = iter(outcomes)
            for (turn, _), result in zip(mixed, results, strict=True):
                if turn is None:
                    outcome = next(expected)[0]
                    if (outcome == "image") != (result.error is None):
                        findings.append((0, f"{outcome} alone, in a pack: {result.error or 'an image'}"))
                elif result.error or (result.grid, result.logits.numpy().tobytes()) != bits[turn]:
                    findings.append((0, f"a good image is not as alone: {result.error or 'other bits'}"))
        except BaseException as error:
            findings.append((0, f"the pipeline ended: {type(error).__name__}: {error}"))
        connection.send(([outcome for outcome, _ in outcomes], findings))


class Child:
    """A child process, started anew when it has ended.

    Args:
        work: what it does; see the function `work`.
    """

    def __init__(self, work: Work) -> None:
        self._work, self._context = work, multiprocessing.get_context("spawn")
        self._process = None

    def answer(self, batch: list[bytes]) -> tuple[list[str], list[tuple[int, str]]] | str:
        """The child's answer, or how it failed: "crash" with its exit code, or "hang"."""
        if self._process is None:
            self._start()
        self._connection.send(batch)
        begin, cpu = time.monotonic(), self._cpu_s()
        while not self._connection.poll(0.2):
            used = self._cpu_s() - cpu
            if self._process.is_alive() and (used > HANG_CPU_S or time.monotonic() - begin > HANG_WALL_S):
                self.stop()
                return "hang"
            if not self._process.is_alive() and not self._connection.poll(0):
                break
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._process = None
            return f"crash (exit code {code})"

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=self._work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def _cpu_s(self) -> float:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, or the system has no /proc
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def fuzz(
    seed: int,
    out: Path,
    *,
    seconds: float = float("inf"),
    n_inputs: float = float("inf"),
    files: Iterator[tuple[str, bytes]] | None = None,
    work: Work = work,
) -> dict:
    """Runs until the time or the number of inputs is reached; keeps the inputs of findings in `out`.

    Args:
        seed: of the damage.
        out: folder for the inputs of findings.
        seconds: time to run.
        n_inputs: number of files.
        files: names and contents; by default `damaged_files(seed)`.
        work: what the child does.

    Returns:
        {"inputs", "outcomes": {name: count}, "findings": [{"finding", "file"}]}
    """
    child, files = Child(work), files or damaged_files(seed)
    outcomes: Counter[str] = Counter()
    findings: list[dict] = []
    n, end = 0, time.monotonic() + seconds

    def keep(finding: str, name: str, data: bytes) -> None:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"decode-{seed}-{len(findings)}-{name}.bin"
        path.write_bytes(data)
        findings.append({"finding": finding, "file": path.name})

    def run(batch: list[tuple[str, bytes]]) -> Iterator[str]:
        answer = child.answer([data for _, data in batch])
        if not isinstance(answer, str):
            for place, finding in answer[1]:
                keep(finding, *batch[place])
            yield from answer[0]
        elif len(batch) > 1:  # which one was it?
            for one in batch:
                yield from run([one])
        else:
            keep(answer, *batch[0])
            yield answer.partition(" ")[0]

    try:
        while n < n_inputs and time.monotonic() < end:
            batch = list(itertools.islice(files, int(min(BATCH, n_inputs - n))))
            n += len(batch)
            outcomes.update(run(batch))
    finally:
        child.stop()
    return {"inputs": n, "outcomes": dict(sorted(outcomes.items())), "findings": findings}

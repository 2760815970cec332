"""Parts that all commands share: options, the checks of their values, and the error for arguments that cannot work.

The module imports neither torch nor NumPy, so that `--help` and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence

from revit_fast.io.atomic import target_of
from revit_fast.io.formats import check_formats
from revit_fast.io.names import MOST_DIGITS, on_one_line, shortened, whole_number

RESULT_FORMATS = ("table", "json", "csv")

DTYPES = ("auto", "float32", "bfloat16", "int8")
"""Values of --dtype: dtypes of `revit_fast.optimize`."""

BATCH_TOKENS = 4096
"""Default of --batch-tokens."""

EXTRA_MODULES = {
    **dict.fromkeys(("PIL", "rich", "safetensors", "timm"), "cli"),
    "ray": "ray",
    "pyarrow": "parquet",
    **dict.fromkeys(("h11", "prometheus_client", "python_multipart", "starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("gradio",), "page"),
    **dict.fromkeys(("matplotlib",), "plot"),
    **dict.fromkeys(("scipy", "tensorboard"), "train"),
    **dict.fromkeys(("mlxtend", "statsmodels"), "experiments"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
    "av": "video",
}
"""Modules that commands need, and the extra of revit-fast that installs each."""

MAX_THREADS = 1024
"""Largest value of --threads. OpenMP cannot start about ten thousand threads, and ends the process."""


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells count."""


class UsageError(Exception):
    """The arguments do not fit the model or the files; exit code 2."""

    @classmethod
    def of(cls, error: Exception, option: str | None = None, /, **options: str) -> UsageError:
        """Turns an error that a function of the package raised into a usage error that names the option.

        Args:
            error: an error whose message begins with the name of an argument, a colon and a space.
            option: the option to name if `options` lack the argument; None: the message stays as it is.
            **options: the option that each argument comes from.
        """
        name, _, said = str(error).partition(": ")
        if name in options:
            return cls(f"{options[name]}: {said}")
        return cls(str(error) if option is None else f"{option}: {error}")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = whole_number(text)
    if value is None or not 1 <= value < 10**MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {shortened(text)}")
    return value


def threads(text: str) -> int:
    """A number of threads that a process can have."""
    return _at_most(MAX_THREADS, positive(text))


def port(text: str) -> int:
    """A TCP port."""
    return _at_most(65535, positive(text))


def _at_most(limit: int, value: int) -> int:
    if value > limit:
        raise argparse.ArgumentTypeError(f"expected 1 to {limit}, got {value}")
    return value


def budget(text: str) -> dict[str, float]:
    """A budget in tokens, or in multiply-adds as in `2.5gmacs`."""
    number, unit = (text[:-5], "mean_gmacs") if text.lower().endswith("gmacs") else (text, "mean_tokens")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected tokens such as 90, or 2.5gmacs, got {shortened(text)}")
    return {unit: value}


def drop(text: str) -> float:
    """Percentage points, converted to a share."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 100.0:
        got = shortened(text)
        raise argparse.ArgumentTypeError(f"expected percentage points from 0 to 100, such as 0.5, got {got}")
    return value / 100


def _grid(text: str) -> int | str:
    return text if text == "mixed" else positive(text)


def _policy(text: str) -> str | tuple[str, object]:
    """`name` or `name:argument` in the form that `policies.make_policy` takes."""
    name, colon, argument = text.partition(":")
    if not colon and name in ("argmax", "cycle", "random", "entropy"):
        return name
    parsers = {
        "threshold": _probability,
        "cascade": _probability,
        "assigned-cascade": _probabilities,
        "fixed": int,
        "random": lambda seed: {"seed": int(seed)},
        "entropy": lambda bits: [float(b) for b in bits.split(",")],
    }
    try:
        return name, parsers[name](argument)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            "expected argmax, threshold:THETA, cascade:P or assigned-cascade:THETA,P (from 0 to 1), fixed:GRID, cycle, "
            f"random, random:SEED, entropy or entropy:BITS,BITS, got {shortened(text)}"
        ) from None


def _formats(text: str) -> tuple[str, ...]:
    try:
        return check_formats(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("formats: ")) from None


def _probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError
    return value


def _probabilities(text: str) -> dict[str, float]:
    threshold, p = map(_probability, text.split(","))
    return {"threshold": threshold, "confidence": p}


def add_images(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that read image files and choose their grids."""
    p.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="file, folder (searched recursively), quoted glob, @list.txt with a path a line, or - for those of stdin",
    )
    add_choice(p)


def add_choice(p: argparse.ArgumentParser) -> None:
    """Arguments that say which model runs, how images are decoded and how their grids are chosen."""
    p.add_argument(
        "--model",
        default="deit_small_patch16_224",
        metavar="DIR|NAME",
        help="a bundle's folder (./model), as fit and save_pretrained write it, or a repository that holds one "
        "(hf-hub:user/name), whose assigner, policy and class names are then the defaults; a shipped bundle's name; or "
        "a timm name (default %(default)s)",
    )
    add_assigner(p)
    p.add_argument(
        "--policy",
        type=_policy,
        metavar="POLICY",
        help="argmax (default with --assigner), threshold:THETA, cascade:P, assigned-cascade:THETA,P, entropy, random, "
        "cycle or fixed:GRID",
    )
    p.add_argument(
        "--budget",
        type=budget,
        metavar="N",
        help="mean patch tokens of an image, or 2.5gmacs: sets the threshold by the assigner's held-out images",
    )
    p.add_argument(
        "--grid",
        type=_grid,
        metavar="14|10|7|mixed",
        help="patches per side of every image (default without an assigner: 14); mixed takes the model's in turn",
    )
    p.add_argument(
        "--draft", action="store_true", help="decode large JPEGs at a fraction of their size: faster, approximate"
    )
    p.add_argument(
        "--formats",
        type=_formats,
        metavar="NAMES",
        help="image formats that may be read, such as JPEG,PNG (default: those that Pillow reads without other "
        "programs; serve: those that browsers show)",
    )
    add_threads(p)


def add_assigner(p: argparse.ArgumentParser) -> None:
    """The option of the commands whose grids an assigner chooses."""
    p.add_argument("--assigner", metavar="FILE", help="a saved TokenLengthAssigner of the model's grids")


def add_threads(p: argparse.ArgumentParser) -> None:
    """The option of the commands that compute on a CPU."""
    p.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's)")


def add_device(p: argparse.ArgumentParser) -> None:
    """Where a model runs, and in which dtype; `pipelines.compute_device` and `pipelines.optimized` read it."""
    p.add_argument(
        "--device",
        default="cpu",
        metavar="DEVICE",
        help="cpu, cuda, or cuda:N for one of several GPUs (default %(default)s)",
    )
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights: auto is bfloat16 where the device multiplies in bfloat16, else float32 (float16 on "
        "a GPU); int8, on a CPU only, is faster and less accurate (default: the model's own, float32 unless a bundle "
        "has another)",
    )


def add_results(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that print a result per image."""
    p.add_argument(
        "--format", choices=RESULT_FORMATS, default="table", help="format of the results (default %(default)s)"
    )
    p.add_argument("--output", metavar="FILE", help="write the results there, all or nothing (default: stdout)")
    add_trace(p)


def add_trace(p: argparse.ArgumentParser) -> None:
    """The option of the commands that run a pipeline to its end; `report.run_stage` reads it."""
    p.add_argument("--trace", metavar="FILE", help="write the time of every stage there, for Perfetto or Chrome")


def add_weights(p: argparse.ArgumentParser) -> None:
    """The option of the commands that run a model which a name or a bundle gives."""
    p.add_argument("--weights", metavar="FILE", help=".safetensors or .pth; without it those of the bundle, or random")


def add_classes(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that classify."""
    add_weights(p)
    p.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes to report (default %(default)s)")
    p.add_argument("--labels", metavar="FILE", help="class names, one per line")
    add_device(p)


def add_batches(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that pack images."""
    p.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help=f"tokens of a packed batch at most, prefix tokens counted (default {BATCH_TOKENS})",
    )


def add_cluster(p: argparse.ArgumentParser) -> None:
    """Arguments of runs on many machines."""
    cluster = p.add_argument_group("many machines (docs/cluster.md)")
    cluster.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on the workers of a Ray cluster, into parts in the folder --output, which a later run completes",
    )
    cluster.add_argument("--workers", type=positive, metavar="N", help="processes (default: one on every node)")
    cluster.add_argument(
        "--address", metavar="HOST:PORT", help="address of a running Ray cluster (default: start one here)"
    )
    cluster.add_argument(
        "--part-images", type=positive, default=512, metavar="N", help="images of a part (default %(default)s)"
    )
    cluster.add_argument(
        "--part-format",
        choices=("parquet", "jsonl"),
        default="parquet",
        help="format of the parts (default %(default)s)",
    )


def add_goal(p: argparse.ArgumentParser, required: bool) -> None:
    """`--budget` or `--max-drop`: what the threshold must keep."""
    goal = p.add_mutually_exclusive_group(required=required)
    goal.add_argument("--budget", type=budget, metavar="N", help="mean patch tokens of an image, or 2.5gmacs")
    goal.add_argument(
        "--max-drop",
        type=drop,
        metavar="POINTS",
        help="percentage points of accuracy that may be lost against the longest grid, where accuracy is the mean "
        "probability of the right class" + ("" if required else " (default 0.3)"),
    )


def check_file(option: str, path: str) -> None:
    """Raises a usage error, before anything is computed, for a file that cannot be written."""
    is_device = os.path.exists(path) and not os.path.isfile(path)  # a device such as /dev/null cannot be replaced
    written = path if is_device else target_of(path).parent
    if os.path.isdir(path) or not os.access(written, os.W_OK):
        raise UsageError(f"{option}: cannot write {path}; give a file in a folder that can be written to")


def check_free(host: str, port: int, options: str = "--host, --port") -> None:
    """Raises a usage error if no server can listen there; a server would only fail later and in another place."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{options}: cannot listen on {host}:{port}: {error}") from error


def refuse_cluster_options(args: argparse.Namespace) -> None:
    """Raises a usage error for options that have no meaning if everything runs in this process."""
    for name in ("workers", "address"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name}: everything runs in this process; give --engine ray for a cluster")


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parses arguments and runs a command; errors that a user can correct become one line on stderr.

    Args:
        parser: parser of the arguments; its `prog` begins the lines.
        run: the command, which returns the exit code.
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code: that of `run`, 2 for a usage error or a missing package, 130 if interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks ends no run
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return run(args)
    except UsageError as error:
        print(f"{parser.prog}: error: {on_one_line(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRA_MODULES.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(f'{parser.prog}: {error.name} is not installed: pip install "revit-fast[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if argv is None and threading.current_thread() is threading.main_thread():
            # Only the interpreter's own end is left. It would answer another Ctrl-C with a traceback, or not before the
            # last thread has ended: a handler in Python is not run while the interpreter waits.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`); the interpreter flushes stdout at its end and must not fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

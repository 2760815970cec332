"""The `revit-fast` command: classify image files in packed batches, each image at the tokens that it needs."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from revit_fast.version import __version__

RESULT_FORMATS = ("table", "json", "csv")
EXTRA_MODULES = {
    **dict.fromkeys(("PIL", "rich", "safetensors", "timm"), "cli"),
    **dict.fromkeys(("pyarrow", "ray"), "ray"),
    **dict.fromkeys(("prometheus_client", "starlette"), "serve"),
    **dict.fromkeys(("gradio",), "page"),
    **dict.fromkeys(("matplotlib", "scipy", "tensorboard"), "train"),
    **dict.fromkeys(("mlxtend", "statsmodels"), "experiments"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
    "av": "video",
}
"""Packages that commands need, and the extra that brings each."""


MAX_THREADS = 1024
"""Of a process: at some ten thousand OpenMP fails to start them, and ends it."""


class UsageError(Exception):
    """Arguments that cannot work together with the model or the files; exit code 2."""

    @classmethod
    def of(cls, error: Exception, option: str | None = None, /, **options: str) -> UsageError:
        """What a function of the package refused, its argument called by the option that it came from.

        Args:
            error: its message begins with the name of the argument.
            option: that other messages are of; None: they stay as they are.
            **options: the option of each argument.
        """
        name, _, said = str(error).partition(": ")
        if name in options:
            return cls(f"{options[name]}: {said}")
        return cls(str(error) if option is None else f"{option}: {error}")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
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


def check_file(option: str, path: str) -> None:
    """Refuses, before anything is computed, a file that could not be written."""
    is_device = os.path.exists(path) and not os.path.isfile(path)  # /dev/null is written to in its place
    written = path if is_device else os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.access(written, os.W_OK):
        raise UsageError(f"{option}: cannot write {path}; give a file in a folder that can be written to")


def _grid(text: str) -> int | str:
    return text if text == "mixed" else positive(text)


def _policy(text: str) -> str | tuple[str, object]:
    """`name` or `name:argument` as `policies.make_policy` takes it."""
    name, colon, argument = text.partition(":")
    if not colon and name in ("argmax", "cycle", "random", "entropy"):
        return name
    parsers = {
        "threshold": _probability,
        "cascade": _probability,
        "fixed": int,
        "random": lambda seed: {"seed": int(seed)},
        "entropy": lambda bits: [float(b) for b in bits.split(",")],
    }
    try:
        return name, parsers[name](argument)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            "expected argmax, threshold:THETA or cascade:P (from 0 to 1), fixed:GRID, cycle, random, random:SEED, "
            f"entropy or entropy:BITS,BITS, got {text!r}"
        ) from None


def _probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError
    return value


def budget(text: str) -> dict[str, float]:
    """A number of tokens, or of multiply-adds as in `2.5gmacs`."""
    number, unit = (text[:-5], "mean_gmacs") if text.lower().endswith("gmacs") else (text, "mean_tokens")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected tokens such as 90, or 2.5gmacs, got {text!r}")
    return {unit: value}


def _add_images(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that read image files and choose their grids."""
    p.add_argument("paths", nargs="+", metavar="PATH", help="file, folder (searched recursively) or quoted glob")
    _add_choice(p)


def _add_choice(p: argparse.ArgumentParser) -> None:
    """Arguments that say how images are decoded and their grids chosen."""
    p.add_argument(
        "--model",
        default="deit_small_patch16_224",
        metavar="DIR|NAME",
        help="a bundle's folder (./model), as fit and save_pretrained write it, or a repository that holds one "
        "(hf-hub:user/name), whose assigner, policy and class names are then the defaults; a shipped bundle's name; or "
        "a timm name (default %(default)s)",
    )
    _add_assigner(p)
    p.add_argument(
        "--policy",
        type=_policy,
        metavar="POLICY",
        help="argmax (default with --assigner), threshold:THETA, cascade:P, entropy, random, cycle or fixed:GRID",
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
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resize bit for bit as Pillow does, or faster within 1/255 (default: --exact)",
    )
    p.add_argument(
        "--draft", action="store_true", help="decode large JPEGs at a fraction of their size: faster, approximate"
    )
    add_threads(p)


def _add_assigner(p: argparse.ArgumentParser) -> None:
    p.add_argument("--assigner", metavar="FILE", help="a saved TokenLengthAssigner of the model's grids")


def add_threads(p: argparse.ArgumentParser) -> None:
    """The option of the commands that compute on a CPU."""
    p.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: PyTorch's)")


def _add_results(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that print a result per image."""
    p.add_argument("--format", choices=RESULT_FORMATS, default="table", help="of the results (default %(default)s)")
    p.add_argument("--output", metavar="FILE", help="write the results there, all or nothing (default: stdout)")
    p.add_argument("--trace", metavar="FILE", help="write the time of every stage there, for Perfetto or Chrome")


def _add_classes(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that classify."""
    p.add_argument("--weights", metavar="FILE", help=".safetensors or .pth; without it those of the bundle, or random")
    p.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes to report (default %(default)s)")
    p.add_argument("--labels", metavar="FILE", help="class names, one per line")


def _add_batches(p: argparse.ArgumentParser) -> None:
    """Arguments of the commands that pack images."""
    p.add_argument(
        "--batch-tokens",
        type=positive,
        default=4096,
        metavar="N",
        help="tokens of a packed batch at most, prefix tokens counted (default %(default)s)",
    )


def _add_cluster(p: argparse.ArgumentParser) -> None:
    """Arguments of runs on many machines."""
    cluster = p.add_argument_group("many machines (docs/cluster.md)")
    cluster.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on the workers of a Ray cluster, into parts in the folder --output, which a later run completes",
    )
    cluster.add_argument("--workers", type=positive, metavar="N", help="processes (default: one on every node)")
    cluster.add_argument("--address", metavar="HOST:PORT", help="of a running Ray cluster (default: start one here)")
    cluster.add_argument(
        "--part-images", type=positive, default=512, metavar="N", help="of a part (default %(default)s)"
    )
    cluster.add_argument("--part-format", choices=("parquet", "jsonl"), default="parquet", help="(default %(default)s)")


def build_parser() -> argparse.ArgumentParser:
    """The parser; every subcommand sets `command`, the module whose `run` is called."""
    parser = argparse.ArgumentParser(prog="revit-fast", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser(
        "predict",
        help="classify image files or clips",
        description="Classify JPEG, PNG and WebP files; or clips, where --model is a folder of a TimeSformer.",
    )
    _add_images(p)
    p.add_argument(
        "--frames", type=positive, metavar="N", help="of a clip, spread evenly over it (default: the model's)"
    )
    _add_results(p)
    _add_classes(p)
    _add_batches(p)
    _add_cluster(p)
    p.set_defaults(command="predict")

    p = commands.add_parser(
        "assign",
        help="print the grid that each image would get",
        description="Print the token grid that each image would get; nothing is classified.",
    )
    _add_images(p)
    _add_results(p)
    p.set_defaults(command="assign", weights=None, labels=None, batch_tokens=4096)

    p = commands.add_parser(
        "explain",
        help="draw why each image gets its grid",
        description="Write one sheet that shows each image's grid, why it was chosen and what it costs.",
    )
    _add_images(p)
    _add_classes(p)
    p.add_argument("--output", metavar="FILE", required=True, help="sheet.html or sheet.png, written all or nothing")
    p.set_defaults(command="explain", batch_tokens=4096)

    p = commands.add_parser(
        "demo",
        help="show in the browser what each image gets",
        description="Open a page on this machine: images, the grid that each gets, and a slider for the budget.",
    )
    p.add_argument(
        "model",
        nargs="?",
        default="fashion-mnist",
        metavar="MODEL",
        help="a bundle's folder (./model), a shipped bundle's name, or a timm name (default %(default)s)",
    )
    _add_assigner(p)
    _add_classes(p)
    add_threads(p)
    p.add_argument("--port", type=port, default=7860, help="(default %(default)s)")
    p.add_argument("--no-browser", dest="browser", action="store_false", help="print the address, open nothing")
    p.set_defaults(command="demo", policy=None, budget=None, grid=None, exact=True, draft=False, batch_tokens=4096)

    p = commands.add_parser("serve", help="classify images that are sent by HTTP", description="Serve a model by HTTP.")
    _add_choice(p)
    _add_classes(p)
    _add_batches(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    p.add_argument("--port", type=port, default=8000, help="(default %(default)s)")
    p.add_argument(
        "--max-wait-ms",
        type=positive,
        default=20,
        metavar="N",
        help="that an image waits for others to fill its batch (default %(default)s)",
    )
    p.add_argument("--max-body-mb", type=positive, default=32, metavar="N", help="of a request (default %(default)s)")
    p.add_argument("--max-megapixels", type=positive, default=50, metavar="N", help="of an image (default %(default)s)")
    p.add_argument("--max-seconds", type=positive, default=30, metavar="N", help="of a request (default %(default)s)")
    p.add_argument(
        "--max-waiting", type=positive, default=256, metavar="N", help="images at a time (default %(default)s)"
    )
    p.set_defaults(command="serve")

    # These read options off their modules.
    for name in ("fit", "train", "label", "train_assigner", "calibrate", "evaluate", "export"):
        import_module(f"revit_fast.cli.{name}").add_parser(commands)

    p = commands.add_parser("env", help="show versions, instruction sets, threads and backends")
    p.add_argument("--json", action="store_true", help="as a JSON object")
    p.set_defaults(command="env")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0; 1 if an image failed; 2 for a usage error or a missing package; 130 if interrupted.
    """
    # Commands import torch, timm and Pillow; a usage error and --help need not wait for them.
    return run_command(build_parser(), lambda args: import_module(f"revit_fast.cli.{args.command}").run(args), argv)


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parses arguments and runs a command; errors that a user can mend become one line on stderr.

    Args:
        parser: of the arguments; its `prog` begins the lines.
        run: the command, which returns the exit code.
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code: that of `run`, 2 for a usage error or a missing package, 130 if interrupted.
    """
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return run(args)
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRA_MODULES.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(f'{parser.prog}: {error.name} is not installed: pip install "revit-fast[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader is gone (`| head`); the interpreter must not fail again when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

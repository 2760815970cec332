"""The `revit-fast` command: classify image files in packed batches, each image at the tokens that it needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from revit_fast.cli.arguments import (
    add_assigner,
    add_batches,
    add_choice,
    add_classes,
    add_cluster,
    add_images,
    add_results,
    add_threads,
    port,
    positive,
    run_command,
)
from revit_fast.io.memory import keep_freed_pages
from revit_fast.version import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser. Every subcommand sets `command`, the name of the module whose `run` is called."""
    parser = argparse.ArgumentParser(prog="revit-fast", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser(
        "predict",
        help="classify image files or clips",
        description="Classify images of formats that Pillow reads, or clips where --model is a TimeSformer's folder.",
    )
    add_images(p)
    p.add_argument(
        "--frames", type=positive, metavar="N", help="frames of a clip, spread evenly over it (default: the model's)"
    )
    add_results(p)
    add_classes(p)
    add_batches(p)
    add_cluster(p)
    p.set_defaults(command="predict")

    p = commands.add_parser(
        "assign",
        help="print the grid that each image would get",
        description="Print the token grid that each image would get; nothing is classified.",
    )
    add_images(p)
    add_results(p)
    p.set_defaults(command="assign", weights=None, labels=None, device="cpu", dtype=None, batch_tokens=None)

    p = commands.add_parser(
        "explain",
        help="draw why each image gets its grid",
        description="Write one sheet that shows each image's grid, why it was chosen and what it costs.",
    )
    add_images(p)
    add_classes(p)
    p.add_argument(
        "--output", metavar="FILE", required=True, help="sheet.html or sheet.png (needs matplotlib), all or nothing"
    )
    p.add_argument(
        "--attention", action="store_true", help="also draw what the class token reads of each patch in the last block"
    )
    p.set_defaults(command="explain", batch_tokens=None)

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
    add_assigner(p)
    add_classes(p)
    add_threads(p)
    p.add_argument("--port", type=port, default=7860, help="port of the page (default %(default)s)")
    p.add_argument("--no-browser", dest="browser", action="store_false", help="print the address, open nothing")
    p.set_defaults(command="demo", policy=None, budget=None, grid=None, draft=False, formats=None, batch_tokens=None)

    p = commands.add_parser("serve", help="classify images that are sent by HTTP", description="Serve a model by HTTP.")
    add_choice(p)
    add_classes(p)
    add_batches(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    p.add_argument("--port", type=port, default=8000, help="port to listen on (default %(default)s)")
    p.add_argument(
        "--max-wait-ms",
        type=positive,
        default=20,
        metavar="N",
        help="milliseconds that an image waits at most for others to fill its batch (default %(default)s)",
    )
    p.add_argument(
        "--max-body-mb",
        type=positive,
        default=32,
        metavar="N",
        help="most megabytes of a request (default %(default)s)",
    )
    p.add_argument(
        "--max-megapixels",
        type=positive,
        default=50,
        metavar="N",
        help="most megapixels of an image (default %(default)s)",
    )
    p.add_argument(
        "--max-seconds",
        type=positive,
        default=30,
        metavar="N",
        help="seconds that a request may take (default %(default)s)",
    )
    p.add_argument(
        "--max-waiting",
        type=positive,
        default=256,
        metavar="N",
        help="images that may wait at the same time (default %(default)s)",
    )
    p.add_argument("--verbose", action="store_true", help="show the logs of Ray and of the process that classifies")
    p.set_defaults(command="serve")

    # The modules of these commands add their own options.
    for name in ("embed", "fit", "train", "label", "train_assigner", "calibrate", "evaluate", "worth_it", "export"):
        import_module(f"revit_fast.cli.{name}").add_parser(commands)

    p = commands.add_parser("env", help="show versions, instruction sets, threads and backends")
    p.add_argument("--json", action="store_true", help="as a JSON object")
    p.set_defaults(command="env")

    p = commands.add_parser(
        "doctor",
        help="say what is slow here and what mends it",
        description="Say what is fast here and what is not, why, and what mends it. The exit code is 1 if something "
        "can be mended.",
    )
    p.add_argument("--json", action="store_true", help="as a JSON array")
    p.set_defaults(command="doctor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0; 1 if an image failed or `doctor` found something to mend; 2 for a usage error or a missing package; 130 if
        interrupted.
    """
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    # A command imports torch, timm and Pillow here, so that --help and usage errors need not wait for them.
    command = import_module(f"revit_fast.cli.{args.command}")
    if args.command not in ("env", "doctor"):  # they show the allocator in its original state
        keep_freed_pages()
    return command.run(args)

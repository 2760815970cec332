"""`revit-fast export`: writes a model as files for other runtimes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from revit_fast.cli.arguments import UsageError, positive
from revit_fast.io.atomic import target_of

if TYPE_CHECKING:
    from revit_fast.streaming.bundle import Bundle

SUFFIXES = {"torch-export": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    p = commands.add_parser(
        "export",
        help="write a model for other runtimes",
        description="Write a model for torch.export, as a package of AOTInductor, which runs without Python, or as "
        "ONNX. Without --grid the first two take packs of any mix of grids, and ONNX is a folder: a file for each grid "
        "and one of the assigner.",
    )
    p.add_argument(
        "model",
        metavar="MODEL",
        help="a bundle's folder (./model), a shipped bundle's name, or a timm name",
    )
    p.add_argument("--format", choices=tuple(SUFFIXES), required=True, help="format of the output")
    p.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help=".pt2, or .onnx (a folder without --grid), written all or nothing",
    )
    p.add_argument("--grid", type=positive, metavar="G", help="images of this grid alone, in PyTorch's own operators")
    p.add_argument("--weights", metavar="FILE", help=".safetensors or .pth; without it those of the bundle, or random")
    p.add_argument("--labels", metavar="FILE", help="class names, one per line")
    p.set_defaults(command="export")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast export`; returns 0, or 1 if there is no C++ compiler."""
    check_output(args)
    if args.format == "onnx":
        for package in ("onnx", "onnxscript"):  # if one is missing, main says what to install
            import_module(package)

    from revit_fast.cli.pipelines import warn_of_random_weights

    bundle = open_model(args)
    if args.grid is not None and args.grid not in bundle.model.grids:
        raise UsageError(f"--grid: expected one of the model's {list(bundle.model.grids)}, got {args.grid}")
    warn_of_random_weights(args)
    try:
        WRITERS[args.format](args, bundle)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"--output: cannot write {args.output}: {error.strerror}") from error
    except RuntimeError as error:
        print(f"revit-fast: error: {error}", file=sys.stderr)
        return 1
    return 0


def check_output(args: argparse.Namespace) -> None:
    """Raises a usage error, before anything is computed, for an output that cannot be written."""
    is_folder, suffix = args.format == "onnx" and args.grid is None, SUFFIXES[args.format]
    path = Path(os.path.realpath(args.output)) if is_folder else target_of(args.output)
    if not is_folder and path.suffix != suffix:
        raise UsageError(f"--output: expected a name that ends in {suffix}, got {args.output!r}")
    if is_folder and (path.suffix == suffix or path.is_file()):
        raise UsageError(f"--output: without --grid it is a folder, got {args.output!r}; give --grid for one file")
    written = path if is_folder and path.is_dir() else path.parent  # a folder that exists stays the same one
    if (not is_folder and path.is_dir()) or not os.access(written, os.W_OK):
        raise UsageError(f"--output: cannot write {args.output}; give a name in a folder that can be written to")


def open_model(args: argparse.Namespace) -> Bundle:
    """The bundle to export: the one that is given, or a timm model without an assigner."""
    from revit_fast.cli.pipelines import load_bundle, load_model, read_labels
    from revit_fast.models.classes import class_names
    from revit_fast.models.folder import default_policy
    from revit_fast.models.hub import is_bundle
    from revit_fast.models.settings import input_settings
    from revit_fast.streaming.bundle import Bundle

    if is_bundle(args.model):
        bundle = load_bundle(args)
    else:
        model = load_model(args)
        bundle = Bundle(model, None, class_names(model) or (), input_settings(model), default_policy(model, None))
    if args.labels:
        bundle = bundle._replace(classes=tuple(read_labels(args.labels, bundle.model.num_classes)))
    return bundle


def _settings(bundle: Bundle) -> dict:
    from revit_fast.deploy.export import model_settings

    return model_settings(bundle.model, bundle.classes or None)


def _torch_export(args: argparse.Namespace, bundle: Bundle) -> None:
    from revit_fast.deploy.export import export_packed, export_single, save_program

    def write(path: str) -> None:
        program = export_packed(bundle.model) if args.grid is None else export_single(bundle.model, args.grid)
        save_program(program, path, _settings(bundle))

    _reported(args.output, "tracing", write)


def _aoti(args: argparse.Namespace, bundle: Bundle) -> None:
    from revit_fast.deploy.export import check_compiler, compile_package, export_packed, export_single
    from revit_fast.inference.optimize import optimize
    from revit_fast.ops import _library

    if args.grid is None and not _library.HAS_EXTENSION:
        raise UsageError(
            f"--format: a package of all grids calls the C++ extension; {_library.HOW_TO_BUILD}, or --grid"
        )

    check_compiler()

    def write(path: str) -> None:
        # A package runs on this kind of processor only, so weights may be packed for its instruction set.
        own = bundle.model
        program = export_packed(optimize(own)) if args.grid is None else export_single(own, args.grid)
        compile_package(program, path, _settings(bundle))

    _reported(args.output, "compiling, which takes about a minute,", write)


def _onnx(args: argparse.Namespace, bundle: Bundle) -> None:
    from revit_fast.deploy.export import write_adaptive_onnx, write_single_onnx

    if args.grid is None:
        _reported(args.output, "translating", lambda path: write_adaptive_onnx(bundle, path))
    else:
        grid, settings = args.grid, _settings(bundle)
        _reported(args.output, "translating", lambda path: write_single_onnx(bundle.model, grid, path, settings))


WRITERS = {"torch-export": _torch_export, "aoti": _aoti, "onnx": _onnx}


def _reported(path: str, doing: str, write: Callable[[str], None]) -> None:
    """Writes an output, and reports the step and the written files on stderr."""
    print(f"{path}: {doing} ...", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    write(path)
    files = sorted(Path(path).iterdir()) if os.path.isdir(path) else [Path(path)]
    size_mb, seconds = sum(file.stat().st_size for file in files) / 1e6, time.perf_counter() - begin
    names = f" ({', '.join(file.name for file in files)})" if os.path.isdir(path) else ""
    print(f"{path}: {size_mb:.1f} MB in {seconds:.0f} s{names}", file=sys.stderr)

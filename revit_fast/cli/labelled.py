"""Parts that the commands on a bundle and labelled images share.

torch and the package are imported when a command runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from revit_fast.cli.arguments import UsageError, add_device, add_threads, check_file, positive
from revit_fast.io.names import on_one_line

if TYPE_CHECKING:
    from revit_fast.streaming.bundle import Bundle
    from revit_fast.train.data import ImageSet


def add_data(p: argparse.ArgumentParser, split: str) -> None:
    """Arguments for the bundle, the images and how many of them are used."""
    p.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle's folder (./model), hf-hub:user/name, or the name of a shipped one"
    )
    p.add_argument("data", metavar="DATA", help="labelled images: folders of classes, idx files, shards, ...")
    p.add_argument("--split", default=split, help="split of DATA (default %(default)s)")
    p.add_argument("--limit", type=positive, metavar="N", help="images, drawn at random (default: all)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (default %(default)s)")
    add_device(p)
    add_threads(p)


def add_rules(p: argparse.ArgumentParser) -> None:
    """Options that say which grid is the label of an image."""
    p.add_argument(
        "--rule",
        choices=("smallest", "stable"),
        default="smallest",
        help="the smallest grid that is right, or that is right together with all longer ones (default %(default)s)",
    )
    p.add_argument(
        "--unsolved",
        choices=("longest", "shortest", "drop"),
        default="longest",
        help="grid of an image that the model gets right at no grid (default %(default)s)",
    )


def add_output(p: argparse.ArgumentParser) -> None:
    """The option for the folder of the changed bundle."""
    p.add_argument("--output", metavar="DIR", help="write the bundle there (default: in the place of BUNDLE)")


@contextmanager
def usage_errors(**options: str) -> Iterator[None]:
    """Turns errors that the arguments or files have caused into usage errors; `options` as in `UsageError.of`."""
    try:
        yield
    except ModuleNotFoundError:
        raise  # main says what to install
    except (OSError, TypeError, ValueError, ImportError) as error:
        named = {"bundle": "BUNDLE", "path": "DATA", "split": "--split"} | options
        raise UsageError.of(error, **named) from error


def open_both(args: argparse.Namespace) -> tuple[Bundle, ImageSet]:
    """The bundle, and the images with classes in the bundle's order."""

    from revit_fast.cli.pipelines import compute_device
    from revit_fast.streaming.bundle import read_bundle
    from revit_fast.train.checks import check_readable
    from revit_fast.train.datasets import open_images

    compute_device(args)
    with usage_errors():
        bundle = read_bundle(args.bundle)
        images = open_images(args.data, args.split, bundle.classes)
        images = sample(images, args.limit, args.seed)
        check_readable(images, "images")
    return bundle, images


def sample(images: ImageSet, n_images: int | None, seed: int) -> ImageSet:
    """At most `n_images` of the images, drawn at random, in their order; None: all."""
    import numpy as np

    if n_images is None or n_images >= len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(seed).permutation(len(images))[:n_images]))


def folder_to_write(args: argparse.Namespace) -> str:
    """The folder to write the bundle to; a bundle that is shipped or on the Hub is never changed."""
    from revit_fast.models.folder import check_replaceable
    from revit_fast.models.hub import SCHEME, SHIPPED, find_bundle
    from revit_fast.train.checks import check_writable

    with usage_errors(folder="--output", output="--output"):
        if args.output is None and (args.bundle.startswith(SCHEME) or SHIPPED in find_bundle(args.bundle).parents):
            raise UsageError(f"--output: give a folder; {args.bundle} is not changed")
        folder = Path(args.bundle if args.output is None else args.output)
        check_replaceable(folder)
        check_writable(folder)
    return str(folder)


def check_place(images: ImageSet, option: str, path: str) -> None:
    """Raises a usage error if the next command would take a file or folder written there for one of the images."""
    from revit_fast.train.checks import check_outside

    with usage_errors():
        check_outside(images, path, option)


def check_report_files(args: argparse.Namespace) -> None:
    """Raises a usage error, before anything is computed, for files of --json and --plot that cannot be made."""
    if args.json:
        check_file("--json", args.json)
    if not args.plot:
        return
    from revit_fast.train.report import PLOTS

    if Path(args.plot).suffix.lower() not in PLOTS:
        raise UsageError(f"--plot: expected a name that ends in {' or '.join(PLOTS)}, got {args.plot!r}")
    check_file("--plot", args.plot)
    import_module("matplotlib")  # if it is missing, main says what to install


def say_unreadable(images: ImageSet, unreadable: dict[int, str]) -> int:
    """Prints the images that could not be read and why; returns the exit code."""
    for i, reason in unreadable.items():
        print(f"error: {on_one_line(images.name(i))}: {on_one_line(reason)}", file=sys.stderr)
    return 1 if unreadable else 0

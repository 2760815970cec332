"""What the commands share that take a bundle and labelled images. Imports what is heavy when a command runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from revit_fast.cli import UsageError, add_threads, positive

if TYPE_CHECKING:
    from revit_fast.bundle import Bundle
    from revit_fast.train.data import ImageSet


def add_arguments(p: argparse.ArgumentParser, split: str) -> None:
    """The bundle, the images and how many of them."""
    p.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle's folder (./model), hf-hub:user/name, or the name of a shipped one"
    )
    p.add_argument("data", metavar="DATA", help="labelled images: folders of classes, idx files, shards, ...")
    p.add_argument("--split", default=split, help="of DATA (default %(default)s)")
    p.add_argument("--limit", type=positive, metavar="N", help="images, drawn at random (default: all)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of whatever is drawn (default %(default)s)")
    add_threads(p)


def add_output(p: argparse.ArgumentParser) -> None:
    """Where the changed bundle goes."""
    p.add_argument("--output", metavar="DIR", help="write the bundle there (default: in the place of BUNDLE)")


@contextmanager
def usage_errors(**options: str) -> Iterator[None]:
    """Errors that the arguments or files have caused are usage errors; `options` as of `UsageError.of`."""
    try:
        yield
    except ModuleNotFoundError:
        raise  # main says what to install
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise UsageError.of(error, bundle="BUNDLE", path="DATA", split="--split", **options) from error


def open_both(args: argparse.Namespace) -> tuple[Bundle, ImageSet]:
    """The bundle and the images, in the order of its classes."""
    import numpy as np
    import torch

    from revit_fast.bundle import read_bundle
    from revit_fast.train.datasets import open_images

    if args.threads:
        torch.set_num_threads(args.threads)
    with usage_errors():
        bundle = read_bundle(args.bundle)
        images = open_images(args.data, args.split, bundle.classes)
        if args.limit is not None and args.limit < len(images):
            chosen = np.random.default_rng(args.seed).permutation(len(images))[: args.limit]
            images = images.subset(np.sort(chosen))
    return bundle, images


def folder_to_write(args: argparse.Namespace) -> str:
    """The folder that the bundle is written to; a shipped one, or one of the Hub, is left as it is."""
    from revit_fast.folder import check_replaceable
    from revit_fast.hub import SCHEME, SHIPPED, find_bundle

    with usage_errors(folder="--output"):
        if args.output is not None:
            check_replaceable(Path(args.output))
            return args.output
        if args.bundle.startswith(SCHEME) or SHIPPED in find_bundle(args.bundle).parents:
            raise UsageError(f"--output: give a folder; {args.bundle} is not changed")
    return args.bundle


def counter(what: str) -> Callable[[int, int], None]:
    """Reports progress on stderr, at most twenty lines of it."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if done == total or done - reported >= total / 20:
            reported = done
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return report


def say_unreadable(images: ImageSet, unreadable: dict[int, str]) -> int:
    """Names images that could not be read; the exit code."""
    from revit_fast.images import on_one_line

    for i, reason in unreadable.items():
        print(f"error: {on_one_line(images.name(i))}: {on_one_line(reason)}", file=sys.stderr)
    return 1 if unreadable else 0

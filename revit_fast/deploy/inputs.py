"""The inputs of a run on many machines: the absolute paths that workers read, and digests that show any change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from revit_fast.io.images import Source

LOOKERS = 16
"""Threads that look at files: a network file system takes up to a millisecond for one, but answers many at a time."""


def absolute_paths(sources: Sequence[Source]) -> list[str]:
    """The path of each source from the root: workers have other working directories than the process that starts them.

    `..` stays in it, because after a symbolic link it is not the folder above the link.
    """
    here = os.getcwd()
    return [os.path.join(here, source.path) for source in sources]


def describe_inputs(sources: Sequence[Source], read: Sequence[str], part_images: int) -> dict[str, Any]:
    """What a manifest says of the inputs.

    A file is known by its name as given, its absolute path, its size and the time of its last change, in nanoseconds.
    So each file costs one call of `stat`, and none is read.

    Args:
        sources: the inputs as they were given.
        read: their `absolute_paths`.
        part_images: number of inputs in a part.

    Returns:
        `images`, their number; `sha256`, a digest of all; `parts`, a digest of every part.
    """

    def lines_of(begin: int) -> bytes:
        some = zip(sources[begin : begin + part_images], read[begin : begin + part_images], strict=True)
        return b"".join(_line(source, path) for source, path in some)

    whole, parts = hashlib.sha256(), []
    with ThreadPoolExecutor(LOOKERS) as threads:
        for lines in threads.map(lines_of, range(0, len(sources), part_images)):
            whole.update(lines)
            parts.append(hashlib.sha256(lines).hexdigest()[:16])
    return {"images": len(sources), "sha256": whole.hexdigest(), "parts": parts}


def _line(source: Source, path: str) -> bytes:
    try:
        found = os.stat(path)
        state = f"{found.st_size} {found.st_mtime_ns}"
    except (OSError, ValueError):  # ValueError: a NUL in the name
        state = "missing"
    return f"{source.path}\0{path}\0{state}\0{source.error or ''}\n".encode("utf-8", "surrogateescape")


def same_inputs(kept: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two descriptions are of the same files in the same order."""
    return (kept.get("images"), kept.get("sha256")) == (now["images"], now["sha256"])


def difference_of_inputs(kept: dict[str, Any], now: dict[str, Any], read: Sequence[str], part_images: int) -> str:
    """Where the inputs of a kept manifest differ from those of a run, in words.

    Args:
        kept: the description in the manifest.
        now: the description of the run.
        read: absolute paths of the run.
        part_images: number of inputs in a part.
    """
    counts = f"{kept.get('images')} images there, {now['images']} now"
    if "parts" not in kept:
        return f"names without sizes and times of the files, {counts}"
    places = [i for i, (a, b) in enumerate(zip(kept["parts"], now["parts"], strict=False)) if a != b]
    if not places:
        return counts
    first, last = read[places[0] * part_images], read[: (places[0] + 1) * part_images][-1]
    return (
        f"other names, folders, sizes or times of files in {len(places)} of {len(now['parts'])} parts, the first from "
        f"{first} to {last}, {counts}"
    )

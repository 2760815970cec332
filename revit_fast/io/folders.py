"""Folders below a folder, where links may lead in a circle."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterator

from revit_fast.io.names import on_one_line


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that follows links, in the order of names, without folders whose name begins with a dot.

    A link to a folder above it would lead in a circle, and every file in the circle would come many times. Such a link
    is left out, with a warning that names it.

    Raises:
        OSError: if a folder cannot be read; `os.walk` would leave it out.
    """
    above = {root: (_identity(root),)}
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raised):
        own, kept = above.pop(folder), []
        for name in sorted(name for name in subfolders if not name.startswith(".")):
            path = os.path.join(folder, name)
            identity = _identity(path)
            if identity in own:
                _warn_of_circle(path)
            else:
                kept.append(name)
                above[path] = (*own, identity)
        subfolders[:] = kept
        yield folder, kept, files


def matches(pattern: str) -> list[str]:
    """The sorted matches of a glob pattern, in which `**` descends; those behind a link in a circle are left out."""
    found = sorted(glob.glob(pattern, recursive=True))
    if "**" not in pattern:
        return found
    parts = pattern.split(os.sep)
    n_fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = os.path.dirname(os.sep.join([*parts[:n_fixed], "match"]))
    known: dict[str, tuple | None] = {base: (_identity(base or os.curdir),)}
    return [path for path in found if _chain(path, known) is not None]


def _chain(path: str, known: dict[str, tuple | None]) -> tuple | None:
    """Identities of the folders along a path; None behind a link that leads to a folder above it."""
    if path not in known:
        above = _chain(os.path.dirname(path), known)
        if above is None or not os.path.isdir(path):
            return above
        identity = _identity(path)
        in_circle = os.path.islink(path) and identity in above
        if in_circle:
            _warn_of_circle(path)
        known[path] = None if in_circle else (*above, identity)
    return known[path]


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _warn_of_circle(link: str) -> None:
    target = on_one_line(os.path.realpath(link))
    warnings.warn(f"path: {on_one_line(link)} links to {target}, a folder above it: it is left out", stacklevel=4)


def _raised(error: OSError) -> None:
    raise error

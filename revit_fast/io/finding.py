"""Finds the image files, or others, that paths, folders, patterns and lists of names stand for."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from revit_fast.io.folders import matches
from revit_fast.io.formats import reads_heif
from revit_fast.io.names import read_names

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
"""Suffixes of file names that count as images inside a folder, in upper or lower case."""

EMBEDDING_SUFFIXES = (".npy", ".parquet")
"""Endings of the names of files of embeddings."""

HEIF_SUFFIXES = (".heic", ".heif")
"""Suffixes of the files that Pillow reads with pillow-heif alone."""

MOST_TYPES = 5
"""Types of files, by their suffix, that `PassedOver` names."""

STDIN, LIST = "-", "@"
"""Stands for the paths that stdin names; stands before the name of a text file that names paths."""


class Kind(NamedTuple):
    """A kind of file to find in folders.

    Attributes:
        one: the singular with its article, for messages.
        many: the plural, for messages.
        suffixes: suffixes, in lower case, of file names that count as this kind inside a folder.
    """

    one: str
    many: str
    suffixes: tuple[str, ...]

    def has_name(self, path: str) -> bool:
        """Whether the name of a file or folder has one of the suffixes."""
        return path.lower().endswith(self.suffixes)


IMAGES = Kind("an image", "images", SUFFIXES)


class Source(NamedTuple):
    """A file to read, or the reason why there is none at this path."""

    path: str
    error: str | None = None


class PassedOver(Counter):
    """The number of files in folders that are not of the kind that was looked for, by their suffix in lower case."""

    def line(self, kind: Kind = IMAGES) -> str:
        """What was passed over when files of this kind were looked for, and how HEIC images could be read."""
        named = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.most_common(MOST_TYPES)]
        named += [f"{len(self) - MOST_TYPES} other types"] * (len(self) > MOST_TYPES)
        text = f"passed over {self.total()} file{'s' * (self.total() != 1)}: {', '.join(named)}"
        heif = ", ".join(suffix for suffix in HEIF_SUFFIXES if suffix in self and suffix in kind.suffixes)
        return f'{text}; to read {heif}: pip install "revit-fast[heif]"' if heif else text


def find_images(
    paths: Iterable[str | os.PathLike], kind: Kind = IMAGES, passed: PassedOver | None = None
) -> Iterator[Source]:
    """Finds the image files that the given paths name, one by one as the result is consumed.

    Args:
        paths: a file is accepted with any suffix. A folder stands for the files below it that end in one of the kind's
            suffixes, sorted by name. Names that start with a dot are left out, and links to other folders are not
            followed. A glob pattern (`**` descends) stands for its sorted matches, as if the shell had expanded it.
            `-` stands for the files and folders that stdin names, one a line, and `@list.txt` for those that a text
            file names. A file or folder that has such a name itself is meant first.
        kind: kind of the files: images or others.
        passed: counts the files in folders that are not of this kind. HEIC images are among them without pillow-heif.

    Yields:
        One `Source` per file in the order of the paths. A path without any image gives a `Source` with an error. So
        does a folder with the suffix of an image, unless it is given with a trailing slash; it is not entered.
    """
    passed = PassedOver() if passed is None else passed
    for path in map(os.fspath, paths):
        if os.path.lexists(path):
            yield from _find_in_path(path, kind, passed)
        elif path == STDIN:
            names = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from _find_named(path, names, kind, passed)
        elif path.startswith(LIST):
            try:
                names = read_names(path.removeprefix(LIST))
            except (OSError, ValueError) as error:
                reason = os_reason(error) if isinstance(error, OSError) else str(error)
                yield Source(path, f"this list cannot be read: {reason}")
            else:
                yield from _find_named(path, names, kind, passed)
        elif glob.has_magic(path):
            # A pattern with `**` matches folders as well as the files in them.
            found = [m for m in matches(path) if "**" not in path or kind.has_name(m) or not os.path.isdir(m)]
            if not found:
                yield Source(path, "no file matches this pattern")
            for match in found:
                yield from _find_in_path(match, kind, passed)
        else:
            yield Source(path)


def _find_named(path: str, names: Iterable[str], kind: Kind, passed: PassedOver) -> Iterator[Source]:
    found = False
    for name in filter(None, names):
        found = True
        yield from _find_in_path(name, kind, passed)
    if not found:
        yield Source(path, "it names no file; give one path a line")


def _find_in_path(path: str, kind: Kind, passed: PassedOver) -> Iterator[Source]:
    if not os.path.isdir(path):
        yield Source(path)
    elif kind.has_name(path):
        yield _folder_like(path, kind)
    else:
        found, here = False, PassedOver()
        for source in _find_in_folder(path, kind, here):
            found = True
            yield source
        if not found:
            reason = f"no {kind.many} in this folder (looked for {', '.join(_readable(kind))})"
            yield Source(path, f"{reason}; {here.line(kind)}" if here else reason)
        else:
            passed.update(here)


def _readable(kind: Kind) -> tuple[str, ...]:
    """The suffixes of a kind that can be read here."""
    return tuple(suffix for suffix in kind.suffixes if suffix not in HEIF_SUFFIXES or reads_heif())


def _find_in_folder(folder: str, kind: Kind, passed: PassedOver) -> Iterator[Source]:
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield Source(folder, os_reason(error))
        return
    suffixes = _readable(kind)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            like = kind.has_name(entry.name)
            yield from [_folder_like(entry.path, kind)] if like else _find_in_folder(entry.path, kind, passed)
        elif entry.name.lower().endswith(suffixes):
            yield Source(entry.path)
        else:
            passed[os.path.splitext(entry.name)[1].lower()] += 1


def _folder_like(path: str, kind: Kind) -> Source:
    return Source(path, f"is a folder, not {kind.one}; to read the {kind.many} in it, give {path}{os.sep}")


def os_reason(error: OSError) -> str:
    """The message of an OSError in lower case, without the path."""
    return (error.strerror or str(error) or type(error).__name__).lower()

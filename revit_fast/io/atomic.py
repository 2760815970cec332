"""Writes files and folders completely or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from revit_fast.io.names import dumps, loads

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants of Linux' system call renameat2."""

LEFTOVER = re.compile(r"\.\d+\.tmp$")
"""Pattern for the end of a temporary path's name."""


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which replaces `path` when the context ends without an error.

    If `path` exists but is not a regular file (/dev/null, for example), it is not replaced: it is yielded itself.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON, completely or not at all; refuses NaN."""
    with replaced(path) as temporary:
        temporary.write_text(dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Reads the value that `write_json`, or anybody else, wrote.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no JSON, see `names.loads`.
    """
    return loads(Path(path).read_bytes())


@contextmanager
def replaced_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new, empty folder beside `path`, which replaces `path` when the context ends without an error.

    On Linux the old or the new folder exists at every moment. If the system cannot exchange folders, there is a moment
    between two renames when neither exists.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same id
    temporary.mkdir()
    try:
        yield temporary
        if not path.exists():
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            old = path.with_name(f"{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(temporary, path)
            os.rename(old, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the unfinished files of killed processes from a folder; no process may be writing to it."""
    for path in Path(folder).iterdir():
        if LEFTOVER.search(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two folders in one step; returns whether it succeeded."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another operating system, or an old C library
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0

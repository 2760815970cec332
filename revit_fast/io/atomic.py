"""Files and folders that are written all or nothing."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux' renameat2."""

LEFTOVER = re.compile(r"\.\d+\.tmp$")
"""The end of a temporary path's name."""


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the context ends without an error.

    What is there and is no file, such as /dev/null, is not replaced: the path itself is written to.
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
    """Writes JSON, all or nothing; NaN is refused."""
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def replaced_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new, empty folder beside `path` that takes its place, or becomes it, when the context ends without an error.

    On Linux there is no moment without the one or the other; where the system cannot exchange folders, there is one
    between two renames.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had this one's id
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
    """Removes from a folder what processes that were killed had begun to write; nobody may be writing to it."""
    for path in Path(folder).iterdir():
        if LEFTOVER.search(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _exchange(a: Path, b: Path) -> bool:
    """Whether the two have changed places, in one step."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0

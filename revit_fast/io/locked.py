"""Locks on folders: at most one run writes to a folder at a time."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from revit_fast.io.atomic import make_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held: set[str] = set()
_guard = threading.Lock()


@contextmanager
def alone_in(folder: str | os.PathLike, name: str, doing: str) -> Iterator[bool]:
    """Locks a folder against other runs, and makes it if it does not exist; yields False if the system has no locks.

    The system releases the lock however the process ends, and no child process inherits it.

    Args:
        folder: the folder.
        name: name of the lock's file in it, which stays there.
        doing: what the other process does, for the message: "training in".

    Raises:
        FileExistsError: if another run, in this process or another, has locked it.
        OSError: if the folder cannot be made or written to.
    """
    folder = Path(folder)
    make_folder(folder)
    path = os.path.realpath(folder / name)
    # The system's lock is the process's: a second one in the same process succeeds, and its end releases the first.
    with _guard:
        if path in _held:
            raise _occupied(folder, doing)
        _held.add(path)
    try:
        with open(path, "w") as file:
            yield _lock(file, folder, doing)
    finally:
        with _guard:
            _held.discard(path)


def _lock(file: TextIO, folder: Path, doing: str) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
            return False
        raise _occupied(folder, doing) from None
    return True


def _occupied(folder: Path, doing: str) -> FileExistsError:
    return FileExistsError(f"another process is {doing} {folder}; wait until it has ended, or give another folder")

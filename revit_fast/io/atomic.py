"""Writes files and folders so that readers find the old content or the new, whenever the process or the machine stops.

Everything that replaces a file does it here: the new file is written beside the old one, brought to disk (fsync) and
renamed over it; then the folder is brought to disk as well. A file keeps its owner and its mode. A new one gets those
that a plain `open` gives it: umask, and the group of a folder with setgid, hold for it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from revit_fast.io.names import dumps, loads

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEFTOVER = re.compile(r"\.\d+\.tmp$")
"""Pattern for the end of a temporary path's name."""

UNFINISHED = ".*.tmp"
"""Pattern for the folders inside a folder that hold the new files of a save which is going on, or was killed."""


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new, empty file beside `path`, which replaces `path` when the context ends without an error.

    A link is followed as `open` does; one that leads into a folder that does not exist is replaced itself. If `path`
    exists but is not a regular file (/dev/null, for example), it is not replaced: it is yielded itself. A file that is
    itself a mount point cannot be replaced: the content is copied into it.
    """
    path = target_of(path)
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = _temporary(path.parent, path.name)
    # Nobody may read the new file who may not read the old one, not even while it is written.
    mode = path.stat().st_mode & 0o666 | 0o600 if path.exists() else 0o666
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        yield temporary
        os.chmod(temporary, mode)  # some writers make the file anew, for its owner alone
        _settle(temporary, path)
        _put(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


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
def replaced_folder(path: str | os.PathLike, own: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a new, empty folder; when the context ends without an error, its files replace those of the folder `path`.

    If there is no folder `path`, the new one becomes it in one step. Otherwise the folder stays the same one: processes
    may stand in it, it may be a mount point, its parent may be read-only. Its mode, its other files and its subfolders
    stay, too. The new files lie in a subfolder (`UNFINISHED`) until they are on disk; then each is renamed to its
    place. If an error or the end of the process stops that halfway, the files whose turn did not come stay in the
    subfolder. Readers for which the first file of `own` says which content is valid find the others in either place
    (`verified.read_file`).

    A link to a folder is followed; if it leads nowhere, the folder is made there. A link in the place of a file is
    replaced, and what it leads to is left alone, for a cache or another folder may use it. Several processes that save
    into one folder take turns where the system can lock folders: not on Windows, nor on most network file systems.

    Args:
        path: the folder. Missing parents are made.
        own: names of the files that belong to the content, in the order in which new ones take their places. Those that
            the new content lacks are removed last.

    Raises:
        OSError: if a file cannot be written or replaced.
    """
    path = Path(os.path.realpath(path))
    make_folder(path.parent)
    with ExitStack() as stack:
        is_new = not path.is_dir()
        alone = not is_new and stack.enter_context(locked(path))
        new, names = _temporary(path.parent, path.name) if is_new else _temporary(path), []
        new.mkdir()
        try:
            yield new
            names = sorted((entry.name for entry in new.iterdir()), key=lambda name: ([*own, name].index(name), name))
            for name in {*own, *names}:
                if (path / name).is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder has the name of a file to write", str(path / name))
            for name in names:
                _settle(new / name, path / name)
            _sync_folder(new)
            if is_new:
                if _became(new, path):
                    return
                alone = stack.enter_context(locked(path))  # another process was faster
                new = new.rename(_temporary(path))
            for name in names:
                _sync_folder(path)  # the first file is on disk before others change
                _put(new / name, path / name)
            _sync_folder(path)
        except BaseException:
            if not names or (new / names[0]).exists():  # otherwise the new content is valid already
                shutil.rmtree(new, ignore_errors=True)
            raise
        for name in set(own) - set(names):
            (path / name).unlink(missing_ok=True)
        # The lock says that nobody else is writing: the others were left by killed processes.
        for done in path.glob(UNFINISHED) if alone else [new]:
            if LEFTOVER.fullmatch(done.name):
                shutil.rmtree(done, ignore_errors=True)


def target_of(path: str | os.PathLike) -> Path:
    """The file that `open` would write to; the link itself if it leads into a folder that does not exist."""
    path, target = Path(path), Path(os.path.realpath(path))
    leads_nowhere = path.is_symlink() and not target.parent.is_dir()
    return Path(os.path.realpath(path.parent), path.name) if leads_nowhere else target


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder and its parents unless it exists; where a link leads nowhere, its target is made."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def is_hidden(entry: Path) -> bool:
    """Whether an entry of a folder is of version control, the file system or an unfinished save, and not of a user."""
    return entry.name.startswith(".") or entry.name == "lost+found"


def is_empty(folder: Path) -> bool:
    """Whether a folder holds only hidden entries; `replaced_folder` leaves them alone."""
    return all(map(is_hidden, folder.iterdir()))


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes the unfinished files of killed processes from a folder; no process may be writing to it."""
    for path in Path(folder).iterdir():
        if LEFTOVER.search(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Waits until no other process saves into a folder; yields False, without waiting, where folders have no locks.

    Args:
        folder: the folder. The lock is on itself, so that no file is left behind.
        shared: whether this process only reads: readers do not exclude each other.
    """
    with ExitStack() as stack:
        got = False
        with suppress(OSError):
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)  # this unlocks, too
                fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                got = True
        yield got


def _temporary(folder: Path, name: str = "") -> Path:
    """A new path in a folder, whose name is no longer than names may be."""
    return folder / f"{name[:50]}.{secrets.randbits(60)}.tmp"


def _settle(new: Path, path: Path) -> None:
    """Gives a finished file the owner and mode of the file at `path`, if there is one, and brings it to disk."""
    descriptor = os.open(new, os.O_RDWR)  # before the mode is set, which may forbid it
    try:
        if path.exists():
            old = path.stat()
            with suppress(OSError, AttributeError):  # only root may give files away; Windows has no owners
                os.chown(new, old.st_uid, old.st_gid)
            with suppress(OSError):  # a file system without modes
                os.chmod(new, stat.S_IMODE(old.st_mode))
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _put(new: Path, path: Path) -> None:
    """Renames a settled file to its place, or copies it into a file that is a mount point."""
    try:
        os.replace(new, path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        with open(new, "rb") as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            _sync(file.fileno())
        new.unlink()


def _became(new: Path, path: Path) -> bool:
    """Renames a new folder to its place; returns False if another process has made a folder there meanwhile."""
    try:
        os.rename(new, path)
    except OSError:
        if not path.is_dir():
            raise
        return False
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    """Brings renames in a folder to disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and a folder may be writable but not readable
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise

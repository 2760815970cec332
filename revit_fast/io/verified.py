"""Reads the files of one save together: their configuration names the size and the hash of each.

The configuration takes its place first (`atomic.replaced_folder`). A reader that has it takes every other file where
it is the named one: in its place, or in the folder of the save that is going on or was killed.
"""

from __future__ import annotations

import hashlib
import mmap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from revit_fast.io.atomic import UNFINISHED, locked

PAUSES_S = (0.01, 0.1)
"""Seconds to wait before something that does not fit is read again; after the last, no save goes on while it is."""

T = TypeVar("T")


def facts(content: bytes | mmap.mmap) -> dict[str, Any]:
    """What a configuration says of a file: its size in bytes and its SHA-256."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def files_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The facts of all files in a folder by their names; no file may be empty."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            files[path.name] = facts(content)
    return files


def read_file(config: Path, name: str, files: Any, what: str) -> bytes:
    """The content of a file beside a configuration, after a comparison with what the configuration says of it.

    Args:
        config: path of the configuration.
        name: name of the file.
        files: facts by name, as the configuration has them, whatever that is. A file that they do not name is taken as
            it is.
        what: first word of errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is another one than the configuration names, or that says no such thing.
    """
    wanted = files.get(name, {}) if isinstance(files, Mapping) else files
    if not isinstance(wanted, Mapping):
        raise ValueError(f"{what}: {config}: files: expected bytes and sha256 of {name}, got {wanted!r}; save it again")
    found = []
    for path in [config.parent / name, *(config.parent.glob(f"{UNFINISHED}/{name}") if wanted else ())]:
        if path.is_file():
            content = path.read_bytes()
            found.append(facts(content))
            if all(wanted.get(fact, value) == value for fact, value in found[-1].items()):
                return content
    if not found:
        raise FileNotFoundError(f"{what}: {config.parent} lacks {name}; copy the whole folder, or save it again")
    raise ValueError(
        f"{what}: {config.parent / name} is not the file that {config.name} names: expected {_text(wanted)}, got "
        f"{_text(found[0])}; copy the whole folder, or save it again; if you changed {name} yourself, delete {name!r} "
        f'under "files" in {config.name}'
    )


def read_together(config: Path, read: Callable[[], T]) -> T:
    """What `read` gives for a configuration and its files, all of the same save.

    If something is missing or does not fit, or the configuration changes meanwhile, a save may be going on, and
    everything is read again. The last time no save can go on, where the system can lock folders.

    Args:
        config: path of the configuration.
        read: function that reads the configuration and all files.

    Raises:
        others: what `read` raises the last time.
    """
    for pause_s in PAUSES_S:
        before = _content(config)
        try:
            value = read()
            if _content(config) == before:  # otherwise files that it does not name may be of another save
                return value
        except (OSError, ValueError):
            if before is None:
                raise
        time.sleep(pause_s)
    with locked(config.parent, shared=True):
        return read()


def _content(config: Path) -> bytes | None:
    try:
        return config.read_bytes()
    except OSError:
        return None


def _text(facts: Mapping[str, Any]) -> str:
    return f"{facts.get('bytes', 'any number of')} bytes with SHA-256 {facts.get('sha256', 'of any value')}"

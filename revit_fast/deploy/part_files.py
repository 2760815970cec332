"""The files of parts: whether one holds all of its records. A crash or a full disk may have cut it short."""

from __future__ import annotations

from pathlib import Path


def damage_of(path: Path, n_records: int, n_bytes: int | None = None) -> str:
    """What is wrong with the file of a part, in words that begin with its name; empty if nothing is.

    A file of JSON lines is read for this, of a Parquet file only its end.

    Args:
        path: the file.
        n_records: number of records that it should have.
        n_bytes: size that it should have; None: any.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            return f"{path.name} is empty"
        if n_bytes is not None and size != n_bytes:
            return f"{path.name} has {size} of {n_bytes} bytes"
        found = _n_records(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        return f"{path.name} cannot be read: {error}"
    return "" if found == n_records else f"{path.name} has {found} of {n_records} records"


def _n_records(path: Path) -> int:
    """Number of whole records: lines of JSON with their ends, or the rows that Parquet's end names."""
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            return sum(line.startswith(b"{") and line.endswith(b"}\n") for line in file)
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows

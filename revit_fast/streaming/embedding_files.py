"""Files of embeddings: NumPy arrays beside a CSV file that names their rows, or Parquet. They are written as they come.

Whatever the number of images, memory stays the same. Every file takes its place when all of them are complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revit_fast.io.atomic import replaced
from revit_fast.io.finding import EMBEDDING_SUFFIXES
from revit_fast.io.images import name_of
from revit_fast.io.names import csv_line, to_text
from revit_fast.streaming.results import Result

GROUP_BYTES = 16 << 20
"""Size, in bytes, of embeddings and tokens after which a Parquet file gets a row group."""

PLACED = ("row", "path", "grid", "tokens")
"""First columns of the CSV file: row of the embedding (empty for an error), path, patches per side, tokens."""

SHAPED = ("prefix_tokens", "grid_h", "grid_w")
"""Columns that say what an image's tokens are: so many prefix tokens, then a grid of patches, row by row."""

Add = Callable[[Result], None]


def paths_beside(path: str | os.PathLike, tokens: bool) -> list[Path]:
    """All files that are written for `path`: the file itself, then for .npy its CSV file and the file of tokens."""
    path = Path(path)
    if path.suffix != ".npy":
        return [path]
    return [path, path.with_suffix(".csv"), *([path.with_suffix(".tokens.npy")] if tokens else [])]


@contextmanager
def embedding_files(path: str | os.PathLike, width: int, *, token_width: int = 0, n_prefix: int = 0) -> Iterator[Add]:
    """Yields a function that writes a result of `AdaptivePipeline.embed`; call it in the order of the stream.

    `x.npy` holds float32 `[n, width]`, a row for each image that has no error, and `x.csv` a line for every source.
    With tokens, `x.tokens.npy` holds float32 `[n_tokens, token_width]`, the tokens of one image after those of another.
    `x.parquet` holds all in one table, with null embeddings for errors (needs pyarrow). See docs/command-line.md.

    Args:
        path: name of the file; its suffix, .npy or .parquet, chooses the format.
        width: channels of an embedding.
        token_width: channels of a token; 0 if the results have no tokens.
        n_prefix: prefix tokens of the model.

    Raises:
        ValueError: for another suffix.
        OSError: if a file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix not in EMBEDDING_SUFFIXES:
        endings = " or ".join(EMBEDDING_SUFFIXES)
        raise ValueError(f"path: expected a name that ends in {endings}, got {os.fspath(path)!r}")
    write = _npy_files if suffix == ".npy" else _parquet_file
    with write(paths_beside(path, token_width > 0), width, token_width, n_prefix) as add:
        yield add


class NpyRows:
    """Writes an .npy file of float32 rows whose number is not known before.

    Args:
        file: an empty file, open for writing in binary, in which positions can be set.
        width: values of a row.
    """

    def __init__(self, file: BinaryIO, width: int) -> None:
        self.n_rows, self._file, self._width = 0, file, width
        self._write_header()

    def add(self, rows: np.ndarray) -> None:
        """Appends rows `[n, width]`."""
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").data)
        self.n_rows += len(rows)

    def finish(self) -> None:
        """Writes the number of rows; nothing can be appended any more."""
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # NumPy pads headers to a multiple of 64 bytes; this one has 128 for every number of rows.
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.n_rows, self._width)}
        np.lib.format.write_array_header_1_0(self._file, shape)


@contextmanager
def _npy_files(paths: list[Path], width: int, token_width: int, n_prefix: int) -> Iterator[Add]:
    with ExitStack() as stack:

        def opened(path: Path, mode: str, **options: Any) -> Any:
            return stack.enter_context(open(stack.enter_context(replaced(path)), mode, **options))

        text = opened(paths[1], "w", encoding="utf-8", newline="")
        rows = NpyRows(opened(paths[0], "wb"), width)
        tokens = NpyRows(opened(paths[2], "wb"), token_width) if token_width else None
        text.write(csv_line([*PLACED, *(("first_token", *SHAPED) if token_width else ()), "error"]))

        def add(result: Result) -> None:
            path = name_of(result.source)
            if result.error is not None:
                text.write(csv_line(["", path, *[""] * (2 + (tokens is not None) * (1 + len(SHAPED))), result.reason]))
                return
            line = [rows.n_rows, path, result.grid, result.n_tokens]
            rows.add(result.embedding.numpy()[None])
            if tokens is not None:
                line += [tokens.n_rows, n_prefix, *result.grid_hw]
                tokens.add(result.tokens.numpy())
            text.write(csv_line([*line, ""]))

        yield add
        rows.finish()
        if tokens is not None:
            tokens.finish()


@contextmanager
def _parquet_file(paths: list[Path], width: int, token_width: int, n_prefix: int) -> Iterator[Add]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    vector = pa.list_(pa.float32())
    fields = {"index": pa.int64(), "path": pa.string(), "grid": pa.int32(), "tokens": pa.int32(), "embedding": vector}
    if token_width:
        fields |= dict.fromkeys(SHAPED, pa.int32()) | {"token_embeddings": pa.list_(vector)}
    schema = pa.schema(list((fields | {"error": pa.string()}).items()))
    waiting, n_bytes = [], 0

    def flush() -> None:
        nonlocal n_bytes
        writer.write_table(pa.Table.from_pylist(waiting, schema))
        waiting.clear()
        n_bytes = 0

    def add(result: Result) -> None:
        nonlocal n_bytes
        record = {"index": result.index, "path": to_text(name_of(result.source))}
        if result.error is not None:
            record["error"] = to_text(result.reason)
        else:
            record |= {"grid": result.grid, "tokens": result.n_tokens, "embedding": result.embedding.numpy()}
            n_bytes += result.embedding.nbytes
            if token_width:
                record |= dict(zip(SHAPED, (n_prefix, *result.grid_hw), strict=True))
                record["token_embeddings"] = list(result.tokens.numpy())
                n_bytes += result.tokens.nbytes
        waiting.append(record)
        if n_bytes >= GROUP_BYTES:
            flush()

    # Vectors and paths hardly repeat, so dictionaries would only take room.
    with replaced(paths[0]) as temporary, ParquetWriter(temporary, schema, use_dictionary=False) as writer:
        yield add
        flush()

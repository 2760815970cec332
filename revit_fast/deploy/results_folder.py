"""The results of a long run: a directory of parts. A later run can compute the missing parts.

    _manifest.json      what the results depend on: model, assigner, policy, preprocessing, inputs, format
    part-000000.parquet records of inputs 0 to part_images - 1, in their order; or .jsonl
    _done/000000.json   written after the part; marks it as complete

Readers of Parquet folders (pyarrow, Spark, DuckDB globs) ignore names that start with an underscore.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from revit_fast.inference.inference_copy import dtype_name
from revit_fast.io.atomic import make_folder, read_json, replaced, write_json
from revit_fast.io.images import Source
from revit_fast.io.names import dumps, from_text, loads, mapped, to_text
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result
from revit_fast.version import __version__

FORMAT = "revit-fast results 1"
PART_FORMATS = ("parquet", "jsonl")


class ManifestError(ValueError):
    """A directory that contains results of another run, or no valid results."""


@dataclass(frozen=True)
class PartReport:
    """The report on a complete part.

    Attributes:
        part: number of the part.
        images: number of its records.
        errors: number of its records with an error.
        tokens: number of tokens that the model processed.
        seconds: time that its worker needed, in seconds.
        pid: process id of the worker.
        node: host name of the worker.
    """

    part: int
    images: int
    errors: int
    tokens: int
    seconds: float
    pid: int
    node: str


@dataclass(frozen=True)
class Layout:
    """The settings that all parts of a directory share.

    Args:
        directory: absolute path.
        part_images: number of images in a part; the last may have fewer.
        part_format: one of `PART_FORMATS`.
        top_k: number of classes to keep for each image.
        logits: whether to keep all logits, too.
        grids: grids for which the assigner gives probabilities; empty if it is not used.
        has_labels: whether classes have names; otherwise they are numbers.
    """

    directory: str
    part_images: int
    part_format: str
    top_k: int
    logits: bool
    grids: tuple[int, ...]
    has_labels: bool

    def __post_init__(self) -> None:
        if "://" in self.directory:
            raise ValueError(
                f"output: expected a path on a file system that every node mounts, got the address {self.directory}"
            )
        if self.part_format not in PART_FORMATS:
            raise ValueError(f"part_format: expected one of {', '.join(PART_FORMATS)}, got {self.part_format!r}")
        for name in ("part_images", "top_k"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {getattr(self, name)!r}")

    def part_path(self, part: int) -> Path:
        """The path of the file with a part's records."""
        return Path(self.directory, f"part-{part:06d}.{self.part_format}")

    def report_path(self, part: int) -> Path:
        """The path of the file that marks a part as complete."""
        return Path(self.directory, "_done", f"{part:06d}.json")

    def record_of(self, result: Result, path: str) -> dict[str, Any]:
        """The record of a result; missing values are None.

        Args:
            result: a result of the pipeline.
            path: the path of the input as it was given.
        """
        record = {"index": result.index, "path": path, "grid": result.grid, "tokens": result.n_tokens}
        record["ms"] = None if result.error is not None else round(result.ms, 3)
        if self.grids:
            named = None
            if result.probabilities is not None:
                named = dict(zip(map(str, self.grids), result.probabilities.tolist(), strict=True))
            record["lengths"] = named
        top = [{"class": entry["label"], "probability": entry["score"]} for entry in result.top(self.top_k)]
        record["top"] = top if result.error is None else None
        if self.logits:
            record["logits"] = None if result.logits is None else result.logits.tolist()
        record["error"] = result.reason
        return record

    def begin(self, part: int) -> int:
        """Counts an attempt at a part; returns the number of earlier unfinished attempts."""
        path = self._tries_path(part)
        tries = int(path.read_text()) if path.exists() else 0
        with replaced(path) as temporary:
            temporary.write_text(str(tries + 1))
        return tries

    def write(self, records: Sequence[dict[str, Any]], report: PartReport) -> None:
        """Writes a part, completely or not at all, and then marks it as complete."""
        with replaced(self.part_path(report.part)) as temporary:
            if self.part_format == "jsonl":
                lines = (dumps(record, allow_nan=False) + "\n" for record in records)
                temporary.write_text("".join(lines), encoding="utf-8")
            else:
                import pyarrow.parquet

                table = pyarrow.Table.from_pylist(mapped(list(records), to_text), self._schema())
                pyarrow.parquet.write_table(table, temporary)
        with replaced(self.report_path(report.part)) as temporary:
            temporary.write_text(json.dumps(asdict(report)), encoding="utf-8")
        self._tries_path(report.part).unlink(missing_ok=True)

    def _tries_path(self, part: int) -> Path:
        return Path(self.directory, "_done", f"{part:06d}.tries")

    def _schema(self) -> Any:
        import pyarrow as pa

        name = pa.string() if self.has_labels else pa.int64()
        fields = {
            "index": pa.int64(),
            "path": pa.string(),
            "grid": pa.int32(),
            "tokens": pa.int32(),
            "ms": pa.float64(),
        }
        if self.grids:
            fields["lengths"] = pa.struct([(str(grid), pa.float32()) for grid in self.grids])
        fields["top"] = pa.list_(pa.struct([("class", name), ("probability", pa.float32())]))
        if self.logits:
            fields["logits"] = pa.list_(pa.float32())
        fields["error"] = pa.string()
        return pa.schema(list(fields.items()))

    def report_of(self, part: int) -> PartReport | None:
        """The report of a part; None if the part is not complete."""
        if not self.part_path(part).exists() or not self.report_path(part).exists():
            return None
        return PartReport(**json.loads(self.report_path(part).read_text(encoding="utf-8")))

    def clear_leftovers(self) -> None:
        """Removes unfinished files of killed workers; no process may be writing to the directory."""
        for pattern in ("part-*.tmp", "_done/*.tmp", "_done/*.tries"):
            for path in Path(self.directory).glob(pattern):
                path.unlink(missing_ok=True)


def claim(layout: Layout, pipe: AdaptivePipeline, sources: Sequence[Source]) -> None:
    """Prepares the directory for results of this pipeline on these sources, or checks that it already is.

    Raises:
        ManifestError: if the directory contains results of another run (the message names the differences), or files
            without a manifest.
    """
    # The round trip through JSON turns tuples into lists, as in the manifest that is read below.
    manifest = json.loads(json.dumps(_manifest(layout, pipe, sources), default=_plain))
    directory = Path(layout.directory)
    path = directory / "_manifest.json"
    if not path.exists():
        if directory.is_dir() and any(not p.name.endswith(".tmp") for p in directory.iterdir()):
            raise ManifestError(
                f"output: {directory} is not empty and holds no results of ours; give another directory"
            )
        make_folder(directory / "_done")
        write_json(path, manifest)
        return
    kept = read_manifest(directory)
    # Older manifests contain the option `exact`. It changed no result and no longer exists.
    kept.get("preprocessing", {}).pop("exact", None)
    # Older manifests do not name the dtype. The model's digest shows it, except for int8, which no command had.
    kept.setdefault("dtype", "float32" if manifest["dtype"] == "int8" else manifest["dtype"])
    differing = [name for name in sorted(kept.keys() | manifest.keys()) if kept.get(name) != manifest.get(name)]
    if differing:
        changes = "; ".join(f"{n}: {_short(kept.get(n))} there, {_short(manifest.get(n))} now" for n in differing)
        raise ManifestError(
            f"output: {directory} holds results of another run ({changes}); give another directory, or what that run "
            "had"
        )


def read_manifest(directory: str | PathLike) -> dict[str, Any]:
    """Reads the manifest of a directory of results.

    Raises:
        ManifestError: if the directory has no manifest, or it cannot be read.
    """
    path = Path(directory, "_manifest.json")
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise ManifestError(f"output: cannot read {path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ManifestError(f"output: {path} is no manifest of {FORMAT!r}")
    return manifest


def read_records(directory: str | PathLike) -> Iterator[dict[str, Any]]:
    """Yields the records of a finished directory, in the order of the inputs.

    Raises:
        ManifestError: if the directory contains no results, or parts are missing.
    """
    manifest = read_manifest(directory)
    n_parts = -(-manifest["inputs"]["images"] // manifest["part_images"])
    paths = [Path(directory, f"part-{part:06d}.{manifest['part_format']}") for part in range(n_parts)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ManifestError(f"output: {fspath(directory)} lacks {len(missing)} of {n_parts} parts, first {missing[0]}")
    for path in paths:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                yield from map(loads, file)
        else:
            import pyarrow.parquet

            yield from mapped(pyarrow.parquet.read_table(path).to_pylist(), from_text)


def _manifest(layout: Layout, pipe: AdaptivePipeline, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything that the results depend on. This excludes the token budget and the workers."""
    prep = pipe.prep
    tla = prep.tla
    labels = None if pipe.labels is None else _digest("\n".join(map(to_text, pipe.labels)).encode())
    own = {"crop_pct": prep.crop_pct, "aspect": prep.aspect, "draft": prep.draft, "macs": prep.macs}
    settings = own | prep.options
    if prep.formats is not None:
        settings["formats"] = list(prep.formats)
    inputs = _digest(*(f"{s.path}\0{s.error or ''}\n".encode("utf-8", "surrogateescape") for s in sources))
    return {
        "format": FORMAT,
        "revit_fast": __version__,
        "model": _module_digest(pipe.model),
        "dtype": dtype_name(pipe.model),
        "assigner": None if tla is None else _module_digest(tla, repr(_calibration(tla)).encode()),
        "policy": prep.policy.spec,
        "preprocessing": settings,
        "labels": labels,
        "inputs": {"images": len(sources), "sha256": inputs},
        "part_images": layout.part_images,
        "part_format": layout.part_format,
        "top_k": layout.top_k,
        "logits": layout.logits,
    }


def _calibration(tla: Any) -> tuple | None:
    kept = tla.calibration
    return kept and (kept.temperature, kept.entropies, _digest(kept.suffices.tobytes()))


def _digest(*parts: bytes) -> str:
    return _digest_of(parts)


def _digest_of(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _module_digest(module: nn.Module, more: bytes = b"") -> str:
    """Digest of the parameters, buffers and plain settings (heads, epsilons, pooling) of a module and its children."""

    def parts() -> Iterator[bytes]:
        yield more
        for name, child in module.named_modules():
            plain = {k: v for k, v in vars(child).items() if k[0] != "_" and _is_plain(v)}
            yield f"{name} {type(child).__name__} {sorted(plain.items())}\n".encode()
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return _digest_of(parts())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:60]}… (sha256 {_digest(text.encode())[:12]})"

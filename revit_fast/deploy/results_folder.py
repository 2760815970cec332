"""The results of a long run: a directory of parts. A later run can compute the missing parts.

    _manifest.json      what the results depend on: model, assigner, policy, preprocessing, inputs, format
    _lock               locked by the run that writes here
    part-000000.parquet records of inputs 0 to part_images - 1, in their order; or .jsonl
    _done/000000.json   written after the part; marks it as complete, and says how many records and bytes it has

A part whose records or bytes are not those of its mark is incomplete: a crash or a full disk has cut a file short.

Readers of Parquet folders (pyarrow, Spark, DuckDB globs) ignore names that start with an underscore.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from revit_fast.deploy.inputs import absolute_paths, describe_inputs, difference_of_inputs, same_inputs
from revit_fast.deploy.part_files import damage_of
from revit_fast.inference.inference_copy import dtype_name
from revit_fast.io.atomic import make_folder, read_json, replaced, write_json
from revit_fast.io.images import Source
from revit_fast.io.names import dumps, from_text, loads, mapped, to_text
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result
from revit_fast.version import __version__

FORMAT = "revit-fast results 1"
PART_FORMATS = ("parquet", "jsonl")

MANIFEST, DONE, LOCK = "_manifest.json", "_done", "_lock"


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
        bytes: size of its file; None if the mark is of a version that did not keep it.
    """

    part: int
    images: int
    errors: int
    tokens: int
    seconds: float
    pid: int
    node: str
    bytes: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Layout:
    """The settings that all parts of a directory share.

    Args:
        directory: path of the directory; the layout keeps it as an absolute path.
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
        check_path(self.directory)
        object.__setattr__(self, "directory", os.path.abspath(self.directory))  # workers have other working directories
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
        return Path(self.directory, DONE, f"{part:06d}.json")

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
        text = path.read_text() if path.exists() else ""
        tries = int(text) if text.isdigit() else 0
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
        mark = asdict(report) | {"bytes": self.part_path(report.part).stat().st_size}
        with replaced(self.report_path(report.part)) as temporary:
            temporary.write_text(json.dumps(mark), encoding="utf-8")
        self._tries_path(report.part).unlink(missing_ok=True)

    def _tries_path(self, part: int) -> Path:
        return Path(self.directory, DONE, f"{part:06d}.tries")

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

    def images_of(self, part: int, images: int) -> int:
        """Number of records of a part in a run of `images` inputs."""
        return min(self.part_images, images - part * self.part_images)

    def report_of(self, part: int, n_records: int | None = None) -> PartReport | None:
        """The report of a part; None if the part is not complete. See `inspect`."""
        return self.inspect(part, n_records)[0]

    def inspect(self, part: int, n_records: int | None = None) -> tuple[PartReport | None, str]:
        """The report of a part, and what is wrong with its files.

        Args:
            part: number of the part.
            n_records: number of records that it should have; None: any number.

        Returns:
            The report, or None if the part is not complete; and the damage of its file or its mark, which the text
            names. The text is empty for a complete part, and for one that was never completed.
        """
        mark, path = self.report_path(part), self.part_path(part)
        if not mark.exists():
            return None, ""
        try:
            report = PartReport(**json.loads(mark.read_text(encoding="utf-8")))
            if report.part != part or not isinstance(report.images, int):
                raise ValueError(f"it is of part {report.part!r}")
        except (OSError, TypeError, ValueError) as error:
            what = "is empty" if mark.exists() and mark.stat().st_size == 0 else f"cannot be read: {error}"
            return None, f"{os.path.join(DONE, mark.name)} {what}"
        expected = report.images if n_records is None else n_records
        damage = damage_of(path, expected, report.bytes)
        if not damage and report.images != expected:
            damage = f"{os.path.join(DONE, mark.name)} is of {report.images} records, not of {expected}"
        return (None, damage) if damage else (report, "")

    def clear_leftovers(self) -> None:
        """Removes unfinished files of killed workers; no process may be writing to the directory."""
        for pattern in ("part-*.tmp", f"{DONE}/*.tmp", f"{DONE}/*.tries"):
            for path in Path(self.directory).glob(pattern):
                path.unlink(missing_ok=True)


def check_path(directory: str | PathLike) -> None:
    """Raises an error for an address of a service, such as s3://bucket: results need a file system."""
    if "://" in fspath(directory):
        raise ValueError(
            f"output: expected a path on a file system that every node mounts, got the address {fspath(directory)}"
        )


def check_directory(directory: str | PathLike) -> dict[str, Any] | None:
    """Checks, before anything is computed, whether a directory can take results.

    Returns:
        The manifest of the results in it; None if there is none yet, or a crash has left an unreadable one alone.

    Raises:
        ManifestError: if it is a file, or holds other files, or parts whose manifest cannot be read.
        ValueError: for the address of a service.
    """
    check_path(directory)
    if not os.path.isdir(directory):
        if os.path.exists(directory):
            raise ManifestError(f"output: {fspath(directory)} is a file; give a directory")
        return None
    found = os.listdir(directory)
    if MANIFEST in found:
        try:
            return read_manifest(directory)
        except ManifestError:
            if any(any(Path(directory).glob(pattern)) for pattern in ("part-*", f"{DONE}/*.json")):
                raise
    if any(name not in (MANIFEST, DONE, LOCK) and not name.endswith(".tmp") for name in found):
        raise ManifestError(
            f"output: {fspath(directory)} is not empty and holds no results of ours; give another directory"
        )
    return None


def claim(layout: Layout, pipe: AdaptivePipeline, sources: Sequence[Source]) -> list[str]:
    """Prepares the directory for results of this pipeline on these sources, or checks that it already is.

    Returns:
        The absolute path of each source, for the workers. The manifest identifies the inputs by these.

    Raises:
        ManifestError: if the directory contains results of another run (the message names the differences), or files
            without a manifest.
    """
    kept = check_directory(layout.directory)
    read = absolute_paths(sources)
    inputs = describe_inputs(sources, read, layout.part_images)
    # The round trip through JSON turns tuples into lists, as in the manifest that is read below.
    manifest = json.loads(json.dumps(_manifest(layout, pipe, inputs), default=_plain))
    directory = Path(layout.directory)
    make_folder(directory / DONE)
    if kept is None:
        write_json(directory / MANIFEST, manifest)
        return read
    # Older manifests contain the option `exact`. It changed no result and no longer exists.
    kept.get("preprocessing", {}).pop("exact", None)
    # Older manifests do not name the dtype. The model's digest shows it, except for int8, which no command had.
    kept.setdefault("dtype", "float32" if manifest["dtype"] == "int8" else manifest["dtype"])
    changes = [
        f"{name}: {_short(kept.get(name))} there, {_short(manifest.get(name))} now"
        for name in sorted(kept.keys() | manifest.keys())
        if name != "inputs" and kept.get(name) != manifest.get(name)
    ]
    if not same_inputs(kept["inputs"], inputs):
        changes.append(f"inputs: {difference_of_inputs(kept['inputs'], inputs, read, layout.part_images)}")
    if changes:
        raise ManifestError(
            f"output: {directory} holds results of another run ({'; '.join(changes)}); give another directory, or what "
            "that run had"
        )
    return read


def _has_results(directory: str | PathLike) -> bool:
    return any(any(Path(directory).glob(pattern)) for pattern in ("part-*", f"{DONE}/*.json"))


def _is_whole(directory: Path) -> bool:
    """Whether the manifest can be read."""
    try:
        return bool(read_manifest(directory))
    except ManifestError:
        return False


def read_manifest(directory: str | PathLike) -> dict[str, Any]:
    """Reads the manifest of a directory of results.

    Raises:
        ManifestError: if the directory has no manifest, or it cannot be read.
    """
    path = Path(directory, MANIFEST)
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"output: cannot read {path}: {error}; without it, parts cannot be told from those of another run: give "
            "another directory"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or "images" not in manifest.get("inputs", ()):
        raise ManifestError(f"output: {path} is no manifest of {FORMAT!r}; give another directory")
    return manifest


def read_records(directory: str | PathLike) -> Iterator[dict[str, Any]]:
    """Yields the records of a finished directory, in the order of the inputs.

    Raises:
        ManifestError: if the directory contains no results, or parts are missing or cut short; nothing is yielded then.
    """
    manifest = read_manifest(directory)
    images, part_images = manifest["inputs"]["images"], manifest["part_images"]
    paths = [Path(directory, f"part-{part:06d}.{manifest['part_format']}") for part in range(-(-images // part_images))]
    damages = [damage_of(path, min(part_images, images - i * part_images)) for i, path in enumerate(paths)]
    lacking = [damage for damage in damages if damage]
    if lacking:
        raise ManifestError(
            f"output: {fspath(directory)} lacks {len(lacking)} of {len(paths)} parts, first {lacking[0]}; run again to "
            "compute them"
        )
    for path in paths:
        if path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as file:
                yield from map(loads, file)
        else:
            import pyarrow.parquet

            yield from mapped(pyarrow.parquet.read_table(path).to_pylist(), from_text)


def _manifest(layout: Layout, pipe: AdaptivePipeline, inputs: dict[str, Any]) -> dict[str, Any]:
    """Everything that the results depend on. This excludes the token budget and the workers."""
    prep = pipe.prep
    tla = prep.tla
    labels = None if pipe.labels is None else _digest("\n".join(map(to_text, pipe.labels)).encode())
    own = {"crop_pct": prep.crop_pct, "aspect": prep.aspect, "draft": prep.draft, "macs": prep.macs}
    settings = own | prep.options
    if prep.formats is not None:
        settings["formats"] = list(prep.formats)
    return {
        "format": FORMAT,
        "revit_fast": __version__,
        "model": module_digest(pipe.model),
        "dtype": dtype_name(pipe.model),
        "assigner": None if tla is None else module_digest(tla, repr(_calibration(tla)).encode()),
        "policy": prep.policy.spec,
        "preprocessing": settings,
        "labels": labels,
        "inputs": inputs,
        "part_images": layout.part_images,
        "part_format": layout.part_format,
        "top_k": layout.top_k,
        "logits": layout.logits,
    }


def _calibration(tla: Any) -> tuple | None:
    kept = tla.calibration
    return kept and (kept.temperature, kept.entropies, _digest(kept.suffices.tobytes()))


def _digest(*parts: bytes) -> str:
    return digest_of(parts)


def digest_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def module_digest(module: nn.Module, more: bytes = b"") -> str:
    """Digest of the parameters, buffers and plain settings (heads, epsilons, pooling) of a module and its children."""

    def parts() -> Iterator[bytes]:
        yield more
        for name, child in module.named_modules():
            plain = {k: v for k, v in vars(child).items() if k[0] != "_" and _is_plain(v)}
            yield f"{name} {type(child).__name__} {sorted(plain.items())}\n".encode()
        for name, tensor in sorted(module.state_dict().items()):
            yield f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return digest_of(parts())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:60]}… (sha256 {_digest(text.encode())[:12]})"

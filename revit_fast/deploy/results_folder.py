"""Results of a long run as a directory of parts that a later run completes.

    _manifest.json      what the results are of: model, assigner, policy, preprocessing, inputs, format
    part-000000.parquet records of inputs 0 to part_images - 1, in their order; or .jsonl
    _done/000000.json   written after the part: it is complete

Names that start with an underscore are left out by what reads a folder of Parquet (pyarrow, Spark, DuckDB globs).
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

from revit_fast.io.atomic import replaced
from revit_fast.io.images import Source
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result
from revit_fast.version import __version__

FORMAT = "revit-fast results 1"
PART_FORMATS = ("parquet", "jsonl")


class ManifestError(ValueError):
    """A directory that holds results of another run."""


@dataclass(frozen=True)
class PartReport:
    """What is known of a complete part.

    Attributes:
        part: its number.
        images: records in it.
        errors: of them, those with an error.
        tokens: that the model processed.
        seconds: that its worker took.
        pid: of the worker's process.
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
    """What every part of a directory has in common.

    Args:
        directory: absolute path.
        part_images: images of a part; the last may have fewer.
        part_format: one of `PART_FORMATS`.
        top_k: classes of an image that are kept.
        logits: whether all logits are kept, too.
        grids: for which the assigner gives probabilities, none where it is not asked.
        has_labels: whether classes are names, else numbers.
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
        """The file of a part's records."""
        return Path(self.directory, f"part-{part:06d}.{self.part_format}")

    def report_path(self, part: int) -> Path:
        """The file that says that a part is complete."""
        return Path(self.directory, "_done", f"{part:06d}.json")

    def record_of(self, result: Result, path: str) -> dict[str, Any]:
        """A result as it is kept; what an image has not is None.

        Args:
            result: of the pipeline.
            path: as the input was given.
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
        """How often this part was begun before and not finished; counts this time."""
        path = self._tries_path(part)
        tries = int(path.read_text()) if path.exists() else 0
        with replaced(path) as temporary:
            temporary.write_text(str(tries + 1))
        return tries

    def write(self, records: Sequence[dict[str, Any]], report: PartReport) -> None:
        """Writes a part, all or nothing, and then that it is complete."""
        with replaced(self.part_path(report.part)) as temporary:
            if self.part_format == "jsonl":
                lines = (json.dumps(record, allow_nan=False) + "\n" for record in records)
                temporary.write_text("".join(lines), encoding="utf-8")
            else:
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, self._schema()), temporary)
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
        """The report of a part; None where it is not complete."""
        if not self.part_path(part).exists() or not self.report_path(part).exists():
            return None
        return PartReport(**json.loads(self.report_path(part).read_text(encoding="utf-8")))

    def clear_leftovers(self) -> None:
        """Removes what killed workers left unfinished; only while nothing writes."""
        for pattern in ("part-*.tmp", "_done/*.tmp", "_done/*.tries"):
            for path in Path(self.directory).glob(pattern):
                path.unlink(missing_ok=True)


def claim(layout: Layout, pipe: AdaptivePipeline, sources: Sequence[Source]) -> None:
    """Makes the directory one of results of this pipeline on these sources, or checks that it is.

    Raises:
        ManifestError: where it holds results of something else, which it names; or files, but no manifest.
    """
    # As JSON gives it back: tuples are lists.
    manifest = json.loads(json.dumps(_manifest(layout, pipe, sources), default=_plain))
    directory = Path(layout.directory)
    path = directory / "_manifest.json"
    if not path.exists():
        if directory.is_dir() and any(not p.name.endswith(".tmp") for p in directory.iterdir()):
            raise ManifestError(
                f"output: {directory} is not empty and holds no results of ours; give another directory"
            )
        (directory / "_done").mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        return
    kept = read_manifest(directory)
    # Older manifests hold the option `exact`. It changed no result and no longer exists.
    kept.get("preprocessing", {}).pop("exact", None)
    differing = [name for name in sorted(kept.keys() | manifest.keys()) if kept.get(name) != manifest.get(name)]
    if differing:
        changes = "; ".join(f"{n}: {_short(kept.get(n))} there, {_short(manifest.get(n))} now" for n in differing)
        raise ManifestError(
            f"output: {directory} holds results of another run ({changes}); give another directory, or what that run "
            "had"
        )


def read_manifest(directory: str | PathLike) -> dict[str, Any]:
    """The manifest of a directory of results.

    Raises:
        ManifestError: where there is none that can be read.
    """
    path = Path(directory, "_manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"output: cannot read {path}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ManifestError(f"output: {path} is no manifest of {FORMAT!r}")
    return manifest


def read_records(directory: str | PathLike) -> Iterator[dict[str, Any]]:
    """The records of a finished directory, in the order of the inputs.

    Raises:
        ManifestError: where it holds no results, or parts are missing.
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
                yield from map(json.loads, file)
        else:
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()


def _manifest(layout: Layout, pipe: AdaptivePipeline, sources: Sequence[Source]) -> dict[str, Any]:
    """All that results follow from: not the token budget and the workers, for no result depends on them."""
    prep = pipe.prep
    tla = prep.tla
    labels = None if pipe.labels is None else _digest("\n".join(pipe.labels).encode())
    own = {"crop_pct": prep.crop_pct, "aspect": prep.aspect, "draft": prep.draft, "macs": prep.macs}
    settings = own | prep.options
    inputs = _digest(*(f"{s.path}\0{s.error or ''}\n".encode("utf-8", "surrogateescape") for s in sources))
    return {
        "format": FORMAT,
        "revit_fast": __version__,
        "model": _module_digest(pipe.model),
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
    """Of parameters, buffers and every plain setting of a module and its children (heads, epsilons, pooling)."""

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

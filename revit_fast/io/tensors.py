"""Files of tensors: safetensors, and what `torch.save` wrote. The content of a file decides, not its name.

The functions of safetensors that take a path open it twice. If a process replaces the file in between, they put the
header of one file over the data of another. Here a file is opened once, and safetensors get its content.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

MOST_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, by its format."""

PICKLE = b"\x80"
"""First byte of what `torch.save` wrote before it wrote zip archives."""

FOREIGN = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; run git lfs pull"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes it"),
    (b"\x93NUMPY", "is an array of NumPy"),
    (b"GGUF", "is a GGUF file of llama.cpp"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
)
"""First bytes of files that are taken for checkpoints, and what they are."""


def read_tensors(path: Path, content: bytes | None = None) -> Any:
    """What a file of tensors holds. Nothing is unpickled beyond tensors, plain values and `argparse.Namespace`.

    Args:
        path: the file.
        content: what it holds, if it has been read already.

    Raises:
        ImportError: for a safetensors file where safetensors is not installed.
        ValueError: for any other file; the message goes on after the file's name and says what it is.
    """
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        problem = misfit(file, path.name)
        if problem is not None:
            raise ValueError(problem)
        return _read(file)


def _read(file: BinaryIO) -> Any:
    try:
        if _is_safetensors(file):
            return tensors_and_metadata(file.read())[0]
        # A Namespace holds the options of a training, and nothing that runs. The file is open, because torch.load goes
        # by the suffix of a name.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise ImportError('reading safetensors needs safetensors: pip install "revit-fast[timm]"') from None
    except UnpicklingError as error:  # PyTorch's text would tell the user to unpickle whatever is in the file
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"other objects ({found.group(1)})" if found else "other objects"
        raise ValueError(
            f"holds {what}, or torch.save did not write it; save the state dict alone: "
            "torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # the readers raise any exception of their parsers
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"is damaged: {reason}") from error


def tensors_and_metadata(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts in its header.

    Raises:
        safetensors.SafetensorError: if it is no safetensors file.
    """
    from safetensors.torch import load

    tensors = load(content)  # it checks the header
    return tensors, metadata_of(io.BytesIO(content))


def metadata_of(file: BinaryIO) -> dict[str, str]:
    """The texts in the header of a safetensors file, which is opened at its start."""
    n_bytes = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(n_bytes)).get("__metadata__") or {}


def misfit(file: BinaryIO, name: str) -> str | None:
    """What a file is that holds no tensors, as the end of a sentence about it; None for any other file.

    Args:
        file: the open file; it is at its start afterwards.
        name: its name.
    """
    size, head = file.seek(0, io.SEEK_END), _beginning(file, 1024)
    if size == 0:
        return "is empty"
    if _is_safetensors(file):
        return _cut_safetensors(file, size)
    if head.startswith(b"PK"):
        return _other_zip(file)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "is a page of HTML or XML, as a failed download leaves it; fetch the file itself"
    if text.startswith((b"{", b"[")):
        index = b"weight_map" in head or name.endswith(".index.json")
        return "is JSON text" + (", the index of weights in several files; join them into one" if index else "")
    if head.startswith(PICKLE):
        return None
    return next((what for begin, what in FOREIGN if head.startswith(begin)), f"begins with {head[:16]!r}, as none does")


def _beginning(file: BinaryIO, n_bytes: int) -> bytes:
    """The first bytes; the file is at its start afterwards."""
    file.seek(0)
    head = file.read(n_bytes)
    file.seek(0)
    return head


def _is_safetensors(file: BinaryIO) -> bool:
    head = _beginning(file, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MOST_HEADER_BYTES


def _cut_safetensors(file: BinaryIO, size: int) -> str | None:
    n_header = int.from_bytes(_beginning(file, 8), "little")
    header = _beginning(file, 8 + n_header)[8:]
    needed = 8 + n_header
    if size >= needed:
        try:
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            needed += max((entry["data_offsets"][1] for entry in entries), default=0)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
            return "is damaged: its header is no safetensors header"
    return f"is cut off: it has {size:,} of {needed:,} bytes; copy or fetch it again" if size < needed else None


def _other_zip(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "is a zip archive that is cut off or damaged; copy or fetch it again"
    finally:
        file.seek(0)
    if not names:
        return "is a zip archive with nothing in it"
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a program of TorchScript; save the state dict of the model that it was made of"
    if not any(name.endswith("data.pkl") for name in names):
        return f"is a zip archive of other files, such as {names[0]!r}"
    return None

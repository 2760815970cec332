"""Files of tensors: safetensors, and what `torch.save` wrote. The content of a file decides, not its name."""

from __future__ import annotations

import json
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

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


def read_tensors(path: Path) -> Any:
    """What a file of tensors holds. Nothing is unpickled beyond tensors, plain values and `argparse.Namespace`.

    Raises:
        ImportError: for a safetensors file where safetensors is not installed.
        ValueError: for any other file; the message goes on after the file's name and says what it is.
    """
    problem = misfit(path)
    if problem is not None:
        raise ValueError(problem)
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            if not str(path).isascii():  # load_file takes only paths in UTF-8
                return parsed(path.read_bytes())[0]
            return load_file(path)
        # A Namespace holds the options of a training, and nothing that runs. The file is open, because torch.load goes
        # by the suffix of a name.
        with torch.serialization.safe_globals([Namespace]), open(path, "rb") as file:
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


def parsed(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        SafetensorError: for other bytes.
    """
    from safetensors.torch import load

    tensors = load(data)
    return tensors, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})


def misfit(path: Path) -> str | None:
    """What a file is that holds no tensors, as the end of a sentence about it; None for any other file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1024)
    if size == 0:
        return "is empty"
    if _is_safetensors(path):
        return _cut_safetensors(path, size)
    if head.startswith(b"PK"):
        return _other_zip(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "is a page of HTML or XML, as a failed download leaves it; fetch the file itself"
    if text.startswith((b"{", b"[")):
        index = b"weight_map" in head or path.name.endswith(".index.json")
        return "is JSON text" + (", the index of weights in several files; join them into one" if index else "")
    if head.startswith(PICKLE):
        return None
    return next((what for begin, what in FOREIGN if head.startswith(begin)), f"begins with {head[:16]!r}, as none does")


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= MOST_HEADER_BYTES


def _cut_safetensors(path: Path, size: int) -> str | None:
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = file.read(n_header)
    needed = 8 + n_header
    if size >= needed:
        try:
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            needed += max((entry["data_offsets"][1] for entry in entries), default=0)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
            return "is damaged: its header is no safetensors header"
    return f"is cut off: it has {size:,} of {needed:,} bytes; copy or fetch it again" if size < needed else None


def _other_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return "is a zip archive that is cut off or damaged; copy or fetch it again"
    if not names:
        return "is a zip archive with nothing in it"
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a program of TorchScript; save the state dict of the model that it was made of"
    if not any(name.endswith("data.pkl") for name in names):
        return f"is a zip archive of other files, such as {names[0]!r}"
    return None

"""Reads safetensors from memory.

The functions of safetensors that take a path open it twice. If a process replaces the file in between, they put the
header of one file over the data of another. Whoever reads a file in one go and hands its content on is safe from that.
"""

from __future__ import annotations

import io
import json
from typing import BinaryIO

from torch import Tensor


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

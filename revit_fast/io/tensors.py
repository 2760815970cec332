"""Reads safetensors from memory.

The functions of safetensors that take a path open it twice. If a process replaces the file in between, they put the
header of one file over the data of another. Whoever reads a file in one go and hands its content on is safe from that.
"""

from __future__ import annotations

import json

from torch import Tensor


def tensors_and_metadata(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts in its header.

    Raises:
        safetensors.SafetensorError: if it is no safetensors file.
    """
    from safetensors.torch import load

    tensors = load(content)  # it checks the header
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__") or {}

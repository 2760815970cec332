"""Notices changes of a module's parameters, so that data derived from them can be updated."""

from __future__ import annotations

from torch import Tensor, nn


class Snapshot:
    """Notices whether parameters or submodules were replaced, moved or written to."""

    def __init__(self, module: nn.Module) -> None:
        self._slots = []
        for owner in module.modules():
            for table in (owner._modules, owner._parameters, owner._buffers):
                self._slots += [(table, name, value) for name, value in table.items()]
        self._tensors = [value for _, _, value in self._slots if isinstance(value, Tensor)]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._pointers = self._read_pointers()
        self._versions = self._read_versions()

    def _read_pointers(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    def _read_versions(self) -> list[int]:
        return [t._version for t in self._versioned]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return (
            all(table.get(name) is value for table, name, value in self._slots)
            and self._read_pointers() == self._pointers
            and self._read_versions() == self._versions
        )

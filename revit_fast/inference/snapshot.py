"""Notices changes of a module, so that data derived from it can be updated."""

from __future__ import annotations

from operator import attrgetter, getitem, is_, itemgetter

from torch import Tensor, nn

from revit_fast.layers.comparison import HOOKS, scalars

_version = attrgetter("_version")


class Snapshot:
    """Notices whether something of a module or its submodules is no longer what it was.

    That is: parameters, buffers and submodules that were replaced, moved or removed; tensors that were written to;
    plain attributes (eps, heads, dropout rates, training mode); hooks of the forward pass; attributes that were set
    on a submodule; classes that were changed, as parametrisations do.

    `holds` is asked before every forward pass: all that it reads is laid out flat here, and read by loops in C.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = owners = list(module.modules())
        self._kinds = list(map(type, owners))
        tables = [table for owner in owners for table in (owner._modules, owner._parameters, owner._buffers)]
        slots = [(table, name, value) for table in tables for name, value in table.items()]
        self._tables, self._names, self._values = zip(*slots, strict=True) if slots else ((), (), ())
        self._readers = [(itemgetter(*names), vars(owner)) for owner in owners if (names := scalars(owner))]
        self._scalars = self._read_scalars()
        self._attributes = [vars(owner) for owner in owners[1:]]  # the module itself may keep derived data
        self._hooks = [getattr(owner, name) for owner in owners for name in HOOKS if "forward" in name]
        self._n_entries = self._count_entries()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._pointers = self._read_pointers()
        self._versions = list(map(_version, self._versioned))

    def _read_scalars(self) -> list:
        return [read(attributes) for read, attributes in self._readers]

    def _count_entries(self) -> int:
        hooks = sum(map(len, self._hooks)) if any(self._hooks) else 0
        return hooks + sum(map(len, self._attributes))

    def _read_pointers(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def holds(self) -> bool:
        """Whether everything is as it was."""
        try:
            return (
                all(map(is_, map(getitem, self._tables, self._names), self._values))
                and self._read_scalars() == self._scalars
                and self._count_entries() == self._n_entries
                and list(map(type, self._owners)) == self._kinds
                and list(map(_version, self._versioned)) == self._versions
                and self._read_pointers() == self._pointers
            )
        except KeyError:  # something was removed
            return False

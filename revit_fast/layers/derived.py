"""Data derived from parameters, such as packed weights: made once, and made anew when the parameters have changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, getitem, is_, itemgetter
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from revit_fast.layers.comparison import HOOKS, scalars
from revit_fast.ops import _library
from revit_fast.ops._modes import own_modes

S = TypeVar("S")
T = TypeVar("T")

_version = attrgetter("_version")


class Watch(Protocol):
    """Remembers a source, and tells whether it is still the same."""

    def holds(self) -> bool:
        """Whether nothing has changed."""


@contextmanager
def kept_tensors() -> Iterator[None]:
    """Makes tensors that outlive the call: no mode of the caller, nor a transform of `torch.func`, changes them."""
    with own_modes(), torch._C._DisableFuncTorch():
        yield


class Derived(Generic[S, T]):
    """A value that is made from a source, usually a module, and kept until the source or the instruction set changes.

    Several threads may use it concurrently. Copies and pickles keep the maker alone and derive their own value.

    Args:
        make: makes the value from its source. It runs without autograd and outside inference mode, because a tensor
            made in inference mode could not be used outside.
        watch: remembers the source.
    """

    def __init__(self, make: Callable[[S], T], watch: Callable[[S], Watch] | None = None) -> None:
        self._make, self._watch = make, watch or Snapshot
        self._lock = threading.RLock()
        self._kept: tuple[str, S, Watch, T] | None = None
        self._pinned = False

    def __reduce__(self) -> tuple:
        return type(self), (self._make, self._watch)

    @property
    def value(self) -> T | None:
        """The value as it is, whether or not its source has changed; None if there is none yet."""
        return None if self._kept is None else self._kept[3]

    @contextmanager
    def of(self, source: S) -> Iterator[T]:
        """The value for `source`, always the same object, with the lock held: only here may the value itself grow."""
        with self._lock:
            isa, kept = _library.cpu_isa(), self._kept
            if kept is None or kept[0] != isa or kept[1] is not source or not kept[2].holds():
                if self._pinned:
                    raise RuntimeError(
                        f"model: its weights were dropped after they had been packed for {kept[0]}, so they cannot be "
                        "packed again for another instruction set; make another copy with keep_weights=True"
                    )
                self._kept = None  # if making fails, the next call tries again
                with kept_tensors():
                    self._kept = kept = isa, source, self._watch(source), self._make(source)
            yield kept[3]

    def get(self, source: S) -> T:
        """The value for `source`, if it never grows."""
        with self.of(source) as value:
            return value

    def pin(self, source: S) -> None:
        """Makes the value now and keeps it whatever becomes of the source, which may then lose its tensors."""
        with self.of(source):
            isa, _, _, value = self._kept
            self._kept, self._pinned = (isa, source, _Unchanging(), value), True

    def refresh(self) -> None:
        """Forgets the value, so that the next use makes it anew: after a write that leaves no trace (`.data`)."""
        with self._lock:
            self._kept = None


class _Unchanging:
    """The watch of a pinned value."""

    @staticmethod
    def holds() -> bool:
        return True


def refresh(module: nn.Module) -> None:
    """Forgets everything that a module and its submodules have derived."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Derived):
                value.refresh()


class Snapshot:
    """Notices whether something of a module or its submodules is no longer what it was.

    That is: parameters, buffers and submodules that were replaced, moved or removed; tensors that were written to;
    plain attributes (eps, heads, dropout rates, training mode); hooks of the forward pass; attributes that were set
    on a submodule; classes that were changed, as parametrisations do.

    `holds` is asked before every forward pass: all that it reads is laid out flat here, and read by loops in C.

    Raises:
        ValueError: for a parameter or buffer that is an inference tensor; the message names it.
    """

    def __init__(self, module: nn.Module) -> None:
        check_versioned(module)
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
        self._pointers = self._read_pointers()
        self._versions = list(map(_version, self._tensors))

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
                and list(map(_version, self._tensors)) == self._versions
                and self._read_pointers() == self._pointers
            )
        except KeyError:  # something was removed
            return False


class TensorWatch:
    """Notices whether some tensors are no longer what they were: replaced, moved or written to. It sees nothing else.

    Args:
        read: reads the tensors from their source; None stands for a tensor that is absent.
        source: where the tensors are. None of them is an inference tensor.
    """

    def __init__(self, read: Callable[[S], Sequence[Tensor | None]], source: S) -> None:
        self._read, self._source = read, source
        self._values = read(source)
        self._key = self._read_key()

    def _read_key(self) -> list[tuple[int, int]]:
        return [(value._version, value.data_ptr()) for value in self._values if value is not None]

    def holds(self) -> bool:
        """Whether the tensors are as they were."""
        return all(map(is_, self._read(self._source), self._values)) and self._read_key() == self._key


def check_versioned(module: nn.Module) -> None:
    """Raises a ValueError that names a parameter or buffer whose changes nobody could notice: an inference tensor."""
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, tensor in tensors:
            if tensor.is_inference():
                raise ValueError(
                    f"model: the {kind} {name} was made under torch.inference_mode(), and writes to such a tensor "
                    "leave no trace; make or load the model outside of it (copy.deepcopy(model) there also helps)"
                )

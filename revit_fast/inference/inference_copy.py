"""The base class of optimised copies of models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from revit_fast.io.memory import keep_freed_pages
from revit_fast.io.threads import check_compute_threads
from revit_fast.layers import derived
from revit_fast.ops._modes import refuse_examples


def dtype_name(model: nn.Module) -> str:
    """Name of the dtype of the weights that a model multiplies with, such as "bfloat16".

    It is a copy's `dtype_used`, or else the dtype of the first parameter; "unknown" for a model without parameters.
    """
    used = getattr(model, "dtype_used", None) or next((p.dtype for p in model.parameters()), "unknown")
    return str(used).removeprefix("torch.")


def device_name(model: nn.Module) -> str:
    """Name of the device of a model's first parameter, such as "cpu"; "unknown" for a model without parameters."""
    return str(next((p.device for p in model.parameters()), "unknown"))


class Turns:
    """Lets calls run together, and a change of the model alone: it waits for the calls, and later calls wait for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = self._changes = 0
        self._own = threading.local()

    def __reduce__(self) -> tuple:
        return Turns, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """The turn of a call, which may contain further calls."""
        depth = getattr(self._own, "depth", 0)
        if depth == 0:
            with self._condition:  # a thread that is changing the model has the lock, and may call it
                self._condition.wait_for(lambda: self._changes == 0 or getattr(self._own, "changes", False))
                self._running += 1
        self._own.depth = depth + 1
        try:
            yield
        finally:
            self._own.depth = depth
            if depth == 0:
                with self._condition:
                    self._running -= 1
                    self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """The turn of a change.

        Raises:
            RuntimeError: in a thread that is calling the model, which would wait for itself.
        """
        if getattr(self._own, "depth", 0):
            raise RuntimeError("model: it is being called by this thread; change it after the call")
        with self._condition:
            self._changes += 1
            before = getattr(self._own, "changes", False)
            try:
                self._condition.wait_for(lambda: self._running == 0)
                self._own.changes = True
                yield
            finally:
                self._own.changes = before
                self._changes -= 1
                self._condition.notify_all()


def in_turn(method: Callable) -> Callable:
    """Makes a method of an `InferenceCopy` a call: no `load_state_dict` or `.to` changes the model meanwhile."""

    @wraps(method)
    def call(self: InferenceCopy, *args: Any, **options: Any) -> Any:
        refuse_examples("model")
        if torch.compiler.is_compiling():
            return method(self, *args, **options)
        with self._turns.call():
            return method(self, *args, **options)

    return call


class InferenceCopy(nn.Module):
    """A copy of a model in evaluation mode, without gradients. List it before the model's class among the bases.

    What a copy derives from its parameters is kept in attributes of type `layers.derived.Derived`.
    """

    def _take(self, model: nn.Module) -> None:
        """Makes `self` a copy of `model`; called instead of the constructor."""
        check_compute_threads("model")
        keep_freed_pages()
        nn.Module.__init__(self)
        with torch.inference_mode(False):  # the parameters of a copy made in inference mode can be watched too
            # References to the model, for example in a hook of load_state_dict, become references to the copy.
            self.__dict__.update(copy.deepcopy(model.__dict__, {id(model): self}))
        self._turns = Turns()
        nn.Module.train(self, False)
        self.requires_grad_(False).zero_grad()

    def train(self, mode: bool = True) -> InferenceCopy:
        """Refuses training mode."""
        if mode:
            raise ValueError("mode: this is an inference copy; train the model that it was made of")
        return super().train(False)

    def refresh(self) -> None:
        """Derives everything from the parameters again: for writes through `.data`, which leave no trace."""
        with self._turns.change():
            derived.refresh(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As `nn.Module.load_state_dict`. Every concurrent call sees either all of the old weights or all new ones."""
        with self._turns.change(), torch.inference_mode(False):
            return super().load_state_dict(state_dict, *args, **options)

    def _apply(self, fn: Callable, recurse: bool = True) -> InferenceCopy:
        with self._turns.change(), torch.inference_mode(False):
            return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict) -> InferenceCopy:
        new = memo[id(self)] = type(self).__new__(type(self))
        with torch.inference_mode(False):
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict:
        """All attributes; those of type `Derived` pickle their makers alone."""
        return self.__dict__.copy()

    def __setstate__(self, state: dict) -> None:
        """Restores a deep copy or a pickle. It may come from another process, so this one sets its allocator."""
        keep_freed_pages()
        super().__setstate__({"_turns": Turns()} | state)

"""The base class of optimised copies of models."""

from __future__ import annotations

import copy

from torch import nn

from revit_fast.io.memory import keep_freed_pages


class InferenceCopy(nn.Module):
    """A copy of a model in evaluation mode, without gradients. List it before the model's class among the bases."""

    DERIVED: tuple[str, ...] = ()
    """Attributes that a copy derives from its parameters. They belong to this process and machine: deep copies and
    pickles leave them out and derive their own."""

    def _take(self, model: nn.Module) -> None:
        """Makes `self` a copy of `model`; called instead of the constructor."""
        keep_freed_pages()
        nn.Module.__init__(self)
        state = {name: value for name, value in model.__dict__.items() if name not in self.DERIVED}
        # References to the model, for example in a hook of load_state_dict, become references to the copy.
        self.__dict__.update(copy.deepcopy(state, {id(model): self}))
        super().train(False)
        self.requires_grad_(False).zero_grad()

    def train(self, mode: bool = True) -> InferenceCopy:
        """Refuses training mode."""
        if mode:
            raise ValueError("mode: this is an inference copy; train the model that it was made of")
        return super().train(False)

    def __setstate__(self, state: dict) -> None:
        """Restores a deep copy or a pickle. It may come from another process, so this one sets its allocator."""
        keep_freed_pages()
        super().__setstate__(state)

    def __getstate__(self) -> dict:
        """All attributes except the derived ones."""
        return {name: value for name, value in self.__dict__.items() if name not in self.DERIVED}

"""What optimised copies of models have in common."""

from __future__ import annotations

import copy

from torch import nn


class InferenceCopy(nn.Module):
    """A copy of a model in evaluation mode, without gradients; in front of the model's class among the bases."""

    DERIVED: tuple[str, ...] = ()
    """Attributes that a copy derives from its parameters. They belong to this process and machine: what is copied or
    pickled of it goes without and makes its own."""

    def _take(self, model: nn.Module) -> None:
        """Becomes a copy of `model`, in place of the constructor."""
        nn.Module.__init__(self)
        state = {name: value for name, value in model.__dict__.items() if name not in self.DERIVED}
        # What refers to the model, as a hook of load_state_dict does, refers to the copy from now on.
        self.__dict__.update(copy.deepcopy(state, {id(model): self}))
        super().train(False)
        self.requires_grad_(False).zero_grad()

    def train(self, mode: bool = True) -> InferenceCopy:
        """Refuses training mode."""
        if mode:
            raise ValueError("mode: this is an inference copy; train the model that it was made of")
        return super().train(False)

    def __getstate__(self) -> dict:
        """All but what is derived."""
        return {name: value for name, value in self.__dict__.items() if name not in self.DERIVED}

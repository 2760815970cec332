"""Means over the updates between two lines of a run's log."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast.train.distributed import World


class Means(NamedTuple):
    """Means since the last line of the log: loss and accuracy `[n_lengths]`, norm of the gradient."""

    loss: Tensor
    accuracy: Tensor
    gradient_norm: float


class Meter:
    """Sums since the last line of the log."""

    def __init__(self, n_lengths: int) -> None:
        self.sums = torch.zeros(3, n_lengths, dtype=torch.float64, device="cpu")  # loss, right, images
        self.gradients = torch.zeros(2, dtype=torch.float64, device="cpu")  # norm, updates
        self._since, self._images = time.perf_counter(), 0

    def batch(self, views: list[int], losses: Tensor, logits: Tensor, target: Tensor) -> None:
        """Counts a batch at the lengths of `views`."""
        classes = target if target.dim() == 1 else target.argmax(dim=1)
        right = (logits.detach().argmax(dim=2) == classes).sum(dim=1)
        n = torch.full_like(losses, float(len(target)), dtype=torch.float64)
        self.sums[:, views] += torch.stack([losses.double() * n, right.double(), n]).cpu()
        self._images += len(target)

    def gradient(self, norm: Tensor) -> None:
        """Counts an update."""
        self.gradients += torch.tensor([norm.item(), 1.0], dtype=torch.float64, device="cpu")

    def means(self, world: World) -> Means:
        """Means over all processes."""
        sums = world.sum(self.sums).cpu()
        norm, updates = self.gradients.tolist()
        n = sums[2].clamp(min=1)
        return Means(sums[0] / n, sums[1] / n, norm / max(updates, 1.0))

    def loss(self) -> float:
        """Mean loss of this process over all lengths."""
        return (self.sums[0].sum() / self.sums[2].sum().clamp(min=1)).item()

    def images_per_s(self) -> float:
        """Throughput of this process since the meter was made."""
        return self._images / max(time.perf_counter() - self._since, 1e-9)

    def state(self, world: World) -> dict[str, Tensor]:
        """The sums over all processes."""
        return {"sums": world.sum(self.sums), "gradients": self.gradients}

    @classmethod
    def restored(cls, state: dict[str, Tensor], world: World) -> Meter:
        """A meter that continues from `state`; only the first process takes over the sums over images."""
        meter = cls(state["sums"].shape[1])
        meter.gradients = state["gradients"].clone()
        if world.is_first:
            meter.sums = state["sums"].clone()
        return meter

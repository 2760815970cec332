"""Accuracy of a model on held-out images at every length, measured by all processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from revit_fast.inference.optimize import optimize
from revit_fast.models.vit import ReViT
from revit_fast.train.data import ImageSet
from revit_fast.train.distributed import World
from revit_fast.train.loader import EvalLoader
from revit_fast.train.pace import Pace

EVAL_BATCH = 64


class Accuracy(NamedTuple):
    """Accuracy and loss of a model on an image set.

    Attributes:
        accuracy: share of the images that are classified correctly, `[n_lengths]`, the longest length first.
        loss: mean cross-entropy, `[n_lengths]`.
        n_images: number of readable images.
    """

    accuracy: list[float]
    loss: list[float]
    n_images: int


@torch.no_grad()
def accuracy_on(
    images: ImageSet,
    model: ReViT,
    world: World,
    say: Callable[[str], None],
    *,
    max_unreadable: float,
    settings: Mapping[str, Any],
) -> Accuracy:
    """Accuracy at every length on images that are divided among the processes.

    Args:
        images: the images, which may be fewer than the processes.
        model: the model in evaluation mode.
        world: processes of the run.
        say: function that prints a line of progress.
        max_unreadable: share of the images that may be unreadable.
        settings: other arguments of `EvalLoader`.
    """
    if world.device.type == "cpu":
        model = optimize(model)
    n_lengths = len(model.grids)
    totals = torch.zeros(2 * n_lengths + 1, dtype=torch.float64, device="cpu")
    places = range(world.rank, len(images), world.size)
    # As in training, every process allows as many unreadable images as the whole set may have.
    allowed = min(max_unreadable * len(images) / max(len(places), 1), 1.0)
    options = {"batch_size": EVAL_BATCH, "max_unreadable": allowed, **settings}
    pace, n_seen = Pace(say, "evaluating"), 0
    for batch in EvalLoader(images.subset(places), **options) if places else ():
        logits = model(batch.images.to(world.device)).view(n_lengths, len(batch.target), -1).double().cpu()
        right = ((logits.argmax(dim=2) == batch.target) & logits.isfinite().all(dim=2)).sum(dim=1)
        losses = [torch.nn.functional.cross_entropy(z, batch.target, reduction="sum") for z in logits]
        totals += torch.cat([right.double(), torch.stack(losses), right.new_tensor([len(batch.target)]).double()])
        n_seen += len(batch.target)
        pace(n_seen, len(places))
    totals = world.sum(totals).cpu()
    n = max(int(totals[-1]), 1)
    return Accuracy((totals[:n_lengths] / n).tolist(), (totals[n_lengths:-1] / n).tolist(), int(totals[-1]))

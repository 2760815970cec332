"""Training of the Token-Length Assigner on token-length labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.network import STEM_PATCH
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.io.memory import keep_freed_pages
from revit_fast.models.folder import check_assigner
from revit_fast.models.vit import ReViT
from revit_fast.train.data import ImageSet
from revit_fast.train.labels import Predictions, decoded_chunks, length_labels
from revit_fast.train.modes import check_trainable, in_training_modes

OBJECTIVES = ("label", "suffices")

LEAST_IMAGES = 4
"""Least number of images that an assigner is trained on."""

Stage = Callable[[str], Callable[[int, int], None]]
"""Makes, for a stage named in words, the function that is called with the number of its finished parts and of all."""


def untold(stage: str) -> Callable[[int, int], None]:
    """The `Stage` that tells nobody."""
    return lambda done, total: None


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch of training.

    Attributes:
        epoch: number of the epoch, from 1.
        loss: mean loss over the augmented training images.
        held_out_loss: mean loss over the held-out images; the epoch with the smallest one is kept.
        held_out_accuracy: share of the held-out images whose label is the argmax.
        shares: share of the held-out images to which argmax gives each length, the longest first.
    """

    epoch: int
    loss: float
    held_out_loss: float
    held_out_accuracy: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """The course of a training.

    Attributes:
        epochs: results of the epochs in order.
        best: number of the epoch that was kept: the one with the smallest held-out loss, the earlier on a tie.
        label_shares: share of the held-out images that have each label, the longest first.
        held_out: places of the held-out images in the set.
    """

    epochs: tuple[Epoch, ...]
    best: int
    label_shares: tuple[float, ...]
    held_out: np.ndarray = field(repr=False)

    @property
    def collapsed(self) -> bool:
        """Whether the assigner gives one length to all held-out images although their labels differ."""
        return max(self.epochs[self.best - 1].shares) == 1.0 and max(self.label_shares) < 1.0

    def to_json(self) -> dict[str, Any]:
        """All values as JSON, except for the held-out places."""
        epochs = [asdict(epoch) for epoch in self.epochs]
        shares = {"label_shares": list(self.label_shares), "n_held_out": len(self.held_out)}
        return {"best": self.best, "collapsed": self.collapsed, **shares, "epochs": epochs}


@in_training_modes
def train_assigner(
    tla: TokenLengthAssigner,
    images: ImageSet,
    labels: np.ndarray,
    *,
    model: ReViT | None = None,
    sufficiency: np.ndarray | None = None,
    objective: str = "label",
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 5e-3,
    weight_decay: float = 0.02,
    balanced: bool = False,
    flip: bool = True,
    held_out_share: float = 0.2,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
    stage: Stage = untold,
) -> History:
    """Trains an assigner in place, keeps its best epoch, and calibrates it on the held-out images.

    Thumbnails are made once, in the same way as at inference, and training runs on them. The optimizer is AdamW with a
    cosine schedule. The same arguments, seed and number of threads give the same bits on one machine's CPU.

    Args:
        tla: the assigner; training starts from its parameters.
        images: the set that the labels belong to.
        labels: int `[N]`, index of the smallest sufficient length, 0 the longest; images with -1 are left out.
        model: model of the assigner: thumbnails show the region that it sees (its crop); None: they show whole images.
        sufficiency: `[n_lengths, N]` in [0, 1], how well each length does for an image: bool, whether its class is
            right, or `Predictions.sufficiency`. Only the objective "suffices" uses it.
        objective: "label": cross-entropy with the labels (the paper's). "suffices": binary cross-entropy between
            P(label <= length) and the length's sufficiency, for every shorter length separately.
        epochs: passes over the training images.
        batch_size: thumbnails per step.
        lr: highest learning rate.
        weight_decay: weight decay of AdamW, for weights of more than one dimension.
        balanced: weight images by the inverse share of their label, so that rare labels count as much as frequent ones.
            The probabilities before calibration are then those of balanced labels, and thresholds must be found anew.
        flip: mirror thumbnails at random.
        held_out_share: share of the images for choosing the epoch and for calibration.
        seed: seed of the split, the order and the flips.
        progress: called after every epoch.
        stage: see `Stage`.

    Returns:
        The course of training. The assigner is in evaluation mode.

    Raises:
        ValueError: if labels or options are not as described above, or the loss becomes NaN or infinite.
    """
    check_trainable(tla, "tla")
    labels, sufficiency = _checked(tla, images, labels, sufficiency, objective)
    if model is not None:
        check_assigner(tla, model.grids)
    check_choices(epochs, batch_size, lr, weight_decay, held_out_share)
    keep_freed_pages()
    places, thumbnails = make_thumbnails(tla, images, model, np.flatnonzero(labels >= 0), stage)
    if len(places) < LEAST_IMAGES:
        raise ValueError(f"images: expected at least {LEAST_IMAGES} readable ones with a label, got {len(places)}")
    targets = torch.from_numpy(labels[places])
    enough = None if sufficiency is None else torch.from_numpy(sufficiency[:, places].T.copy())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator, dtype=torch.int64, device="cpu")
    n_held_out = min(max(round(held_out_share * len(places)), 1), len(places) - 2)
    held_out, training = order[:n_held_out].sort().values, order[n_held_out:].sort().values
    n_lengths = len(tla.grids)
    counts = torch.bincount(targets[training], minlength=n_lengths)
    even = counts.clamp(min=1).double() * (counts > 0).sum() / len(training)
    weights = (even.reciprocal() if balanced else torch.ones_like(even)).float()
    loss_of = _LabelLoss(weights) if objective == "label" else _SufficesLoss(weights)

    decays = [p for p in tla.parameters() if p.dim() > 1]
    others = [p for p in tla.parameters() if p.dim() <= 1]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr)
    per_epoch = max(len(training) // batch_size, 1)  # a small last batch would distort the norms' statistics
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    told, history = stage("steps of the assigner"), []
    best_state, best = None, 0
    for epoch in range(1, epochs + 1):
        tla.train()
        shuffled = training[torch.randperm(len(training), generator=generator, dtype=torch.int64, device="cpu")]
        total = 0.0
        for step, batch in enumerate(shuffled[: per_epoch * batch_size].split(batch_size)[:per_epoch], 1):
            x = _inputs(tla, thumbnails[batch])
            if flip:
                mirrored = torch.rand(len(batch), generator=generator, dtype=torch.float32, device="cpu") < 0.5
                x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
            loss = loss_of(tla(x), targets[batch], None if enough is None else enough[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / per_epoch
            told((epoch - 1) * per_epoch + step, epochs * per_epoch)
        history.append(_judge(tla.eval(), epoch, total, thumbnails, targets, enough, held_out, loss_of))
        if not math.isfinite(total + history[-1].held_out_loss):
            raise ValueError(
                f"lr: the loss of epoch {epoch} is {total}, {history[-1].held_out_loss} on held-out images; expected a "
                f"smaller lr than {lr}"
            )
        if best == 0 or history[-1].held_out_loss < history[best - 1].held_out_loss:
            best, best_state = epoch, copy.deepcopy(tla.network.state_dict())
        if progress is not None:
            progress(history[-1])
    tla.network.load_state_dict(best_state)
    tla.calibrate_rows(thumbnails[held_out].flatten(0, 1), targets[held_out])
    shares = torch.bincount(targets[held_out], minlength=n_lengths) / len(held_out)
    return History(tuple(history), best, tuple(shares.tolist()), places[held_out.numpy()])


def check_choices(
    epochs: int, batch_size: int, lr: float, weight_decay: float = 0.0, held_out_share: float = 0.5
) -> None:
    """Raises a ValueError for values that `train_assigner` does not take."""
    if epochs < 1 or batch_size < 2 or not 0.0 < held_out_share < 1.0:
        raise ValueError(
            "epochs, batch_size, held_out_share: expected at least 1, at least 2 and a share in (0, 1), got "
            f"{epochs}, {batch_size} and {held_out_share}"
        )
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number, 0 or more, got {value}")


def make_thumbnails(
    tla: TokenLengthAssigner, images: ImageSet, model: ReViT | None, places: np.ndarray, stage: Stage = untold
) -> tuple[np.ndarray, Tensor]:
    """Raw thumbnails of the images at `places` that can be read.

    Returns:
        Their places, int64 `[n]`, and uint8 patch rows `[n, (S/4)², 48]`.
    """
    prep = None if model is None else AdaptivePreprocessor.for_model(model, policy=("fixed", model.grids[0]))
    found, rows, told = [np.empty(0, np.int64)], [], stage("read images for the assigner")
    for where, pixels in decoded_chunks(images.subset(places), {}) if len(places) else ():
        boxes = None if prep is None else prep.seen(pixels)
        side = tla.thumbnail_px // STEM_PATCH
        rows.append(tla.thumbnails(pixels, boxes, torch.uint8).view(len(pixels), side**2, -1))
        found.append(places[where])
        told(int(where[-1]) + 1, len(places))
    return np.concatenate(found), torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8, device="cpu")


def calibrate_on(
    tla: TokenLengthAssigner, images: ImageSet, model: ReViT, predictions: Predictions, stage: Stage = untold
) -> np.ndarray:
    """Calibrates an assigner with its model's predictions for held-out images.

    Only a few images are in memory at a time. The label of an image that no length classifies correctly is the shortest
    length, because more tokens would not help.

    Args:
        tla: the assigner.
        images: images that neither the model nor the assigner was trained on.
        model: the assigner's model.
        predictions: the model's predictions for these images.
        stage: see `Stage`.

    Returns:
        Places of the readable images, in the order of the calibration.

    Raises:
        ValueError: if no image is readable.
    """
    check_assigner(tla, model.grids)
    places, rows = make_thumbnails(tla, images, model, np.flatnonzero(predictions.readable), stage)
    if len(places) == 0:
        raise ValueError(f"images: expected held-out images to calibrate on, but none of {len(images)} can be read")
    labels = length_labels(predictions.correct(images.labels)[:, places], unsolved="shortest")
    tla.calibrate_rows(rows.flatten(0, 1), labels)
    return places


@dataclass(frozen=True)
class _LabelLoss:
    """Mean over images of the cross-entropy with the labels, weighted by label."""

    weights: Tensor

    def __call__(self, logits: Tensor, labels: Tensor, enough: Tensor | None) -> Tensor:
        return (F.cross_entropy(logits, labels, reduction="none") * self.weights[labels]).mean()


@dataclass(frozen=True)
class _SufficesLoss:
    """Mean over shorter lengths of the binary cross-entropy between P(label <= length) and the length's sufficiency."""

    weights: Tensor

    def __call__(self, logits: Tensor, labels: Tensor, enough: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=1)
        # P(label <= length i) sums the probabilities of length i and all shorter ones; its complement sums the others.
        log_suffices = log_p.flip(1).logcumsumexp(1).flip(1)[:, 1:]
        log_fails = log_p.logcumsumexp(1)[:, :-1]
        shorter = enough[:, 1:]
        loss = -(shorter * log_suffices + (1 - shorter) * log_fails).mean(dim=1)
        return (loss * self.weights[labels]).mean()


def _inputs(tla: TokenLengthAssigner, thumbnails: Tensor) -> Tensor:
    """The network's input for raw thumbnails `[B, (S/4)², 48]`, in the dtype of its parameters."""
    return tla.images_of(tla.normalised(thumbnails.flatten(0, 1))).to(next(tla.parameters()).dtype)


def _judge(tla, epoch, loss, thumbnails, targets, enough, held_out, loss_of) -> Epoch:
    with torch.no_grad():
        logits = torch.cat([tla(_inputs(tla, thumbnails[some])) for some in held_out.split(1024)])
        held_out_loss = loss_of(logits, targets[held_out], None if enough is None else enough[held_out]).item()
    given = logits.argmax(dim=1)
    shares = torch.bincount(given, minlength=len(tla.grids)) / len(given)
    accuracy = (given == targets[held_out]).double().mean().item()
    return Epoch(epoch, loss, held_out_loss, accuracy, tuple(shares.tolist()))


def _checked(
    tla: TokenLengthAssigner,
    images: ImageSet,
    labels: Sequence[int] | np.ndarray,
    sufficiency: np.ndarray | None,
    objective: str,
) -> tuple[np.ndarray, np.ndarray | None]:
    n, n_lengths = len(images), len(tla.grids)
    labels = np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or labels.min() < -1 or labels.max() >= n_lengths:
        got = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"labels: expected {n} indices from 0 to {n_lengths - 1}, or -1 to leave out, got {got}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if objective == "label":
        return labels.astype(np.int64), None
    shape = None if sufficiency is None else np.shape(sufficiency)
    if shape != (n_lengths, n) or not (0 <= np.min(sufficiency) <= np.max(sufficiency) <= 1):
        got = None if shape is None else f"{list(shape)} from {np.min(sufficiency)} to {np.max(sufficiency)}"
        raise ValueError(f'sufficiency: the objective "suffices" needs [{n_lengths}, {n}] numbers in [0, 1], got {got}')
    return labels.astype(np.int64), np.asarray(sufficiency, dtype=np.float32)

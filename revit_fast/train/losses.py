"""Losses of multi-length training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_fast.train.config import DISTILL_WEIGHT, TEMPERATURE, check_distillation


def classification_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits `[B, K]` with classes int64 `[B]` or probabilities `[B, K]`.

    It is computed in float32 or float64, also for 16-bit logits.
    """
    logits = _at_least_float32(logits)
    return F.cross_entropy(logits, target.to(logits.dtype) if target.is_floating_point() else target)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """`τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ))`, summed over classes, mean over images.

    The factor τ² makes the size of gradients independent of the temperature (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits `[B, K]`.
        teacher: logits `[B, K]`; no gradient flows to them.
        temperature: τ > 0.
    """
    log_student = F.log_softmax(_at_least_float32(student) / temperature, dim=1)
    log_teacher = F.log_softmax(_at_least_float32(teacher.detach()) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def length_loss(
    logits: Tensor,
    target: Tensor,
    teacher: Tensor | None,
    distill_weight: float = DISTILL_WEIGHT,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The loss at one length: `(1 - λ) · CE + λ · distillation` with a teacher, else CE.

    Args:
        logits: `[B, K]` at this length.
        target: int64 `[B]` or probabilities `[B, K]`.
        teacher: logits `[B, K]` at the longest length; None at that length itself, or without distillation.
        distill_weight: λ in [0, 1].
        temperature: τ > 0.
    """
    if teacher is None or distill_weight == 0:
        return classification_loss(logits, target)
    distilled = distillation_loss(logits, teacher, temperature)
    if distill_weight == 1:
        return distilled
    return (1 - distill_weight) * classification_loss(logits, target) + distill_weight * distilled


def tlsd_loss(
    logits: Tensor, target: Tensor, distill_weight: float = DISTILL_WEIGHT, temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Token-length-aware self-distillation (TLSD, arXiv 2307.02092): the longest length teaches the shorter ones.

    The loss is the mean over lengths of the cross-entropy at the longest length and `length_loss` at the others. The
    weighting with λ is this package's own.

    Args:
        logits: `[n_lengths, B, K]`, the longest length first.
        target: int64 `[B]` or probabilities `[B, K]`.
        distill_weight: λ in [0, 1].
        temperature: τ > 0.

    Returns:
        The loss, and the loss of every length `[n_lengths]`, detached.

    Raises:
        ValueError: for logits of another rank, a weight outside [0, 1] or a temperature that is not positive.
    """
    check_distillation(distill_weight, temperature)
    if logits.dim() != 3 or logits.shape[0] == 0:
        raise ValueError(f"logits: expected shape [n_lengths, B, K], the longest first, got {list(logits.shape)}")
    losses = [
        length_loss(z, target, None if i == 0 else logits[0], distill_weight, temperature) for i, z in enumerate(logits)
    ]
    losses = torch.stack(losses)
    return losses.mean(), losses.detach()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

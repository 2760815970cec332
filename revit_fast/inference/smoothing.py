"""int8 weights that suit their inputs, which are measured on a few batches.

Three steps, all of them folded into parameters that the engine has anyway:

1. A factor for every input channel of a linear layer, as in SmoothQuant (arXiv 2211.10438): rows are divided by it, and
   the weight's columns are multiplied by it. The norm before a layer, or the value rows of the projection before
   attention, divide the rows. Between activation and `fc2` nothing can be folded, so `fc2` has no factors.
2. Each integer is chosen with regard to the errors of those before it, as in GPTQ (arXiv 2210.17323).
3. The mean error of every output is taken off its bias (arXiv 1906.04721).

The first block's qkv keeps its precision: patches meet each other there before anything has averaged over them, and its
errors are magnified most of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revit_fast.ops.linear import LARGEST
from revit_fast.ops.vit import NO_NORM, TokenNorm

EXPONENTS = [i / 10 for i in range(11)]
"""Exponents that are tried for the factors: 0 evens out the weight's columns, 1 the rows' channels."""

N_PEAK_ROWS = 256
"""Number of rows on which the largest values are measured."""

DAMPING = 0.01
"""Share of the mean variance that is added to that of every channel."""

COLUMNS = 64
"""Columns whose errors are passed on together."""

LAYERS = ("qkv", "proj", "fc1", "fc2")
"""The linear layers of a block."""


class LinearWeights(NamedTuple):
    """A linear layer before it is packed.

    Attributes:
        weight: `[N, K]`.
        bias: `[N]`, or None for zero.
        scale: float32 `[N]`, the scale of every row's integers; None for the largest magnitude over 127.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


class BlockParameters(NamedTuple):
    """Norms and linear layers of a block before they are packed; LayerScale is folded into `proj` and `fc2`.

    The fields are those of `ops.vit.BlockWeights`.
    """

    norm1: TokenNorm
    qkv: LinearWeights
    proj: LinearWeights
    norm2: TokenNorm
    fc1: LinearWeights
    fc2: LinearWeights
    q_norm: TokenNorm = NO_NORM
    k_norm: TokenNorm = NO_NORM
    out_norm: TokenNorm = NO_NORM
    mlp_norm: TokenNorm = NO_NORM


def calibrated(block: BlockParameters, inputs: Mapping[str, Tensor], layers: Sequence[str] = LAYERS) -> BlockParameters:
    """The same function in float, up to rounding to integers, with parameters that lose less by it.

    Args:
        block: the parameters.
        inputs: rows `[T, K]` that enter its linear layers, from `calibration.block_inputs`.
        layers: the layers to round.
    """
    statistics = {name: Statistics.of(rows, getattr(block, name).weight) for name, rows in inputs.items()}
    factors = {name: statistics[name].factors(getattr(block, name).weight) for name in ("qkv", "proj", "fc1")}
    smooth = smoothed(block, factors)
    factors["fc2"] = torch.ones_like(statistics["fc2"].mean)
    rounded = {name: statistics[name].divided_by(factors[name]).rounded(getattr(smooth, name)) for name in layers}
    return smooth._replace(**rounded)


def smoothed(block: BlockParameters, factors: Mapping[str, Tensor]) -> BlockParameters:
    """The same function in exact arithmetic: inputs of "qkv", "proj" and "fc1" are divided by `factors`.

    All lengths of a norm share the factors, as they share the layer. Attention's result is a mixture of values whose
    weights do not depend on the channel, so values that are divided give a result that is divided. If a norm of the
    result follows, it divides the result instead.
    """
    of_values = torch.ones(len(block.qkv.weight), dtype=torch.float64, device="cpu")
    if not block.out_norm.weight.numel():
        of_values[-len(factors["proj"]) :] = 1 / factors["proj"]
    qkv, proj, fc1 = (layer._replace(weight=layer.weight.double()) for layer in (block.qkv, block.proj, block.fc1))
    return block._replace(
        norm1=_divided(block.norm1, factors["qkv"]),
        out_norm=_divided(block.out_norm, factors["proj"]),
        qkv=LinearWeights(
            qkv.weight * factors["qkv"] * of_values.unsqueeze(1),
            None if qkv.bias is None else qkv.bias.double() * of_values,
        ),
        proj=proj._replace(weight=proj.weight * factors["proj"]),
        norm2=_divided(block.norm2, factors["fc1"]),
        fc1=fc1._replace(weight=fc1.weight * factors["fc1"]),
    )


def _divided(norm: TokenNorm, factors: Tensor) -> TokenNorm:
    weight, bias = ((p.double() / factors).to(p.dtype) if p.numel() else p for p in norm[:2])
    return TokenNorm(weight, bias, norm.eps)


class Statistics(NamedTuple):
    """What is known of the rows x that enter a linear layer, in float64.

    Attributes:
        mean: `[K]`, of each channel.
        order: `[K]`, the channels in the order in which a weight's columns are rounded.
        triangle: `[K, K]`, the upper Cholesky factor of the inverse of x's covariance, in that order.
        peaks: `[at most N_PEAK_ROWS, K]`, magnitudes of some of the rows.
    """

    mean: Tensor
    order: Tensor
    triangle: Tensor
    peaks: Tensor

    @classmethod
    def of(cls, rows: Tensor, weight: Tensor) -> Statistics:
        """Statistics of rows `[T, K]`; columns that carry much of the output are rounded first."""
        mean = rows.double().mean(0)
        centred = rows - mean.float()
        covariance = (centred.t() @ centred).double() / len(rows)
        variance = covariance.diagonal()
        damping = DAMPING * variance.mean().item() or 1.0
        order = (variance * weight.double().square().sum(0)).argsort(descending=True)
        covariance = covariance[order][:, order] + damping * torch.eye(len(order), dtype=torch.float64, device="cpu")
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        peaks = rows[:: -(-len(rows) // N_PEAK_ROWS)].double().abs()
        return cls(mean, order, torch.linalg.cholesky(inverse, upper=True), peaks)

    def factors(self, weight: Tensor) -> Tensor:
        """The factors `[K]` of the form max |x|^a / max |w|^(1 - a) that promise the least error of the output."""
        weight = weight.double()
        of_rows, of_weight = (t.amax(0).clamp(min=1e-6 * t.max().item() or 1.0) for t in (self.peaks, weight.abs()))
        tried = [of_rows**a / of_weight ** (1 - a) for a in EXPONENTS]
        return min(tried, key=lambda factors: self.divided_by(factors).expected_error(weight * factors))

    def expected_error(self, weight: Tensor) -> float:
        """12 · 127² times the expected squared error of the outputs, summed, for rows and weight `[N, K]` in int8.

        An integer's error has the variance scale² / 12. An error of x_j meets column j of the weight. An error of w_nj
        meets what the channels that are rounded later do not tell of x_j, which has the variance triangle_jj^-2.
        """
        of_rows = self.peaks.amax(1).square().mean() * weight.square().sum()
        of_weight = weight.abs().amax(1).square().sum() * self.triangle.diagonal().pow(-2).sum()
        return (of_rows + of_weight).item()

    def divided_by(self, factors: Tensor) -> Statistics:
        """Statistics of the rows divided by factors `[K]`."""
        triangle = self.triangle * factors[self.order]
        return Statistics(self.mean / factors, self.order, triangle, self.peaks / factors)

    def rounded(self, layer: LinearWeights) -> LinearWeights:
        """The layer with its weight rounded to integers times a scale, and the mean error taken off the bias."""
        weight = layer.weight.double()
        scale = (weight.abs().amax(1) / LARGEST).float()
        integers = torch.empty_like(weight)
        units = weight[:, self.order] / scale.double().clamp(min=1e-30).unsqueeze(1)
        integers[:, self.order] = _integers(units.float(), self.triangle.float()).double()
        rounded = integers * scale.double().unsqueeze(1)
        shift = (weight - rounded) @ self.mean
        return LinearWeights(rounded, shift if layer.bias is None else layer.bias.double() + shift, scale)


def _integers(weight: Tensor, triangle: Tensor) -> Tensor:
    """Integers for a weight `[N, K]` in units of its scales, column after column; overwrites the weight.

    Args:
        weight: the columns in the order of the triangle.
        triangle: see `Statistics`.
    """
    result, depth = torch.empty_like(weight), weight.shape[1]
    for begin in range(0, depth, COLUMNS):
        end = min(begin + COLUMNS, depth)
        errors = torch.empty_like(weight[:, begin:end])
        for j in range(begin, end):
            result[:, j] = weight[:, j].round().clamp(-LARGEST, LARGEST)
            errors[:, j - begin] = (weight[:, j] - result[:, j]) / triangle[j, j]
            weight[:, j + 1 : end] -= torch.outer(errors[:, j - begin], triangle[j, j + 1 : end])
        weight[:, end:] -= errors @ triangle[begin:end, end:]
    return result

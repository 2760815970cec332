"""Rounding of float32 results to the dtype of a tensor, the same compiled and interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """`value`, float32, in `dtype`, to the nearest, ties to even."""
    if (
        INTERPRETED and dtype == tl.bfloat16
    ):  # Triton 3.8's interpreter cuts the low bits off: add what rounds them first
        bits = value.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        value = tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)

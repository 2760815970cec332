"""Rounding of float32 results to the dtype of a tensor, with the same result compiled and interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Rounds the float32 `value` to the nearest in `dtype`, ties to even."""
    # Triton 3.8's interpreter cuts off the low bits when it converts to bfloat16.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)

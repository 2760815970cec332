"""Rotary embeddings: pairs of channels of queries and keys turn by the angles of their token.

    y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin

q is `[T, H, D]` and k `[T, Hkv, D]`, read where they lie, such as in the rows of a product; cos and sin are
`[T, 1 or H, D / 2]`. A pair (a, b) is channels j and j + D / 2 (HALF), or else 2 j and 2 j + 1. The backward pass is
the same with -sin (INVERSE).

One launch turns both. A program turns a block of vectors, each a head of a row, in the order of memory, so no thread is
idle whatever the number of heads. The heads of a row read the same angles, which then come from the first cache.
Arithmetic is in float32. Every product and sum is spelled out: a compiler that chose which to fuse could give a row
other bits at another address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, target_of
from .rounding import rounded

THREADS = 128
"""Threads of one program, whatever the size of a warp."""

PAIRS_PER_THREAD = 8
"""Pairs that a thread turns: two 16-byte loads of 16-bit channels."""


@triton.jit
def _turn(
    x,
    cos,
    sin,
    out,
    block,
    n_vectors,
    ROW_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    ANGLE_ROW_STRIDE: tl.constexpr,
    ANGLE_HEAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    VECTORS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turns one block of the vectors of q, or of k."""
    vector = block * VECTORS + tl.arange(0, VECTORS)
    exists = (vector < n_vectors)[:, None]
    row = (vector // HEADS)[:, None].to(tl.int64)
    head = (vector % HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    in_pairs = exists & (pair < D // 2)
    angle = row * ANGLE_ROW_STRIDE + head * ANGLE_HEAD_STRIDE + pair
    c = tl.load(cos + angle, mask=in_pairs, other=0.0)
    s = tl.load(sin + angle, mask=in_pairs, other=0.0)
    if INVERSE:
        s = -s
    x += row * ROW_STRIDE + head * HEAD_STRIDE
    out += vector[:, None].to(tl.int64) * D
    if HALF:
        a = tl.load(x + pair, mask=in_pairs, other=0.0).to(tl.float32)
        b = tl.load(x + D // 2 + pair, mask=in_pairs, other=0.0).to(tl.float32)
    else:
        channel = tl.arange(0, 2 * PAIRS)[None, :]
        in_channels = exists & (channel < D)
        both = tl.load(x + channel, mask=in_channels, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (VECTORS, PAIRS, 2)))
    turned_a = rounded(tl.fma(a, c, -(b * s)), out.dtype.element_ty)
    turned_b = rounded(tl.fma(b, c, a * s), out.dtype.element_ty)
    if HALF:
        tl.store(out + pair, turned_a, mask=in_pairs)
        tl.store(out + D // 2 + pair, turned_b, mask=in_pairs)
    else:
        tl.store(out + channel, tl.reshape(tl.join(turned_a, turned_b), (VECTORS, 2 * PAIRS)), mask=in_channels)


@triton.jit(do_not_specialize=["n_q_programs", "n_q_vectors", "n_k_vectors"])
def rotary_kernel(
    q,
    k,
    cos,
    sin,
    turned_q,
    turned_k,
    n_q_programs,
    n_q_vectors,
    n_k_vectors,
    Q_ROW_STRIDE: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_ROW_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    K_HEADS: tl.constexpr,
    ANGLE_ROW_STRIDE: tl.constexpr,
    ANGLE_HEAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    VECTORS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < n_q_programs:
        _turn(
            q, cos, sin, turned_q, program, n_q_vectors, Q_ROW_STRIDE, Q_HEAD_STRIDE, Q_HEADS,
            ANGLE_ROW_STRIDE, ANGLE_HEAD_STRIDE, D, HALF, INVERSE, VECTORS, PAIRS,
        )  # fmt: skip
    elif K_HEADS > 0:
        _turn(
            k, cos, sin, turned_k, program - n_q_programs, n_k_vectors, K_ROW_STRIDE, K_HEAD_STRIDE, K_HEADS,
            ANGLE_ROW_STRIDE, ANGLE_HEAD_STRIDE, D, HALF, INVERSE, VECTORS, PAIRS,
        )  # fmt: skip


def _by_rows(t: Tensor) -> Tensor:
    """The tensor itself if it lies row by row, else a copy: the stride of heads one after another would depend on T.

    Strides are constants of the code, which would be compiled anew for every T.
    """
    return t if t.stride(2) == 1 and t.stride(0) >= t.stride(1) else t.contiguous()


def _strides(t: Tensor) -> tuple[int, int]:
    """Elements from one row to the next, and from one head to the next; the stride of a single one has no meaning."""
    head = t.stride(1) if t.shape[1] > 1 else t.shape[2]
    return t.stride(0) if t.shape[0] > 1 else t.shape[1] * head, head


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, half: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    """Launches the op of the same name."""
    n_rows, n_heads, head_dim = q.shape
    q, k = _by_rows(q), _by_rows(k)
    cos, sin = (t.to(torch.float32).contiguous() for t in (cos, sin))
    turned_q, turned_k = (t.new_empty(t.shape) for t in (q, k))
    pairs = triton.next_power_of_2(head_dim // 2)
    vectors = max(THREADS * PAIRS_PER_THREAD // pairs, 1)
    n_q_programs, n_k_programs = (triton.cdiv(n_rows * t.shape[1], vectors) for t in (q, k))
    (q_row, q_head), (k_row, k_head) = _strides(q), _strides(k)
    launch(
        rotary_kernel,
        (n_q_programs + n_k_programs,),
        *(q, k, cos, sin, turned_q, turned_k),
        *(n_q_programs, n_rows * n_heads, n_rows * k.shape[1]),
        num_warps=THREADS // target_of(q.device).warp_size,
        Q_ROW_STRIDE=q_row,
        Q_HEAD_STRIDE=q_head,
        Q_HEADS=n_heads,
        K_ROW_STRIDE=k_row,
        K_HEAD_STRIDE=k_head,
        K_HEADS=k.shape[1],
        ANGLE_ROW_STRIDE=cos.shape[1] * cos.shape[2],
        ANGLE_HEAD_STRIDE=cos.shape[2] if cos.shape[1] > 1 else 0,
        D=head_dim,
        HALF=half,
        INVERSE=inverse,
        VECTORS=vectors,
        PAIRS=pairs,
    )
    return turned_q, turned_k

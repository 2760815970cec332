"""The peer of `python -m bench.gpu_code`: Triton's fused-attention tutorial as a competent user would make it varlen.

The tutorial (triton-lang/triton, python/tutorials/06-fused-attention.py) computes a batch of equal lengths. Kept from
it: the online softmax in units of log2, its order of operations, an inner loop in two stages (there off and on the
causal band, here whole blocks of keys and the ragged rest), and the space it tunes over. Changed, because lengths
differ: rows come from `cu_seqlens`, the grid is dense (tiles of the longest sequence, heads, sequences) and programs
beyond their sequence's end return at once; head dimensions that are no power of two are masked.
"""

from __future__ import annotations

import math
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from revit_fast.kernels.launch import Target, launch


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    return tl.load(pointers, mask=inside, other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def _inner(
    acc, total, m, q, k_rows, v_rows, stride_k, stride_v, lo, hi, n_keys, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        row = start + keys
        k_pointers = k_rows + row[None, :] * stride_k + dims[:, None]
        v_pointers = v_rows + row[:, None] * stride_v + dims[None, :]
        k_inside = dims[:, None] < HEAD_DIM
        v_inside = dims[None, :] < HEAD_DIM
        if RAGGED:
            k_inside = k_inside & (row[None, :] < n_keys)
            v_inside = v_inside & (row[:, None] < n_keys)
        k = _load(k_pointers, k_inside, RAGGED or HEAD_DIM < BLOCK_D)
        qk = tl.dot(q, k, input_precision="ieee")
        if RAGGED:
            qk = qk * scale_log2 + tl.where(row[None, :] < n_keys, 0.0, -1.0e6)
            m_new = tl.maximum(m, tl.max(qk, 1))
            qk -= m_new[:, None]
        else:
            m_new = tl.maximum(m, tl.max(qk, 1) * scale_log2)
            qk = qk * scale_log2 - m_new[:, None]
        p = tl.math.exp2(qk)
        alpha = tl.math.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = _load(v_pointers, v_inside, RAGGED or HEAD_DIM < BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        m = m_new
    return acc, total, m


@triton.jit
def tutorial_attention_kernel(
    q, k, v, out, lse, cu_seqlens, n_rows, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_ot, stride_oh, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head of one sequence."""
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    begin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - begin
    row = tl.program_id(0) * BLOCK_M
    if row >= length:
        return
    begin = begin.to(tl.int64)
    rows = row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < length) & (dims[None, :] < HEAD_DIM)
    q_rows = q + begin * stride_qt + head * stride_qh
    k_rows = k + begin * stride_kt + head * stride_kh
    v_rows = v + begin * stride_vt + head * stride_vh
    q_block = tl.load(q_rows + rows[:, None] * stride_qt + dims[None, :], mask=inside, other=0.0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    acc, total, m = _inner(
        acc, total, m, q_block, k_rows, v_rows, stride_kt, stride_vt, 0, whole, length, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    acc, total, m = _inner(
        acc, total, m, q_block, k_rows, v_rows, stride_kt, stride_vt, whole, length, length, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    tl.store(lse + head * n_rows + begin + rows, m + tl.math.log2(total), mask=rows < length)
    o_rows = out + begin * stride_ot + head * stride_oh
    tl.store(
        o_rows + rows[:, None] * stride_ot + dims[None, :], (acc / total[:, None]).to(out.dtype.element_ty), inside
    )


def configurations(target: Target, head_dim: int) -> list[dict[str, int]]:
    """What the tutorial tunes over: tiles, stages and warps, with its own exclusions."""
    stages = (1,) if target.backend == "hip" else (2, 3, 4)
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_stages": s, "num_warps": w}
        for m, n, s, w in product((64, 128), (32, 64, 128), stages, (4, 8))
        if n <= head_dim and not (target.name == "sm_90" and m * n < 128 * 128 and w == 8)
    ]


def tutorial_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, configuration: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Attention within every sequence.

    Args:
        q: `[T, H, D]`, as k and v, the last dimension contiguous.
        k: keys.
        v: values.
        cu_seqlens: int32 `[B + 1]`.
        max_seqlen: the longest sequence.
        scale: of the scores.
        configuration: one of `configurations`.

    Returns:
        The result `[T, H, D]`, and lse `[H, T]` in units of log2, as the tutorial has it.
    """
    n_rows, n_heads, head_dim = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty(n_heads, n_rows, dtype=torch.float32)
    strides = [stride for t in (q, k, v, out) for stride in t.stride()[:2]]
    launch(
        tutorial_attention_kernel,
        (triton.cdiv(max_seqlen, configuration["BLOCK_M"]), n_heads, cu_seqlens.shape[0] - 1),
        q, k, v, out, lse, cu_seqlens, n_rows, *strides, scale * math.log2(math.e),
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), **configuration,
    )  # fmt: skip
    return out, lse

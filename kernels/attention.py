"""Attention over packed sequences: softmax(scale · q kᵀ) v within every sequence and head.

Layout: q `[Tq, Hq, D]`, k and v `[Tk, Hkv, D]` with a contiguous last dimension and any other strides; sequence b owns
rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`; lse `[Hq, Tq]` float32, natural logarithm. A program computes one tile of
the work list, 64 rows of one sequence, for one head. Tiles whose sequence has few keys hold all of them at once (the
short schedule); the others loop over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135). Tiles of
padding rows are zero. `kernels/schedules.py` chooses the schedule and its tiles by the sequence's own length alone, and
which classes of tiles share a launch.

Head dimensions and key counts that are not powers of two are cut into parts that are, see `kernels/parts.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import schedules
from .constants import PADDING, TILE_ROWS
from .launch import launch, target_of
from .parts import (
    add_outer,
    element,
    inner,
    load_parts,
    multiply_rows,
    n_elements,
    n_steps,
    rows_contiguous,
    scale_parts,
    sequence_rows,
    store_parts,
    visible,
    zero_parts,
)
from .rounding import rounded
from .tiles import Tiles


@triton.jit
def _exponential(s, m, scale, EXACT: tl.constexpr):
    """exp(scale (s - m))."""
    if EXACT:
        return tl.exp2((s - m) * (scale * 1.4426950408889634))
    return tl.exp2(s * (scale * 1.4426950408889634) - m * (scale * 1.4426950408889634))


@triton.jit
def _store_rows(
    out, lse, row, n_rows, begin, head, n_heads, n_rows_all, parts, m, total, scale, PARTS, HEAD_DIM: tl.constexpr
):
    """Divides by the softmax's sum and writes out and lse. Rows that saw no key get 0 and -inf."""
    seen = total != 0
    scaled = scale_parts(parts, tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None])
    base = out + (begin.to(tl.int64) * n_heads + head) * HEAD_DIM
    store_parts(base, row, n_rows, n_heads * HEAD_DIM, scaled, PARTS, HEAD_DIM)
    value = tl.where(seen, m * scale + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(lse + head.to(tl.int64) * n_rows_all + begin + row, value, mask=row < n_rows)


@triton.jit
def _short_tile(
    q_base, k_base, v_base, out, lse, first_row, begin_q, n_q, n_k, head, n_rows_q,
    stride_qt, stride_kt, stride_vt, q_factor, scale,
    N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr, CAUSAL: tl.constexpr, SCALE_Q: tl.constexpr,
    TILE: tl.constexpr, FULL_KEYS: tl.constexpr, KEY_BLOCKS: tl.constexpr, CLASS: tl.constexpr,
):  # fmt: skip
    """Computes one tile of a sequence with few keys: holds all keys at once, or works on a few unrolled blocks.

    KEY_BLOCKS[CLASS] holds the blocks; a part of one is (start, width, whether it needs a mask). Every sequence of the
    class has at least FULL_KEYS keys.
    """
    rows = first_row + tl.arange(0, TILE)
    q_rows = load_parts(q_base, rows, n_q, stride_qt, DIM_PARTS, HEAD_DIM, True)
    if SCALE_Q:
        q_rows = multiply_rows(q_rows, q_factor)
    m = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = zero_parts(TILE, DIM_PARTS)
    for block in tl.static_range(n_elements(KEY_BLOCKS, CLASS)):
        scores = ()
        m_new = m
        for i in tl.static_range(n_elements(KEY_BLOCKS, CLASS, block)):
            keys = element(KEY_BLOCKS, CLASS, block, i, 0) + tl.arange(0, element(KEY_BLOCKS, CLASS, block, i, 1))
            k_rows = load_parts(
                k_base, keys, n_k, stride_kt, DIM_PARTS, HEAD_DIM, element(KEY_BLOCKS, CLASS, block, i, 2)
            )
            s = inner(q_rows, k_rows)
            if element(KEY_BLOCKS, CLASS, block, i, 2) or CAUSAL:
                s = tl.where(visible(rows[:, None], keys[None, :], n_k, n_k - n_q, CAUSAL), s, float("-inf"))
            m_new = tl.maximum(m_new, tl.max(s, 1))
            scores = scores + (s,)
        shift = m_new
        if CAUSAL or FULL_KEYS == 0:
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        if block > 0:
            alpha = _exponential(m, shift, scale, True)
            total *= alpha
            acc = scale_parts(acc, alpha[:, None])
        for i in tl.static_range(n_elements(KEY_BLOCKS, CLASS, block)):
            keys = element(KEY_BLOCKS, CLASS, block, i, 0) + tl.arange(0, element(KEY_BLOCKS, CLASS, block, i, 1))
            p = _exponential(scores[i], shift[:, None], scale, k_base.dtype.element_ty == tl.float32)
            total += tl.sum(p, 1)
            v_rows = load_parts(
                v_base, keys, n_k, stride_vt, DIM_PARTS, HEAD_DIM, element(KEY_BLOCKS, CLASS, block, i, 2)
            )
            acc = add_outer(acc, rounded(p, v_base.dtype.element_ty), v_rows)
        m = m_new
    _store_rows(out, lse, rows, n_q, begin_q, head, N_HEADS, n_rows_q, acc, m, total, scale, DIM_PARTS, HEAD_DIM)


@triton.jit
def _online_softmax_step(
    q_rows, acc, m, total, k_block, v_block, stride_kt, stride_vt, rows, key, n_k, diagonal, scale,
    DIM_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys, from `key` on, to the running maximum m, sum and weighted values."""
    keys = tl.arange(0, BLOCK_N)
    s = inner(q_rows, load_parts(k_block, keys, n_k - key, stride_kt, DIM_PARTS, HEAD_DIM, RAGGED))
    if RAGGED:
        s = tl.where(visible(rows[:, None], key + keys[None, :], n_k, diagonal, CAUSAL), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if RAGGED else m_new
    p = _exponential(s, shift[:, None], scale, k_block.dtype.element_ty == tl.float32)
    alpha = _exponential(m, shift, scale, True)
    total = total * alpha + tl.sum(p, 1)
    v_rows = load_parts(v_block, keys, n_k - key, stride_vt, DIM_PARTS, HEAD_DIM, RAGGED)
    acc = add_outer(scale_parts(acc, alpha[:, None]), rounded(p, v_block.dtype.element_ty), v_rows)
    return acc, m_new, total


@triton.jit
def _streaming_tile(
    q_base, k_base, v_base, out, lse, first_row, begin_q, n_q, n_k, head, n_rows_q,
    stride_qt, stride_kt, stride_vt, q_factor, scale,
    N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr, CAUSAL: tl.constexpr, SCALE_Q: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes one tile over blocks of keys: whole blocks without masks, then the rest and the diagonal with masks."""
    diagonal = n_k - n_q
    for step in range(n_steps(first_row, n_q, TILE, BLOCK_M)):
        row = first_row + step * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        q_rows = load_parts(q_base, rows, n_q, stride_qt, DIM_PARTS, HEAD_DIM, True)
        if SCALE_Q:
            q_rows = multiply_rows(q_rows, q_factor)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = zero_parts(BLOCK_M, DIM_PARTS)
        n_seen_by_all = n_k
        n_seen = n_k
        if CAUSAL:
            n_seen_by_all = tl.minimum(tl.maximum(row + diagonal + 1, 0), n_k)
            n_seen = tl.minimum(tl.maximum(row + BLOCK_M + diagonal, 0), n_k)
        whole = n_seen_by_all // BLOCK_N * BLOCK_N
        k_block, v_block = k_base, v_base
        for key in range(0, whole, BLOCK_N):
            acc, m, total = _online_softmax_step(
                q_rows, acc, m, total, k_block, v_block, stride_kt, stride_vt, rows, key, n_k, diagonal, scale,
                DIM_PARTS, HEAD_DIM, BLOCK_N, CAUSAL, False,
            )  # fmt: skip
            k_block += BLOCK_N * stride_kt
            v_block += BLOCK_N * stride_vt
        for key in range(whole, n_seen, BLOCK_N):
            acc, m, total = _online_softmax_step(
                q_rows, acc, m, total, k_block, v_block, stride_kt, stride_vt, rows, key, n_k, diagonal, scale,
                DIM_PARTS, HEAD_DIM, BLOCK_N, CAUSAL, True,
            )  # fmt: skip
            k_block += BLOCK_N * stride_kt
            v_block += BLOCK_N * stride_vt
        _store_rows(out, lse, rows, n_q, begin_q, head, N_HEADS, n_rows_q, acc, m, total, scale, DIM_PARTS, HEAD_DIM)


@triton.jit(do_not_specialize=["last_tile", "n_tiles", "first_padding", "n_rows_q", "n_rows_k", "n_sequences"])
def attention_forward_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, tiles, last_tile, n_tiles, first_padding,
    n_rows_q, n_rows_k, n_sequences, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, q_factor, scale,
    N_HEADS: tl.constexpr, N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr,
    FULL_KEYS: tl.constexpr, KEY_BLOCKS: tl.constexpr, STREAMING: tl.constexpr, CAUSAL: tl.constexpr,
    SCALE_Q: tl.constexpr, FIRST_CLASS: tl.constexpr, LAST_CLASS: tl.constexpr, PADDING: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Computes one tile for one head, in the way of its class.

    FULL_KEYS and KEY_BLOCKS have one element for each short class, STREAMING is (BLOCK_M, BLOCK_N) of the classes after
    them, or None. Programs take `n_tiles` rows of the list from `last_tile` backwards, because the last have the most
    keys and should begin first. Programs after them take tiles of padding rows, from `first_padding` on. It is negative
    if another launch writes them.
    """
    index = tl.program_id(0) // N_HEADS
    head = tl.program_id(0) % N_HEADS
    tile = tiles + tl.where(index < n_tiles, last_tile - index, first_padding + index - n_tiles) * 3
    tile_class = tl.load(tile + 2)
    first_row = tl.load(tile + 1)
    if tile_class == PADDING:
        if first_padding >= 0:
            begin_q = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + n_sequences), 0), n_rows_q)
            nothing = tl.zeros((TILE,), tl.float32)
            _store_rows(
                out, lse, first_row + tl.arange(0, TILE), n_rows_q - begin_q, begin_q, head, N_HEADS, n_rows_q,
                zero_parts(TILE, DIM_PARTS), nothing, nothing, scale, DIM_PARTS, HEAD_DIM,
            )  # fmt: skip
        return
    if (tile_class < FIRST_CLASS) | (tile_class > LAST_CLASS):
        return
    sequence = tl.minimum(tl.maximum(tl.load(tile), 0), n_sequences - 1)
    begin_q, n_q = sequence_rows(cu_seqlens_q, sequence, n_rows_q)
    begin_k, n_k = sequence_rows(cu_seqlens_k, sequence, n_rows_k)
    q_base = q + begin_q.to(tl.int64) * stride_qt + head * stride_qh
    k_base = k + begin_k.to(tl.int64) * stride_kt + (head // N_REP) * stride_kh
    v_base = v + begin_k.to(tl.int64) * stride_vt + (head // N_REP) * stride_vh
    for i in tl.static_range(len(FULL_KEYS)):
        if tile_class == FIRST_CLASS + i:
            if n_k >= FULL_KEYS[i]:  # otherwise the list is of another pack
                _short_tile(
                    q_base, k_base, v_base, out, lse, first_row, begin_q, n_q, n_k, head, n_rows_q,
                    stride_qt, stride_kt, stride_vt, q_factor, scale,
                    N_HEADS, HEAD_DIM, DIM_PARTS, CAUSAL, SCALE_Q, TILE, FULL_KEYS[i], KEY_BLOCKS, i,
                )  # fmt: skip
            return  # here, so that no register keeps a value for the code of the next class
    if STREAMING is not None:
        _streaming_tile(
            q_base, k_base, v_base, out, lse, first_row, begin_q, n_q, n_k, head, n_rows_q,
            stride_qt, stride_kt, stride_vt, q_factor, scale,
            N_HEADS, HEAD_DIM, DIM_PARTS, CAUSAL, SCALE_Q, TILE, STREAMING[0], STREAMING[1],
        )  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float,
    causal: bool,
    tiles: Tensor | None,
    tile_counts: list[int],
) -> tuple[Tensor, Tensor]:
    """The op `revit_fast::varlen_attention`; see `revit_fast.ops.varlen_attention`."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    n_heads, head_dim = q.shape[1:]
    out = q.new_empty(q.shape)
    lse = q.new_empty(n_heads, q.shape[0], dtype=torch.float32)
    q_factor, score_scale = _split_scale(scale, q.dtype)
    work = Tiles(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0], tiles, tile_counts)
    target = target_of(q.device)
    first_padding, n_padding = work.of(PADDING, PADDING) if work.counts else (0, 0)
    possible = schedules.forward(target, head_dim, q.dtype)
    parts = [(part, *work.of(*part.classes)) for part in possible if not part.beyond(max_seqlen_k)]
    for part, first_tile, n_tiles in [found for found in parts if found[2]] or parts[:1]:
        launch(
            attention_forward_kernel, ((n_tiles + n_padding) * n_heads,),
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, work.rows, first_tile + n_tiles - 1, n_tiles, first_padding,
            q.shape[0], k.shape[0], work.n_sequences, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], q_factor,
            score_scale,
            N_HEADS=n_heads, N_REP=n_heads // k.shape[1], HEAD_DIM=head_dim,
            DIM_PARTS=schedules.head_dim_parts(target, head_dim, q.dtype), CAUSAL=causal, SCALE_Q=q_factor != 1,
            PADDING=PADDING, TILE=TILE_ROWS, **part.options,
        )  # fmt: skip
        first_padding, n_padding = -1, 0  # written by now
    return out, lse


def _split_scale(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """Factors of q and of the scores whose product is the scale.

    Float32 queries get the whole scale, which saves a rounding of the scores. Other queries get only its sign: the
    factor of the scores must then be positive, so that masked scores of -inf stay -inf.
    """
    if dtype == torch.float32:
        return scale, 1.0
    return -1.0 if scale < 0 else 1.0, max(abs(scale), 1e-30)

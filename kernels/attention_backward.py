"""Gradients of attention over packed sequences, without atomics; layout as in `kernels/attention.py`.

P are the probabilities, recomputed from lse. delta are the row sums of P · grad_out vᵀ, which equal those of grad_out ·
out, minus the gradient of lse. Then
grad_v = Pᵀ grad_out, dS = P · (grad_out vᵀ - delta), grad_q = scale · dS k, grad_k = scale · dSᵀ q.

Float32 gradients must be as accurate as those of a softmax that keeps P. A float32 lse has too few digits for that, so
the rows of P are normalised again (EXACT), which costs a second pass over the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import schedules
from .constants import TILE_ROWS
from .launch import launch, target_of
from .parts import (
    add_outer,
    inner,
    load_parts,
    multiply_rows,
    n_steps,
    rows_contiguous,
    scale_parts,
    sequence_rows,
    store_parts,
    visible,
    zero_parts,
)
from .rounding import rounded
from .tiles import Tiles, zero_padding


@triton.jit
def _load_lse(lse, offset, rows, n_rows):
    """lse of query rows; rows after the last get +inf, which makes their probabilities zero."""
    return tl.load(lse + offset + rows, mask=rows < n_rows, other=float("inf"))


@triton.jit
def _probabilities(s, lse, seen, scale, MASK: tl.constexpr, EXACT: tl.constexpr):
    """exp(scale s - lse), zero where a mask says that the key is not seen; lse broadcasts against s."""
    if EXACT:  # large probabilities have small differences; subtracting first keeps the digits of large scores
        p = tl.exp2((s * scale - lse) * 1.4426950408889634)
    else:
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse * 1.4426950408889634)
    return tl.where(seen, p, 0.0) if MASK else p


@triton.jit
def _scores_step(
    q_rows, grad_rows, lse_rows, k_block, v_block, stride_kt, stride_vt, rows, key, keys, n_k, diagonal, scale,
    DIM_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Probabilities of one block of keys, the gradients of the probabilities, and the keys."""
    k_rows = load_parts(k_block, keys, n_k - key, stride_kt, DIM_PARTS, HEAD_DIM, RAGGED)
    v_rows = load_parts(v_block, keys, n_k - key, stride_vt, DIM_PARTS, HEAD_DIM, RAGGED)
    seen = visible(rows[:, None], key + keys[None, :], n_k, diagonal, CAUSAL)
    p = _probabilities(inner(q_rows, k_rows), lse_rows[:, None], seen, scale, RAGGED or CAUSAL, EXACT)
    return p, inner(grad_rows, v_rows), k_rows


@triton.jit
def _grad_q_step(
    grad_q, q_rows, grad_rows, lse_rows, delta, normalizer, k_block, v_block, stride_kt, stride_vt, rows, key, keys,
    n_k,
    diagonal, scale, DIM_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    p, dp, k_rows = _scores_step(
        q_rows, grad_rows, lse_rows, k_block, v_block, stride_kt, stride_vt, rows, key, keys, n_k, diagonal, scale,
        DIM_PARTS, HEAD_DIM, CAUSAL, RAGGED, EXACT,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    if EXACT:
        ds *= normalizer[:, None]
    return add_outer(grad_q, rounded(ds, k_block.dtype.element_ty), k_rows)


@triton.jit(do_not_specialize=["first_tile", "n_rows_q", "n_rows_k", "n_sequences"])
def attention_grad_q_backward_kernel(
    grad_out, grad_lse, q, k, v, out, lse, delta, normalizer, grad_q, cu_seqlens_q, cu_seqlens_k, tiles, first_tile,
    n_rows_q, n_rows_k, n_sequences, stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh, stride_ot, stride_oh, q_factor, scale,
    N_HEADS: tl.constexpr, N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr, FULL_KEYS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, SCALE_Q: tl.constexpr,
    FIRST_CLASS: tl.constexpr, LAST_CLASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries, over all keys at once (KEY_PARTS) or block by block.

    It also stores their delta, the sum of grad_out · out minus the gradient of lse: the gradient of the keys needs it.
    """
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    tile_class = tl.load(tile + 2)
    if (tile_class < FIRST_CLASS) | (tile_class > LAST_CLASS):
        return
    sequence = tl.minimum(tl.maximum(tl.load(tile), 0), n_sequences - 1)
    head = tl.program_id(1)
    begin_q, n_q = sequence_rows(cu_seqlens_q, sequence, n_rows_q)
    begin_k, n_k = sequence_rows(cu_seqlens_k, sequence, n_rows_k)
    grad_base = grad_out + begin_q.to(tl.int64) * stride_gt + head * stride_gh
    q_base = q + begin_q.to(tl.int64) * stride_qt + head * stride_qh
    k_base = k + begin_k.to(tl.int64) * stride_kt + (head // N_REP) * stride_kh
    v_base = v + begin_k.to(tl.int64) * stride_vt + (head // N_REP) * stride_vh
    out_base = out + begin_q.to(tl.int64) * stride_ot + head * stride_oh
    lse_offset = head.to(tl.int64) * n_rows_q + begin_q

    if KEY_PARTS is not None and n_k < FULL_KEYS:  # no tile of this class: a list of another pack
        return
    diagonal = n_k - n_q
    first_row = tl.load(tile + 1)
    for step in range(n_steps(first_row, n_q, TILE, BLOCK_M)):
        row = first_row + step * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        grad_rows = load_parts(grad_base, rows, n_q, stride_gt, DIM_PARTS, HEAD_DIM, True)
        q_rows = load_parts(q_base, rows, n_q, stride_qt, DIM_PARTS, HEAD_DIM, True)
        if SCALE_Q:
            q_rows = multiply_rows(q_rows, q_factor)
        lse_rows = _load_lse(lse, lse_offset, rows, n_q)
        n_seen_by_all = n_k
        n_seen = n_k
        if CAUSAL:
            n_seen_by_all = tl.minimum(tl.maximum(row + diagonal + 1, 0), n_k)
            n_seen = tl.minimum(tl.maximum(row + BLOCK_M + diagonal, 0), n_k)
        if SCALE_Q:
            total = tl.zeros((BLOCK_M,), tl.float32)
            delta_rows = tl.zeros((BLOCK_M,), tl.float32)
            k_block, v_block = k_base, v_base
            for key in range(0, n_seen, BLOCK_N):
                p, dp, _ = _scores_step(
                    q_rows, grad_rows, lse_rows, k_block, v_block, stride_kt, stride_vt, rows, key,
                    tl.arange(0, BLOCK_N), n_k, diagonal, scale, DIM_PARTS, HEAD_DIM, CAUSAL, True, SCALE_Q,
                )  # fmt: skip
                total += tl.sum(p, 1)
                delta_rows += tl.sum(p * dp, 1)
                k_block += BLOCK_N * stride_kt
                v_block += BLOCK_N * stride_vt
            normalizer_rows = 1.0 / tl.where(total == 0, 1.0, total)
            delta_rows *= normalizer_rows
            tl.store(normalizer + lse_offset + rows, normalizer_rows, mask=rows < n_q)
        else:
            out_rows = load_parts(out_base, rows, n_q, stride_ot, DIM_PARTS, HEAD_DIM, True)
            delta_rows = _row_products(grad_rows, out_rows)
            normalizer_rows = None
        if grad_lse is not None:
            delta_rows -= tl.load(grad_lse + lse_offset + rows, mask=rows < n_q, other=0.0)
        tl.store(delta + lse_offset + rows, delta_rows, mask=rows < n_q)
        grad_q_rows = zero_parts(BLOCK_M, DIM_PARTS)
        if KEY_PARTS is not None:
            for i in tl.static_range(len(KEY_PARTS)):
                grad_q_rows = _grad_q_step(
                    grad_q_rows, q_rows, grad_rows, lse_rows, delta_rows, normalizer_rows, k_base, v_base, stride_kt,
                    stride_vt, rows, 0, KEY_PARTS[i][0] + tl.arange(0, KEY_PARTS[i][1]), n_k, diagonal, scale,
                    DIM_PARTS, HEAD_DIM, CAUSAL, KEY_PARTS[i][0] + KEY_PARTS[i][1] > FULL_KEYS, SCALE_Q,
                )  # fmt: skip
        else:
            whole = n_seen_by_all // BLOCK_N * BLOCK_N
            k_block, v_block = k_base, v_base
            for key in range(0, whole, BLOCK_N):
                grad_q_rows = _grad_q_step(
                    grad_q_rows, q_rows, grad_rows, lse_rows, delta_rows, normalizer_rows, k_block, v_block,
                    stride_kt, stride_vt, rows, key, tl.arange(0, BLOCK_N), n_k, diagonal, scale, DIM_PARTS, HEAD_DIM,
                    CAUSAL, False, SCALE_Q,
                )  # fmt: skip
                k_block += BLOCK_N * stride_kt
                v_block += BLOCK_N * stride_vt
            for key in range(whole, n_seen, BLOCK_N):
                grad_q_rows = _grad_q_step(
                    grad_q_rows, q_rows, grad_rows, lse_rows, delta_rows, normalizer_rows, k_block, v_block,
                    stride_kt, stride_vt, rows, key, tl.arange(0, BLOCK_N), n_k, diagonal, scale, DIM_PARTS, HEAD_DIM,
                    CAUSAL, True, SCALE_Q,
                )  # fmt: skip
                k_block += BLOCK_N * stride_kt
                v_block += BLOCK_N * stride_vt
        grad_q_base = grad_q + (begin_q.to(tl.int64) * N_HEADS + head) * HEAD_DIM
        grad_q_rows = scale_parts(grad_q_rows, q_factor * scale)
        store_parts(grad_q_base, rows, n_q, N_HEADS * HEAD_DIM, grad_q_rows, DIM_PARTS, HEAD_DIM)


@triton.jit
def _row_products(a, b):
    """Sum over the head dimension of a · b, row by row."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["first_tile", "n_rows_q", "n_rows_k", "n_sequences"])
def attention_grad_kv_backward_kernel(
    grad_out, q, k, v, lse, delta, normalizer, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k, tiles, first_tile,
    n_rows_q, n_rows_k, n_sequences, stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh, q_factor, scale,
    N_HEADS: tl.constexpr, N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SCALE_Q: tl.constexpr,
    FIRST_CLASS: tl.constexpr, LAST_CLASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one key head, summed over its query heads and their rows in order.
    Scores are kept transposed, keys by queries, so that both products use them directly.

    Float32 sums begin at the last rows: with a causal mask late rows share their weight among most keys, so the small
    terms come first, while the sum is small.
    """
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    tile_class = tl.load(tile + 2)
    if (tile_class < FIRST_CLASS) | (tile_class > LAST_CLASS):
        return
    sequence = tl.minimum(tl.maximum(tl.load(tile), 0), n_sequences - 1)
    key_head = tl.program_id(1)
    begin_q, n_q = sequence_rows(cu_seqlens_q, sequence, n_rows_q)
    begin_k, n_k = sequence_rows(cu_seqlens_k, sequence, n_rows_k)
    k_base = k + begin_k.to(tl.int64) * stride_kt + key_head * stride_kh
    v_base = v + begin_k.to(tl.int64) * stride_vt + key_head * stride_vh

    diagonal = n_k - n_q
    first_key = tl.load(tile + 1)
    for step in range(n_steps(first_key, n_k, TILE, BLOCK_N)):
        key = first_key + step * BLOCK_N
        keys = key + tl.arange(0, BLOCK_N)
        k_rows = load_parts(k_base, keys, n_k, stride_kt, DIM_PARTS, HEAD_DIM, True)
        v_rows = load_parts(v_base, keys, n_k, stride_vt, DIM_PARTS, HEAD_DIM, True)
        grad_k_rows = zero_parts(BLOCK_N, DIM_PARTS)
        grad_v_rows = zero_parts(BLOCK_N, DIM_PARTS)
        first_row = 0
        if CAUSAL:
            first_row = tl.maximum(key - diagonal, 0) // BLOCK_M * BLOCK_M
        begin_row = first_row
        end_row = n_q
        STEP: tl.constexpr = -BLOCK_M if SCALE_Q else BLOCK_M
        if SCALE_Q:
            begin_row = first_row + (tl.cdiv(n_q - first_row, BLOCK_M) - 1) * BLOCK_M
            end_row = first_row - 1
        for repeat in range(N_REP):
            head = key_head * N_REP + repeat
            row_q = (begin_q + begin_row).to(tl.int64)
            q_block = q + row_q * stride_qt + head * stride_qh
            grad_block = grad_out + row_q * stride_gt + head * stride_gh
            lse_offset = head.to(tl.int64) * n_rows_q + begin_q
            for row in range(begin_row, end_row, STEP):
                local = tl.arange(0, BLOCK_M)
                q_rows = load_parts(q_block, local, n_q - row, stride_qt, DIM_PARTS, HEAD_DIM, True)
                if SCALE_Q:
                    q_rows = multiply_rows(q_rows, q_factor)
                grad_rows = load_parts(grad_block, local, n_q - row, stride_gt, DIM_PARTS, HEAD_DIM, True)
                rows = row + local
                lse_rows = _load_lse(lse, lse_offset, rows, n_q)
                delta_rows = tl.load(delta + lse_offset + rows, mask=rows < n_q, other=0.0)
                seen = visible(rows[None, :], keys[:, None], n_k, diagonal, CAUSAL)
                # Rows after the last key are never stored, so only the diagonal needs a mask.
                p = _probabilities(inner(k_rows, q_rows), lse_rows[None, :], seen, scale, CAUSAL, SCALE_Q)
                if SCALE_Q:
                    p *= tl.load(normalizer + lse_offset + rows, mask=rows < n_q, other=0.0)[None, :]
                ds = p * (inner(v_rows, grad_rows) - delta_rows[None, :])
                grad_v_rows = add_outer(grad_v_rows, rounded(p, v.dtype.element_ty), grad_rows)
                grad_k_rows = add_outer(grad_k_rows, rounded(ds, q.dtype.element_ty), q_rows)
                q_block += STEP * stride_qt
                grad_block += STEP * stride_gt
        grad_base = (begin_k.to(tl.int64) * (N_HEADS // N_REP) + key_head) * HEAD_DIM
        grad_stride = N_HEADS // N_REP * HEAD_DIM
        grad_k_rows = scale_parts(grad_k_rows, scale)
        store_parts(grad_k + grad_base, keys, n_k, grad_stride, grad_k_rows, DIM_PARTS, HEAD_DIM)
        store_parts(grad_v + grad_base, keys, n_k, grad_stride, grad_v_rows, DIM_PARTS, HEAD_DIM)


@triton.jit(do_not_specialize=["first_tile", "n_rows", "n_sequences"])
def attention_fused_backward_kernel(
    grad_out, grad_lse, q, k, v, lse, grad_q, grad_k, grad_v, cu_seqlens, tiles, first_tile, n_rows, n_sequences,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, q_factor, scale,
    N_HEADS: tl.constexpr, N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, SCALE_Q: tl.constexpr,
    FIRST_CLASS: tl.constexpr, LAST_CLASS: tl.constexpr,
):  # fmt: skip
    """All gradients of a self-attention whose sequence is a single tile, for one key head and its query heads."""
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    tile_class = tl.load(tile + 2)
    if (tile_class < FIRST_CLASS) | (tile_class > LAST_CLASS):
        return
    sequence = tl.minimum(tl.maximum(tl.load(tile), 0), n_sequences - 1)
    key_head = tl.program_id(1)
    begin, n = sequence_rows(cu_seqlens, sequence, n_rows)
    first = begin.to(tl.int64)
    rows = tl.arange(0, BLOCK)
    k_rows = load_parts(k + first * stride_kt + key_head * stride_kh, rows, n, stride_kt, DIM_PARTS, HEAD_DIM, True)
    v_rows = load_parts(v + first * stride_vt + key_head * stride_vh, rows, n, stride_vt, DIM_PARTS, HEAD_DIM, True)
    grad_k_rows = zero_parts(BLOCK, DIM_PARTS)
    grad_v_rows = zero_parts(BLOCK, DIM_PARTS)
    seen = visible(rows[:, None], rows[None, :], n, 0, CAUSAL)
    for repeat in range(N_REP):
        head = key_head * N_REP + repeat
        q_rows = load_parts(q + first * stride_qt + head * stride_qh, rows, n, stride_qt, DIM_PARTS, HEAD_DIM, True)
        if SCALE_Q:
            q_rows = multiply_rows(q_rows, q_factor)
        grad_base = grad_out + first * stride_gt + head * stride_gh
        grad_rows = load_parts(grad_base, rows, n, stride_gt, DIM_PARTS, HEAD_DIM, True)
        lse_offset = head.to(tl.int64) * n_rows + begin
        lse_rows = _load_lse(lse, lse_offset, rows, n)
        p = _probabilities(inner(q_rows, k_rows), lse_rows[:, None], seen, scale, True, SCALE_Q)
        if SCALE_Q:
            total = tl.sum(p, 1)
            p *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]
        dp = inner(grad_rows, v_rows)
        delta = tl.sum(p * dp, 1)
        if grad_lse is not None:
            delta -= tl.load(grad_lse + lse_offset + rows, mask=rows < n, other=0.0)
        ds = rounded(p * (dp - delta[:, None]), q.dtype.element_ty)
        grad_v_rows = add_outer(grad_v_rows, tl.trans(rounded(p, v.dtype.element_ty)), grad_rows)
        grad_k_rows = add_outer(grad_k_rows, tl.trans(ds), q_rows)
        grad_q_rows = scale_parts(add_outer(zero_parts(BLOCK, DIM_PARTS), ds, k_rows), q_factor * scale)
        grad_q_base = grad_q + (first * N_HEADS + head) * HEAD_DIM
        store_parts(grad_q_base, rows, n, N_HEADS * HEAD_DIM, grad_q_rows, DIM_PARTS, HEAD_DIM)
    grad_base = (first * (N_HEADS // N_REP) + key_head) * HEAD_DIM
    grad_stride = N_HEADS // N_REP * HEAD_DIM
    grad_k_rows = scale_parts(grad_k_rows, scale)
    store_parts(grad_k + grad_base, rows, n, grad_stride, grad_k_rows, DIM_PARTS, HEAD_DIM)
    store_parts(grad_v + grad_base, rows, n, grad_stride, grad_v_rows, DIM_PARTS, HEAD_DIM)


def varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float,
    causal: bool,
    tiles: Tensor | None,
    tile_counts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `revit_fast::varlen_attention_backward`: gradients of q, k and v, without atomics.

    Self-attention of sequences that fit one tile takes one pass. All others take two: one over tiles of queries, then
    one over tiles of keys. Each pass recomputes the scores, so that programs share no sums.
    """
    grad_out, q, k, v, out = (rows_contiguous(t) for t in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    n_heads, head_dim = q.shape[1:]
    n_key_heads = k.shape[1]
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    normalizer = torch.empty_like(lse) if q.dtype == torch.float32 else None
    query_tiles = Tiles(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0], tiles, tile_counts)
    self_attention = same_tensor(cu_seqlens_q, cu_seqlens_k) and q.shape[0] == k.shape[0]
    key_tiles = query_tiles if self_attention else Tiles(cu_seqlens_k, k.shape[0], cu_seqlens_k, k.shape[0], None, ())
    target = target_of(q.device)
    shared = {
        "N_HEADS": n_heads,
        "N_REP": n_heads // n_key_heads,
        "HEAD_DIM": head_dim,
        "DIM_PARTS": schedules.head_dim_parts(target, head_dim, q.dtype),
        "CAUSAL": causal,
        "SCALE_Q": q.dtype == torch.float32,
    }
    strides = [stride for t in (grad_out, q, k, v) for stride in t.stride()[:2]]
    # As in the forward pass, float32 queries get the scale, which saves a rounding of the scores.
    factors = (scale, 1.0) if q.dtype == torch.float32 else (1.0, scale)
    rows = (q.shape[0], k.shape[0], query_tiles.n_sequences)
    plan = schedules.backward(target, head_dim, q.dtype, self_attention, n_heads != n_key_heads)
    for schedule in plan.fused:
        if schedule.beyond(max_seqlen_k):
            break
        first_tile, n_tiles = query_tiles.of(schedule.first_class, schedule.last_class)
        if n_tiles == 0:
            continue
        launch(
            attention_fused_backward_kernel, (n_tiles, n_key_heads),
            grad_out, grad_lse, q, k, v, lse, grad_q, grad_k, grad_v, cu_seqlens_q, query_tiles.rows, first_tile,
            q.shape[0], query_tiles.n_sequences, *strides, *factors,
            **shared, BLOCK=schedule.block_m, **schedule.launch_options(),
        )  # fmt: skip
    for schedule in plan.grad_q:
        if schedule.beyond(max_seqlen_k):
            break
        first_tile, n_tiles = query_tiles.of(schedule.first_class, schedule.last_class)
        if n_tiles == 0:
            continue
        short = schedule.name == "short"
        launch(
            attention_grad_q_backward_kernel, (n_tiles, n_heads),
            grad_out, grad_lse, q, k, v, out, lse, delta, normalizer, grad_q, cu_seqlens_q, cu_seqlens_k,
            query_tiles.rows,
            first_tile, *rows, *strides, *out.stride()[:2], *factors,
            **shared, KEY_PARTS=schedule.key_parts if short else None, FULL_KEYS=schedule.full_keys,
            BLOCK_N=schedule.keys,
            BLOCK_M=schedule.block_m, TILE=TILE_ROWS, **schedule.launch_options(),
        )  # fmt: skip
    for schedule in plan.grad_kv:
        if schedule.beyond(max_seqlen_k):
            break
        first_tile, n_tiles = key_tiles.of(schedule.first_class, schedule.last_class)
        launch(
            attention_grad_kv_backward_kernel, (n_tiles, n_key_heads),
            grad_out, q, k, v, lse, delta, normalizer, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k, key_tiles.rows,
            first_tile,
            *rows, *strides, *factors,
            **shared, BLOCK_N=schedule.keys, BLOCK_M=schedule.block_m, TILE=TILE_ROWS, **schedule.launch_options(),
        )  # fmt: skip
    zero_padding(grad_q, cu_seqlens_q, query_tiles)
    zero_padding(grad_k, cu_seqlens_k, key_tiles)
    zero_padding(grad_v, cu_seqlens_k, key_tiles)
    return grad_q, grad_k, grad_v


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same memory; works for fake tensors, which have no address."""
    same_storage = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same_storage and (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())

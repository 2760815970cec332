"""Attention over packed sequences: softmax(scale · q kᵀ) v within every sequence and head.

Layout: q `[Tq, Hq, D]`, k and v `[Tk, Hkv, D]` with any strides but a contiguous last dimension; sequence b owns rows
`cu_seqlens[b]` to `cu_seqlens[b + 1]`; lse `[Hq, Tq]` float32, natural logarithm. A program computes one tile of the
work list, 64 rows of one sequence, for one head. Tiles whose sequence has few keys hold all of them at once (the short
schedule); the others walk over blocks of keys with an online softmax (FlashAttention, arXiv 2205.14135). Which is
chosen, and with which tiles, is in `kernels/schedules.py` and depends on the sequence's own length alone.

Extents that are no power of two, head dimensions as 80 and key counts as 208, are cut into parts that are: 64 + 16, and
128 + 64 + 16. A part is a pair (start, width).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from revit_fast.kernels import schedules
from revit_fast.kernels.launch import launch, target_of
from revit_fast.kernels.schedules import PADDING, TILE_ROWS, Schedule

LOG2_E = math.log2(math.e)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _sequence_rows(cu_seqlens, sequence, n_rows):
    """First row and end of a sequence, clamped to the rows that there are."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0), n_rows)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence + 1), begin), n_rows)
    return begin, end - begin


@triton.jit
def _load_parts(base, rows, n_rows, stride, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Rows `[len(rows), HEAD_DIM]` from `base` as one tensor per part of the head dimension, zero beyond the ends."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        columns = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        pointers = base + rows[:, None] * stride + columns[None, :]
        if PARTS[i][0] + PARTS[i][1] > HEAD_DIM:
            inside = columns[None, :] < HEAD_DIM
            if MASK_ROWS:
                inside = inside & (rows[:, None] < n_rows)
            part = tl.load(pointers, mask=inside, other=0.0)
        elif MASK_ROWS:
            part = tl.load(pointers, mask=rows[:, None] < n_rows, other=0.0)
        else:
            part = tl.load(pointers)
        parts = parts + (part,)
    return parts


@triton.jit
def _store_parts(base, rows, n_rows, stride, parts, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    for i in tl.static_range(len(PARTS)):
        columns = PARTS[i][0] + tl.arange(0, PARTS[i][1])
        inside = rows[:, None] < n_rows
        if PARTS[i][0] + PARTS[i][1] > HEAD_DIM:
            inside = inside & (columns[None, :] < HEAD_DIM)
        pointers = base + rows[:, None] * stride + columns[None, :]
        tl.store(pointers, parts[i].to(base.dtype.element_ty), mask=inside)


@triton.jit
def _zero_parts(N_ROWS: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (tl.zeros((N_ROWS, PARTS[i][1]), tl.float32),)
    return parts


@triton.jit
def _scale_parts(parts, factor):
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def _negate_parts(parts):
    negated = ()
    for i in tl.static_range(len(parts)):
        # By way of float32: the interpreter cannot make a bfloat16 constant.
        negated = negated + ((-parts[i].to(tl.float32)).to(parts[i].dtype),)
    return negated


@triton.jit
def _dot(a, b, acc):
    """a b + acc; acc float32 or None."""
    if INTERPRETED:  # whose product takes the bits of a bfloat16 for an integer
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _inner(a, b):
    """a bᵀ, summed over the parts of the head dimension."""
    s = _dot(a[0], tl.trans(b[0]), None)
    for i in tl.static_range(1, len(a)):
        s = _dot(a[i], tl.trans(b[i]), s)
    return s


@triton.jit
def _add_outer(parts, weights, rows):
    """parts + weights rows, part by part of the head dimension."""
    summed = ()
    for i in tl.static_range(len(parts)):
        summed = summed + (_dot(weights, rows[i], parts[i]),)
    return summed


@triton.jit
def _visible(rows, keys, n_keys, diagonal, CAUSAL: tl.constexpr):
    """Whether a query row sees a key: keys that there are, up to the diagonal (aligned bottom right) if causal."""
    visible = keys < n_keys
    if CAUSAL:
        visible = visible & (keys <= rows + diagonal)
    return visible


@triton.jit
def _store_rows(
    out, lse, row, n_rows, begin, head, n_heads, n_rows_all, parts, m, total, PARTS, HEAD_DIM: tl.constexpr
):
    """Divides by the softmax's sum and writes out and lse; m is in units of log2. Rows that saw no key: 0 and -inf."""
    seen = total != 0
    scaled = _scale_parts(parts, tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None])
    base = out + (begin.to(tl.int64) * n_heads + head) * HEAD_DIM
    _store_parts(base, row, n_rows, n_heads * HEAD_DIM, scaled, PARTS, HEAD_DIM)
    value = tl.where(seen, (m + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse + head.to(tl.int64) * n_rows_all + begin + row, value, mask=row < n_rows)


@triton.jit(do_not_specialize=["first_tile", "n_rows_q", "n_rows_k", "n_sequences"])
def attention_short_forward_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, tiles, first_tile, n_rows_q, n_rows_k, n_sequences,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale_log2,
    N_HEADS: tl.constexpr, N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr,
    KEY_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, NEGATE: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, FIRST_CLASS: tl.constexpr, LAST_CLASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile whose keys are all held at once: one maximum, one sum, no rescaling."""
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    tile_class = tl.load(tile + 2)
    if (tile_class < FIRST_CLASS) | (tile_class > LAST_CLASS):
        return
    sequence = tl.minimum(tl.maximum(tl.load(tile), 0), n_sequences - 1)
    head = tl.program_id(1)
    begin_q, n_q = _sequence_rows(cu_seqlens_q, sequence, n_rows_q)
    begin_k, n_k = _sequence_rows(cu_seqlens_k, sequence, n_rows_k)
    stride_qt, stride_qh = tl.multiple_of(stride_qt, STRIDE_ALIGN), tl.multiple_of(stride_qh, STRIDE_ALIGN)
    stride_kt, stride_kh = tl.multiple_of(stride_kt, STRIDE_ALIGN), tl.multiple_of(stride_kh, STRIDE_ALIGN)
    stride_vt, stride_vh = tl.multiple_of(stride_vt, STRIDE_ALIGN), tl.multiple_of(stride_vh, STRIDE_ALIGN)
    q_base = q + begin_q.to(tl.int64) * stride_qt + head * stride_qh
    k_base = k + begin_k.to(tl.int64) * stride_kt + (head // N_REP) * stride_kh
    v_base = v + begin_k.to(tl.int64) * stride_vt + (head // N_REP) * stride_vh

    first_row = tl.load(tile + 1)
    for step in tl.static_range(TILE // BLOCK_M):
        rows = first_row + step * BLOCK_M + tl.arange(0, BLOCK_M)
        q_rows = _load_parts(q_base, rows, n_q, stride_qt, DIM_PARTS, HEAD_DIM, True)
        if NEGATE:
            q_rows = _negate_parts(q_rows)
        scores = ()
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for i in tl.static_range(len(KEY_PARTS)):
            keys = KEY_PARTS[i][0] + tl.arange(0, KEY_PARTS[i][1])
            s = _inner(q_rows, _load_parts(k_base, keys, n_k, stride_kt, DIM_PARTS, HEAD_DIM, True))
            s = tl.where(_visible(rows[:, None], keys[None, :], n_k, n_k - n_q, CAUSAL), s, float("-inf"))
            m = tl.maximum(m, tl.max(s, 1))
            scores = scores + (s,)
        m = tl.where(m == float("-inf"), 0.0, m) * scale_log2
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = _zero_parts(BLOCK_M, DIM_PARTS)
        for i in tl.static_range(len(KEY_PARTS)):
            keys = KEY_PARTS[i][0] + tl.arange(0, KEY_PARTS[i][1])
            p = tl.exp2(scores[i] * scale_log2 - m[:, None])
            total += tl.sum(p, 1)
            v_rows = _load_parts(v_base, keys, n_k, stride_vt, DIM_PARTS, HEAD_DIM, True)
            acc = _add_outer(acc, p.to(v.dtype.element_ty), v_rows)
        _store_rows(out, lse, rows, n_q, begin_q, head, N_HEADS, n_rows_q, acc, m, total, DIM_PARTS, HEAD_DIM)


@triton.jit
def _online_softmax_step(
    q_rows, acc, m, total, k_block, v_block, stride_kt, stride_vt, rows, key, n_k, diagonal, scale_log2,
    DIM_PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Takes one block of keys, from `key` on, into the running maximum m, sum and weighted values."""
    keys = tl.arange(0, BLOCK_N)
    s = _inner(q_rows, _load_parts(k_block, keys, n_k - key, stride_kt, DIM_PARTS, HEAD_DIM, RAGGED))
    if RAGGED:
        s = tl.where(_visible(rows[:, None], key + keys[None, :], n_k, diagonal, CAUSAL), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if RAGGED else m_new
    p = tl.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, 1)
    v_rows = _load_parts(v_block, keys, n_k - key, stride_vt, DIM_PARTS, HEAD_DIM, RAGGED)
    acc = _add_outer(_scale_parts(acc, alpha[:, None]), p.to(v_block.dtype.element_ty), v_rows)
    return acc, m_new, total


@triton.jit(do_not_specialize=["first_tile", "n_rows_q", "n_rows_k", "n_sequences"])
def attention_streaming_forward_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, tiles, first_tile, n_rows_q, n_rows_k, n_sequences,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale_log2,
    N_HEADS: tl.constexpr, N_REP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, NEGATE: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, FIRST_CLASS: tl.constexpr, LAST_CLASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile that walks over blocks of keys: whole blocks without masks, then what is left or on the diagonal."""
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    tile_class = tl.load(tile + 2)
    if (tile_class < FIRST_CLASS) | (tile_class > LAST_CLASS):
        return
    sequence = tl.minimum(tl.maximum(tl.load(tile), 0), n_sequences - 1)
    head = tl.program_id(1)
    begin_q, n_q = _sequence_rows(cu_seqlens_q, sequence, n_rows_q)
    begin_k, n_k = _sequence_rows(cu_seqlens_k, sequence, n_rows_k)
    stride_qt, stride_qh = tl.multiple_of(stride_qt, STRIDE_ALIGN), tl.multiple_of(stride_qh, STRIDE_ALIGN)
    stride_kt, stride_kh = tl.multiple_of(stride_kt, STRIDE_ALIGN), tl.multiple_of(stride_kh, STRIDE_ALIGN)
    stride_vt, stride_vh = tl.multiple_of(stride_vt, STRIDE_ALIGN), tl.multiple_of(stride_vh, STRIDE_ALIGN)
    q_base = q + begin_q.to(tl.int64) * stride_qt + head * stride_qh
    k_base = k + begin_k.to(tl.int64) * stride_kt + (head // N_REP) * stride_kh
    v_base = v + begin_k.to(tl.int64) * stride_vt + (head // N_REP) * stride_vh

    diagonal = n_k - n_q
    first_row = tl.load(tile + 1)
    for step in tl.static_range(TILE // BLOCK_M):
        row = first_row + step * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        q_rows = _load_parts(q_base, rows, n_q, stride_qt, DIM_PARTS, HEAD_DIM, True)
        if NEGATE:
            q_rows = _negate_parts(q_rows)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = _zero_parts(BLOCK_M, DIM_PARTS)
        n_seen_by_all = n_k
        n_seen = n_k
        if CAUSAL:
            n_seen_by_all = tl.minimum(tl.maximum(row + diagonal + 1, 0), n_k)
            n_seen = tl.minimum(tl.maximum(row + BLOCK_M + diagonal, 0), n_k)
        whole = n_seen_by_all // BLOCK_N * BLOCK_N
        k_block, v_block = k_base, v_base
        for key in range(0, whole, BLOCK_N):
            acc, m, total = _online_softmax_step(
                q_rows, acc, m, total, k_block, v_block, stride_kt, stride_vt, rows, key, n_k, diagonal, scale_log2,
                DIM_PARTS, HEAD_DIM, BLOCK_N, CAUSAL, False,
            )  # fmt: skip
            k_block += BLOCK_N * stride_kt
            v_block += BLOCK_N * stride_vt
        for key in range(whole, n_seen, BLOCK_N):
            acc, m, total = _online_softmax_step(
                q_rows, acc, m, total, k_block, v_block, stride_kt, stride_vt, rows, key, n_k, diagonal, scale_log2,
                DIM_PARTS, HEAD_DIM, BLOCK_N, CAUSAL, True,
            )  # fmt: skip
            k_block += BLOCK_N * stride_kt
            v_block += BLOCK_N * stride_vt
        _store_rows(out, lse, rows, n_q, begin_q, head, N_HEADS, n_rows_q, acc, m, total, DIM_PARTS, HEAD_DIM)


@triton.jit(do_not_specialize=["n_rows_q", "n_rows_k", "n_sequences", "n_slots"])
def attention_tiles_kernel(
    cu_seqlens_q, cu_seqlens_k, tiles, n_rows_q, n_rows_k, n_sequences, n_slots,
    KEY_CLASSES: tl.constexpr, PADDING: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Work list from the offsets alone. Tile j of sequence b has slot cu_seqlens[b] // TILE + b + j, which no other
    tile has; slots between hold no work, class -1. Padding rows are one more sequence."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros((BLOCK,), tl.int32)
    step = 1
    while step <= n_sequences:
        step *= 2
    while step > 0:  # the last sequence whose first slot is not beyond this one
        probe = sequence + step
        begin = tl.load(cu_seqlens_q + tl.minimum(probe, n_sequences))
        begin = tl.minimum(tl.maximum(begin, 0), n_rows_q)
        sequence = tl.where((probe <= n_sequences) & (begin // TILE + probe <= slot), probe, sequence)
        step //= 2
    is_padding = sequence == n_sequences
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), 0), n_rows_q)
    last = tl.minimum(sequence + 1, n_sequences)
    end = tl.where(is_padding, n_rows_q, tl.minimum(tl.maximum(tl.load(cu_seqlens_q + last), begin), n_rows_q))
    begin_k = tl.minimum(tl.maximum(tl.load(cu_seqlens_k + sequence), 0), n_rows_k)
    n_k = tl.minimum(tl.maximum(tl.load(cu_seqlens_k + last), begin_k), n_rows_k) - begin_k
    first_row = (slot - begin // TILE - sequence) * TILE
    tile_class = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(len(KEY_CLASSES)):
        tile_class += (n_k > KEY_CLASSES[i]).to(tl.int32)
    tile_class = tl.where(is_padding, PADDING, tile_class)
    tile_class = tl.where(first_row < end - begin, tile_class, -1)
    tl.store(tiles + slot * 3, sequence, mask=slot < n_slots)
    tl.store(tiles + slot * 3 + 1, first_row, mask=slot < n_slots)
    tl.store(tiles + slot * 3 + 2, tile_class, mask=slot < n_slots)


@triton.jit(do_not_specialize=["first_tile", "n_rows", "n_sequences"])
def attention_padding_kernel(
    out, lse, cu_seqlens, tiles, first_tile, n_rows, n_sequences,
    N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LSE: tl.constexpr,
    PADDING: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of padding rows: zero, and an lse of -inf."""
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    if tl.load(tile + 2) != PADDING:
        return
    head = tl.program_id(1)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n_sequences), 0), n_rows)
    rows = begin + tl.load(tile + 1) + tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_D)
    offset = (rows.to(tl.int64)[:, None] * N_HEADS + head) * HEAD_DIM + columns[None, :]
    zeros = tl.zeros((TILE, BLOCK_D), tl.float32).to(out.dtype.element_ty)
    tl.store(out + offset, zeros, mask=(rows[:, None] < n_rows) & (columns[None, :] < HEAD_DIM))
    if HAS_LSE:
        minus_inf = tl.full((TILE,), float("-inf"), tl.float32)
        tl.store(lse + head.to(tl.int64) * n_rows + rows, minus_inf, mask=rows < n_rows)


def rows_contiguous(t: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def stride_alignment(*tensors: Tensor) -> int:
    """Largest power of two up to 16 that divides every row and head stride: what wide loads may rely on."""
    return math.gcd(16, *(stride for t in tensors for stride in t.stride()[:2]))


class Tiles:
    """The work list of one side of an attention call, and which of its rows a launch covers.

    Args:
        cu_seqlens: offsets of the rows that the tiles divide.
        n_rows: rows in all, padding included.
        cu_seqlens_k: offsets of the keys, which choose the class.
        n_rows_k: rows of the keys.
        tiles: the pack's list, or None to derive one on the device.
        counts: tiles of each class on the host, for a list that is sorted by class; empty where they are not known.
    """

    def __init__(self, cu_seqlens, n_rows, cu_seqlens_k, n_rows_k, tiles, counts):
        self.counts = tuple(counts) if tiles is not None else ()
        self.n_sequences = cu_seqlens.shape[0] - 1
        if tiles is None:
            n_slots = n_rows // TILE_ROWS + self.n_sequences + 1
            tiles = cu_seqlens.new_empty(n_slots, 3)
            launch(
                attention_tiles_kernel, (triton.cdiv(n_slots, 128),),
                cu_seqlens, cu_seqlens_k, tiles, n_rows, n_rows_k, self.n_sequences, n_slots,
                KEY_CLASSES=schedules.KEY_CLASSES, PADDING=PADDING, TILE=TILE_ROWS, BLOCK=128,
            )  # fmt: skip
        self.rows = tiles

    def of(self, first_class: int, last_class: int) -> tuple[int, int]:
        """First row of the list, and how many, that may hold tiles of these classes."""
        if not self.counts:
            return 0, self.rows.shape[0]
        return sum(self.counts[:first_class]), sum(self.counts[first_class : last_class + 1])


def _zero_padding(out: Tensor, lse: Tensor | None, cu_seqlens: Tensor, tiles: Tiles) -> None:
    first_tile, n_tiles = tiles.of(PADDING, PADDING)
    launch(
        attention_padding_kernel, (n_tiles, out.shape[1]),
        out, out if lse is None else lse, cu_seqlens, tiles.rows, first_tile, out.shape[0], tiles.n_sequences,
        N_HEADS=out.shape[1], HEAD_DIM=out.shape[2], BLOCK_D=triton.next_power_of_2(out.shape[2]),
        HAS_LSE=lse is not None, PADDING=PADDING, TILE=TILE_ROWS,
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
    work = Tiles(cu_seqlens_q, q.shape[0], cu_seqlens_k, k.shape[0], tiles, tile_counts)
    for schedule in schedules.forward(target_of(q.device), head_dim, q.dtype):
        if schedule.beyond(max_seqlen_k):
            break
        first_tile, n_tiles = work.of(schedule.first_class, schedule.last_class)
        kernel, keys = _forward_kernel(schedule)
        launch(
            kernel, (n_tiles, n_heads),
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, work.rows, first_tile, q.shape[0], k.shape[0],
            work.n_sequences, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], _scale_log2(scale),
            N_HEADS=n_heads, N_REP=n_heads // k.shape[1], HEAD_DIM=head_dim,
            DIM_PARTS=schedules.parts_of(head_dim), **keys, BLOCK_M=schedule.block_m, CAUSAL=causal,
            NEGATE=scale < 0, STRIDE_ALIGN=stride_alignment(q, k, v), FIRST_CLASS=schedule.first_class,
            LAST_CLASS=schedule.last_class, TILE=TILE_ROWS, num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
        )  # fmt: skip
    _zero_padding(out, lse, cu_seqlens_q, work)
    return out, lse


def _forward_kernel(schedule: Schedule):
    if schedule.name == "short":
        return attention_short_forward_kernel, {"KEY_PARTS": schedules.parts_of(schedule.keys)}
    return attention_streaming_forward_kernel, {"BLOCK_N": schedule.keys}


def _scale_log2(scale: float) -> float:
    """|scale| in units of log2, not quite zero: scores of -inf, which mask keys, must stay so when scaled."""
    return max(abs(scale) * LOG2_E, 1e-30)

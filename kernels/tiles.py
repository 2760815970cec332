"""The work list of an attention call on the device: which tiles a launch covers, and the tiles of padding rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .constants import KEY_CLASSES, PADDING, TILE_ROWS
from .launch import launch


@triton.jit(do_not_specialize=["n_rows_q", "n_rows_k", "n_sequences", "n_slots"])
def attention_tiles_kernel(
    cu_seqlens_q, cu_seqlens_k, tiles, n_rows_q, n_rows_k, n_sequences, n_slots,
    KEY_CLASSES: tl.constexpr, PADDING: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the work list from the offsets alone.

    Tile j of sequence b has slot cu_seqlens[b] // TILE + b + j, which no other tile has. Unused slots have class -1 and
    no work. Padding rows are one more sequence.
    """
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
    grad, cu_seqlens, tiles, first_tile, n_rows, n_sequences,
    N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PADDING: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes zeros to one tile of padding rows of a gradient."""
    tile = tiles + (first_tile + tl.program_id(0)) * 3
    if tl.load(tile + 2) != PADDING:
        return
    head = tl.program_id(1)
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n_sequences), 0), n_rows)
    rows = begin + tl.load(tile + 1) + tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK_D)
    offset = (rows.to(tl.int64)[:, None] * N_HEADS + head) * HEAD_DIM + columns[None, :]
    zeros = tl.zeros((TILE, BLOCK_D), tl.float32).to(grad.dtype.element_ty)
    tl.store(grad + offset, zeros, mask=(rows[:, None] < n_rows) & (columns[None, :] < HEAD_DIM))


class Tiles:
    """The work list of one side of an attention call, and which of its rows a launch covers.

    Args:
        cu_seqlens: offsets of the rows that the tiles divide.
        n_rows: number of rows, including padding.
        cu_seqlens_k: offsets of the keys, which choose the class.
        n_rows_k: number of rows of the keys.
        tiles: the pack's list, or None to derive one on the device.
        counts: number of tiles of each class on the host, for a list that is sorted by class; empty if they are not
            known.
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
                KEY_CLASSES=KEY_CLASSES, PADDING=PADDING, TILE=TILE_ROWS, BLOCK=128,
            )  # fmt: skip
        self.rows = tiles

    def of(self, first_class: int, last_class: int) -> tuple[int, int]:
        """First row and number of rows of the list that may hold tiles of these classes."""
        if not self.counts:
            return 0, self.rows.shape[0]
        return sum(self.counts[:first_class]), sum(self.counts[first_class : last_class + 1])


def zero_padding(grad: Tensor, cu_seqlens: Tensor, tiles: Tiles) -> None:
    """Writes zeros to the padding rows of a gradient."""
    first_tile, n_tiles = tiles.of(PADDING, PADDING)
    launch(
        attention_padding_kernel, (n_tiles, grad.shape[1]),
        grad, cu_seqlens, tiles.rows, first_tile, grad.shape[0], tiles.n_sequences,
        N_HEADS=grad.shape[1], HEAD_DIM=grad.shape[2], BLOCK_D=triton.next_power_of_2(grad.shape[2]), PADDING=PADDING,
        TILE=TILE_ROWS,
    )  # fmt: skip

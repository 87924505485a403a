"""Where tiles lie in memory: the only place that knows packed from dense, and strides from positions.

Offsets are 64-bit before they are multiplied, so tensors of more than 2**31 elements are addressed right.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.backends.triton import constants

STATISTICS_ROWS = tl.constexpr(constants.STATISTICS_ROWS)


class Sequence(NamedTuple):
    """One sequence of the batch: its index, its first rows in packed buffers (0 if dense), and its lengths."""

    batch_idx: Any
    q_begin: Any
    kv_begin: Any
    seqlen_q: Any
    seqlen_kv: Any


@triton.jit
def find_sequence(sequences, batch_idx, seqlen_q, seqlen_kv):
    """The sequence ``batch_idx``; ``seqlen_q`` and ``seqlen_kv`` are its lengths if dense, upper bounds if packed."""
    if sequences.cu_seqlens_q is None:
        return Sequence(batch_idx, 0, 0, seqlen_q, seqlen_kv)
    else:
        q_begin = tl.load(sequences.cu_seqlens_q + batch_idx)
        kv_begin = tl.load(sequences.cu_seqlens_kv + batch_idx)
        q_end = tl.load(sequences.cu_seqlens_q + batch_idx + 1)
        kv_end = tl.load(sequences.cu_seqlens_kv + batch_idx + 1)
        return Sequence(batch_idx, q_begin, kv_begin, q_end - q_begin, kv_end - kv_begin)


@triton.jit
def row_pointer(matrix, batch_idx, head_idx, row_idx):
    """The address of column 0 in one row; ``row_idx`` counts from the start of the buffer if packed."""
    offset = tl.cast(batch_idx, tl.int64) * matrix.batch_stride + tl.cast(head_idx, tl.int64) * matrix.head_stride
    return matrix.ptr + offset + tl.cast(row_idx, tl.int64) * matrix.row_stride


@triton.jit
def tile_pointers(ptr, matrix, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, begin=0):
    """[BLOCK_ROWS, BLOCK_COLS] addresses of the tile whose first element is at ``ptr``.

    Wide tiles count from there in 32 bits, as the planner sees to; so many 64-bit addresses would not fit in registers.
    A loop that has no registers for these either says where its tile begins, and computes them in every step: with a 0
    that is not known to be one, the sign of a number that changes from step to step.
    """
    rows, cols = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLS)[None, :]
    if BLOCK_COLS < 256:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    else:
        rows += begin >> 31
    return ptr + (rows * matrix.row_stride + cols * matrix.col_stride)


@triton.jit
def inside(num_rows, NUM_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Which elements of a tile exist; broadcasts to [BLOCK_ROWS, BLOCK_COLS]."""
    rows = (tl.arange(0, BLOCK_ROWS) < num_rows)[:, None]
    if NUM_COLS < BLOCK_COLS:
        return rows & (tl.arange(0, BLOCK_COLS) < NUM_COLS)[None, :]
    else:
        return rows


@triton.jit
def load_tile(
    ptr, matrix, num_rows, NUM_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, begin=0
):
    """[BLOCK_ROWS, BLOCK_COLS] of the matrix from ``ptr`` on, of which ``num_rows`` rows and NUM_COLS columns exist.

    What lies outside is never read, and 0. ``begin``: see ``tile_pointers``.
    """
    pointers = tile_pointers(ptr, matrix, BLOCK_ROWS, BLOCK_COLS, begin)
    return tl.load(pointers, mask=inside(num_rows, NUM_COLS, BLOCK_ROWS, BLOCK_COLS), other=0.0)


@triton.jit
def store_tile(ptr, matrix, tile, num_rows, NUM_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Stores the part of the tile that exists, in the matrix's dtype: the one rounding of a result."""
    pointers = tile_pointers(ptr, matrix, BLOCK_ROWS, BLOCK_COLS)
    exists = inside(num_rows, NUM_COLS, BLOCK_ROWS, BLOCK_COLS)
    tl.store(pointers, tile.to(matrix.ptr.dtype.element_ty), mask=exists)


@triton.jit
def lse_pointer(ptr, sequences, sequence, heads, head_idx, head_stride):
    """The address of the sequence's first lse, in a contiguous [batch, heads, rows], or packed [heads, rows]."""
    row_of_heads = tl.cast(head_idx, tl.int64)
    if sequences.cu_seqlens_q is None:
        row_of_heads += tl.cast(sequence.batch_idx, tl.int64) * heads.num_q
    return ptr + row_of_heads * head_stride + sequence.q_begin


@triton.jit
def statistics_pointer(rows, sequence, head_idx, q_begin):
    """The address of the backward's number for one query row; see ``STATISTICS_ROWS``."""
    begin = sequence.batch_idx * tl.cast(rows.batch_stride, tl.int64)
    begin += sequence.q_begin // STATISTICS_ROWS * STATISTICS_ROWS
    return rows.ptr + begin + tl.cast(head_idx, tl.int64) * rows.head_stride + q_begin

"""Before the backward: delta = rowsum(out * d_out) - d_lse, the lse as a power of two, and zeros. After it: d_q,
and d_k and d_v where they were added up too.

Plain Triton: passes that memory bounds have no use for Hopper's asynchronous units. Both go from the last head to the
first: then the L2 cache has what the kernel begins with, and what it ended with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.hopper import constants

LOG2_E = tl.constexpr(constants.LOG2_E)
INF = tl.constexpr(float("inf"))
STATISTICS_ROWS = tl.constexpr(constants.STATISTICS_ROWS)
SUM_ROWS = tl.constexpr(constants.SUM_ROWS)


@triton.jit(do_not_specialize=["lse_length", "length", "num_sum_blocks", "num_stored_rows", "seqlen_q"])
def attention_row_statistics(
    out,
    d_out,
    lse,
    d_lse,
    lse_length,
    lse_log2,
    delta,
    length,
    d_q_sums,
    num_sum_blocks,
    num_stored_rows,
    counter,
    cu_seqlens_q,
    num_heads,
    seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """BLOCK_ROWS rows of one head: their numbers, and zeros for sums that are added to; one for the counter of shares.

    lse and d_lse are contiguous [batch, heads, lse_length], lse_log2 and delta [batch, heads, length]; packed ones
    have no batch axis. Rows beyond a sequence get delta 0 and lse_log2 +inf, so p is 0.
    """
    num_blocks = tl.cdiv(seqlen_q, STATISTICS_ROWS) * (STATISTICS_ROWS // BLOCK_ROWS)
    program_idx = tl.num_programs(0) - 1 - tl.program_id(0)
    head_and_batch = program_idx // num_blocks
    head_idx, batch_idx = head_and_batch % num_heads, head_and_batch // num_heads
    begin = program_idx % num_blocks * BLOCK_ROWS
    row = begin + tl.arange(0, BLOCK_ROWS)

    buffer_idx, first_row, first_number = batch_idx, 0, 0
    if cu_seqlens_q is not None:
        first_row = tl.load(cu_seqlens_q + batch_idx)
        seqlen_q = tl.load(cu_seqlens_q + batch_idx + 1) - first_row
        buffer_idx, first_number = 0, (batch_idx + first_row // STATISTICS_ROWS) * STATISTICS_ROWS
    exists = row < seqlen_q
    cols = tl.arange(0, BLOCK_DV)[None, :]
    mask = exists[:, None] & (cols < HEAD_DIM_V)
    token = (first_row + row).to(tl.int64)[:, None]
    out_tile = tl.load(_place(out, buffer_idx, head_idx) + token * out.row_stride + cols, mask=mask, other=0.0)
    d_out_tile = tl.load(_place(d_out, buffer_idx, head_idx) + token * d_out.row_stride + cols, mask=mask, other=0.0)
    numbers = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)  # [BLOCK_ROWS]
    line = tl.cast(buffer_idx * num_heads + head_idx, tl.int64)
    source = line * lse_length + first_row + row
    row_lse = tl.load(lse + source, mask=exists, other=-INF)
    if d_lse is not None:
        numbers -= tl.load(d_lse + source, mask=exists, other=0.0)

    last_block = tl.cdiv(seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS
    within = row < last_block
    target = line * length + first_number + row
    tl.store(lse_log2 + target, tl.where(row_lse > -INF, row_lse * LOG2_E, INF), mask=within)
    tl.store(delta + target, numbers, mask=within)

    first_sum = _first_sum(line, num_sum_blocks, cu_seqlens_q, batch_idx, first_row, BLOCK_D)
    place = tl.cast(begin, tl.int64) * BLOCK_D + tl.arange(0, BLOCK_ROWS * BLOCK_D)
    is_added_to = place < tl.cdiv(seqlen_q, SUM_ROWS) * SUM_ROWS * BLOCK_D
    if num_stored_rows is not None:
        is_added_to &= place >= tl.cast(num_stored_rows, tl.int64) * BLOCK_D
    tl.store(d_q_sums + first_sum + place, 0.0, mask=is_added_to)
    if counter is not None:
        tl.store(counter, 0, mask=program_idx == 0)


@triton.jit(do_not_specialize=["num_sum_blocks", "seqlen"])
def attention_scale_gradient(
    all_sums,
    num_sum_blocks,
    gradient,
    scale,
    cu_seqlens,
    num_heads,
    seqlen,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A gradient, scale * sums, rounded once, of BLOCK_ROWS rows of one head."""
    num_blocks = tl.cdiv(seqlen, BLOCK_ROWS)
    program_idx = tl.num_programs(0) - 1 - tl.program_id(0)
    head_and_batch = program_idx // num_blocks
    head_idx, batch_idx = head_and_batch % num_heads, head_and_batch // num_heads
    begin = program_idx % num_blocks * BLOCK_ROWS
    row = begin + tl.arange(0, BLOCK_ROWS)

    buffer_idx, first_row = batch_idx, 0
    if cu_seqlens is not None:
        first_row = tl.load(cu_seqlens + batch_idx)
        seqlen = tl.load(cu_seqlens + batch_idx + 1) - first_row
        buffer_idx = 0
    line = tl.cast(buffer_idx * num_heads + head_idx, tl.int64)
    first_sum = _first_sum(line, num_sum_blocks, cu_seqlens, batch_idx, first_row, BLOCK_D)
    place = tl.cast(begin, tl.int64) * BLOCK_D + tl.arange(0, BLOCK_ROWS * BLOCK_D)
    sums = tl.load(all_sums + first_sum + place, mask=place < tl.cdiv(seqlen, SUM_ROWS) * SUM_ROWS * BLOCK_D)
    tile = (_in_rows(sums, BLOCK_ROWS, BLOCK_D) * scale).to(gradient.ptr.dtype.element_ty)
    cols = tl.arange(0, BLOCK_D)[None, :]
    token = (first_row + row).to(tl.int64)[:, None]
    mask = (row < seqlen)[:, None] & (cols < HEAD_DIM)
    tl.store(_place(gradient, buffer_idx, head_idx) + token * gradient.row_stride + cols, tile, mask=mask)


@triton.jit
def _in_rows(sums, NUM_ROWS: tl.constexpr, NUM_COLS: tl.constexpr):
    """Sums as they lie in memory, as a matrix [NUM_ROWS, NUM_COLS].

    They lie as the product of a warp does in its registers: of each 16 rows and 8 columns a thread has two neighbours
    and the two that are 8 rows below them (PTX ISA, wgmma, fragments of D).
    """
    in_order = tl.reshape(sums, (NUM_ROWS // SUM_ROWS, NUM_COLS // 8, 8, 4, 2, 2))
    return tl.reshape(tl.permute(in_order, (0, 4, 2, 1, 3, 5)), (NUM_ROWS, NUM_COLS))


@triton.jit
def _first_sum(line, num_sum_blocks, cu_seqlens_q, batch_idx, first_row, BLOCK_D: tl.constexpr):
    """Where the sums of a sequence's head begin; see ``addressing.sums_block``."""
    block = line * num_sum_blocks
    if cu_seqlens_q is not None:
        block += batch_idx + first_row // SUM_ROWS
    return block * SUM_ROWS * BLOCK_D


@triton.jit
def _place(tensor, buffer_idx, head_idx):
    """The address of a head's first row."""
    offset = tl.cast(buffer_idx, tl.int64) * tensor.batch_stride + tl.cast(head_idx, tl.int64) * tensor.head_stride
    return tensor.ptr + offset

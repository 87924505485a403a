"""Before the backward: delta = rowsum(out * d_out) - d_lse and the lse as a power of two. After it: d_q, rounded once.

Plain Triton: passes that memory bounds have no use for Hopper's asynchronous units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.hopper import constants

LOG2_E = tl.constexpr(constants.LOG2_E)
INF = tl.constexpr(float("inf"))
STATISTICS_ROWS = tl.constexpr(constants.STATISTICS_ROWS)


@triton.jit(do_not_specialize=["lse_length", "length", "seqlen_q"])
def attention_row_statistics(
    out,
    d_out,
    lse,
    d_lse,
    lse_length,
    lse_log2,
    delta,
    length,
    cu_seqlens_q,
    num_heads,
    seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program fills BLOCK_ROWS numbers of one head; rows beyond a sequence get delta 0 and lse +inf, so p is 0.

    lse and d_lse are contiguous [batch, heads, lse_length], lse_log2 and delta [batch, heads, length]; packed ones
    have no batch axis.
    """
    num_blocks = tl.cdiv(seqlen_q, STATISTICS_ROWS) * (STATISTICS_ROWS // BLOCK_ROWS)
    program_idx = tl.program_id(0)
    head_and_batch = program_idx // num_blocks
    head_idx, batch_idx = head_and_batch % num_heads, head_and_batch // num_heads
    row = program_idx % num_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)

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


@triton.jit(do_not_specialize=["num_rows"])
def attention_scale_d_q(
    d_q_sum,
    d_q,
    num_rows,
    sum_row_stride,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """d_q = d_q_sum * scale in d_q's dtype, for all heads of all tokens; d_q's rows lie side by side."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < num_rows) & (cols < HEAD_DIM)
    total = tl.load(d_q_sum + row * sum_row_stride + cols, mask=mask)
    tl.store(d_q + row * HEAD_DIM + cols, (total * scale).to(d_q.dtype.element_ty), mask=mask)


@triton.jit
def _place(tensor, buffer_idx, head_idx):
    """The address of a head's first row."""
    offset = tl.cast(buffer_idx, tl.int64) * tensor.batch_stride + tl.cast(head_idx, tl.int64) * tensor.head_stride
    return tensor.ptr + offset

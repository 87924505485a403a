"""After a forward whose keys were split: the results of all parts become one. Plain Triton, bound by memory.

With ``(out_i, lse_i)`` of part i of a row's keys, and a sink, which is one more part without a value:

    weight_i = exp(lse_i - max lse)     total = sum of weight_i, and exp(sink - max lse)
    out = sum of weight_i * out_i / total     lse = max lse + log(total)

Source: Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding for long-context inference"; the rescaling is that of the
online softmax (Milakov and Gimelshein 2018, algorithm 3).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.hopper import constants

LOG2_E = tl.constexpr(constants.LOG2_E)
LN_2 = tl.constexpr(1 / constants.LOG2_E)
INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["num_parts", "seqlen_q"])
def attention_combine(
    out_parts,
    lse_parts,
    num_parts,
    sink_ptr,
    out,
    lse,
    seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """ROWS rows of one head, PARTS parts of each at a time; the grid is [batch, heads, blocks of rows].

    out_parts and lse_parts are contiguous [num_parts, batch, seqlen_q, heads, HEAD_DIM_V] and [num_parts, batch, heads,
    seqlen_q], float32, and lse [batch, heads, seqlen_q].
    """
    batch_idx, head_idx = tl.program_id(0), tl.program_id(1)
    batch, num_heads = tl.num_programs(0), tl.num_programs(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_DV)
    row_exists, col_exists = row < seqlen_q, cols < HEAD_DIM_V

    max_log2, total = tl.zeros([ROWS], tl.float32) - INF, tl.zeros([ROWS], tl.float32)
    if sink_ptr is not None:
        sink_log2 = tl.load(sink_ptr + head_idx).to(tl.float32) * LOG2_E
        max_log2, total = tl.zeros([ROWS], tl.float32) + sink_log2, tl.zeros([ROWS], tl.float32) + 1.0
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for first_part in range(0, num_parts, PARTS):
        part = first_part + tl.arange(0, PARTS)
        entry = part.to(tl.int64) * batch + batch_idx
        exists = row_exists[:, None] & (part < num_parts)[None, :]  # [ROWS, PARTS]
        lse_place = ((entry * num_heads + head_idx) * seqlen_q)[None, :] + row[:, None]
        out_place = (((entry * seqlen_q)[None, :] + row[:, None]) * num_heads + head_idx) * HEAD_DIM_V
        part_log2 = tl.load(lse_parts + lse_place, mask=exists, other=-INF) * LOG2_E
        mask = exists[:, :, None] & col_exists[None, None, :]
        part_out = tl.load(out_parts + out_place[:, :, None] + cols[None, None, :], mask=mask, other=0.0)
        new_max = tl.maximum(max_log2, tl.max(part_log2, 1))
        shift = tl.where(new_max == -INF, 0.0, new_max)
        rescale, weight = tl.exp2(max_log2 - shift), tl.exp2(part_log2 - shift[:, None])
        total = total * rescale + tl.sum(weight, 1)
        # What a part without weight has does not count, not even NaN.
        weighted = tl.where(weight[:, :, None] > 0.0, part_out * weight[:, :, None], 0.0)
        acc = acc * rescale[:, None] + tl.sum(weighted, 1)
        max_log2 = new_max

    sees_nothing = total == 0.0
    total = tl.where(sees_nothing, 1.0, total)
    row_lse = tl.where(sees_nothing, -INF, (max_log2 + tl.log2(total)) * LN_2)
    row_out = (acc / total[:, None]).to(out.ptr.dtype.element_ty)  # rounded for the caller, once
    begin = tl.cast(batch_idx, tl.int64) * out.batch_stride + tl.cast(head_idx, tl.int64) * out.head_stride
    places = begin + row.to(tl.int64)[:, None] * out.row_stride + cols[None, :]
    tl.store(out.ptr + places, row_out, mask=row_exists[:, None] & col_exists[None, :])
    line = tl.cast(batch_idx, tl.int64) * num_heads + head_idx
    tl.store(lse + line * seqlen_q + row, row_lse, mask=row_exists)

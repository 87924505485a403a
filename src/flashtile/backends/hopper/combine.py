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
PARTS = tl.constexpr(constants.PARTS)


@triton.jit(do_not_specialize=["num_parts"])
def attention_combine(
    out_parts,
    lse_parts,
    num_parts,
    sink_ptr,
    out,
    lse,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One row; the grid is [batch, heads, seqlen_q].

    out_parts and lse_parts are contiguous [num_parts, batch, seqlen_q, heads, HEAD_DIM_V] and [num_parts, batch, heads,
    seqlen_q], float32, and lse [batch, heads, seqlen_q].
    """
    batch_idx, head_idx, row_idx = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, num_heads, seqlen_q = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    cols = tl.arange(0, BLOCK_DV)

    max_log2, total = -INF, 0.0
    if sink_ptr is not None:
        max_log2, total = tl.load(sink_ptr + head_idx).to(tl.float32) * LOG2_E, 1.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first_part in range(0, num_parts, PARTS):
        part = first_part + tl.arange(0, PARTS)
        entry = part.to(tl.int64) * batch + batch_idx
        exists = part < num_parts
        lse_place = (entry * num_heads + head_idx) * seqlen_q + row_idx
        out_place = ((entry * seqlen_q + row_idx) * num_heads + head_idx) * HEAD_DIM_V
        part_log2 = tl.load(lse_parts + lse_place, mask=exists, other=-INF) * LOG2_E  # [PARTS]
        mask = exists[:, None] & (cols < HEAD_DIM_V)[None, :]
        part_out = tl.load(out_parts + out_place[:, None] + cols[None, :], mask=mask, other=0.0)  # [PARTS, BLOCK_DV]
        new_max = tl.maximum(max_log2, tl.max(part_log2, 0))
        shift = tl.where(new_max == -INF, 0.0, new_max)
        rescale, weight = tl.exp2(max_log2 - shift), tl.exp2(part_log2 - shift)
        total = total * rescale + tl.sum(weight, 0)
        # What a part without weight has does not count, not even NaN.
        acc = acc * rescale + tl.sum(tl.where(weight[:, None] > 0.0, part_out * weight[:, None], 0.0), 0)
        max_log2 = new_max

    sees_nothing = total == 0.0
    total = tl.where(sees_nothing, 1.0, total)
    row_lse = tl.where(sees_nothing, -INF, (max_log2 + tl.log2(total)) * LN_2)
    row_out = (acc / total).to(out.ptr.dtype.element_ty)  # rounded for the caller, once
    begin = tl.cast(batch_idx, tl.int64) * out.batch_stride + tl.cast(head_idx, tl.int64) * out.head_stride
    begin += tl.cast(row_idx, tl.int64) * out.row_stride
    tl.store(out.ptr + begin + cols, row_out, mask=cols < HEAD_DIM_V)
    line = tl.cast(batch_idx, tl.int64) * num_heads + head_idx
    tl.store(lse + line * seqlen_q + row_idx, row_lse)

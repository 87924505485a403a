"""Forward: one program per tile of queries of one head streams K and V past it (FlashAttention-2, algorithm 1).

| name | what |
|---|---|
| q, k, v | tiles [BLOCK_Q, BLOCK_D], [BLOCK_KV, BLOCK_D], [BLOCK_KV, BLOCK_DV] in the inputs' dtype |
| s, p | scores and unnormalised probabilities [BLOCK_Q, BLOCK_KV], float32 |
| max_log2, row_sum | softmax statistics of each query row [BLOCK_Q], float32 |
| acc | the output before normalisation [BLOCK_Q, BLOCK_DV], float32 |
| tiles | which kv tiles the window leaves full, partial or empty; empty ones are never visited |
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.triton.primitives import scores
from flashtile.backends.triton.primitives.addressing import (
    find_sequence,
    load_tile,
    lse_pointer,
    row_pointer,
    store_tile,
)
from flashtile.backends.triton.primitives.masking import is_full, kv_tiles
from flashtile.backends.triton.primitives.online_softmax import INF, finish, softmax_step
from flashtile.backends.triton.primitives.products import accumulate
from flashtile.backends.triton.primitives.scheduling import share


@triton.jit(do_not_specialize=["lse_head_stride", "seqlen_q", "seqlen_kv"])
def attention_forward(
    q_matrix,
    k_matrix,
    v_matrix,
    out_matrix,
    lse_ptr,
    lse_head_stride,
    sink_ptr,
    rules,
    sequences,
    heads,
    seqlen_q,
    seqlen_kv,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    work = share(tl.cdiv(seqlen_q, BLOCK_Q), heads.num_q, LAST_FIRST=rules.window.right is not None)
    sequence = find_sequence(sequences, work.batch_idx, seqlen_q, seqlen_kv)
    q_begin = work.tile_idx * BLOCK_Q
    num_rows = sequence.seqlen_q - q_begin
    if num_rows <= 0:
        return

    head = scores.HeadRules(rules, sequence, work.head_idx)
    kv_head_idx = work.head_idx // heads.per_kv
    q_ptr = row_pointer(q_matrix, work.batch_idx, work.head_idx, sequence.q_begin + q_begin)
    k_ptr = row_pointer(k_matrix, work.batch_idx, kv_head_idx, sequence.kv_begin)
    v_ptr = row_pointer(v_matrix, work.batch_idx, kv_head_idx, sequence.kv_begin)
    q = load_tile(q_ptr, q_matrix, num_rows, HEAD_DIM, BLOCK_Q, BLOCK_D)

    max_log2 = tl.full([BLOCK_Q], -INF, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    q_end = tl.minimum(q_begin + BLOCK_Q, sequence.seqlen_q)
    tiles = kv_tiles(rules.window, sequence.seqlen_q, sequence.seqlen_kv, q_begin, q_end, BLOCK_KV)
    for tile_idx in range(tiles.begin, tiles.end):
        kv_begin = tile_idx * BLOCK_KV
        tile = scores.Tile(q_begin, kv_begin, is_full(tiles, tile_idx))
        num_kv = sequence.seqlen_kv - kv_begin
        k_tile_ptr = k_ptr + tl.cast(kv_begin, tl.int64) * k_matrix.row_stride
        k = load_tile(k_tile_ptr, k_matrix, num_kv, HEAD_DIM, BLOCK_KV, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV] f32
        s, _ = scores.scored(product, head, tile, False, BLOCK_Q, BLOCK_KV)
        p, max_log2, row_sum, rescale = softmax_step(s, max_log2, row_sum, scores.unit_log2(rules))
        if rules.dropout is not None:
            p *= scores.survival(head, tile, False, BLOCK_Q, BLOCK_KV)
        v_tile_ptr = v_ptr + tl.cast(kv_begin, tl.int64) * v_matrix.row_stride
        v = load_tile(v_tile_ptr, v_matrix, num_kv, HEAD_DIM_V, BLOCK_KV, BLOCK_DV)
        acc = accumulate(acc * rescale[:, None], p, v, PRECISION)  # [BLOCK_Q, BLOCK_DV] f32

    factor, lse = finish(max_log2, row_sum, sink_ptr, work.head_idx)
    out_ptr = row_pointer(out_matrix, work.batch_idx, work.head_idx, sequence.q_begin + q_begin)
    store_tile(out_ptr, out_matrix, acc * factor[:, None], num_rows, HEAD_DIM_V, BLOCK_Q, BLOCK_DV)
    lse_ptr = lse_pointer(lse_ptr, sequences, sequence, heads, work.head_idx, lse_head_stride) + q_begin
    rows = tl.arange(0, BLOCK_Q)
    tl.store(lse_ptr + rows, lse, mask=rows < num_rows)

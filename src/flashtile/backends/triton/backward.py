"""Backward: three kernels without atomics, so it is bitwise repeatable by construction (FlashAttention-2, algorithm 2).

1. ``attention_row_statistics``: delta = rowsum(out * d_out) - d_lse and lse_log2, two numbers per query row.
2. ``attention_backward_kv``: one program per tile of keys of one kv head streams Q and d_out past it, for every query
   head that shares the kv head, and owns d_k and d_v of its keys.
3. ``attention_backward_q``: one program per tile of queries of one head streams K and V past it and owns d_q.

The scores are computed again from lse, p = exp2(s - lse), in both of the last two: seven products where atomic addition
of d_q would need five, in exchange for no float32 copy of d_q in memory and for the order of every sum being fixed.

| name | what |
|---|---|
| s, p, d_p, d_s | scores, probabilities and their gradients, float32; ``_t`` where keys are the rows |
| lse_log2, delta | what the forward and the first kernel left for each query row, float32 |
| factor | float32 inputs only: p = factor * exp2(s - lse_log2), see ``MIDDLE_LOG2`` |
| d_q, d_k, d_v | accumulators [BLOCK_Q, BLOCK_D], [BLOCK_KV, BLOCK_D], [BLOCK_KV, BLOCK_DV], float32 |
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.triton import constants
from flashtile.backends.triton.primitives import scores
from flashtile.backends.triton.primitives.addressing import (
    STATISTICS_ROWS,
    find_sequence,
    load_tile,
    lse_pointer,
    row_pointer,
    statistics_pointer,
    store_tile,
)
from flashtile.backends.triton.primitives.masking import is_full, kv_tiles, q_tiles
from flashtile.backends.triton.primitives.online_softmax import INF, LOG2_E
from flashtile.backends.triton.primitives.products import accumulate
from flashtile.backends.triton.primitives.scheduling import share

MIDDLE_LOG2 = tl.constexpr(constants.MIDDLE_LOG2)
MIDDLE = tl.constexpr(2.0**constants.MIDDLE_LOG2)


@triton.jit(do_not_specialize=["lse_head_stride", "seqlen_q", "seqlen_kv"])
def attention_row_statistics(
    out_matrix,
    d_out_matrix,
    lse_ptr,
    d_lse_ptr,
    lse_head_stride,
    lse_log2_rows,
    factor_rows,
    delta_rows,
    sequences,
    heads,
    seqlen_q,
    seqlen_kv,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    work = share(tl.cdiv(seqlen_q, STATISTICS_ROWS) * (STATISTICS_ROWS // BLOCK_Q), heads.num_q, LAST_FIRST=False)
    sequence = find_sequence(sequences, work.batch_idx, seqlen_q, seqlen_kv)
    q_begin = work.tile_idx * BLOCK_Q
    num_rows = sequence.seqlen_q - q_begin
    if q_begin >= tl.cdiv(sequence.seqlen_q, STATISTICS_ROWS) * STATISTICS_ROWS:
        return
    rows = tl.arange(0, BLOCK_Q)
    exists = rows < num_rows
    lse = tl.full([BLOCK_Q], -INF, tl.float32)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if num_rows > 0:
        row_idx = sequence.q_begin + q_begin
        out_ptr = row_pointer(out_matrix, work.batch_idx, work.head_idx, row_idx)
        d_out_ptr = row_pointer(d_out_matrix, work.batch_idx, work.head_idx, row_idx)
        out = load_tile(out_ptr, out_matrix, num_rows, HEAD_DIM_V, BLOCK_Q, BLOCK_DV)
        d_out = load_tile(d_out_ptr, d_out_matrix, num_rows, HEAD_DIM_V, BLOCK_Q, BLOCK_DV)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)  # [BLOCK_Q]
        first_lse = lse_pointer(lse_ptr, sequences, sequence, heads, work.head_idx, lse_head_stride) + q_begin
        lse = tl.load(first_lse + rows, mask=exists, other=-INF)
        if d_lse_ptr is not None:
            first_d_lse = lse_pointer(d_lse_ptr, sequences, sequence, heads, work.head_idx, lse_head_stride) + q_begin
            delta -= tl.load(first_d_lse + rows, mask=exists, other=0.0)
        delta = tl.where(exists, delta, 0.0)
    # A row that sees nothing, or is none, gets +inf: then p = exp2(s - lse) is 0, whatever its scores.
    is_finite = lse > -INF
    exact = tl.where(is_finite, lse, 0.0).to(tl.float64) * LOG2_E
    if factor_rows is not None:
        exact += MIDDLE_LOG2
    lse_log2 = exact.to(tl.float32)
    lse_log2_ptr = statistics_pointer(lse_log2_rows, sequence, work.head_idx, q_begin)
    tl.store(lse_log2_ptr + rows, tl.where(is_finite, lse_log2, INF))
    if factor_rows is not None:
        factor = tl.exp2((lse_log2.to(tl.float64) - exact).to(tl.float32)) * MIDDLE
        tl.store(statistics_pointer(factor_rows, sequence, work.head_idx, q_begin) + rows, factor)
    tl.store(statistics_pointer(delta_rows, sequence, work.head_idx, q_begin) + rows, delta)


@triton.jit
def probabilities(
    product,
    lse_log2_rows,
    factor_rows,
    head,
    tile,
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """(p, capped) of a tile of products, before dropout."""
    lse_log2 = per_query(lse_log2_rows, head, tile, TRANSPOSED, BLOCK_Q)
    s, capped = scores.scored(product, head, tile, TRANSPOSED, BLOCK_Q, BLOCK_KV)
    p = tl.exp2(tl.fma(s, scores.unit_log2(head.rules), -lse_log2))
    if factor_rows is not None:
        p *= per_query(factor_rows, head, tile, TRANSPOSED, BLOCK_Q)
    return p, capped


@triton.jit
def per_query(rows, head, tile, TRANSPOSED: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The backward's numbers of a tile's query rows, to broadcast against the tile."""
    numbers = tl.load(statistics_pointer(rows, head.sequence, head.head_idx, tile.q_begin) + tl.arange(0, BLOCK_Q))
    return numbers[None, :] if TRANSPOSED else numbers[:, None]


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_kv"])
def attention_backward_kv(
    q_matrix,
    k_matrix,
    v_matrix,
    d_out_matrix,
    lse_log2_rows,
    factor_rows,
    delta_rows,
    d_k_matrix,
    d_v_matrix,
    scale,
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
    work = share(tl.cdiv(seqlen_kv, BLOCK_KV), heads.num_q // heads.per_kv, LAST_FIRST=False)
    sequence = find_sequence(sequences, work.batch_idx, seqlen_q, seqlen_kv)
    kv_begin = work.tile_idx * BLOCK_KV
    num_kv = sequence.seqlen_kv - kv_begin
    if num_kv <= 0:
        return

    row_idx = sequence.kv_begin + kv_begin
    k_ptr = row_pointer(k_matrix, work.batch_idx, work.head_idx, row_idx)
    v_ptr = row_pointer(v_matrix, work.batch_idx, work.head_idx, row_idx)
    k = load_tile(k_ptr, k_matrix, num_kv, HEAD_DIM, BLOCK_KV, BLOCK_D)
    v = load_tile(v_ptr, v_matrix, num_kv, HEAD_DIM_V, BLOCK_KV, BLOCK_DV)
    d_k = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_KV, BLOCK_DV], tl.float32)

    kv_end = tl.minimum(kv_begin + BLOCK_KV, sequence.seqlen_kv)
    tiles = q_tiles(rules.window, sequence.seqlen_q, sequence.seqlen_kv, kv_begin, kv_end, BLOCK_Q)
    num_tiles = tiles.end - tiles.begin
    for step in range(num_tiles * heads.per_kv):  # every query tile of every query head that shares the kv head
        tile_idx, head_idx = tiles.begin + step, work.head_idx
        if heads.per_kv > 1:  # a division for each tile, which a tenth of the time would pay for without groups
            tile_idx = tiles.begin + step % num_tiles
            head_idx = work.head_idx * heads.per_kv + step // num_tiles
        head = scores.HeadRules(rules, sequence, head_idx)
        q_begin = tile_idx * BLOCK_Q
        tile = scores.Tile(q_begin, kv_begin, is_full(tiles, tile_idx))
        num_rows = sequence.seqlen_q - q_begin
        q_ptr = row_pointer(q_matrix, work.batch_idx, head.head_idx, sequence.q_begin + q_begin)
        d_out_ptr = row_pointer(d_out_matrix, work.batch_idx, head.head_idx, sequence.q_begin + q_begin)
        q = load_tile(q_ptr, q_matrix, num_rows, HEAD_DIM, BLOCK_Q, BLOCK_D, q_begin)
        product_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_KV, BLOCK_Q] f32
        p_t, capped_t = probabilities(product_t, lse_log2_rows, factor_rows, head, tile, True, BLOCK_Q, BLOCK_KV)
        d_out = load_tile(d_out_ptr, d_out_matrix, num_rows, HEAD_DIM_V, BLOCK_Q, BLOCK_DV, q_begin)
        d_p_t = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)  # [BLOCK_KV, BLOCK_Q] f32
        dropped_t = p_t
        p_t = scores.through_cap(p_t, capped_t, rules)
        if rules.dropout is not None:
            survival_t = scores.survival(head, tile, True, BLOCK_Q, BLOCK_KV)
            dropped_t, d_p_t = dropped_t * survival_t, d_p_t * survival_t
        d_v = accumulate(d_v, dropped_t, d_out, PRECISION)
        delta = per_query(delta_rows, head, tile, True, BLOCK_Q)
        d_s_t = p_t * (d_p_t - delta)
        d_k = accumulate(d_k, d_s_t, q, PRECISION)

    d_k_ptr = row_pointer(d_k_matrix, work.batch_idx, work.head_idx, row_idx)
    d_v_ptr = row_pointer(d_v_matrix, work.batch_idx, work.head_idx, row_idx)
    store_tile(d_k_ptr, d_k_matrix, d_k * scale, num_kv, HEAD_DIM, BLOCK_KV, BLOCK_D)
    store_tile(d_v_ptr, d_v_matrix, d_v, num_kv, HEAD_DIM_V, BLOCK_KV, BLOCK_DV)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_kv"])
def attention_backward_q(
    q_matrix,
    k_matrix,
    v_matrix,
    d_out_matrix,
    lse_log2_rows,
    factor_rows,
    delta_rows,
    d_q_matrix,
    scale,
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
    row_idx = sequence.q_begin + q_begin
    q_ptr = row_pointer(q_matrix, work.batch_idx, work.head_idx, row_idx)
    d_out_ptr = row_pointer(d_out_matrix, work.batch_idx, work.head_idx, row_idx)
    k_ptr = row_pointer(k_matrix, work.batch_idx, kv_head_idx, sequence.kv_begin)
    v_ptr = row_pointer(v_matrix, work.batch_idx, kv_head_idx, sequence.kv_begin)
    q = load_tile(q_ptr, q_matrix, num_rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
    d_out = load_tile(d_out_ptr, d_out_matrix, num_rows, HEAD_DIM_V, BLOCK_Q, BLOCK_DV)
    d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    q_end = tl.minimum(q_begin + BLOCK_Q, sequence.seqlen_q)
    tiles = kv_tiles(rules.window, sequence.seqlen_q, sequence.seqlen_kv, q_begin, q_end, BLOCK_KV)
    for tile_idx in range(tiles.begin, tiles.end):
        kv_begin = tile_idx * BLOCK_KV
        tile = scores.Tile(q_begin, kv_begin, is_full(tiles, tile_idx))
        num_kv = sequence.seqlen_kv - kv_begin
        k_tile_ptr = k_ptr + tl.cast(kv_begin, tl.int64) * k_matrix.row_stride
        k = load_tile(k_tile_ptr, k_matrix, num_kv, HEAD_DIM, BLOCK_KV, BLOCK_D)
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV] f32
        p, capped = probabilities(product, lse_log2_rows, factor_rows, head, tile, False, BLOCK_Q, BLOCK_KV)
        v_tile_ptr = v_ptr + tl.cast(kv_begin, tl.int64) * v_matrix.row_stride
        v = load_tile(v_tile_ptr, v_matrix, num_kv, HEAD_DIM_V, BLOCK_KV, BLOCK_DV)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV] f32
        if rules.dropout is not None:
            d_p *= scores.survival(head, tile, False, BLOCK_Q, BLOCK_KV)
        d_s = scores.through_cap(p * (d_p - per_query(delta_rows, head, tile, False, BLOCK_Q)), capped, rules)
        d_q = accumulate(d_q, d_s, k, PRECISION)

    d_q_ptr = row_pointer(d_q_matrix, work.batch_idx, work.head_idx, row_idx)
    store_tile(d_q_ptr, d_q_matrix, d_q * scale, num_rows, HEAD_DIM, BLOCK_Q, BLOCK_D)

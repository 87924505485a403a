"""Gradient of an additive bias of any broadcast shape, without atomics and without a score matrix in memory.

The gradient of a bias element is the sum of d_s over the pairs that share it. A program owns one tile of the bias and
one share of the score tiles that are summed into it: along each axis that the bias broadcasts, all of them. Its sum is
a partial result; the launcher adds the shares of a tile, in order, so the result is bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.triton.backward import per_query, probabilities
from flashtile.backends.triton.primitives import scores
from flashtile.backends.triton.primitives.addressing import find_sequence, load_tile, row_pointer
from flashtile.backends.triton.primitives.masking import kv_tiles


@triton.jit
def split(index, count, SHARED: tl.constexpr):
    """(the bias's own index on an axis, terms to sum on it, what is left of ``index``)."""
    if SHARED:
        return 0, count, index
    else:
        return index % count, 1, index // count


@triton.jit(do_not_specialize=["share_stride", "seqlen_q", "seqlen_kv", "batch", "num_shares"])
def attention_bias_gradient(
    q_matrix,
    k_matrix,
    v_matrix,
    d_out_matrix,
    lse_log2_rows,
    factor_rows,
    delta_rows,
    d_bias_matrix,
    share_stride,
    rules,
    sequences,
    heads,
    seqlen_q,
    seqlen_kv,
    batch,
    num_shares,
    SHARED_BATCH: tl.constexpr,
    SHARED_HEADS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHARED_COLS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    share_idx = tl.program_id(0) % num_shares
    rest = tl.program_id(0) // num_shares
    all_q_tiles, all_kv_tiles = tl.cdiv(seqlen_q, BLOCK_Q), tl.cdiv(seqlen_kv, BLOCK_KV)
    kv_tile_idx, num_kv_tiles, rest = split(rest, all_kv_tiles, SHARED_COLS)
    q_tile_idx, num_q_tiles, rest = split(rest, all_q_tiles, SHARED_ROWS)
    bias_head_idx, num_heads, rest = split(rest, heads.num_q, SHARED_HEADS)
    bias_batch_idx, num_batches, rest = split(rest, batch, SHARED_BATCH)

    total = tl.zeros([BLOCK_Q, BLOCK_KV], tl.float32)
    for term in range(share_idx, num_batches * num_heads * num_q_tiles * num_kv_tiles, num_shares):
        row_term = term // num_kv_tiles
        head_term = row_term // num_q_tiles
        kv_begin = (kv_tile_idx + term % num_kv_tiles) * BLOCK_KV
        q_begin = (q_tile_idx + row_term % num_q_tiles) * BLOCK_Q
        head_idx = bias_head_idx + head_term % num_heads
        batch_idx = bias_batch_idx + head_term // num_heads

        sequence = find_sequence(sequences, batch_idx, seqlen_q, seqlen_kv)
        num_rows = sequence.seqlen_q - q_begin
        num_kv = sequence.seqlen_kv - kv_begin
        q_end = tl.minimum(q_begin + BLOCK_Q, sequence.seqlen_q)
        tiles = kv_tiles(rules.window, sequence.seqlen_q, sequence.seqlen_kv, q_begin, q_end, BLOCK_KV)
        is_visited = (kv_begin >= tiles.begin * BLOCK_KV) & (kv_begin < tiles.end * BLOCK_KV)
        if (num_rows > 0) & is_visited:
            head = scores.HeadRules(rules, sequence, head_idx)
            kv_head_idx = head_idx // heads.per_kv
            q_ptr = row_pointer(q_matrix, batch_idx, head_idx, sequence.q_begin + q_begin)
            d_out_ptr = row_pointer(d_out_matrix, batch_idx, head_idx, sequence.q_begin + q_begin)
            k_ptr = row_pointer(k_matrix, batch_idx, kv_head_idx, sequence.kv_begin + kv_begin)
            v_ptr = row_pointer(v_matrix, batch_idx, kv_head_idx, sequence.kv_begin + kv_begin)
            q = load_tile(q_ptr, q_matrix, num_rows, HEAD_DIM, BLOCK_Q, BLOCK_D)
            k = load_tile(k_ptr, k_matrix, num_kv, HEAD_DIM, BLOCK_KV, BLOCK_D)
            tile = scores.Tile(q_begin, kv_begin, False)
            product = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV] f32
            p, _ = probabilities(product, lse_log2_rows, factor_rows, head, tile, False, BLOCK_Q, BLOCK_KV)
            d_out = load_tile(d_out_ptr, d_out_matrix, num_rows, HEAD_DIM_V, BLOCK_Q, BLOCK_DV)
            v = load_tile(v_ptr, v_matrix, num_kv, HEAD_DIM_V, BLOCK_KV, BLOCK_DV)
            d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_KV] f32
            if rules.dropout is not None:
                d_p *= scores.survival(head, tile, False, BLOCK_Q, BLOCK_KV)
            total += p * (d_p - per_query(delta_rows, head, tile, False, BLOCK_Q))

    q_pos = q_tile_idx * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    kv_pos = kv_tile_idx * BLOCK_KV + tl.arange(0, BLOCK_KV)[None, :]
    if SHARED_ROWS:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [BLOCK_Q, BLOCK_KV])
        q_exists = q_pos == 0
    else:
        q_exists = q_pos < seqlen_q
    if SHARED_COLS:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], [BLOCK_Q, BLOCK_KV])
        kv_exists = kv_pos == 0
    else:
        kv_exists = kv_pos < seqlen_kv
    bias_ptr = row_pointer(d_bias_matrix, bias_batch_idx, bias_head_idx, 0)
    bias_ptr += tl.cast(share_idx, tl.int64) * share_stride
    pointers = bias_ptr + q_pos.to(tl.int64) * d_bias_matrix.row_stride + kv_pos.to(tl.int64) * d_bias_matrix.col_stride
    tl.store(pointers, total.to(d_bias_matrix.ptr.dtype.element_ty), mask=q_exists & kv_exists)

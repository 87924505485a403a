"""Backward on Hopper: five products per tile, d_k and d_v in registers, d_q added up in memory (FlashAttention-3).

One program per tile of keys of one kv head streams Q and d_out past it, for every query head that shares the kv head.
Scores are transposed, keys as rows, so that P and dS feed the products for d_v and d_k from registers.

| partition | does |
|---|---|
| ``load`` | one warp: the tiles of K and V, then Q, d_out and the statistics of each tile of queries |
| ``gradients`` | two times four warps: 64 keys each; S, dP, d_v and d_k of its keys, and its half of the tile's d_q |
| ``clean`` | one warp, for packed sequences: what lies behind their ends must not be NaN |

| name | what |
|---|---|
| s_t, p_t, d_p_t, d_s_t | scores, probabilities and their gradients [64, 64], float32 |
| lse_log2, delta | two numbers per query row from ``statistics``, float32 |
| d_q, d_k, d_v | sums in float32: d_k [64, BLOCK_D] and d_v [64, BLOCK_DV] in registers, d_q in memory |

Source: Shah et al. 2024, "FlashAttention-3"; Dao 2023, "FlashAttention-2", algorithm 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.backends.hopper.backward_parts import (
    NUM_CONSUMERS,
    ROWS,
    RUNTIME_NUMBERS,
    Call,
    Channels,
    Order,
    add_d_q,
    clean,
    d_q_product,
    gradient_target,
    load,
    num_readers,
    only_work,
    release_parts,
    row_numbers,
    store_gradient,
    tile_and_head,
    wait_for_keys,
    wait_for_rows,
)
from flashtile.backends.hopper.primitives import scores
from flashtile.backends.hopper.primitives.addressing import Sums
from flashtile.backends.hopper.primitives.channel import (
    make_barriers,
    make_channel,
    receive,
    release,
    release_previous,
    send,
)
from flashtile.backends.hopper.primitives.gluon_compat import (
    jit,
    warpgroup_mma,
    warpgroup_mma_wait,
    zeros,
)
from flashtile.backends.hopper.primitives.layouts import cols_of, operand_layout, product_layout
from flashtile.backends.hopper.primitives.masking import is_causal, is_full, q_tiles
from flashtile.backends.hopper.primitives.turns import first_turn, pass_turn, take_turn

BLOCK_KV = gl.constexpr(NUM_CONSUMERS.value * ROWS.value)
NUM_D_S_SLOTS = gl.constexpr(4)


class Block(NamedTuple):
    """64 keys from ``kv_begin`` on: their tiles of K and V, and what every step of theirs needs."""

    work: Any
    k: Any
    v: Any
    kv_begin: Any
    d_s: Any
    sums: Any


@jit(do_not_specialize=RUNTIME_NUMBERS)
def attention_backward(
    q_desc,
    k_desc,
    v_desc,
    d_out_desc,
    lse_log2_desc,
    delta_desc,
    d_q_sums,
    num_sum_blocks,
    d_k_target,
    d_v_target,
    scale,
    rules,
    sequences,
    heads,
    num_heads,
    heads_together,
    num_splits,
    counter,
    seqlen_q,
    seqlen_kv,
    num_stored_rows,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    BLOCK_D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    NUM_READERS: gl.constexpr = num_readers(sequences.cu_seqlens_q is not None)
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_DV], dtype)
    channels = Channels(
        None,
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_D], kv_layout),
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_DV], v_layout),
        make_barriers(1, 1) if sequences.cu_seqlens_q is not None else None,
        None,
        make_barriers(1, 1) if sequences.cu_seqlens_q is not None else None,
        make_barriers(NUM_STAGES, 1) if sequences.cu_seqlens_q is not None else None,
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_D, NUM_READERS),
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_DV, NUM_READERS),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], lse_log2_desc.layout),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], delta_desc.layout),
    )
    d_s = make_channel(dtype, NUM_D_S_SLOTS, ROWS, ROWS, NUM_CONSUMERS)
    fence_async_shared()

    order = Order(gl.cdiv(seqlen_kv, BLOCK_KV), num_heads, heads_together, num_splits, counter)
    call = Call(rules, sequences, heads, order, seqlen_q, seqlen_kv)
    d_k_target = gradient_target(d_k_target, num_splits, order.num_tiles, BLOCK_KV)
    d_v_target = gradient_target(d_v_target, num_splits, order.num_tiles, BLOCK_KV)
    targets = (d_k_target, d_v_target, scale)
    loads = (q_desc, k_desc, v_desc, d_out_desc, lse_log2_desc, delta_desc)
    sums = Sums(d_q_sums, num_sum_blocks, num_stored_rows)
    gl.warp_specialize(
        [
            (gradients, (0, call, channels, d_s, sums, targets, HEAD_DIM, HEAD_DIM_V)),
            (gradients, (1, call, channels, d_s, sums, targets, HEAD_DIM, HEAD_DIM_V)),
            (load, (call, channels, loads)),
            (clean, (call, channels)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


@jit
def gradients(
    part: gl.constexpr,
    call,
    channels,
    d_s,
    sums,
    targets,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    Q_COLS: gl.constexpr = BLOCK_D // NUM_CONSUMERS
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(ROWS)
    DK: gl.constexpr = product_layout(BLOCK_D)
    DV: gl.constexpr = product_layout(BLOCK_DV)

    work = only_work(call, BLOCK_KV)
    sequence = work.sequence
    own_begin = work.kv_begin + part * ROWS
    own_end = gl.minimum(own_begin + ROWS, sequence.seqlen_kv)
    tiles = q_tiles(call.rules.window, sequence.seqlen_q, sequence.seqlen_kv, own_begin, own_end, ROWS)
    has_all_keys = own_begin + ROWS <= sequence.seqlen_kv
    d_k = zeros([ROWS, BLOCK_D], gl.float32, DK)
    d_v = zeros([ROWS, BLOCK_DV], gl.float32, DV)
    no_s = zeros([ROWS, ROWS], gl.float32, S)
    k, v = channels.k.index(part), channels.v.index(part)
    if work.num_steps > 0:
        wait_for_keys(call, channels, work)
    first_turn(part, NUM_CONSUMERS)
    send(d_s, part, no_s.to(dtype))  # d_q is a step behind: before the first one it adds 0

    block = Block(work, k, v, own_begin, d_s, sums)
    for step in range(work.num_steps):
        tile_idx, _head_idx = tile_and_head(work, call, step)
        is_masked = not (is_full(tiles, tile_idx) & has_all_keys)
        if is_causal(call.rules.window):  # queries behind the end need no mask: their p is 0
            is_masked = not ((tile_idx >= tiles.full_begin) & has_all_keys)
        d_k, d_v = add_step(block, call, channels, d_k, d_v, step, is_masked, part)

    if work.num_steps > 0:
        d_q_token = d_q_product(d_s, channels.k, work.num_steps, part * Q_COLS, Q_COLS)
        d_q = warpgroup_mma_wait(0, deps=[d_q_token])
        tile_idx, head_idx = tile_and_head(work, call, work.num_steps - 1)
        add_d_q(sums, d_q, call, work, tile_idx, head_idx, part * Q_COLS, BLOCK_D)
    d_k_target, d_v_target, scale = targets
    store_gradient(d_k_target, d_k * scale, dtype, call, work, own_begin, HEAD_DIM)
    store_gradient(d_v_target, d_v, dtype, call, work, own_begin, HEAD_DIM_V)


@jit
def add_step(block, call, channels, d_k, d_v, step, is_masked, part: gl.constexpr):
    """(d_k, d_v) with what the queries of a step add; d_q is that of the step before."""
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    Q_COLS: gl.constexpr = BLOCK_D // NUM_CONSUMERS
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(ROWS)
    work = block.work
    no_s = zeros([ROWS, ROWS], gl.float32, S)
    tile_idx, head_idx = tile_and_head(work, call, step)
    q_begin = tile_idx * ROWS
    slope_log2 = scores.slope_log2(call.rules, work.batch_idx, head_idx)
    head = scores.HeadRules(call.rules, work.sequence, slope_log2)
    q = receive(channels.q, step)
    wait_for_rows(call, channels, step)
    take_turn(part)
    s_token = warpgroup_mma(block.k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
    d_out = receive(channels.d_out, step)
    d_p_token = warpgroup_mma(block.v, d_out.permute((1, 0)), no_s, use_acc=False, is_async=True)
    release_previous(channels.q, step)
    lse_log2 = row_numbers(channels.lse_log2, step, cols_of(S))
    s_t = warpgroup_mma_wait(1, deps=[s_token])
    pass_turn(1 - part)
    s_t, capped_t = scores.scored_by_key(s_t, head, q_begin, block.kv_begin, is_masked)
    p_t = scores.probabilities(s_t, scores.unit_log2(call.rules), lse_log2)
    p_operand = gl.convert_layout(p_t.to(dtype), operand_layout(BLOCK_DV))  # rounded for the product with d_out
    delta = row_numbers(channels.delta, step, cols_of(S))
    d_p_t = warpgroup_mma_wait(0, deps=[d_p_token])
    d_s_t = p_t * (d_p_t - gl.expand_dims(delta, 0))
    if call.rules.softcap is not None:
        d_s_t *= 1.0 - capped_t * capped_t
    d_s_t = d_s_t.to(dtype)  # rounded for the products with Q and K
    send(block.d_s, (step + 1) * NUM_CONSUMERS + part, d_s_t)
    d_s_operand = gl.convert_layout(d_s_t, operand_layout(BLOCK_D))
    d_v_token = warpgroup_mma(p_operand, d_out, d_v, is_async=True)
    d_q_token = d_q_product(block.d_s, channels.k, step, part * Q_COLS, Q_COLS)
    d_k_token = warpgroup_mma(d_s_operand, q, d_k, is_async=True)
    d_q, d_v = warpgroup_mma_wait(1, deps=[d_q_token, d_v_token])
    tile_idx, head_idx = tile_and_head(work, call, gl.maximum(step - 1, 0))
    add_d_q(block.sums, d_q, call, work, tile_idx, head_idx, part * Q_COLS, BLOCK_D)
    release(channels.d_out, step)
    release_parts(block.d_s, step, NUM_CONSUMERS)
    d_k = warpgroup_mma_wait(0, deps=[d_k_token])
    return d_k, d_v

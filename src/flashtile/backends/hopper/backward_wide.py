"""Backward on Hopper for heads of 129 to 256: d_k and d_v are too much for one warpgroup's registers; each has its own.

Like ``backward``, with 64 keys per program and other consumers:

| partition | does |
|---|---|
| ``values`` | S and P of every tile, d_v, and the left half of d_q |
| ``keys`` | dP and dS of every tile, with P from ``values``, d_k, and the right half of d_q |

P and dS go through shared memory in the inputs' dtype, as they are for the products that take them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

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
    send,
    slot_to_fill,
)
from flashtile.backends.hopper.primitives.gluon_compat import jit, warpgroup_mma, warpgroup_mma_wait, zeros
from flashtile.backends.hopper.primitives.layouts import cols_of, operand_layout, product_layout
from flashtile.backends.hopper.primitives.masking import is_full


class Exchange(NamedTuple):
    """Tiles [64 keys, 64 queries] between the consumers: P one way, dS the other."""

    p: Any
    d_s: Any


@jit(do_not_specialize=RUNTIME_NUMBERS)
def attention_backward_wide(
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
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_DV], dtype)
    channels = Channels(
        None,
        gl.allocate_shared_memory(dtype, [1, ROWS, BLOCK_D], k_layout),
        gl.allocate_shared_memory(dtype, [1, ROWS, BLOCK_DV], v_layout),
        make_barriers(1, 1) if sequences.cu_seqlens_q is not None else None,
        None,
        make_barriers(1, 1) if sequences.cu_seqlens_q is not None else None,
        make_barriers(NUM_STAGES, 1) if sequences.cu_seqlens_q is not None else None,
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_D, NUM_READERS),
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_DV, NUM_READERS),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], lse_log2_desc.layout),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], delta_desc.layout),
    )
    exchange = Exchange(make_channel(dtype, 2, ROWS, ROWS, 1), make_channel(dtype, 2, ROWS, ROWS, 1))
    fence_async_shared()

    order = Order(gl.cdiv(seqlen_kv, ROWS), num_heads, heads_together, num_splits, counter)
    call = Call(rules, sequences, heads, order, seqlen_q, seqlen_kv)
    loads = (q_desc, k_desc, v_desc, d_out_desc, lse_log2_desc, delta_desc)
    d_k_target = gradient_target(d_k_target, num_splits, order.num_tiles, ROWS)
    d_v_target = gradient_target(d_v_target, num_splits, order.num_tiles, ROWS)
    sums = Sums(d_q_sums, num_sum_blocks, num_stored_rows)
    gl.warp_specialize(
        [
            (values, (call, channels, exchange, sums, d_v_target, HEAD_DIM_V)),
            (keys, (call, channels, exchange, sums, d_k_target, scale, HEAD_DIM)),
            (load, (call, channels, loads)),
            (clean, (call, channels)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


@jit
def values(call, channels, exchange, sums, d_v_target, HEAD_DIM_V: gl.constexpr):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    Q_COLS: gl.constexpr = BLOCK_D // NUM_CONSUMERS
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(ROWS)
    work = only_work(call, ROWS)
    sequence = work.sequence
    num_keys = sequence.seqlen_kv - work.kv_begin
    unit_log2 = scores.unit_log2(call.rules)
    d_v = zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
    no_s = zeros([ROWS, ROWS], gl.float32, S)
    k = channels.k.index(0)
    if work.num_steps > 0:
        wait_for_keys(call, channels, work)

    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        q_begin = tile_idx * ROWS
        slope_log2 = scores.slope_log2(call.rules, work.batch_idx, head_idx)
        head = scores.HeadRules(call.rules, sequence, slope_log2)
        q = receive(channels.q, step)
        wait_for_rows(call, channels, step)
        lse_log2 = row_numbers(channels.lse_log2, step, cols_of(S))
        s_token = warpgroup_mma(k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
        d_out = receive(channels.d_out, step)
        s_t = warpgroup_mma_wait(0, deps=[s_token])
        release(channels.q, step)
        is_masked = not (is_full(work.tiles, tile_idx) & (num_keys >= ROWS))
        s_t, _capped = scores.scored_by_key(s_t, head, q_begin, work.kv_begin, is_masked)
        p_t = scores.probabilities(s_t, unit_log2, lse_log2)
        p_t = p_t.to(dtype)  # rounded for the product with d_out, and for its way to the other consumer
        slot_to_fill(exchange.p, step).store(p_t)
        mbarrier.arrive(exchange.p.ready.index(step & 1), count=1)
        p_operand = gl.convert_layout(p_t, operand_layout(BLOCK_DV))
        d_q_token = d_q_product(exchange.d_s, channels.k, step, 0, Q_COLS)
        d_v_token = warpgroup_mma(p_operand, d_out, d_v, is_async=True)
        d_q = warpgroup_mma_wait(1, deps=[d_q_token])
        tile_idx, head_idx = tile_and_head(work, call, gl.maximum(step - 1, 0))
        add_d_q(sums, d_q, call, work, tile_idx, head_idx, 0, BLOCK_D)
        release(exchange.d_s, step)
        d_v = warpgroup_mma_wait(0, deps=[d_v_token])
        release(channels.d_out, step)

    store_gradient(d_v_target, d_v, dtype, call, work, work.kv_begin, HEAD_DIM_V)
    # ``keys`` has needed that time for the last dS.
    if work.num_steps > 0:
        d_q_token = d_q_product(exchange.d_s, channels.k, work.num_steps, 0, Q_COLS)
        d_q = warpgroup_mma_wait(0, deps=[d_q_token])
        tile_idx, head_idx = tile_and_head(work, call, work.num_steps - 1)
        add_d_q(sums, d_q, call, work, tile_idx, head_idx, 0, BLOCK_D)


@jit
def keys(call, channels, exchange, sums, d_k_target, scale, HEAD_DIM: gl.constexpr):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    Q_COLS: gl.constexpr = BLOCK_D // NUM_CONSUMERS
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(ROWS)
    work = only_work(call, ROWS)
    d_k = zeros([ROWS, BLOCK_D], gl.float32, product_layout(BLOCK_D))
    no_s = zeros([ROWS, ROWS], gl.float32, S)
    v = channels.v.index(0)
    if work.num_steps > 0:
        wait_for_keys(call, channels, work)
    send(exchange.d_s, 0, no_s.to(dtype))  # ``values`` is a step behind with d_q: before the first one it adds 0

    for step in range(work.num_steps):
        d_out = receive(channels.d_out, step)
        wait_for_rows(call, channels, step)
        d_p_token = warpgroup_mma(v, d_out.permute((1, 0)), no_s, use_acc=False, is_async=True)
        delta = row_numbers(channels.delta, step, cols_of(S))
        q = receive(channels.q, step)
        p_t = receive(exchange.p, step).load(S).to(gl.float32)
        release(exchange.p, step)
        d_p_t = warpgroup_mma_wait(0, deps=[d_p_token])
        release(channels.d_out, step)
        d_s_t = (p_t * (d_p_t - gl.expand_dims(delta, 0))).to(dtype)  # rounded for the products with Q and K
        send(exchange.d_s, step + 1, d_s_t)
        d_s_operand = gl.convert_layout(d_s_t, operand_layout(BLOCK_D))
        d_q_token = d_q_product(exchange.d_s, channels.k, step + 1, Q_COLS, Q_COLS)
        d_k_token = warpgroup_mma(d_s_operand, q, d_k, is_async=True)
        d_q = warpgroup_mma_wait(1, deps=[d_q_token])
        tile_idx, head_idx = tile_and_head(work, call, step)
        add_d_q(sums, d_q, call, work, tile_idx, head_idx, Q_COLS, BLOCK_D)
        d_k = warpgroup_mma_wait(0, deps=[d_k_token])
        release(channels.q, step)

    store_gradient(d_k_target, d_k * scale, dtype, call, work, work.kv_begin, HEAD_DIM)

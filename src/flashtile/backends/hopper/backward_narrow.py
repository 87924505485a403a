"""Backward on Hopper for heads of up to 64: K and V stay in registers, and a third warpgroup multiplies for d_q.

Like ``backward``, with other consumers of the same tiles:

| partition | does |
|---|---|
| ``gradients`` | two times four warps: 64 keys each, with S, dP, d_v and d_k of its keys; never waits for the other |
| ``add_up_d_q`` | four warps: d_q of a tile from both consumers' dS, added to memory in float32 |

Shared memory bounds the products of so narrow heads: an operand in registers is one that is not read there again.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashtile.backends.hopper.backward_parts import (
    NUM_CONSUMERS,
    ROWS,
    Call,
    Channels,
    clean,
    find_work,
    load,
    num_readers,
    row_numbers,
    tile_and_head,
    wait_for_keys,
    wait_for_rows,
)
from flashtile.backends.hopper.primitives import scores
from flashtile.backends.hopper.primitives.channel import make_barriers, make_channel, receive, release, slot_to_fill
from flashtile.backends.hopper.primitives.gluon_compat import (
    barrier,
    jit,
    static_range,
    tma_add,
    warpgroup_mma,
    warpgroup_mma_wait,
    zeros,
)
from flashtile.backends.hopper.primitives.layouts import cols_of, operand_layout, product_layout, rows_of
from flashtile.backends.hopper.primitives.masking import is_full, q_tiles
from flashtile.backends.hopper.primitives.tiles import store_rows, zero_rows_from

BLOCK_KV = gl.constexpr(NUM_CONSUMERS.value * ROWS.value)
NUM_D_S_SLOTS = gl.constexpr(4)
NUM_D_Q_SLOTS = gl.constexpr(2)


@jit(do_not_specialize=["seqlen_q", "seqlen_kv"])
def attention_backward_narrow(
    q_desc,
    k_desc,
    v_desc,
    d_out_desc,
    lse_log2_desc,
    delta_desc,
    d_q_desc,
    d_k_matrix,
    d_v_matrix,
    scale,
    rules,
    sequences,
    heads,
    seqlen_q,
    seqlen_kv,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    D_Q_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    BLOCK_D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    NUM_READERS: gl.constexpr = num_readers(sequences.cu_seqlens_q is not None)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_DV], dtype)
    d_q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], gl.float32)
    channels = Channels(
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_D], k_layout),
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_DV], v_layout),
        make_barriers(1, 1),
        make_barriers(1, 1),
        make_barriers(NUM_STAGES, 1),
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_D, NUM_READERS),
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_DV, NUM_READERS),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], lse_log2_desc.layout),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], delta_desc.layout),
        gl.allocate_shared_memory(gl.float32, [NUM_D_Q_SLOTS, ROWS, BLOCK_D], d_q_layout),
    )
    d_s = make_channel(dtype, NUM_D_S_SLOTS, ROWS, ROWS, 1)
    fence_async_shared()

    call = Call(rules, sequences, heads, seqlen_q, seqlen_kv)
    targets = (d_k_matrix, d_v_matrix, scale)
    loads = (q_desc, k_desc, v_desc, d_out_desc, lse_log2_desc, delta_desc)
    gl.warp_specialize(
        [
            (gradients, (0, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V)),
            (gradients, (1, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V)),
            (add_up_d_q, (call, channels, d_s, d_q_desc)),
            (load, (call, channels, loads)),
            (clean, (call, channels)),
        ],
        [4, 4, 1, 1],
        [CONSUMER_REGISTERS, D_Q_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


@jit
def gradients(part: gl.constexpr, call, channels, d_s, targets, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(ROWS)

    work = find_work(call, BLOCK_KV)
    sequence = work.sequence
    own_begin = work.kv_begin + part * ROWS
    kv_pos = own_begin + gl.expand_dims(gl.arange(0, ROWS, rows_of(S)), 1)
    q_idx = gl.expand_dims(gl.arange(0, ROWS, cols_of(S)), 0)
    own_end = gl.minimum(own_begin + ROWS, sequence.seqlen_kv)
    tiles = q_tiles(call.rules.window, sequence.seqlen_q, sequence.seqlen_kv, own_begin, own_end, ROWS)
    has_all_keys = own_begin + ROWS <= sequence.seqlen_kv
    unit_log2 = scores.unit_log2(call.rules)
    d_k = zeros([ROWS, BLOCK_D], gl.float32, product_layout(BLOCK_D))
    d_v = zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
    no_s = zeros([ROWS, ROWS], gl.float32, S)
    if work.num_steps > 0:
        wait_for_keys(call, channels)
    k = channels.k.index(part).load(operand_layout(ROWS))
    v = channels.v.index(part).load(operand_layout(ROWS))

    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        slope_log2 = scores.slope_log2(call.rules, work.batch_idx, head_idx)
        head = scores.HeadRules(call.rules, sequence, slope_log2)
        q = receive(channels.q, step)
        wait_for_rows(call, channels, step)
        s_token = warpgroup_mma(k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
        d_out = receive(channels.d_out, step)
        d_p_token = warpgroup_mma(v, d_out.permute((1, 0)), no_s, use_acc=False, is_async=True)
        lse_log2 = row_numbers(channels.lse_log2, step, cols_of(S))
        s_t = warpgroup_mma_wait(1, deps=[s_token])
        is_masked = not (is_full(tiles, tile_idx) & has_all_keys)
        s_t, capped_t = scores.scored(s_t, head, tile_idx * ROWS + q_idx, kv_pos, is_masked)
        p_t = scores.probabilities(s_t, unit_log2, lse_log2)
        p_operand = gl.convert_layout(p_t.to(dtype), operand_layout(BLOCK_DV))  # rounded for the product with d_out
        delta = row_numbers(channels.delta, step, cols_of(S))
        d_p_t = warpgroup_mma_wait(0, deps=[d_p_token])
        d_v_token = warpgroup_mma(p_operand, d_out, d_v, is_async=True)
        d_s_t = p_t * (d_p_t - gl.expand_dims(delta, 0))
        if call.rules.softcap is not None:
            d_s_t *= 1.0 - capped_t * capped_t
        d_s_t = d_s_t.to(dtype)  # rounded for the products with Q and K
        d_s_operand = gl.convert_layout(d_s_t, operand_layout(BLOCK_D))
        d_s_step = step * NUM_CONSUMERS + part
        slot_to_fill(d_s, d_s_step).store(d_s_t)
        fence_async_shared()
        mbarrier.arrive(d_s.ready.index(d_s_step % NUM_D_S_SLOTS), count=1)
        d_k_token = warpgroup_mma(d_s_operand, q, d_k, is_async=True)
        d_v, d_k = warpgroup_mma_wait(0, deps=[d_v_token, d_k_token])
        release(channels.d_out, step)
        release(channels.q, step)

    d_k_matrix, d_v_matrix, scale = targets
    num_rows = sequence.seqlen_kv - own_begin
    row = sequence.kv_begin + own_begin
    store_rows(d_k_matrix, (d_k * scale).to(dtype), sequence.buffer_idx, work.kv_head_idx, row, num_rows, HEAD_DIM)
    store_rows(d_v_matrix, d_v.to(dtype), sequence.buffer_idx, work.kv_head_idx, row, num_rows, HEAD_DIM_V)


@jit
def add_up_d_q(call, channels, d_s, d_q_desc):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    work = find_work(call, BLOCK_KV)
    sequence = work.sequence
    no_d_q = zeros([ROWS, BLOCK_D], gl.float32, product_layout(BLOCK_D))
    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        token = no_d_q
        for part in static_range(NUM_CONSUMERS):
            d_s_part = receive(d_s, step * NUM_CONSUMERS + part)
            k = channels.k.index(part)
            token = warpgroup_mma(d_s_part.permute((1, 0)), k, token, use_acc=part > 0, is_async=True)
        d_q = warpgroup_mma_wait(0, deps=[token])
        for part in static_range(NUM_CONSUMERS):
            release(d_s, step * NUM_CONSUMERS + part)
        row = tile_idx * ROWS
        tile = channels.d_q.index(step % channels.d_q.shape[0])
        tma.store_wait(NUM_D_Q_SLOTS - 1)
        barrier()
        tile.store(d_q)
        if call.sequences.cu_seqlens_q is not None:  # the tile may reach into the next sequence
            barrier()
            zero_rows_from(tile, sequence.seqlen_q - row, 4)
        fence_async_shared()
        barrier()
        place = [sequence.buffer_idx, head_idx, sequence.q_begin + row, 0]
        tma_add(d_q_desc, place, tile.reshape([1, 1, ROWS, BLOCK_D]))
    tma.store_wait(0)

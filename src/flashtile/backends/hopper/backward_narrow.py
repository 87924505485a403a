"""Backward on Hopper for heads of up to 64: K and V stay in registers, and a third warpgroup multiplies for d_q.

Like ``backward``, with other consumers of the same tiles:

| partition | does |
|---|---|
| ``gradients`` | two times four warps: 64 keys each, with S, dP, d_v and d_k of its keys |
| ``add_up_d_q`` | four warps: d_q of a tile from both consumers' dS, added to memory in float32 |

Shared memory bounds the products of so narrow heads: an operand in registers is one that is not read there again.
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
    find_work,
    gradient_target,
    load,
    num_readers,
    release_parts,
    row_numbers,
    steps_and_shares,
    store_gradient,
    tile_and_head,
    wait_for_keys,
    wait_for_rows,
)
from flashtile.backends.hopper.primitives import scores
from flashtile.backends.hopper.primitives.addressing import Sums
from flashtile.backends.hopper.primitives.channel import make_barriers, make_channel, receive, release, send
from flashtile.backends.hopper.primitives.gluon_compat import (
    jit,
    warpgroup_mma,
    warpgroup_mma_wait,
    zeros,
)
from flashtile.backends.hopper.primitives.layouts import cols_of, operand_layout, product_layout
from flashtile.backends.hopper.primitives.masking import is_full, q_tiles
from flashtile.backends.hopper.primitives.scheduling import END, make_share_channel, receive_index
from flashtile.backends.hopper.primitives.turns import first_turn, pass_turn, take_turn

BLOCK_KV = gl.constexpr(NUM_CONSUMERS.value * ROWS.value)
NUM_D_S_SLOTS = gl.constexpr(4)


class Block(NamedTuple):
    """64 keys from ``kv_begin`` on: K and V in registers, and where their dS goes."""

    work: Any
    k: Any
    v: Any
    kv_begin: Any
    d_s: Any


@jit(do_not_specialize=RUNTIME_NUMBERS)
def attention_backward_narrow(
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
    TWO_LOOPS: gl.constexpr,
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
    channels = Channels(
        make_share_channel(NUM_READERS + 1),
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_D], k_layout),
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_DV], v_layout),
        make_barriers(1, 1),
        make_barriers(1, NUM_CONSUMERS + 1),
        make_barriers(1, 1) if sequences.cu_seqlens_q is not None else None,
        make_barriers(NUM_STAGES, 1) if sequences.cu_seqlens_q is not None else None,
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_D, NUM_READERS),
        make_channel(dtype, NUM_STAGES, ROWS, BLOCK_DV, NUM_READERS),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], lse_log2_desc.layout),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, ROWS], delta_desc.layout),
    )
    d_s = make_channel(dtype, NUM_D_S_SLOTS, ROWS, ROWS, 1)
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
            (gradients, (0, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, TWO_LOOPS)),
            (gradients, (1, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, TWO_LOOPS)),
            (add_up_d_q, (call, channels, d_s, sums)),
            (load, (call, channels, loads)),
            (clean, (call, channels)),
        ],
        [4, 4, 1, 1],
        [CONSUMER_REGISTERS, D_Q_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )


@jit
def gradients(
    part: gl.constexpr,
    call,
    channels,
    d_s,
    targets,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    TWO_LOOPS: gl.constexpr,
):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    dtype: gl.constexpr = channels.q.tiles.dtype

    first_turn(part, NUM_CONSUMERS)
    turn, first_step, num_before = 0, 0, 0
    share_idx = receive_index(channels.shares, turn, 4)
    while share_idx != END:
        work = find_work(call, share_idx, first_step, num_before, BLOCK_KV)
        sequence = work.sequence
        own_begin = work.kv_begin + part * ROWS
        own_end = gl.minimum(own_begin + ROWS, sequence.seqlen_kv)
        tiles = q_tiles(call.rules.window, sequence.seqlen_q, sequence.seqlen_kv, own_begin, own_end, ROWS)
        has_all_keys = own_begin + ROWS <= sequence.seqlen_kv
        d_k = zeros([ROWS, BLOCK_D], gl.float32, product_layout(BLOCK_D))
        d_v = zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
        if work.num_steps > 0:
            wait_for_keys(call, channels, work)
        k = channels.k.index(part).load(operand_layout(ROWS))
        v = channels.v.index(part).load(operand_layout(ROWS))
        if work.num_steps > 0:
            mbarrier.arrive(channels.kv_empty.index(0), count=1)

        block = Block(work, k, v, own_begin, d_s)
        d_k, d_v = add_steps(block, call, channels, tiles, has_all_keys, d_k, d_v, part, TWO_LOOPS)

        d_k_target, d_v_target, scale = targets
        store_gradient(d_k_target, d_k * scale, dtype, call, work, own_begin, HEAD_DIM)
        store_gradient(d_v_target, d_v, dtype, call, work, own_begin, HEAD_DIM_V)
        first_step, num_before = steps_and_shares(work)
        turn += 1
        share_idx = receive_index(channels.shares, turn, 4)


@jit
def run_of_tiles(work, own_tiles, has_all_keys, tile_idx):
    """(full, partial): how many tiles from one on downwards are visible everywhere, or how many are not.

    Args:
        own_tiles: which query tiles a consumer's own keys see, and which of them everywhere.
        has_all_keys: whether none of its keys lies behind the end of the sequence.
    """
    num_full = gl.where(is_full(own_tiles, tile_idx) & has_all_keys, tile_idx + 1 - own_tiles.full_begin, 0)
    has_full_below = (tile_idx >= own_tiles.full_end) & (own_tiles.full_end > own_tiles.full_begin) & has_all_keys
    first_partial = gl.where(has_full_below, own_tiles.full_end, work.tiles.begin)
    return num_full, gl.where(num_full > 0, 0, tile_idx + 1 - first_partial)


@jit
def add_steps(block, call, channels, own_tiles, has_all_keys, d_k, d_v, part: gl.constexpr, TWO_LOOPS: gl.constexpr):
    """(d_k, d_v) after all steps of a share: in one loop, or those whose tiles are visible everywhere in their own.

    ``own_tiles`` and ``has_all_keys`` as for ``run_of_tiles``.
    """
    work = block.work
    if TWO_LOOPS:
        step = 0
        while step < work.num_steps:
            tile_idx, _head_idx = tile_and_head(work, call, step)
            num_full, num_partial = run_of_tiles(work, own_tiles, has_all_keys, tile_idx)
            if call.order.num_splits is not None:  # a run may go on in the next split
                num_full = gl.minimum(num_full, work.num_steps - step)
                num_partial = gl.minimum(num_partial, work.num_steps - step)
            for i in range(num_full):
                d_k, d_v = add_step(block, call, channels, d_k, d_v, step + i, False, part)
            for i in range(num_partial):
                d_k, d_v = add_step(block, call, channels, d_k, d_v, step + i, True, part)
            step += num_full + num_partial
    else:
        for step in range(work.num_steps):
            tile_idx, _head_idx = tile_and_head(work, call, step)
            is_masked = not (is_full(own_tiles, tile_idx) & has_all_keys)
            d_k, d_v = add_step(block, call, channels, d_k, d_v, step, is_masked, part)
    return d_k, d_v


@jit
def add_step(block, call, channels, d_k, d_v, step, is_masked, part: gl.constexpr):
    """(d_k, d_v) with what the queries of a step add."""
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(ROWS)
    work = block.work
    no_s = zeros([ROWS, ROWS], gl.float32, S)
    tile_idx, head_idx = tile_and_head(work, call, step)
    at = work.first_step + step
    slope_log2 = scores.slope_log2(call.rules, work.batch_idx, head_idx)
    head = scores.HeadRules(call.rules, work.sequence, slope_log2)
    q = receive(channels.q, at)
    wait_for_rows(call, channels, at)
    lse_log2 = row_numbers(channels.lse_log2, at, cols_of(S))
    take_turn(part)
    s_token = warpgroup_mma(block.k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
    d_out = receive(channels.d_out, at)
    d_p_token = warpgroup_mma(block.v, d_out.permute((1, 0)), no_s, use_acc=False, is_async=True)
    s_t = warpgroup_mma_wait(1, deps=[s_token])
    pass_turn(1 - part)
    s_t, capped_t = scores.scored_by_key(s_t, head, tile_idx * ROWS, block.kv_begin, is_masked)
    p_t = scores.probabilities(s_t, scores.unit_log2(call.rules), lse_log2)
    p_operand = gl.convert_layout(p_t.to(dtype), operand_layout(BLOCK_DV))  # rounded for the product with d_out
    delta = row_numbers(channels.delta, at, cols_of(S))
    d_p_t = warpgroup_mma_wait(0, deps=[d_p_token])
    d_v_token = warpgroup_mma(p_operand, d_out, d_v, is_async=True)
    d_s_t = p_t * (d_p_t - gl.expand_dims(delta, 0))
    if call.rules.softcap is not None:
        d_s_t *= 1.0 - capped_t * capped_t
    d_s_t = d_s_t.to(dtype)  # rounded for the products with Q and K
    d_s_operand = gl.convert_layout(d_s_t, operand_layout(BLOCK_D))
    send(block.d_s, at * NUM_CONSUMERS + part, d_s_t)
    d_k_token = warpgroup_mma(d_s_operand, q, d_k, is_async=True)
    d_v = warpgroup_mma_wait(1, deps=[d_v_token])
    release(channels.d_out, at)
    d_k = warpgroup_mma_wait(0, deps=[d_k_token])
    release(channels.q, at)
    return d_k, d_v


@jit
def add_up_d_q(call, channels, d_s, sums):
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    turn, first_step, num_before = 0, 0, 0
    share_idx = receive_index(channels.shares, turn, 4)
    while share_idx != END:
        work = find_work(call, share_idx, first_step, num_before, BLOCK_KV)
        for step in range(work.num_steps):
            tile_idx, head_idx = tile_and_head(work, call, step)
            at = first_step + step
            d_q = warpgroup_mma_wait(0, deps=[d_q_product(d_s, channels.k, at, 0, BLOCK_D)])
            release_parts(d_s, at, NUM_CONSUMERS)
            if step == work.num_steps - 1:
                mbarrier.arrive(channels.kv_empty.index(0), count=1)
            add_d_q(sums, d_q, call, work, tile_idx, head_idx, 0, BLOCK_D)
        first_step, num_before = steps_and_shares(work)
        turn += 1
        share_idx = receive_index(channels.shares, turn, 4)

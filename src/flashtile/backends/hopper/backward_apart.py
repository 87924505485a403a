"""Experiment: d_q by a warpgroup of its own, so that the others never wait for each other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.backward_parts import ROWS, Call, Channels, find_work, load, tile_and_head
from flashtile.backends.hopper.primitives import scores
from flashtile.backends.hopper.primitives.channel import make_barriers, make_channel, receive, release, slot_to_fill
from flashtile.backends.hopper.primitives.gluon_compat import barrier, tma_add
from flashtile.backends.hopper.primitives.layouts import cols_of, operand_layout, product_layout, rows_of
from flashtile.backends.hopper.primitives.masking import is_full, q_tiles
from flashtile.backends.hopper.primitives.tiles import store_rows, zero_rows_from


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_kv"])
def attention_backward_apart(
    q_desc,
    k_desc,
    v_desc,
    d_out_desc,
    lse_log2_desc,
    delta_desc,
    d_q_desc,
    d_q_matrix,
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
    BLOCK_Q: gl.constexpr,
    NUM_CONSUMERS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    D_S_SLOTS: gl.constexpr,
    DIRECT: gl.constexpr,
    LATE: gl.constexpr,
    KV_REGS: gl.constexpr,
    PREFETCH: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    D_Q_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    BLOCK_D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_DV], dtype)
    d_q_tiles = None
    if not DIRECT:
        d_q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], gl.float32)
        d_q_tiles = gl.allocate_shared_memory(gl.float32, [1, ROWS, BLOCK_D], d_q_layout)
    channels = Channels(
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_D], k_layout),
        gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, BLOCK_DV], v_layout),
        make_barriers(1, 1),
        make_channel(dtype, NUM_STAGES, BLOCK_Q, BLOCK_D, NUM_CONSUMERS),
        make_channel(dtype, NUM_STAGES, BLOCK_Q, BLOCK_DV, NUM_CONSUMERS),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, BLOCK_Q], lse_log2_desc.layout),
        gl.allocate_shared_memory(gl.float32, [NUM_STAGES, 1, BLOCK_Q], delta_desc.layout),
        d_q_tiles,
    )
    d_s = make_channel(dtype, D_S_SLOTS * NUM_CONSUMERS, ROWS, BLOCK_Q, 1)
    fence_async_shared()

    call = Call(rules, sequences, heads, seqlen_q, seqlen_kv)
    targets = (d_k_matrix, d_v_matrix, scale)
    loads = (q_desc, k_desc, v_desc, d_out_desc, lse_log2_desc, delta_desc)
    if NUM_CONSUMERS == 2:
        gl.warp_specialize(
            [
                (gradients, (0, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, NUM_CONSUMERS, LATE, KV_REGS, PREFETCH)),
                (gradients, (1, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, NUM_CONSUMERS, LATE, KV_REGS, PREFETCH)),
                (add_d_q, (call, channels, d_s, d_q_desc, d_q_matrix, NUM_CONSUMERS, HEAD_DIM, DIRECT)),
                (load, (call, channels, loads)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, D_Q_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (gradients, (0, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, NUM_CONSUMERS, LATE, KV_REGS, PREFETCH)),
                (gradients, (1, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, NUM_CONSUMERS, LATE, KV_REGS, PREFETCH)),
                (gradients, (2, call, channels, d_s, targets, HEAD_DIM, HEAD_DIM_V, NUM_CONSUMERS, LATE, KV_REGS, PREFETCH)),
                (add_d_q, (call, channels, d_s, d_q_desc, d_q_matrix, NUM_CONSUMERS, HEAD_DIM, DIRECT)),
                (load, (call, channels, loads)),
            ],
            [4, 4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, D_Q_REGISTERS, LOADER_REGISTERS],
        )


@gluon.jit
def gradients(
    part: gl.constexpr,
    call,
    channels,
    d_s,
    targets,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    NUM_CONSUMERS: gl.constexpr,
    LATE: gl.constexpr,
    KV_REGS: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    BLOCK_Q: gl.constexpr = channels.q.tiles.shape[1]
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    NUM_STAGES: gl.constexpr = channels.q.tiles.shape[0]
    D_S_SLOTS: gl.constexpr = d_s.tiles.shape[0]
    dtype: gl.constexpr = channels.q.tiles.dtype
    S: gl.constexpr = product_layout(BLOCK_Q)

    work = find_work(call, BLOCK_Q, NUM_CONSUMERS * ROWS)
    sequence = work.sequence
    own_begin = work.kv_begin + part * ROWS
    kv_pos = own_begin + gl.expand_dims(gl.arange(0, ROWS, rows_of(S)), 1)
    q_idx = gl.expand_dims(gl.arange(0, BLOCK_Q, cols_of(S)), 0)
    own_end = gl.minimum(own_begin + ROWS, sequence.seqlen_kv)
    tiles = q_tiles(call.rules.window, sequence.seqlen_q, sequence.seqlen_kv, own_begin, own_end, BLOCK_Q)
    has_all_keys = own_begin + ROWS <= sequence.seqlen_kv
    unit_log2 = scores.unit_log2(call.rules)
    d_k = gl.zeros([ROWS, BLOCK_D], gl.float32, product_layout(BLOCK_D))
    d_v = gl.zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
    no_s = gl.zeros([ROWS, BLOCK_Q], gl.float32, S)
    k, v = channels.k.index(part), channels.v.index(part)
    is_packed: gl.constexpr = call.sequences.cu_seqlens_kv is not None
    if work.num_steps > 0:
        mbarrier.wait(channels.kv_ready.index(0), 0)
        if is_packed:
            zero_rows_from(k, sequence.seqlen_kv - own_begin)
            zero_rows_from(v, sequence.seqlen_kv - own_begin)

    if KV_REGS:
        k = k.load(operand_layout(BLOCK_Q))
        v = v.load(operand_layout(BLOCK_Q))
    if PREFETCH:
        s_token = warpgroup_mma_init(no_s)
        if work.num_steps > 0:
            s_token = warpgroup_mma(k, receive(channels.q, 0).permute((1, 0)), no_s, use_acc=False, is_async=True)
    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        slot = step % NUM_STAGES
        q_begin = tile_idx * BLOCK_Q
        slope_log2 = scores.slope_log2(call.rules, work.batch_idx, head_idx)
        head = scores.HeadRules(call.rules, sequence, slope_log2)
        q = receive(channels.q, step)
        if is_packed:
            zero_rows_from(q, sequence.seqlen_q - q_begin)
        if not PREFETCH:
            s_token = warpgroup_mma(k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
        d_out = receive(channels.d_out, step)
        if is_packed:
            zero_rows_from(d_out, sequence.seqlen_q - q_begin)
        d_p_token = warpgroup_mma(v, d_out.permute((1, 0)), no_s, use_acc=False, is_async=True)
        lse_log2 = channels.lse_log2.index(slot).reshape([BLOCK_Q]).load(cols_of(S))
        s_t = warpgroup_mma_wait(1, deps=[s_token])
        is_masked = not (is_full(tiles, tile_idx) & has_all_keys)
        s_t, capped_t = scores.scored(s_t, head, q_begin + q_idx, kv_pos, is_masked)
        p_t = gl.exp2(gl.fma(s_t, gl.to_tensor(unit_log2), -gl.expand_dims(lse_log2, 0)))
        p_operand = gl.convert_layout(p_t.to(dtype), operand_layout(BLOCK_DV))
        delta = channels.delta.index(slot).reshape([BLOCK_Q]).load(cols_of(S))
        d_p_t = warpgroup_mma_wait(0, deps=[d_p_token])
        d_v_token = warpgroup_mma(p_operand, d_out, d_v, is_async=True)
        d_s_t = p_t * (d_p_t - gl.expand_dims(delta, 0))
        if call.rules.softcap is not None:
            d_s_t *= 1.0 - capped_t * capped_t
        d_s_t = d_s_t.to(dtype)
        d_s_operand = gl.convert_layout(d_s_t, operand_layout(BLOCK_D))
        d_s_step = step * NUM_CONSUMERS + part
        if LATE:
            d_k_token = warpgroup_mma(d_s_operand, q, d_k, is_async=True)
            slot_to_fill(d_s, d_s_step).store(d_s_t)
            fence_async_shared()
            mbarrier.arrive(d_s.ready.index(d_s_step % D_S_SLOTS), count=1)
        else:
            slot_to_fill(d_s, d_s_step).store(d_s_t)
            fence_async_shared()
            mbarrier.arrive(d_s.ready.index(d_s_step % D_S_SLOTS), count=1)
            d_k_token = warpgroup_mma(d_s_operand, q, d_k, is_async=True)
        if PREFETCH:
            next_q = receive(channels.q, gl.minimum(step + 1, work.num_steps - 1))
            s_token = warpgroup_mma(k, next_q.permute((1, 0)), no_s, use_acc=False, is_async=True)
            d_v, d_k = warpgroup_mma_wait(1, deps=[d_v_token, d_k_token])
        else:
            d_v, d_k = warpgroup_mma_wait(0, deps=[d_v_token, d_k_token])
        release(channels.d_out, step)
        release(channels.q, step)

    if PREFETCH:
        warpgroup_mma_wait(0, deps=[s_token])
    d_k_matrix, d_v_matrix, scale = targets
    num_rows = sequence.seqlen_kv - own_begin
    row = sequence.kv_begin + own_begin
    store_rows(d_k_matrix, (d_k * scale).to(dtype), sequence.buffer_idx, work.kv_head_idx, row, num_rows, HEAD_DIM)
    store_rows(d_v_matrix, d_v.to(dtype), sequence.buffer_idx, work.kv_head_idx, row, num_rows, HEAD_DIM_V)


@gluon.jit
def add_d_q(
    call,
    channels,
    d_s,
    d_q_desc,
    d_q_matrix,
    NUM_CONSUMERS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    DIRECT: gl.constexpr,
):
    BLOCK_Q: gl.constexpr = channels.q.tiles.shape[1]
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    DQ: gl.constexpr = product_layout(BLOCK_D)
    work = find_work(call, BLOCK_Q, NUM_CONSUMERS * ROWS)
    sequence = work.sequence
    no_d_q = gl.zeros([ROWS, BLOCK_D], gl.float32, DQ)
    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        for half in gl.static_range(BLOCK_Q // ROWS):
            token = no_d_q
            for part in gl.static_range(NUM_CONSUMERS):
                d_s_part = receive(d_s, step * NUM_CONSUMERS + part)
                if BLOCK_Q > ROWS:
                    d_s_part = d_s_part.slice(half * ROWS, ROWS, dim=1)
                k = channels.k.index(part)
                token = warpgroup_mma(d_s_part.permute((1, 0)), k, token, use_acc=part > 0, is_async=True)
            d_q = warpgroup_mma_wait(0, deps=[token])
            if half == BLOCK_Q // ROWS - 1:
                for part in gl.static_range(NUM_CONSUMERS):
                    release(d_s, step * NUM_CONSUMERS + part)
            row = tile_idx * BLOCK_Q + half * ROWS
            if DIRECT:
                rows = gl.arange(0, ROWS, rows_of(DQ))
                cols = gl.arange(0, BLOCK_D, cols_of(DQ))
                offset = gl.to_tensor(sequence.buffer_idx).to(gl.int64) * d_q_matrix.batch_stride
                offset += head_idx.to(gl.int64) * d_q_matrix.head_stride
                offset += (sequence.q_begin + row).to(gl.int64) * d_q_matrix.row_stride
                offsets = gl.expand_dims(rows * d_q_matrix.row_stride, 1) + gl.expand_dims(cols, 0)
                exists = gl.expand_dims(rows < sequence.seqlen_q - row, 1) & gl.expand_dims(cols < HEAD_DIM, 0)
                gl.atomic_add(d_q_matrix.ptr + offset + offsets, d_q, mask=exists, sem="relaxed")
            else:
                tile = channels.d_q.index(0)
                tma.store_wait(0)
                barrier()
                tile.store(d_q)
                fence_async_shared()
                barrier()
                place = [sequence.buffer_idx, head_idx, sequence.q_begin + row, 0]
                tma_add(d_q_desc, place, tile.reshape([1, 1, ROWS, BLOCK_D]))
    if not DIRECT:
        tma.store_wait(0)

"""Forward on Hopper: one warp loads tiles with TMA, two or three warpgroups compute (FlashAttention-3, algorithm 2).

| partition | does |
|---|---|
| ``load`` | one warp: Q tiles of a share, then its K and V tiles, the last first, as slots become free |
| ``softmax_and_pv`` | four warps each: 64 of the queries; the product S of a tile runs beside P @ V of the one before |

| name | what |
|---|---|
| q, k, v | channels of tiles [64, BLOCK_D], [BLOCK_KV, BLOCK_D], [BLOCK_KV, BLOCK_DV] in shared memory |
| s, p | scores and unnormalised probabilities [64, BLOCK_KV] in registers, float32; ``p_operand`` in 16 bits |
| max_log2, row_sums | softmax statistics: the maximum [64], and each thread's part of the sum [64, 4], float32 |
| acc | the output before normalisation [64, BLOCK_DV] in registers, float32 |

Where keys are split, a share has one part of them, and its results go to memory in float32 for ``combine.py``.

Source: Shah et al. 2024, "FlashAttention-3" (warp specialisation, overlap of softmax and products).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashtile.backends.hopper import constants
from flashtile.backends.hopper.primitives import scores
from flashtile.backends.hopper.primitives.addressing import RowNumbers, find_sequence, row_offset, stored_sequence
from flashtile.backends.hopper.primitives.channel import fill, make_channel, receive, release
from flashtile.backends.hopper.primitives.gluon_compat import (
    barrier,
    jit,
    static_range,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
    zeros,
)
from flashtile.backends.hopper.primitives.layouts import cols_of, operand_layout, product_layout, rows_of
from flashtile.backends.hopper.primitives.masking import TileRange, is_full, is_unlimited, kv_tiles, part_of
from flashtile.backends.hopper.primitives.online_softmax import (
    INF,
    finish,
    rescaled,
    rescaled_if_needed,
    softmax_step,
    thread_sums,
)
from flashtile.backends.hopper.primitives.scheduling import (
    END,
    Schedule,
    Splits,
    Work,
    make_share_channel,
    next_share,
    num_shares,
    receive_share,
    send_share,
    share,
)
from flashtile.backends.hopper.primitives.tiles import halves, store_rows, zero_rows_from
from flashtile.backends.hopper.primitives.turns import first_turn, next_in_turn, pass_turn, take_turn

ROWS = gl.constexpr(constants.ROWS)


class Call(NamedTuple):
    """What every partition knows of the call."""

    rules: Any
    sequences: Any
    heads: Any
    schedule: Any
    seqlen_q: Any
    seqlen_kv: Any


class Results(NamedTuple):
    """Where results go: by way of ``tiles`` in shared memory through the descriptor, or straight to the matrix."""

    desc: Any
    tiles: Any
    matrix: Any
    lse: Any
    sink_ptr: Any


class Block(NamedTuple):
    """64 queries of one head: their tile, positions, rules, and the channels of keys and values that they see."""

    head: Any
    q_pos: Any
    kv_idx: Any
    q: Any
    q_empty: Any
    last_tile: Any
    """The last that is visited: the first of the sequence, unless a window hides that."""
    k: Any
    v: Any


class Sums(NamedTuple):
    """What has come together of the tiles so far; ``p_operand`` is the last tile's, whose P @ V is still to come."""

    max_log2: Any
    row_sums: Any
    acc: Any
    p_operand: Any


@jit(do_not_specialize=["seqlen_q", "seqlen_kv", "batch", "heads_alone", "heads_per_group", "lse_length", "num_splits"])
def attention_forward(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    out_matrix,
    lse_ptr,
    lse_length,
    sink_ptr,
    rules,
    sequences,
    heads,
    batch,
    heads_alone,
    heads_per_group,
    num_splits,
    counter,
    seqlen_q,
    seqlen_kv,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_KV: gl.constexpr,
    NUM_CONSUMERS: gl.constexpr,
    NUM_Q_SLOTS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    IN_TURN: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    BLOCK_D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_DV: gl.constexpr = v_desc.block_shape[3]
    dtype: gl.constexpr = q_desc.dtype
    shares = make_share_channel(NUM_CONSUMERS)
    q = make_channel(dtype, NUM_Q_SLOTS * NUM_CONSUMERS, ROWS, BLOCK_D, 1)
    k = make_channel(dtype, NUM_STAGES, BLOCK_KV, BLOCK_D, NUM_CONSUMERS)
    v = make_channel(dtype, NUM_STAGES, BLOCK_KV, BLOCK_DV, NUM_CONSUMERS)
    out_tiles = None
    if out_desc is not None:
        OUT_COLS: gl.constexpr = out_desc.block_shape[3]
        out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, OUT_COLS], dtype)
        out_tiles = gl.allocate_shared_memory(dtype, [NUM_CONSUMERS, ROWS, OUT_COLS], out_layout)
    fence_async_shared()

    splits = None
    if num_splits is not None:
        splits = Splits(num_splits, batch)
    num_tiles = gl.cdiv(seqlen_q, NUM_CONSUMERS * ROWS)
    schedule = Schedule(num_tiles, batch * heads.num_q, heads_alone, heads_per_group, counter, splits)
    lse = RowNumbers(lse_ptr, heads.num_q, lse_length)
    call = Call(rules, sequences, heads, schedule, seqlen_q, seqlen_kv)
    results = Results(out_desc, out_tiles, out_matrix, lse, sink_ptr)
    if NUM_CONSUMERS == 2:
        gl.warp_specialize(
            [
                (softmax_and_pv, (0, call, shares, q, k, v, results, HEAD_DIM_V, NUM_CONSUMERS, IN_TURN)),
                (softmax_and_pv, (1, call, shares, q, k, v, results, HEAD_DIM_V, NUM_CONSUMERS, IN_TURN)),
                (load, (call, shares, q, k, v, q_desc, k_desc, v_desc, NUM_CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, LOADER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (softmax_and_pv, (0, call, shares, q, k, v, results, HEAD_DIM_V, NUM_CONSUMERS, IN_TURN)),
                (softmax_and_pv, (1, call, shares, q, k, v, results, HEAD_DIM_V, NUM_CONSUMERS, IN_TURN)),
                (softmax_and_pv, (2, call, shares, q, k, v, results, HEAD_DIM_V, NUM_CONSUMERS, IN_TURN)),
                (load, (call, shares, q, k, v, q_desc, k_desc, v_desc, NUM_CONSUMERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, LOADER_REGISTERS],
        )


@jit
def load(call, shares, q, k, v, q_desc, k_desc, v_desc, NUM_CONSUMERS: gl.constexpr):
    BLOCK_Q: gl.constexpr = NUM_CONSUMERS * ROWS
    BLOCK_KV: gl.constexpr = k.tiles.shape[1]
    step, turn, share_idx = 0, 0, gl.program_id(0)
    while share_idx < num_shares(call.schedule):
        work = share(call.schedule, share_idx, call.heads.num_q, LAST_FIRST=call.rules.window.right is not None)
        sequence = find_sequence(call.sequences, work.batch_idx, call.seqlen_q, call.seqlen_kv)
        block_begin = work.tile_idx * BLOCK_Q
        if block_begin < sequence.seqlen_q:
            send_share(shares, turn, work, call.schedule.splits)
            tiles = visited_tiles(call.rules.window, sequence, block_begin, BLOCK_Q, BLOCK_KV)
            tiles = part_of(tiles, call.schedule.splits, work.split_idx)
            kv_head_idx = work.head_idx // call.heads.per_kv
            row = sequence.q_begin + block_begin
            for part in static_range(NUM_CONSUMERS):
                place = [sequence.buffer_idx, work.head_idx, row + part * ROWS, 0]
                fill(q, turn * NUM_CONSUMERS + part, q_desc, place)
            num_tiles = tiles.end - tiles.begin
            for i in range(num_tiles - 1):
                row = sequence.kv_begin + (tiles.end - 1 - i) * BLOCK_KV
                fill_kv(k, v, step + i, k_desc, v_desc, sequence.buffer_idx, kv_head_idx, row)
            # Asked for while slots for the last tile become free. Earlier, shares would not even out.
            share_idx = next_share(call.schedule)
            row = sequence.kv_begin + tiles.begin * BLOCK_KV
            fill_kv(k, v, step + num_tiles - 1, k_desc, v_desc, sequence.buffer_idx, kv_head_idx, row)
            step += num_tiles
            turn += 1
        else:
            share_idx = next_share(call.schedule)
    send_share(shares, turn, Work(END, 0, 0, 0), call.schedule.splits)


@jit
def fill_kv(k, v, step, k_desc, v_desc, buffer_idx, kv_head_idx, row):
    fill(k, step, k_desc, [buffer_idx, kv_head_idx, row, 0])
    fill(v, step, v_desc, [buffer_idx, kv_head_idx, row, 0])


@jit
def softmax_and_pv(
    part: gl.constexpr,
    call,
    shares,
    q,
    k,
    v,
    results,
    HEAD_DIM_V: gl.constexpr,
    NUM_CONSUMERS: gl.constexpr,
    IN_TURN: gl.constexpr,
):
    BLOCK_Q: gl.constexpr = NUM_CONSUMERS * ROWS
    BLOCK_KV: gl.constexpr = k.tiles.shape[1]
    BLOCK_DV: gl.constexpr = v.tiles.shape[2]
    dtype: gl.constexpr = q.tiles.dtype
    S: gl.constexpr = product_layout(BLOCK_KV)
    P: gl.constexpr = operand_layout(BLOCK_DV)

    q_idx = gl.expand_dims(gl.arange(0, ROWS, rows_of(S)), 1)
    kv_idx = gl.expand_dims(gl.arange(0, BLOCK_KV, cols_of(S)), 0)
    no_s = zeros([ROWS, BLOCK_KV], gl.float32, S)
    next_part: gl.constexpr = next_in_turn(part, NUM_CONSUMERS, IN_TURN)
    if IN_TURN:
        first_turn(part, NUM_CONSUMERS)
    step, turn = 0, 0
    work = receive_share(shares, 0, call.schedule.splits)
    while work.tile_idx != END:
        sequence = find_sequence(call.sequences, work.batch_idx, call.seqlen_q, call.seqlen_kv)
        block_begin = work.tile_idx * BLOCK_Q
        q_begin = block_begin + part * ROWS
        visited = visited_tiles(call.rules.window, sequence, block_begin, BLOCK_Q, BLOCK_KV)
        visited = part_of(visited, call.schedule.splits, work.split_idx)
        tiles = visited_tiles(call.rules.window, sequence, q_begin, ROWS, BLOCK_KV)
        end = gl.minimum(tiles.end, visited.end)
        # Rows behind the end see nothing: 192 divides few lengths, and who splits keys has few queries.
        if NUM_CONSUMERS == 3 or call.schedule.splits is not None:
            end = gl.where(q_begin < sequence.seqlen_q, end, 0)
        last = gl.maximum(end - 1, visited.begin)
        num_hidden = visited.end - 1 - last
        for i in range(num_hidden):  # tiles that only other rows of the block see
            skip(k, v, step + i, part, next_part)
        step += num_hidden
        slope_log2 = scores.slope_log2(call.rules, work.batch_idx, work.head_idx)
        head = scores.HeadRules(call.rules, sequence, slope_log2)
        q_step = turn * NUM_CONSUMERS + part
        q_empty = q.empty.index(q_step % q.tiles.shape[0])
        block = Block(head, q_begin + q_idx, kv_idx, receive(q, q_step), q_empty, visited.begin, k, v)

        s = warpgroup_mma(block.q, receive(k, step).permute((1, 0)), no_s, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        release(k, step)
        release_q(block, last)
        is_masked = not is_full(tiles, last)
        if IN_TURN and is_unlimited(call.rules.window):  # a branch costs more there than masks that hide nothing
            is_masked = True
        s = scores.scored(s, head, block.q_pos, last * BLOCK_KV + kv_idx, is_masked)
        no_max = thread_sums(no_s) - INF
        p, max_log2, _rescale = softmax_step(s, no_max, scores.unit_log2(call.rules))
        p_operand = gl.convert_layout(p.to(dtype), P)  # rounded for the product with V
        acc = zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
        sums = Sums(max_log2, thread_sums(p), acc, p_operand)
        if call.sequences.cu_seqlens_kv is not None:  # what lies behind a packed sequence may be NaN
            zero_rows_from(receive(v, step), sequence.seqlen_kv - last * BLOCK_KV, 4)

        tile_begin, tile_end = visited.begin, last
        if IN_TURN and is_unlimited(call.rules.window):  # the same range, of which the compiler makes a faster loop
            tile_begin = gl.minimum(gl.maximum(tiles.full_begin, visited.begin), last)
            tile_end = gl.minimum(gl.maximum(tiles.full_end, tile_begin), last)
        for tile_idx in range(tile_end - 1, tile_begin - 1, -1):
            is_masked = not is_full(tiles, tile_idx)
            if is_unlimited(call.rules.window):  # what lies behind the end is in the last tile
                is_masked = False
            sums = attend(block, sums, tile_idx, step + last - tile_idx, is_masked, part, next_part)

        step += last - visited.begin  # the step of the last product P @ V
        acc_token = warpgroup_mma(sums.p_operand, receive(v, step), sums.acc, is_async=True)
        row_sum = gl.convert_layout(gl.sum(sums.row_sums, 1), rows_of(S))
        row_max = gl.convert_layout(gl.max(sums.max_log2, 1), rows_of(S))
        factor, lse = finish(row_max, row_sum, results.sink_ptr, work.head_idx)
        row = q_begin + gl.arange(0, ROWS, rows_of(S))
        stored = stored_sequence(sequence, call.schedule.splits, work.split_idx)
        place = row_offset(results.lse, stored, work.head_idx, row)
        gl.store(results.lse.ptr + place, lse, mask=row < sequence.seqlen_q)
        acc = warpgroup_mma_wait(0, deps=[acc_token])
        release(v, step)
        out = rescaled(acc, factor).to(results.matrix.ptr.dtype.element_ty)
        if results.desc is not None:
            store_out(results, part, out, stored.buffer_idx, work.head_idx, q_begin)
        else:
            first, num_rows = sequence.q_begin + q_begin, sequence.seqlen_q - q_begin
            store_rows(results.matrix, out, stored.buffer_idx, work.head_idx, first, num_rows, HEAD_DIM_V)
        step += 1
        turn += 1
        work = receive_share(shares, turn, call.schedule.splits)
    if results.desc is not None:
        tma.store_wait(0)


@jit
def attend(block, sums, tile_idx, step, is_masked, part: gl.constexpr, next_part: gl.constexpr):
    """Takes one more tile of keys into the sums; its product S runs beside P @ V of the tile before."""
    BLOCK_KV: gl.constexpr = block.k.tiles.shape[1]
    dtype: gl.constexpr = block.q.dtype
    no_s = zeros([ROWS, BLOCK_KV], gl.float32, product_layout(BLOCK_KV))
    k_t = receive(block.k, step).permute((1, 0))
    if next_part is not None:
        take_turn(part)
    s_token = warpgroup_mma(block.q, k_t, no_s, use_acc=False, is_async=True)
    acc_token = warpgroup_mma(sums.p_operand, receive(block.v, step - 1), sums.acc, is_async=True)
    if next_part is not None:
        pass_turn(next_part)
    s = warpgroup_mma_wait(1, deps=[s_token])
    release(block.k, step)
    release_q(block, tile_idx)
    s = scores.scored(s, block.head, block.q_pos, tile_idx * BLOCK_KV + block.kv_idx, is_masked)
    p, max_log2, rescale = softmax_step(s, sums.max_log2, scores.unit_log2(block.head.rules))
    row_sums = sums.row_sums * rescale + thread_sums(p)
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    release(block.v, step - 1)
    acc = rescaled_if_needed(acc, rescale)
    p_operand = gl.convert_layout(p.to(dtype), sums.p_operand.type.layout)  # rounded for the product with V
    return Sums(max_log2, row_sums, acc, p_operand)


@jit
def release_q(block, tile_idx):
    """Gives the tile of Q back as soon as the scores of the last tile of keys are there."""
    if tile_idx == block.last_tile:
        mbarrier.arrive(block.q_empty, count=1)


@jit
def store_out(results, part: gl.constexpr, out, buffer_idx, head_idx, row):
    """Stores a tile of the output by TMA, in pieces as wide as the descriptor's."""
    COLS: gl.constexpr = results.desc.block_shape[3]
    tile = results.tiles.index(part)
    pieces = (out,) if out.shape[1] == COLS else halves(out)
    for i in static_range(len(pieces)):
        tma.store_wait(0)
        barrier()
        tile.store(pieces[i])
        fence_async_shared()
        barrier()
        tma_store(results.desc, [buffer_idx, head_idx, row, i * COLS], tile.reshape([1, 1, ROWS, COLS]))


@jit
def skip(k, v, step, part: gl.constexpr, next_part: gl.constexpr):
    """Lets a tile of keys and values pass."""
    if next_part is not None:
        take_turn(part)
        pass_turn(next_part)
    receive(k, step)
    release(k, step)
    receive(v, step)
    release(v, step)


@jit
def visited_tiles(window, sequence, q_begin, NUM_ROWS: gl.constexpr, BLOCK_KV: gl.constexpr):
    """The kv tiles that a block of queries visits: those that it sees, and at least one."""
    seqlen_q, seqlen_kv = sequence.seqlen_q, sequence.seqlen_kv
    q_end = gl.minimum(q_begin + NUM_ROWS, seqlen_q)
    tiles = kv_tiles(window, seqlen_q, seqlen_kv, q_begin, q_end, BLOCK_KV)
    return TileRange(tiles.begin, tiles.full_begin, tiles.full_end, gl.maximum(tiles.end, tiles.begin + 1))

"""What the backward kernels have in common: the share of a program, and the warps that load, clean and add up d_q."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.backends.hopper import constants
from flashtile.backends.hopper.primitives.addressing import Sums, find_sequence, statistics_row, sums_block
from flashtile.backends.hopper.primitives.channel import claim, receive, release
from flashtile.backends.hopper.primitives.gluon_compat import (
    constexpr_function,
    inline_asm,
    jit,
    static_range,
    tma_load,
    warpgroup_mma,
    zeros,
)
from flashtile.backends.hopper.primitives.layouts import cols_of, product_layout, rows_of
from flashtile.backends.hopper.primitives.masking import q_tiles
from flashtile.backends.hopper.primitives.scheduling import END, next_index, receive_index, send_index
from flashtile.backends.hopper.primitives.tiles import store_rows, zero_rows_from

ROWS = gl.constexpr(constants.ROWS)
SUM_ROWS = gl.constexpr(constants.SUM_ROWS)
NUM_CONSUMERS = gl.constexpr(2)
RUNTIME_NUMBERS = [
    "num_sum_blocks",
    "num_stored_rows",
    "num_heads",
    "heads_together",
    "num_splits",
    "seqlen_q",
    "seqlen_kv",
]
"""Parameters of each backward kernel that must not become compile-time numbers, or a new length would compile it."""


class Order(NamedTuple):
    """``num_tiles`` tiles of keys for each of ``num_heads`` kv heads (of all sequences), one head after the other.

    So programs that run at the same time find Q, d_out and the sums of d_q of few heads in the L2 cache. The last
    heads, ``num_together`` of them, take turns: under a causal mask the first keys are seen by the most queries, and no
    program with much to do should start when the others are done.
    """

    num_tiles: Any
    num_heads: Any
    num_together: Any
    num_splits: Any
    """The parts that the steps of each tile are split into, each a share of its own; ``None`` if they are not."""
    counter: Any
    """How many shares were drawn beyond the programs' first ones, 0 at the start; ``None`` if a program has but one."""


class Call(NamedTuple):
    """What every partition knows of the call."""

    rules: Any
    sequences: Any
    heads: Any
    order: Any
    seqlen_q: Any
    seqlen_kv: Any


class Work(NamedTuple):
    """One share: a tile of keys, and the tiles of queries that see any of it, for each head of a group.

    Before it the program had ``num_before`` shares with steps, and ``first_step`` steps in all. Of the tile's steps
    ``num_skipped`` belong to the splits before this one.
    """

    sequence: Any
    batch_idx: Any
    kv_head_idx: Any
    kv_begin: Any
    tiles: Any
    num_tiles: Any
    num_steps: Any
    first_step: Any
    num_before: Any
    num_skipped: Any


class Channels(NamedTuple):
    """What lies in shared memory: K and V [parts, 64, columns], and the streams of Q and d_out.

    The two numbers of each query row come with the tiles of Q and d_out. The barriers ``kv_clean`` and
    ``rows_clean`` are those of ``clean``, ``None`` where it has nothing to do. ``shares``, their indices, and
    ``kv_empty`` are ``None`` where a program has but one share, and ``kv_ready`` also if it is not cleaned.
    """

    shares: Any
    k: Any
    v: Any
    kv_ready: Any
    kv_empty: Any
    kv_clean: Any
    rows_clean: Any
    q: Any
    d_out: Any
    lse_log2: Any
    delta: Any


@jit
def num_shares(order):
    """Of all programs."""
    num = order.num_tiles * order.num_heads
    if order.num_splits is not None:
        num *= order.num_splits
    return num


@jit
def tile_of_keys(order, share_idx):
    """(tile, kv head of all sequences, split) of a share: all splits of a tile, then the next tile."""
    split_idx = 0
    if order.num_splits is not None:
        split_idx = share_idx % order.num_splits
        share_idx = share_idx // order.num_splits
    num_before = order.num_heads - order.num_together
    tile_idx, head = share_idx % order.num_tiles, share_idx // order.num_tiles
    if head >= num_before:
        place = share_idx - num_before * order.num_tiles
        tile_idx, head = place // order.num_together, num_before + place % order.num_together
    return tile_idx, head, split_idx


@jit
def find_work(call, share_idx, first_step, num_before, BLOCK_KV: gl.constexpr):
    """The share of an index; one without keys has no steps."""
    heads_kv = call.heads.num_q // call.heads.per_kv
    tile_idx, head, split_idx = tile_of_keys(call.order, share_idx)
    kv_head_idx, batch_idx = head % heads_kv, head // heads_kv
    sequence = find_sequence(call.sequences, batch_idx, call.seqlen_q, call.seqlen_kv)
    kv_begin = tile_idx * BLOCK_KV
    kv_end = gl.minimum(kv_begin + BLOCK_KV, sequence.seqlen_kv)
    tiles = q_tiles(call.rules.window, sequence.seqlen_q, sequence.seqlen_kv, kv_begin, kv_end, ROWS)
    num_tiles = gl.where(kv_begin < sequence.seqlen_kv, tiles.end - tiles.begin, 0)
    num_steps, num_skipped = num_tiles * call.heads.per_kv, 0
    if call.order.num_splits is not None:
        num_skipped = num_steps * split_idx // call.order.num_splits
        num_steps = num_steps * (split_idx + 1) // call.order.num_splits - num_skipped
    return Work(
        sequence, batch_idx, kv_head_idx, kv_begin, tiles, num_tiles, num_steps, first_step, num_before, num_skipped
    )


@jit
def only_work(call, BLOCK_KV: gl.constexpr):
    """The share of a program that has no other."""
    return find_work(call, gl.program_id(0), 0, 0, BLOCK_KV)


@jit
def steps_and_shares(work):
    """``first_step`` and ``num_before`` of the share that comes after this one."""
    return work.first_step + work.num_steps, work.num_before + gl.where(work.num_steps > 0, 1, 0)


@jit
def tile_and_head(work, call, step):
    """(tile of queries, query head) of a step: tile after tile from the last one on, head after head.

    Programs that start together so visit the same rows at the same time, under a causal mask too.
    """
    if call.order.num_splits is not None:
        step += work.num_skipped
    tile_idx, head_idx = work.tiles.end - 1 - step, work.kv_head_idx
    if call.heads.per_kv > 1:
        tile_idx = work.tiles.end - 1 - step % work.num_tiles
        head_idx = work.kv_head_idx * call.heads.per_kv + step // work.num_tiles
    return tile_idx, head_idx


@jit
def load(call, channels, loads):
    BLOCK_KV: gl.constexpr = channels.k.shape[0] * ROWS
    if call.order.counter is None:
        load_share(call, channels, loads, only_work(call, BLOCK_KV))
    else:
        share_idx, turn, first_step, num_before = gl.program_id(0), 0, 0, 0
        while share_idx != END:
            send_index(channels.shares, turn, share_idx)
            work = find_work(call, share_idx, first_step, num_before, BLOCK_KV)
            load_share(call, channels, loads, work)
            first_step, num_before = steps_and_shares(work)
            turn += 1
            share_idx = next_index(call.order.counter, num_shares(call.order))
        send_index(channels.shares, turn, END)


@jit
def load_share(call, channels, loads, work):
    """K and V come with the first tiles of Q and d_out, or before them where a barrier of their own tells of them."""
    if work.num_steps > 0:
        if channels.kv_ready is not None:
            if channels.kv_empty is not None:
                mbarrier.wait(channels.kv_empty.index(0), (work.num_before & 1) ^ 1)
            _q_desc, k_desc, v_desc, _d_out_desc, _lse_log2_desc, _delta_desc = loads
            NUM_PARTS: gl.constexpr = channels.k.shape[0]
            mbarrier.expect(
                channels.kv_ready.index(0), NUM_PARTS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            )
            load_parts(k_desc, channels.k, channels.kv_ready.index(0), work)
            load_parts(v_desc, channels.v, channels.kv_ready.index(0), work)
        load_step(call, channels, loads, work, 0, channels.kv_ready is None)
    for i in range(1, work.num_steps):
        load_step(call, channels, loads, work, i, False)


@jit
def load_step(call, channels, loads, work, i, WITH_KEYS: gl.constexpr):
    q_desc, k_desc, v_desc, d_out_desc, lse_log2_desc, delta_desc = loads
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    NUM_PARTS: gl.constexpr = channels.k.shape[0] * WITH_KEYS
    sequence = work.sequence
    tile_idx, head_idx = tile_and_head(work, call, i)
    step, row = work.first_step + i, tile_idx * ROWS
    place = [sequence.buffer_idx, head_idx, sequence.q_begin + row, 0]
    number_row, number_col = statistics_row(call, sequence, work.batch_idx, head_idx, row)
    slot = step % channels.q.tiles.shape[0]
    K_BYTES: gl.constexpr = NUM_PARTS * k_desc.block_type.nbytes
    tile, ready = claim(channels.q, step, q_desc.block_type.nbytes + lse_log2_desc.block_type.nbytes + K_BYTES)
    if WITH_KEYS:
        load_parts(k_desc, channels.k, ready, work)
    tma_load(lse_log2_desc, [number_row, number_col], ready, channels.lse_log2.index(slot))
    tma_load(q_desc, place, ready, tile.reshape([1, 1, ROWS, BLOCK_D]))
    V_BYTES: gl.constexpr = NUM_PARTS * v_desc.block_type.nbytes
    tile, ready = claim(channels.d_out, step, d_out_desc.block_type.nbytes + delta_desc.block_type.nbytes + V_BYTES)
    if WITH_KEYS:
        load_parts(v_desc, channels.v, ready, work)
    tma_load(delta_desc, [number_row, number_col], ready, channels.delta.index(slot))
    tma_load(d_out_desc, place, ready, tile.reshape([1, 1, ROWS, BLOCK_DV]))


@jit
def load_parts(desc, tiles, ready, work):
    """All of the share's K, or V."""
    NUM_PARTS: gl.constexpr = tiles.shape[0]
    NUM_COLS: gl.constexpr = tiles.shape[2]
    for part in static_range(NUM_PARTS):
        row = work.sequence.kv_begin + work.kv_begin + part * ROWS
        place = [work.sequence.buffer_idx, work.kv_head_idx, row, 0]
        tma_load(desc, place, ready, tiles.index(part).reshape([1, 1, ROWS, NUM_COLS]))


@constexpr_function
def num_readers(is_packed):
    """Of the tiles of Q and d_out: the consumers and, for packed sequences, the warp that cleans them."""
    return NUM_CONSUMERS.value + is_packed


@jit
def wait_for_keys(call, channels, work):
    """Until K and V have arrived, and hold nothing that does not belong to the sequence.

    Where they come with the first tiles of Q and d_out, waiting for those will do.
    """
    if channels.kv_clean is not None:
        mbarrier.wait(channels.kv_clean.index(0), work.num_before & 1)
    elif channels.kv_ready is not None:
        mbarrier.wait(channels.kv_ready.index(0), work.num_before & 1)


@jit
def wait_for_rows(call, channels, step):
    """Until the tiles of Q and d_out of a step, which have arrived, hold nothing behind the end of their sequence."""
    if call.sequences.cu_seqlens_kv is not None:
        num_slots: gl.constexpr = channels.rows_clean.shape[0]
        mbarrier.wait(channels.rows_clean.index(step % num_slots), step // num_slots & 1)


@jit
def clean(call, channels):
    """Sets to 0 what lies behind a packed sequence in its tiles: it may be NaN, and 0 times NaN is NaN."""
    BLOCK_KV: gl.constexpr = channels.k.shape[0] * ROWS
    if call.sequences.cu_seqlens_kv is not None:
        if call.order.counter is None:
            clean_share(call, channels, only_work(call, BLOCK_KV))
        else:
            turn, first_step, num_before = 0, 0, 0
            share_idx = receive_index(channels.shares, turn, 1)
            while share_idx != END:
                work = find_work(call, share_idx, first_step, num_before, BLOCK_KV)
                clean_share(call, channels, work)
                first_step, num_before = steps_and_shares(work)
                turn += 1
                share_idx = receive_index(channels.shares, turn, 1)


@jit
def clean_share(call, channels, work):
    NUM_PARTS: gl.constexpr = channels.k.shape[0]
    if work.num_steps > 0:
        mbarrier.wait(channels.kv_ready.index(0), work.num_before & 1)
        num_keys = work.sequence.seqlen_kv - work.kv_begin
        for part in static_range(NUM_PARTS):
            zero_rows_from(channels.k.index(part), num_keys - part * ROWS, 1)
            zero_rows_from(channels.v.index(part), num_keys - part * ROWS, 1)
        mbarrier.arrive(channels.kv_clean.index(0), count=1)
    for i in range(work.num_steps):
        tile_idx, _head_idx = tile_and_head(work, call, i)
        step = work.first_step + i
        q, d_out = receive(channels.q, step), receive(channels.d_out, step)
        num_rows = work.sequence.seqlen_q - tile_idx * ROWS
        zero_rows_from(q, num_rows, 1)
        zero_rows_from(d_out, num_rows, 1)
        mbarrier.arrive(channels.rows_clean.index(step % channels.rows_clean.shape[0]), count=1)
        release(channels.q, step)
        release(channels.d_out, step)


@jit
def row_numbers(numbers, step, layout: gl.constexpr):
    """The lse_log2 of a step's queries, which has come with Q, or their delta, which has come with d_out."""
    num_slots: gl.constexpr = numbers.shape[0]
    return numbers.index(step % num_slots).reshape([ROWS]).load(layout)


@jit
def d_q_product(d_s, k, step, COL: gl.constexpr, NUM_COLS: gl.constexpr):
    """dS @ K in flight: columns of a step's d_q from COL on. The channel ``d_s`` has a tile for each part of K."""
    NUM_PARTS: gl.constexpr = k.shape[0]
    token = zeros([ROWS, NUM_COLS], gl.float32, product_layout(NUM_COLS))
    for part in static_range(NUM_PARTS):
        d_s_part = receive(d_s, step * NUM_PARTS + part).permute((1, 0))
        k_part = k.index(part).slice(COL, NUM_COLS, dim=1)
        token = warpgroup_mma(d_s_part, k_part, token, use_acc=part > 0, is_async=True)
    return token


@jit
def release_parts(d_s, step, NUM_PARTS: gl.constexpr):
    for part in static_range(NUM_PARTS):
        release(d_s, step * NUM_PARTS + part)


@jit
def add_d_q(sums, d_q, call, work, tile_idx, head_idx, COL: gl.constexpr, BLOCK_D: gl.constexpr):
    """Adds a product, the columns of a tile of d_q from COL on, to the sums in memory.

    These lie as a product does in registers (see ``statistics``), so that a warp adds 512 bytes in a row. Blocks
    behind the end of a sequence belong to the next one. Where a program is the only one that has a tile's d_q, it is
    stored: no zeros were written there (``plan.num_stored_rows``).
    """
    NUM_ROWS: gl.constexpr = d_q.shape[0]
    NUM_BLOCKS: gl.constexpr = NUM_ROWS // SUM_ROWS
    in_order = in_order_of_sums(d_q)
    line, block = sums_block(call, work.sequence, work.batch_idx, head_idx)
    places, block_idx = places_in_sums(sums, line, block, tile_idx * NUM_BLOCKS, in_order, COL, BLOCK_D)
    if sums.num_stored_rows is not None:
        is_stored = (work.kv_begin == 0) & (tile_idx * NUM_ROWS < sums.num_stored_rows)
        inline_asm(
            """{ .reg .pred stored; setp.ne.b32 stored, $9, 0;
            @stored st.global.v4.f32 [$1], {$5, $6, $7, $8};
            @!stored red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0; }""",
            "=r,l,l,l,l,r,r,r,r,r,r,r,r",
            [places.to(gl.int64, bitcast=True), in_order, gl.where(is_stored, 1, 0)],
            dtype=gl.int8,
            is_pure=False,
            pack=4,
        )
    elif call.sequences.cu_seqlens_q is None:
        add_numbers(places, in_order, None)
    else:  # blocks behind the end belong to the next sequence
        exists = tile_idx * NUM_BLOCKS + block_idx < gl.cdiv(work.sequence.seqlen_q, SUM_ROWS)
        add_numbers(places, in_order, exists)


@jit
def in_order_of_sums(product):
    """[blocks of ``SUM_ROWS`` rows, their numbers], in the order in which a warp holds them (see ``statistics``)."""
    NUM_BLOCKS: gl.constexpr = product.shape[0] // SUM_ROWS
    NUM_COLS: gl.constexpr = product.shape[1]
    in_order = product.reshape([NUM_BLOCKS, 2, 8, NUM_COLS // 8, 4, 2]).permute((0, 3, 2, 4, 1, 5))
    return in_order.reshape([NUM_BLOCKS, SUM_ROWS * NUM_COLS])


@jit
def places_in_sums(sums, line, block, first_block, numbers, COL: gl.constexpr, NUM_COLS: gl.constexpr):
    """(pointers, index of each block) for ``numbers`` in the sums' order: the columns from COL on, of NUM_COLS."""
    layout: gl.constexpr = numbers.type.layout
    BLOCK_SIZE: gl.constexpr = SUM_ROWS * NUM_COLS
    first = (gl.to_tensor(line).to(gl.int64) * sums.num_blocks + block + first_block) * BLOCK_SIZE
    block_idx = gl.expand_dims(gl.arange(0, numbers.shape[0], rows_of(layout)), 1)
    places = sums.ptr + (first + SUM_ROWS * COL) + block_idx * BLOCK_SIZE
    places += gl.expand_dims(gl.arange(0, numbers.shape[1], cols_of(layout)), 0)
    return places, block_idx


@jit
def add_numbers(places, numbers, exists):
    """Adds each thread's numbers to memory, four at a time; only of blocks that exist, or of all if ``None``."""
    if exists is None:
        inline_asm(
            "red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0;",
            "=r,l,l,l,l,r,r,r,r",
            [places.to(gl.int64, bitcast=True), numbers],
            dtype=gl.int8,  # four of them are the one result that an instruction for four numbers has to have
            is_pure=False,
            pack=4,
        )
    else:
        inline_asm(
            """{ .reg .pred exists; setp.ne.b32 exists, $9, 0;
            @exists red.relaxed.gpu.global.add.v4.f32 [$1], {$5, $6, $7, $8}; mov.b32 $0, 0; }""",
            "=r,l,l,l,l,r,r,r,r,r,r,r,r",
            [places.to(gl.int64, bitcast=True), numbers, exists.to(gl.int32)],
            dtype=gl.int8,
            is_pure=False,
            pack=4,
        )


@jit
def gradient_target(given, num_splits, num_tiles, BLOCK_KV: gl.constexpr):
    """The ``Matrix`` that d_k or d_v is stored in; or the ``Sums`` that each split of a tile adds its part to."""
    return given if num_splits is None else Sums(given, num_tiles * (BLOCK_KV // SUM_ROWS), 0)


@jit
def store_gradient(target, gradient, dtype: gl.constexpr, call, work, begin, HEAD_DIM: gl.constexpr):
    """Stores d_k or d_v of the keys from ``begin`` on, or adds it up (``gradient_target``)."""
    sequence = work.sequence
    if call.order.num_splits is None:
        num_rows = sequence.seqlen_kv - begin
        row = sequence.kv_begin + begin
        rounded = gradient.to(dtype)
        store_rows(target, rounded, sequence.buffer_idx, work.kv_head_idx, row, num_rows, HEAD_DIM)
    else:
        in_order = in_order_of_sums(gradient)
        line = work.batch_idx * (call.heads.num_q // call.heads.per_kv) + work.kv_head_idx
        NUM_COLS: gl.constexpr = gradient.shape[1]
        places, _block_idx = places_in_sums(target, line, 0, begin // SUM_ROWS, in_order, 0, NUM_COLS)
        add_numbers(places, in_order, None)

"""What the backward kernels have in common: the share of a program, and the warps that load, clean and add up d_q."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashtile.backends.hopper import constants
from flashtile.backends.hopper.primitives.addressing import find_sequence, statistics_row
from flashtile.backends.hopper.primitives.channel import claim, receive, release
from flashtile.backends.hopper.primitives.gluon_compat import constexpr_function, jit, static_range, tma_add, tma_load
from flashtile.backends.hopper.primitives.masking import q_tiles
from flashtile.backends.hopper.primitives.tiles import zero_rows_from

ROWS = gl.constexpr(constants.ROWS)
NUM_CONSUMERS = gl.constexpr(2)


class Call(NamedTuple):
    """What every partition knows of the call."""

    rules: Any
    sequences: Any
    heads: Any
    seqlen_q: Any
    seqlen_kv: Any


class Work(NamedTuple):
    """What one program does: a tile of keys, and the tiles of queries that see any of it, for each head of a group."""

    sequence: Any
    batch_idx: Any
    kv_head_idx: Any
    kv_begin: Any
    tiles: Any
    num_tiles: Any
    num_steps: Any


class Channels(NamedTuple):
    """What lies in shared memory: K and V [parts, 64, columns], the streams of Q and d_out, d_q on its way to memory.

    The two numbers of each query row come with the tile of d_out, in its slots. The barriers ``kv_clean`` and ``clean``
    are those of ``clean``.
    """

    k: Any
    v: Any
    kv_ready: Any
    kv_clean: Any
    clean: Any
    q: Any
    d_out: Any
    lse_log2: Any
    delta: Any
    d_q: Any


@jit
def find_work(call, BLOCK_KV: gl.constexpr):
    """The program's share; one without keys has no steps."""
    num_kv_tiles = gl.cdiv(call.seqlen_kv, BLOCK_KV)
    program_idx = gl.program_id(0)
    heads_kv = call.heads.num_q // call.heads.per_kv
    head = program_idx // num_kv_tiles
    kv_head_idx, batch_idx = head % heads_kv, head // heads_kv
    sequence = find_sequence(call.sequences, batch_idx, call.seqlen_q, call.seqlen_kv)
    kv_begin = (program_idx % num_kv_tiles) * BLOCK_KV
    kv_end = gl.minimum(kv_begin + BLOCK_KV, sequence.seqlen_kv)
    tiles = q_tiles(call.rules.window, sequence.seqlen_q, sequence.seqlen_kv, kv_begin, kv_end, ROWS)
    num_tiles = gl.where(kv_begin < sequence.seqlen_kv, tiles.end - tiles.begin, 0)
    return Work(sequence, batch_idx, kv_head_idx, kv_begin, tiles, num_tiles, num_tiles * call.heads.per_kv)


@jit
def tile_and_head(work, call, step):
    """(tile of queries, query head) of a step: tile after tile, head after head."""
    tile_idx, head_idx = work.tiles.begin + step, work.kv_head_idx
    if call.heads.per_kv > 1:
        tile_idx = work.tiles.begin + step % work.num_tiles
        head_idx = work.kv_head_idx * call.heads.per_kv + step // work.num_tiles
    return tile_idx, head_idx


@jit
def load(call, channels, loads):
    q_desc, k_desc, v_desc, d_out_desc, lse_log2_desc, delta_desc = loads
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    BLOCK_DV: gl.constexpr = channels.d_out.tiles.shape[2]
    NUM_PARTS: gl.constexpr = channels.k.shape[0]
    work = find_work(call, NUM_PARTS * ROWS)
    sequence = work.sequence
    if work.num_steps > 0:
        kv_ready = channels.kv_ready.index(0)
        mbarrier.expect(kv_ready, NUM_PARTS * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for part in static_range(NUM_PARTS):
            place = [sequence.buffer_idx, work.kv_head_idx, sequence.kv_begin + work.kv_begin + part * ROWS, 0]
            tma_load(k_desc, place, kv_ready, channels.k.index(part).reshape([1, 1, ROWS, BLOCK_D]))
            tma_load(v_desc, place, kv_ready, channels.v.index(part).reshape([1, 1, ROWS, BLOCK_DV]))
    numbers: gl.constexpr = lse_log2_desc.block_type.nbytes + delta_desc.block_type.nbytes
    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        row = tile_idx * ROWS
        place = [sequence.buffer_idx, head_idx, sequence.q_begin + row, 0]
        tile, ready = claim(channels.q, step, q_desc.block_type.nbytes)
        tma_load(q_desc, place, ready, tile.reshape([1, 1, ROWS, BLOCK_D]))
        tile, ready = claim(channels.d_out, step, d_out_desc.block_type.nbytes + numbers)
        number_row, number_col = statistics_row(call, sequence, work.batch_idx, head_idx, row)
        slot = step % channels.d_out.tiles.shape[0]
        tma_load(lse_log2_desc, [number_row, number_col], ready, channels.lse_log2.index(slot))
        tma_load(delta_desc, [number_row, number_col], ready, channels.delta.index(slot))
        tma_load(d_out_desc, place, ready, tile.reshape([1, 1, ROWS, BLOCK_DV]))


@constexpr_function
def num_readers(is_packed):
    """Of the tiles of Q and d_out: the consumers and, for packed sequences, the warp that cleans them."""
    return NUM_CONSUMERS.value + is_packed


@jit
def wait_for_keys(call, channels):
    """Until K and V have arrived, and hold nothing that does not belong to the sequence."""
    if call.sequences.cu_seqlens_kv is None:
        mbarrier.wait(channels.kv_ready.index(0), 0)
    else:
        mbarrier.wait(channels.kv_clean.index(0), 0)


@jit
def wait_for_rows(call, channels, step):
    """Until the tiles of Q and d_out of a step, which have arrived, hold nothing behind the end of their sequence."""
    if call.sequences.cu_seqlens_kv is not None:
        num_slots: gl.constexpr = channels.clean.shape[0]
        mbarrier.wait(channels.clean.index(step % num_slots), step // num_slots & 1)


@jit
def clean(call, channels):
    """Sets to 0 what lies behind a packed sequence in its tiles: it may be NaN, and 0 times NaN is NaN."""
    if call.sequences.cu_seqlens_kv is not None:
        NUM_PARTS: gl.constexpr = channels.k.shape[0]
        work = find_work(call, NUM_PARTS * ROWS)
        if work.num_steps > 0:
            mbarrier.wait(channels.kv_ready.index(0), 0)
            num_keys = work.sequence.seqlen_kv - work.kv_begin
            for part in static_range(NUM_PARTS):
                zero_rows_from(channels.k.index(part), num_keys - part * ROWS, 1)
                zero_rows_from(channels.v.index(part), num_keys - part * ROWS, 1)
            mbarrier.arrive(channels.kv_clean.index(0), count=1)
        for step in range(work.num_steps):
            tile_idx, _head_idx = tile_and_head(work, call, step)
            q, d_out = receive(channels.q, step), receive(channels.d_out, step)
            num_rows = work.sequence.seqlen_q - tile_idx * ROWS
            zero_rows_from(q, num_rows, 1)
            zero_rows_from(d_out, num_rows, 1)
            mbarrier.arrive(channels.clean.index(step % channels.clean.shape[0]), count=1)
            release(channels.q, step)
            release(channels.d_out, step)


@jit
def row_numbers(numbers, step, layout: gl.constexpr):
    """The lse_log2 or delta of a step's queries, which have come with the tile of d_out."""
    num_slots: gl.constexpr = numbers.shape[0]
    return numbers.index(step % num_slots).reshape([ROWS]).load(layout)


@jit
def add_d_q(call, channels, d_q_desc):
    """Adds d_q to memory piece by piece; a consumer has half of a tile's columns."""
    BLOCK_D: gl.constexpr = channels.q.tiles.shape[2]
    COLS: gl.constexpr = channels.d_q.tiles.shape[2]
    NUM_PIECES: gl.constexpr = BLOCK_D // (NUM_CONSUMERS * COLS)
    work = find_work(call, channels.k.shape[0] * ROWS)
    sequence = work.sequence
    for step in range(work.num_steps):
        tile_idx, head_idx = tile_and_head(work, call, step)
        row = sequence.q_begin + tile_idx * ROWS
        for piece in static_range(NUM_PIECES):
            for part in static_range(NUM_CONSUMERS):
                mbarrier.wait(channels.d_q.ready.index(part), (step * NUM_PIECES + piece) & 1)
                tile = channels.d_q.tiles.index(part)
                if call.sequences.cu_seqlens_q is not None:  # the tile may reach into the next sequence
                    zero_rows_from(tile, sequence.seqlen_q - tile_idx * ROWS, 1)
                place = [sequence.buffer_idx, head_idx, row, (part * NUM_PIECES + piece) * COLS]
                tma_add(d_q_desc, place, tile.reshape([1, 1, ROWS, COLS]))
            tma.store_wait(1)
            mbarrier.arrive(channels.d_q.empty.index(0), count=1)
            tma.store_wait(0)
            mbarrier.arrive(channels.d_q.empty.index(1), count=1)

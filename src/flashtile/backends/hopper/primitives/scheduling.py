"""Which program works on what: a persistent grid, whose programs take the next share of the work when they are done."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.backends.hopper.primitives.channel import Channel, make_barriers, receive, release, slot_to_fill
from flashtile.backends.hopper.primitives.gluon_compat import jit
from flashtile.backends.hopper.primitives.layouts import everywhere_layout, number_layout, plain_layout

NUM_SLOTS = gl.constexpr(2)
END = gl.constexpr(-1)
"""The tile of the share that does not exist."""


class Splits(NamedTuple):
    """The keys of every tile in ``num`` parts, each a share of its own."""

    num: Any
    batch: Any
    """So many sequences have their results of one part before those of the next."""


class Schedule(NamedTuple):
    """``num_tiles`` tiles for each of ``num_heads`` heads (of all sequences).

    The first ``num_alone`` heads come one after the other, the rest ``group`` at a time. The heads of a group find
    their K and V in the L2 cache; within a group the tile with the most to do comes first.
    """

    num_tiles: Any
    num_heads: Any
    num_alone: Any
    group: Any
    counter: Any
    """How many shares were drawn beyond the programs' first ones: 0 before and after; not read if those are all."""
    splits: Any
    """``None`` if a share has all keys of its tile."""


class Work(NamedTuple):
    """One share: a tile of one head of one sequence, and a part of its keys (0 if they are not split)."""

    tile_idx: Any
    head_idx: Any
    batch_idx: Any
    split_idx: Any


@jit
def num_shares(schedule):
    whole = schedule.num_tiles * schedule.num_heads
    if schedule.splits is None:
        return whole
    else:
        return whole * schedule.splits.num


@jit
def next_share(schedule):
    """Draws the index of a further share for a program; one that is not below ``num_shares`` does not exist.

    Every share but the programs' first ones is drawn once, and every program stops at the first index that does not
    exist: as many draws as there are shares. Whoever draws last sets the counter back to 0, for the next launch.
    """
    share_idx = num_shares(schedule)
    if share_idx > gl.num_programs(0):
        num_drawn = 1 + gl.atomic_add(schedule.counter, 1, sem="relaxed")
        if num_drawn == share_idx:
            gl.atomic_xchg(schedule.counter, 0, sem="relaxed")  # a store makes ptxas spill more, of full calls at 256
        share_idx = gl.num_programs(0) + num_drawn - 1
    return share_idx


@jit
def share(schedule, share_idx, heads_per_sequence, LAST_FIRST: gl.constexpr):
    """The share of an index below ``num_shares``.

    Args:
        LAST_FIRST: the later tiles of a head have more to do (query tiles of causal attention).
    """
    split_idx = 0
    if schedule.splits is not None:
        split_idx = share_idx % schedule.splits.num
        share_idx = share_idx // schedule.splits.num
    first_head, size = 0, 1
    if share_idx >= schedule.num_alone * schedule.num_tiles:
        first_head, size = schedule.num_alone, schedule.group
    group_idx = (share_idx - first_head * schedule.num_tiles) // (schedule.num_tiles * size)
    first_head += group_idx * size
    within = share_idx - first_head * schedule.num_tiles
    group = gl.minimum(size, schedule.num_heads - first_head)
    tile_idx = within // group
    if LAST_FIRST:
        tile_idx = schedule.num_tiles - 1 - tile_idx
    head = first_head + within % group
    return Work(tile_idx, head % heads_per_sequence, head // heads_per_sequence, split_idx)


@jit
def make_share_channel(NUM_READERS: gl.constexpr):
    """Tells the other partitions of a program which share comes next."""
    layout: gl.constexpr = plain_layout()
    numbers = gl.allocate_shared_memory(gl.int32, [NUM_SLOTS, 4], layout)
    return Channel(numbers, make_barriers(NUM_SLOTS, 1), make_barriers(NUM_SLOTS, NUM_READERS))


@jit
def send_share(shares, turn, work, splits):
    """From one warp, which has divided the index, so that readers need not; the tile ``END`` is sent last."""
    place = gl.arange(0, 4, number_layout(1))
    last = work.batch_idx
    if splits is not None:
        last = gl.where(place == 2, work.batch_idx, work.split_idx)
    numbers = gl.where(place == 0, work.tile_idx, gl.where(place == 1, work.head_idx, last))
    slot_to_fill(shares, turn).store(numbers)
    mbarrier.arrive(shares.ready.index(turn % NUM_SLOTS), count=1)


@jit
def receive_share(shares, turn, splits):
    layout: gl.constexpr = everywhere_layout(4, 4)
    numbers = receive(shares, turn).load(layout)
    release(shares, turn)
    place = gl.arange(0, 4, layout)
    split_idx = 0
    if splits is not None:
        split_idx = number_at(numbers, place, 3)
    return Work(number_at(numbers, place, 0), number_at(numbers, place, 1), number_at(numbers, place, 2), split_idx)


@jit
def next_index(counter, num_shares):
    """Draws the index of a further share for a program, as ``next_share`` does, but leaves the counter; END if none."""
    share_idx = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    return gl.where(share_idx < num_shares, share_idx, END)


@jit
def send_index(shares, turn, share_idx):
    """From one warp, to readers that divide it; END comes last."""
    slot_to_fill(shares, turn).store(gl.arange(0, 4, number_layout(1)) * 0 + share_idx)
    mbarrier.arrive(shares.ready.index(turn % NUM_SLOTS), count=1)


@jit
def receive_index(shares, turn, NUM_WARPS: gl.constexpr):
    layout: gl.constexpr = everywhere_layout(4, NUM_WARPS)
    numbers = receive(shares, turn).load(layout)
    release(shares, turn)
    return number_at(numbers, gl.arange(0, 4, layout), 0)


@jit
def number_at(numbers, place, idx: gl.constexpr):
    return gl.sum(gl.where(place == idx, numbers, 0), 0)

"""Which program works on what: a persistent grid, whose programs take every ``num_programs``-th share of the work."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Schedule(NamedTuple):
    """``num_tiles`` tiles for each of ``num_heads`` heads (of all sequences), ``group`` heads at a time.

    The heads of a group find their K and V in the L2 cache; within a group the tile with the most to do comes first.
    """

    num_tiles: Any
    num_heads: Any
    group: Any


class Work(NamedTuple):
    """One share: a tile of one head of one sequence."""

    tile_idx: Any
    head_idx: Any
    batch_idx: Any


@gluon.jit
def num_shares(schedule):
    return schedule.num_tiles * schedule.num_heads


@gluon.jit
def share(schedule, share_idx, heads_per_sequence, LAST_FIRST: gl.constexpr):
    """The share of an index below ``num_shares``.

    Args:
        LAST_FIRST: the later tiles of a head have more to do (query tiles of causal attention).
    """
    group_idx = share_idx // (schedule.num_tiles * schedule.group)
    first_head = group_idx * schedule.group
    within = share_idx - first_head * schedule.num_tiles
    group = gl.minimum(schedule.group, schedule.num_heads - first_head)
    tile_idx = within // group
    if LAST_FIRST:
        tile_idx = schedule.num_tiles - 1 - tile_idx
    head = first_head + within % group
    return Work(tile_idx, head % heads_per_sequence, head // heads_per_sequence)

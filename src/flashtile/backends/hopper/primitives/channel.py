"""A ring of tiles in shared memory between one warp that fills it and the warpgroups that read it.

Slot ``step % num_slots`` belongs to the tile of a step. The writer waits until every reader of the slot's last tile is
done, and the TMA unit signals when the new tile has arrived; each barrier flips its phase once per use of the slot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from flashtile.backends.hopper.primitives.gluon_compat import jit, static_range, tma_load


class Channel(NamedTuple):
    """Tiles [num_slots, rows, columns] in shared memory, with two barriers for each slot."""

    tiles: Any
    ready: Any
    empty: Any


@jit
def make_barriers(NUM_SLOTS: gl.constexpr, NUM_ARRIVALS: gl.constexpr):
    """One barrier for each slot; a phase ends with the last of NUM_ARRIVALS.

    Make only those that a partition uses: the compiler gives the memory of others to tiles. To the GPU it stays a
    barrier until ``mbarrier.inval`` (PTX ISA), and when another process gets the GPU for a while, 8 bytes of a barrier
    come to lie in the tile.
    """
    barriers = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in static_range(NUM_SLOTS):
        mbarrier.init(barriers.index(slot), count=NUM_ARRIVALS)
    return barriers


@jit
def make_channel(
    dtype: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    NUM_READERS: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], dtype)
    tiles = gl.allocate_shared_memory(dtype, [NUM_SLOTS, ROWS, COLS], layout)
    return Channel(tiles, make_barriers(NUM_SLOTS, 1), make_barriers(NUM_SLOTS, NUM_READERS))


@jit
def slot_to_fill(channel, step):
    """The slot of a step for a writer that stores it itself, as soon as it is free; it then arrives at ``ready``."""
    num_slots: gl.constexpr = channel.tiles.shape[0]
    slot = step % num_slots
    mbarrier.wait(channel.empty.index(slot), ((step // num_slots) & 1) ^ 1)
    return channel.tiles.index(slot)


@jit
def send(channel, step, tile):
    """Stores a writer's tile of a step, from registers, for readers that multiply it."""
    slot_to_fill(channel, step).store(tile)
    fence_async_shared()
    mbarrier.arrive(channel.ready.index(step % channel.tiles.shape[0]), count=1)


@jit
def claim(channel, step, NUM_BYTES: gl.constexpr):
    """(tile, barrier) of a step for the writer, as soon as the slot is free; NUM_BYTES will arrive at the barrier."""
    num_slots: gl.constexpr = channel.tiles.shape[0]
    ready = channel.ready.index(step % num_slots)
    tile = slot_to_fill(channel, step)
    mbarrier.expect(ready, NUM_BYTES)
    return tile, ready


@jit
def fill(channel, step, desc, place):
    """Loads the tile at ``place`` of a rank-4 descriptor into the slot of a step."""
    rows: gl.constexpr = channel.tiles.shape[1]
    cols: gl.constexpr = channel.tiles.shape[2]
    tile, ready = claim(channel, step, desc.block_type.nbytes)
    tma_load(desc, place, ready, tile.reshape([1, 1, rows, cols]))


@jit
def receive(channel, step):
    """A reader's tile of a step, once it has arrived."""
    num_slots: gl.constexpr = channel.tiles.shape[0]
    slot = step % num_slots
    mbarrier.wait(channel.ready.index(slot), (step // num_slots) & 1)
    return channel.tiles.index(slot)


@jit
def release(channel, step):
    """A reader is done with the tile of a step."""
    num_slots: gl.constexpr = channel.tiles.shape[0]
    mbarrier.arrive(channel.empty.index(step % num_slots), count=1)


@jit
def release_previous(channel, step):
    """A reader is done with the tile of the step before this one, if there is one."""
    num_slots: gl.constexpr = channel.tiles.shape[0]
    mbarrier.arrive(channel.empty.index((step + num_slots - 1) % num_slots), count=1, pred=step > 0)

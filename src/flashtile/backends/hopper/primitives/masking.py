"""Which tiles and pairs a window leaves visible; mirrors ``flashtile.spec.masks``, where the reasoning is."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.primitives.gluon_compat import jit, static_range
from flashtile.backends.hopper.primitives.layouts import axis_of


class Place(NamedTuple):
    """Rows and columns of a product, as numbers that are added up: of the row, of the thread, and of what is in it.

    A product [rows, columns] has the axes rows, groups of eight columns, threads and neighbours here. Which of a
    thread's own columns a number is in is known when the kernel is compiled, and takes no register.
    """

    row: Any
    thread_col: Any
    own_col: Any


class TileRange(NamedTuple):
    """Tiles [begin, end) hold something visible; of these [full_begin, full_end) are visible everywhere."""

    begin: Any
    full_begin: Any
    full_end: Any
    end: Any


@jit
def kv_tiles(window, seqlen_q, seqlen_kv, q_begin, q_end, BLOCK_KV: gl.constexpr):
    """The kv tiles that the query rows [q_begin, q_end) visit."""
    offset = seqlen_kv - seqlen_q
    any_begin, all_begin = 0, 0
    any_end, all_end = seqlen_kv, seqlen_kv
    if window.left is not None:
        any_begin, all_begin = q_begin + offset - window.left, q_end - 1 + offset - window.left
    if window.right is not None:
        any_end, all_end = q_end + offset + window.right, q_begin + 1 + offset + window.right
    return _tile_range(any_begin, all_begin, all_end, any_end, seqlen_kv, BLOCK_KV)


@jit
def q_tiles(window, seqlen_q, seqlen_kv, kv_begin, kv_end, BLOCK_Q: gl.constexpr):
    """The query tiles that see something of the keys [kv_begin, kv_end)."""
    offset = seqlen_kv - seqlen_q
    any_begin, all_begin = 0, 0
    any_end, all_end = seqlen_q, seqlen_q
    if window.right is not None:
        any_begin, all_begin = kv_begin - offset - window.right, kv_end - 1 - offset - window.right
    if window.left is not None:
        any_end, all_end = kv_end - offset + window.left, kv_begin + 1 - offset + window.left
    return _tile_range(any_begin, all_begin, all_end, any_end, seqlen_q, BLOCK_Q)


@jit
def _tile_range(any_begin, all_begin, all_end, any_end, length, BLOCK: gl.constexpr):
    any_begin = gl.minimum(gl.maximum(any_begin, 0), length)
    all_begin = gl.minimum(gl.maximum(all_begin, 0), length)
    all_end = gl.minimum(gl.maximum(all_end, 0), length)
    any_end = gl.minimum(gl.maximum(any_end, 0), length)
    sees_any = any_begin < any_end
    begin = gl.where(sees_any, any_begin // BLOCK, 0)
    end = gl.where(sees_any, (any_end + BLOCK - 1) // BLOCK, 0)
    full_begin = gl.minimum((all_begin + BLOCK - 1) // BLOCK, end)
    full_end = gl.minimum(gl.maximum(all_end // BLOCK, full_begin), end)
    return TileRange(begin, full_begin, full_end, end)


@jit
def is_unlimited(window):
    """Whether only the ends of the sequences hide anything."""
    return window.left is None and window.right is None


@jit
def is_causal(window):
    """Whether only keys behind a query are hidden, and none before it."""
    return window.left is None and window.right is not None


@jit
def part_of(tiles, splits, split_idx):
    """The tiles of one part of those that a block visits: all without ``splits``, else at least one.

    The last parts may have nothing left. They get a tile behind all that the block visits, of which no row sees a key.
    """
    if splits is None:
        return tiles
    else:
        num_tiles = gl.cdiv(tiles.end - tiles.begin, splits.num)
        begin = tiles.begin + split_idx * num_tiles
        end = gl.maximum(gl.minimum(begin + num_tiles, tiles.end), begin + 1)
        return TileRange(begin, tiles.full_begin, tiles.full_end, end)


@jit
def is_full(tiles, tile_idx):
    """Whether every pair of the tile is visible."""
    return (tile_idx >= tiles.full_begin) & (tile_idx < tiles.full_end)


@jit
def is_visible(window, q_pos, kv_pos, seqlen_q, seqlen_kv):
    """Whether each query sees each key; positions broadcast against each other, and keys beyond the end are hidden."""
    aligned = q_pos + (seqlen_kv - seqlen_q)
    if window.right is not None:
        visible = kv_pos <= gl.minimum(aligned + window.right, seqlen_kv - 1)
    else:
        visible = (kv_pos < seqlen_kv) & (q_pos == q_pos)
    if window.left is not None:
        visible &= kv_pos >= aligned - window.left
    return visible


@jit
def is_visible_by_key(window, q_begin, kv_begin, seqlen_q, seqlen_kv, product):
    """``is_visible`` for a product with keys as rows and queries as columns, in its layout.

    Each key is seen by the queries from one on, up to another: two numbers of a row, with which columns are compared.
    """
    place = place_in(product)
    offset = seqlen_kv - seqlen_q
    kv_pos = kv_begin + place.row
    exists = kv_pos < seqlen_kv
    if window.right is not None:
        first = gl.where(exists, kv_pos - offset - window.right - q_begin, product.shape[1])
        visible = place.own_col >= first - place.thread_col
    else:
        visible = exists & (place.own_col + place.thread_col >= 0)
    if window.left is not None:
        visible &= place.own_col <= kv_pos - offset + window.left - q_begin - place.thread_col
    return gl.convert_layout(visible.reshape(product.shape), product.type.layout)


@jit
def place_in(product):
    """The place of each number of a product; see ``Place``."""
    by_thread = product.reshape([product.shape[0], product.shape[1] // 8, 4, 2])
    LAYOUT: gl.constexpr = by_thread.type.layout
    row, group = along(0, product.shape[0], LAYOUT), along(1, product.shape[1] // 8, LAYOUT)
    thread, neighbour = along(2, 4, LAYOUT), along(3, 2, LAYOUT)
    return Place(row, thread * 2, group * 8 + neighbour)


@jit
def along(AXIS: gl.constexpr, NUM: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, .. along one of a tile's four axes."""
    index = gl.arange(0, NUM, axis_of(LAYOUT, AXIS))
    for axis in static_range(4):
        if axis != AXIS:
            index = gl.expand_dims(index, axis)
    return index

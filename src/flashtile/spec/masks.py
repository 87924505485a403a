"""Which tiles of the score matrix the mask leaves full, partial or empty: integer arithmetic that every kernel mirrors.

A query tile is rows ``[q_begin, q_end)``, a kv tile is columns ``[t * block_kv, (t + 1) * block_kv)``. Empty tiles are
never computed, full tiles are computed without looking at positions, and only partial tiles pay for masking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile.spec.problem import MaskSpec

HIDDEN_BELOW = torch.finfo(torch.float32).min / 2
"""A score at or below this after a bias hides its pair, as -inf does. People mask with finfo.min, and a row masked so
throughout sees nothing: its softmax would be that of rounding errors, and float32's lse could not hold log(n) beside
-3.4e38 for the backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRange:
    """Tiles ``[begin, end)`` hold something visible; of these ``[full_begin, full_end)`` are visible everywhere."""

    begin: int
    full_begin: int
    full_end: int
    end: int

    def is_full(self, tile_idx: int) -> bool:
        return self.full_begin <= tile_idx < self.full_end


def kv_tiles(mask: MaskSpec, *, seqlen_q: int, seqlen_kv: int, q_begin: int, q_end: int, block_kv: int) -> TileRange:
    """The kv tiles that the query rows ``[q_begin, q_end)`` visit."""
    offset = seqlen_kv - seqlen_q
    any_begin = 0 if mask.left is None else q_begin + offset - mask.left
    all_begin = 0 if mask.left is None else q_end - 1 + offset - mask.left
    any_end = seqlen_kv if mask.right is None else q_end + offset + mask.right
    all_end = seqlen_kv if mask.right is None else q_begin + 1 + offset + mask.right
    return _tile_range(any_begin, all_begin, all_end, any_end, length=seqlen_kv, block=block_kv)


def q_tiles(mask: MaskSpec, *, seqlen_q: int, seqlen_kv: int, kv_begin: int, kv_end: int, block_q: int) -> TileRange:
    """The query tiles that see something of the keys ``[kv_begin, kv_end)``: what a dK/dV kernel walks."""
    offset = seqlen_kv - seqlen_q
    any_begin = 0 if mask.right is None else kv_begin - offset - mask.right
    all_begin = 0 if mask.right is None else kv_end - 1 - offset - mask.right
    any_end = seqlen_q if mask.left is None else kv_end - offset + mask.left
    all_end = seqlen_q if mask.left is None else kv_begin + 1 - offset + mask.left
    return _tile_range(any_begin, all_begin, all_end, any_end, length=seqlen_q, block=block_q)


def _tile_range(any_begin: int, all_begin: int, all_end: int, any_end: int, *, length: int, block: int) -> TileRange:
    any_begin, all_begin, all_end, any_end = (min(max(x, 0), length) for x in (any_begin, all_begin, all_end, any_end))
    if any_begin >= any_end:
        return TileRange(begin=0, full_begin=0, full_end=0, end=0)
    begin, end = any_begin // block, -(-any_end // block)
    full_begin = min(-(-all_begin // block), end)
    full_end = max(all_end // block, full_begin)  # a tile that the length cuts short is partial
    return TileRange(begin=begin, full_begin=full_begin, full_end=full_end, end=end)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileCount:
    """How many tiles of one score matrix are visible everywhere, somewhere and nowhere."""

    full: int
    partial: int
    empty: int

    @property
    def visited(self) -> int:
        return self.full + self.partial


def count_tiles(mask: MaskSpec, *, seqlen_q: int, seqlen_kv: int, block_q: int, block_kv: int) -> TileCount:
    """The tiles of one [seqlen_q, seqlen_kv] score matrix, by what the mask leaves of them."""
    num_kv_tiles = -(-seqlen_kv // block_kv)
    full = visited = total = 0
    for q_begin in range(0, seqlen_q, block_q):
        q_end = min(q_begin + block_q, seqlen_q)
        tiles = kv_tiles(mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, q_begin=q_begin, q_end=q_end, block_kv=block_kv)
        visited += tiles.end - tiles.begin
        full += tiles.full_end - tiles.full_begin
        total += num_kv_tiles
    return TileCount(full=full, partial=visited - full, empty=total - visited)


def visible_pairs(mask: MaskSpec, *, seqlen_q: int, seqlen_kv: int) -> int:
    """The number of (query, key) pairs that the mask leaves visible, in closed form."""
    up_to_right_end = _pairs_at_or_left_of(seqlen_q, seqlen_kv, mask.right)
    if mask.left is None:
        return up_to_right_end
    return up_to_right_end - _pairs_at_or_left_of(seqlen_q, seqlen_kv, -mask.left - 1)


def _pairs_at_or_left_of(seqlen_q: int, seqlen_kv: int, reach: int | None) -> int:
    """Pairs with ``j <= i + seqlen_kv - seqlen_q + reach``; ``None`` reaches every key."""
    if reach is None or 0 in (seqlen_q, seqlen_kv):
        return seqlen_q * seqlen_kv
    first = seqlen_kv - seqlen_q + reach + 1  # keys of row 0 before clamping; each further row has one more
    num_empty = min(max(-first, 0), seqlen_q)
    num_whole = min(max(first + seqlen_q - 1 - seqlen_kv, 0), seqlen_q)
    num_rising = max(seqlen_q - num_empty - num_whole, 0)
    lowest = min(max(first + num_empty, 0), seqlen_kv)
    return num_rising * lowest + num_rising * (num_rising - 1) // 2 + num_whole * seqlen_kv


def is_visible(mask: MaskSpec, q_pos: Tensor, kv_pos: Tensor, offset: Tensor | int) -> Tensor:
    """Boolean tensor, broadcast of the position tensors: whether the query may see the key.

    Args:
        q_pos, kv_pos: integer positions within their sequences; they must broadcast against each other.
        offset: ``seqlen_kv - seqlen_q``, an int or a tensor that broadcasts too (packed sequences differ).
    """
    distance = kv_pos - (q_pos + offset)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if mask.left is not None:
        visible &= distance >= -mask.left
    if mask.right is not None:
        visible &= distance <= mask.right
    return visible

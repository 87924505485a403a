"""Which program works on what. One-dimensional grids: the other grid axes end at 65,535."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Work(NamedTuple):
    """One program's share: a tile of one head of one sequence."""

    tile_idx: Any
    head_idx: Any
    batch_idx: Any


@triton.jit
def share(num_tiles, num_heads, LAST_FIRST: tl.constexpr):
    """Tiles of a head follow each other, so that they find its K and V in the cache; heaviest first balances the end.

    Args:
        LAST_FIRST: the later tiles of a head have more to do (query tiles of causal attention).
    """
    program_idx = tl.program_id(0)
    tile_idx = program_idx % num_tiles
    head_and_batch = program_idx // num_tiles
    if LAST_FIRST:
        tile_idx = num_tiles - 1 - tile_idx
    return Work(tile_idx, head_and_batch % num_heads, head_and_batch // num_heads)

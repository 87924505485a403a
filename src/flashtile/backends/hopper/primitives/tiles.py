"""Tiles between shared memory, registers and packed tensors, whose ends no descriptor knows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.backends.hopper.primitives.gluon_compat import barrier
from flashtile.backends.hopper.primitives.layouts import cols_of, rows_of

SLICE = gl.constexpr(16)


@gluon.jit
def zero_rows_from(tile, num_rows):
    """Sets the rows of a tile in shared memory to 0 from ``num_rows`` on: 0 times NaN would be NaN."""
    NUM_ROWS: gl.constexpr = tile.shape[0]
    NUM_COLS: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if num_rows < NUM_ROWS:
        for begin in gl.static_range(0, NUM_ROWS, SLICE):
            if num_rows < begin + SLICE:
                rows = tile.slice(begin, SLICE, dim=0)
                exists = begin + gl.arange(0, SLICE, rows_of(layout)) < num_rows
                kept = gl.where(gl.expand_dims(exists, 1), rows.load(layout), 0.0)
                rows.store(kept.to(tile.dtype))
        fence_async_shared()
        barrier()


@gluon.jit
def store_rows(matrix, tile, batch_idx, head_idx, row_idx, num_rows, NUM_COLS: gl.constexpr):
    """Stores the first ``num_rows`` rows and NUM_COLS columns of a tile in registers, from row ``row_idx`` on."""
    layout: gl.constexpr = tile.type.layout
    rows = gl.arange(0, tile.shape[0], rows_of(layout))
    cols = gl.arange(0, tile.shape[1], cols_of(layout))
    offset = gl.to_tensor(batch_idx).to(gl.int64) * matrix.batch_stride
    offset += gl.to_tensor(head_idx).to(gl.int64) * matrix.head_stride
    offset += gl.to_tensor(row_idx).to(gl.int64) * matrix.row_stride
    offsets = gl.expand_dims(rows.to(gl.int64) * matrix.row_stride, 1) + gl.expand_dims(cols, 0)
    exists = gl.expand_dims(rows < num_rows, 1) & gl.expand_dims(cols < NUM_COLS, 0)
    gl.store(matrix.ptr + offset + offsets, tile, mask=exists)

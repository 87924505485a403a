"""Tiles between shared memory, registers and packed tensors, whose ends no descriptor knows."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from flashtile.backends.hopper.primitives.gluon_compat import barrier, jit, reinterpreted, static_range, zeros
from flashtile.backends.hopper.primitives.layouts import cols_of, number_layout, plain_layout, row_layout, rows_of


@jit
def zero_rows_from(tile, num_rows, NUM_WARPS: gl.constexpr):
    """Sets the rows of a tile in shared memory to 0 from ``num_rows`` on: 0 times NaN would be NaN.

    A row is 128 bytes in each block of columns; swizzling moves them within the row.
    """
    NUM_ROWS: gl.constexpr = tile.shape[0]
    NUM_BLOCKS: gl.constexpr = tile.shape[1] * tile.dtype.primitive_bitwidth // 1024
    layout: gl.constexpr = plain_layout()
    if num_rows < NUM_ROWS:
        rows = reinterpreted(tile, gl.int32, [NUM_BLOCKS * NUM_ROWS, 32], layout)
        nothing = zeros([32], gl.int32, number_layout(NUM_WARPS))
        for row in range(gl.maximum(num_rows, 0), NUM_ROWS):
            for block in static_range(NUM_BLOCKS):
                rows.index(block * NUM_ROWS + row).store(nothing)
        fence_async_shared()
        barrier()


@jit
def halves(tile):
    """The left and the right half of a tile in registers."""
    return tile.reshape([tile.shape[0], 2, tile.shape[1] // 2]).permute((0, 2, 1)).split()


@jit
def store_rows(matrix, tile, batch_idx, head_idx, row_idx, num_rows, NUM_COLS: gl.constexpr):
    """Stores the first ``num_rows`` rows and NUM_COLS columns of a tile in registers, from row ``row_idx`` on.

    As products lie, four threads have 8 numbers side by side: too few of 16 bits to be written well, and just enough of
    32. To change that takes shared memory, which wide tiles leave none of.
    """
    is_narrow: gl.constexpr = tile.shape[1] <= 128 and tile.dtype.primitive_bitwidth == 16
    layout: gl.constexpr = row_layout(tile.shape[1]) if is_narrow else tile.type.layout
    tile = gl.convert_layout(tile, layout)
    rows = gl.arange(0, tile.shape[0], rows_of(layout))
    cols = gl.arange(0, tile.shape[1], cols_of(layout))
    offset = gl.to_tensor(batch_idx).to(gl.int64) * matrix.batch_stride
    offset += gl.to_tensor(head_idx).to(gl.int64) * matrix.head_stride
    offset += gl.to_tensor(row_idx).to(gl.int64) * matrix.row_stride
    offsets = gl.expand_dims(rows.to(gl.int64) * matrix.row_stride, 1) + gl.expand_dims(cols, 0)
    exists = gl.expand_dims(rows < num_rows, 1) & gl.expand_dims(cols < NUM_COLS, 0)
    gl.store(matrix.ptr + offset + offsets, tile, mask=exists)

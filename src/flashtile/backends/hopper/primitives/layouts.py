"""How products lie in the registers of one warpgroup (four warps, 64 rows)."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.primitives.gluon_compat import constexpr_function


@constexpr_function
def product_layout(num_cols):
    """Of a product [64, num_cols] in float32."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, num_cols, 16])


@constexpr_function
def operand_layout(num_cols):
    """Of a left operand in registers, for a product of ``num_cols`` columns."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(num_cols), k_width=2)


@constexpr_function
def row_layout(num_cols):
    """Of a tile [64, num_cols] of 16-bit numbers for memory: 8 neighbours for each thread, in its warp's 16 rows."""
    further = [[0, 1 << bit] for bit in range(5, (num_cols - 1).bit_length())]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *further],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, num_cols],
    )


@constexpr_function
def number_layout(num_warps):
    """Of one number for each lane, the same in every warp."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@constexpr_function
def everywhere_layout(num, num_warps):
    """Of ``num`` numbers, all of them in every thread."""
    return gl.BlockedLayout([num], [32], [num_warps], [0])


@constexpr_function
def plain_layout():
    """Of numbers side by side in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, [0])


@constexpr_function
def rows_of(layout):
    """Of one number per row of a tile in ``layout``."""
    return gl.SliceLayout(1, layout)


@constexpr_function
def cols_of(layout):
    """Of one number per column of a tile in ``layout``."""
    return gl.SliceLayout(0, layout)


@constexpr_function
def axis_of(layout, axis):
    """Of numbers along one axis of a tile with four."""
    for other in (3, 2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@constexpr_function
def threads_of(layout):
    """Of one number per row and thread, for a tile whose axes are rows, groups of columns, threads and neighbours."""
    return gl.SliceLayout(1, gl.SliceLayout(3, layout))

"""The online softmax of 64 query rows in the registers of one warpgroup, in powers of two.

Each thread adds up its own part of a row; the parts are added across threads once, after the last tile.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; as FlashAttention-2 uses
it (Dao 2023, algorithm 1). That sums stay relative to an older maximum while the new one is not far above it is
FlashAttention-4's idea (Dao, Hot Chips 2025).
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from flashtile.backends.hopper import constants
from flashtile.backends.hopper.primitives.gluon_compat import constexpr_function, full_like, inline_asm, jit
from flashtile.backends.hopper.primitives.layouts import rows_of

LOG2_E = gl.constexpr(constants.LOG2_E)
LN_2 = gl.constexpr(1 / constants.LOG2_E)
INF = gl.constexpr(float("inf"))
MOST_ABOVE = gl.constexpr(8.0)
"""How far exponents may grow beyond the one that sums are relative to, before sums are brought to a new one.

Probabilities, then up to 2**8, are rounded as exactly as those up to 1.
"""


@jit
def guarded(log2_value):
    """-inf replaced by 0, so that exp2(-inf - guarded(-inf)) is 0 and not NaN."""
    return gl.where(log2_value == -INF, 0.0, log2_value)


@jit
def softmax_step(s, max_log2, unit_log2):
    """Takes one more tile of scores into the running maximum.

    Args:
        s: [64, BLOCK_KV] float32 scores, which ``unit_log2 > 0`` turns into powers of two.
        max_log2: [64] the exponent that sums are relative to: at most MOST_ABOVE below the largest so far; -inf before
            the first.

    Returns:
        (p, max_log2, rescale): p = exp2(unit_log2 * s - max_log2) with the new maximum, and the factor that brings sums
        of the old maximum to the new one.
    """
    tile_max = gl.max(s, 1) * unit_log2
    new_max = gl.where(tile_max - max_log2 > MOST_ABOVE, tile_max, max_log2)
    shift = guarded(new_max)
    p = gl.exp2(gl.fma(s, gl.to_tensor(unit_log2), -gl.expand_dims(shift, 1)))
    return p, new_max, gl.exp2(max_log2 - shift)


@jit
def thread_sums(p, BLOCK_KV: gl.constexpr):
    """[64, 4]: what each of the four threads that share a row has of its sum."""
    return gl.sum(gl.sum(p.reshape([64, BLOCK_KV // 8, 4, 2]), 3), 1)


@jit
def rescaled(sums, rescale):
    """Sums per row (and thread or column) at the new maximum."""
    layout: gl.constexpr = rows_of(sums.type.layout)
    return sums * gl.expand_dims(gl.convert_layout(rescale, layout), 1)


@jit
def rescaled_if_needed(acc, rescale):
    """``rescaled``, but a warp whose rows all have a factor of 1, as they almost always do, multiplies nothing."""
    NUM: gl.constexpr = acc.shape[1] // 2
    factors = gl.expand_dims(gl.convert_layout(rescale, rows_of(acc.type.layout)), 1)
    return inline_asm(
        rescale_asm(NUM), rescale_constraints(NUM), [acc, factors], dtype=gl.float32, is_pure=True, pack=NUM
    )


@constexpr_function
def is_in_place(num):
    """Whether results take the registers of their numbers: with 128 of them none is left for more.

    Otherwise ptxas gets to choose, and then interleaves the exponentials of the two rows better.
    """
    return num >= 128


@constexpr_function
def rescale_asm(num):
    """A thread's ``num`` numbers times their factors; it has two of either row in turn, so two factors are all."""
    of_one_row, of_the_other, one = 2 * num, 2 * num + 2, "0f3F800000"
    copies = "" if is_in_place(num) else "".join(f"mov.b32 ${i}, ${num + i}; " for i in range(num))
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * num + i}; " for i in range(num))
    test = f"setp.neu.f32 any, ${of_one_row}, {one}; setp.neu.or.f32 any, ${of_the_other}, {one}, any; "
    vote = "vote.sync.any.pred any, any, -1; "
    return "{ .reg .pred any; " + copies + test + vote + "@!any bra.uni DONE; " + products + "DONE: }"


@constexpr_function
def rescale_constraints(num):
    if is_in_place(num):
        return ",".join(["=f"] * num + [str(i) for i in range(num)] + ["f"] * num)
    return ",".join(["=&f"] * num + ["f"] * (2 * num))


@jit
def finish(max_log2, row_sum, sink_ptr, head_idx):
    """The factor that turns the accumulator into the output, and the lse, both [64] float32.

    A sink is one more key, with a score and no value. A row without key and sink gets (0, -inf).
    """
    rescale = full_like(row_sum, 1.0)
    if sink_ptr is not None:
        sink_log2 = gl.load(sink_ptr + head_idx).to(gl.float32) * LOG2_E
        total_max = gl.maximum(max_log2, sink_log2)
        shift = guarded(total_max)
        rescale = gl.exp2(max_log2 - shift)
        row_sum = row_sum * rescale + gl.exp2(sink_log2 - shift)
        max_log2 = total_max
    sees_nothing = row_sum == 0.0
    row_sum = gl.where(sees_nothing, 1.0, row_sum)
    lse = gl.where(sees_nothing, -INF, (guarded(max_log2) + gl.log2(row_sum)) * LN_2)
    return gl.where(sees_nothing, 0.0, rescale / row_sum), lse

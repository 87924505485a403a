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
from flashtile.backends.hopper.primitives.layouts import rows_of, threads_of

LOG2_E = gl.constexpr(constants.LOG2_E)
LN_2 = gl.constexpr(1 / constants.LOG2_E)
INF = gl.constexpr(float("inf"))
MOST_ABOVE = 8.0
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
        max_log2: [64, 4] the exponent that sums are relative to, alike in the four threads of a row: at most MOST_ABOVE
            below the largest so far; -inf before the first.

    Returns:
        (p, max_log2, rescale): p = exp2(unit_log2 * s - max_log2) with the new maximum, and the factor that brings sums
        of the old maximum to the new one.
    """
    by_thread = s.reshape([s.shape[0], s.shape[1] // 8, 4, 2])
    THREADS: gl.constexpr = threads_of(by_thread.type.layout)
    tile_max = gl.convert_layout(thread_max(s), max_log2.type.layout) * unit_log2
    new_max = raised_if_needed(tile_max, max_log2)
    shift = guarded(new_max)
    of_tile = gl.expand_dims(gl.expand_dims(gl.convert_layout(shift, THREADS), 1), 3)
    p = gl.exp2(gl.fma(by_thread, gl.to_tensor(unit_log2), -of_tile)).reshape(s.shape)
    return gl.convert_layout(p, s.type.layout), new_max, gl.exp2(max_log2 - shift)


@jit
def thread_max(s):
    """[64, 4]: the largest of what each of the four threads that share a row has of it; in short chains."""
    pairs = gl.max(s.reshape([s.shape[0], 4, s.shape[1] // 32, 4, 2]), 4)
    return gl.max(gl.max(pairs, 2), 1)


@jit
def thread_sums(p):
    """[64, 4]: what each of the four threads that share a row has of its sum."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@jit
def raised_if_needed(tile_max, max_log2):
    """The exponent that sums are relative to, from what each thread has of the tile.

    The threads of a row compare theirs only where a thread of the warp finds one that is too far above.
    """
    ASM: gl.constexpr = raise_asm()
    return inline_asm(ASM, "=&f,=&f,f,f,f,f", [tile_max, max_log2], dtype=gl.float32, is_pure=True, pack=2)


@constexpr_function
def raise_asm():
    """A thread has one number of either of its two rows; the four that share a row are neighbours."""
    test = "sub.f32 above, {tile}, {old}; setp.gt.or.f32 far, above, {most}, far; "
    share = "shfl.sync.bfly.b32 other, row, {lane}, 31, -1; max.f32 row, row, other; "
    compare = "mov.b32 row, {tile}; " + share.replace("{lane}", "2") + share.replace("{lane}", "1")
    select = "sub.f32 above, row, {old}; setp.gt.f32 far, above, {most}; selp.f32 {new}, row, {old}, far; "
    first, second = {"new": "$0", "tile": "$2", "old": "$4"}, {"new": "$1", "tile": "$3", "old": "$5"}
    begin = "{ .reg .pred far; .reg .f32 above, row, other; mov.b32 $0, $4; mov.b32 $1, $5; setp.ne.u32 far, 0, 0; "
    tests = test.format(**first, most=MOST_ABOVE) + test.format(**second, most=MOST_ABOVE)
    branch = "vote.sync.any.pred far, far, -1; @!far bra.uni DONE; "
    raised = (compare + select).format(**first, most=MOST_ABOVE) + (compare + select).format(**second, most=MOST_ABOVE)
    return begin + tests + branch + raised + "DONE: }"


@jit
def rescaled(sums, rescale):
    """Sums per row (and thread or column) at the new maximum."""
    layout: gl.constexpr = rows_of(sums.type.layout)
    return sums * gl.expand_dims(gl.convert_layout(rescale, layout), 1)


@jit
def rescaled_if_needed(acc, rescale):
    """acc times the factors of its rows; a warp whose factors are all 1, as almost always, multiplies nothing."""
    NUM: gl.constexpr = acc.shape[1] // 2
    by_thread = acc.reshape([acc.shape[0], acc.shape[1] // 8, 4, 2])
    THREADS: gl.constexpr = threads_of(by_thread.type.layout)
    factors = gl.expand_dims(gl.expand_dims(gl.convert_layout(rescale, THREADS), 1), 3)
    product = inline_asm(
        rescale_asm(NUM), rescale_constraints(NUM), [by_thread, factors], dtype=gl.float32, is_pure=True, pack=NUM
    )
    return gl.convert_layout(product.reshape(acc.shape), acc.type.layout)


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

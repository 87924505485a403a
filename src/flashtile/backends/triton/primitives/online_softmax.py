"""The online softmax of one tile of query rows, in powers of two.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; as FlashAttention-2 uses
it (Dao 2023, algorithm 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashtile.backends.triton import constants

LOG2_E = tl.constexpr(constants.LOG2_E)
LN_2 = tl.constexpr(1 / constants.LOG2_E)
INF = tl.constexpr(float("inf"))
HIDDEN_BELOW_LOG2 = tl.constexpr(constants.HIDDEN_BELOW_LOG2)


@triton.jit
def guarded(log2_value):
    """-inf replaced by 0, so that exp2(-inf - guarded(-inf)) is 0 and not NaN."""
    return tl.where(log2_value == -INF, 0.0, log2_value)


@triton.jit
def softmax_step(s, max_log2, row_sum, unit_log2):
    """Takes one more tile of scores into the statistics of its rows.

    Args:
        s: [BLOCK_Q, BLOCK_KV] float32 scores, which ``unit_log2 > 0`` turns into powers of two.
        max_log2: [BLOCK_Q] the largest exponent so far, rounded; -inf before the first.
        row_sum: [BLOCK_Q] the sum of exp2(unit_log2 * s - max_log2) so far.

    Returns:
        (p, max_log2, row_sum, rescale): p = exp2(unit_log2 * s - max_log2) with the new maximum, and the factor that
        brings accumulators of the old maximum to the new one.
    """
    new_max = tl.maximum(max_log2, tl.max(s, 1) * unit_log2)
    shift = guarded(new_max)
    p = tl.exp2(tl.fma(s, unit_log2, -shift[:, None]))
    rescale = tl.exp2(max_log2 - shift)
    return p, new_max, row_sum * rescale + tl.sum(p, 1), rescale


@triton.jit
def finish(max_log2, row_sum, sink_ptr, head_idx):
    """The factor that turns the accumulator into the output, and the lse, both [BLOCK_Q] float32.

    A sink is one more key, with a score and no value. A row without key and sink gets (0, -inf), and so does one whose
    keys a bias hides, all of them: elsewhere such keys have no weight beside those that are seen.
    """
    rescale = tl.full(row_sum.shape, 1.0, tl.float32)
    if sink_ptr is not None:
        sink_log2 = tl.load(sink_ptr + head_idx).to(tl.float32) * LOG2_E
        total_max = tl.maximum(max_log2, sink_log2)
        shift = guarded(total_max)
        rescale = tl.exp2(max_log2 - shift)
        row_sum = row_sum * rescale + tl.exp2(sink_log2 - shift)
        max_log2 = total_max
    sees_nothing = max_log2 <= HIDDEN_BELOW_LOG2
    row_sum = tl.where(sees_nothing, 1.0, row_sum)
    # In float64, so that the lse is rounded once: the backward's probabilities are as exact as it is.
    lse_log2 = guarded(max_log2).to(tl.float64) + tl.log2(row_sum).to(tl.float64)
    lse = tl.where(sees_nothing, -INF, (lse_log2 * LN_2).to(tl.float32))
    return tl.where(sees_nothing, 0.0, rescale / row_sum), lse

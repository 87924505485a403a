"""Sums of tile products in float32 accumulators."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(acc, a, b, PRECISION: tl.constexpr):
    """acc + a @ b, with ``a`` rounded to b's dtype.

    float32 tiles are summed on their own first: one long sum over all keys would lose more than the naive formula does.
    The multiplication by 1 is there because Triton turns ``acc + dot`` back into the long sum. Tiles wider than 256
    leave no registers for it.
    """
    a = a.to(b.dtype)
    if b.dtype == tl.float32 and b.shape[1] <= 256:
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)

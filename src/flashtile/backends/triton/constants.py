"""Numbers that kernels and host code have to agree on. Imports nothing, so that kernels may import it."""

import math

LOG2_E = math.log2(math.e)

HIDDEN_BELOW_LOG2 = -(2.0**127 - 2.0**103) * LOG2_E * (1 - 2.0**-22)
"""``spec.masks.HIDDEN_BELOW`` as the exponent of a power of two, less what its rounding may take away."""

MIDDLE_LOG2 = -7
"""Where the backward puts the exponents' zero for float32 inputs, as an exponent of two.

The closer an exponent is to 0, the less float32 rounds away from it. Probabilities of 1 to 2**-14 and all between lie
within 7 of 2**-7, so p = exp2(s - lse) is computed as 2**-7 * exp2(s - (lse - 7)), and what float32 rounds away from
``lse - 7`` is made up for by a factor too.
"""

FARTHEST_ROWS = 2**24
"""The largest stride between the rows of a tile, in elements: offsets within a tile of up to 128 rows fit 32 bits."""

FARTHEST_NEAR = 2**22
"""Integers closer to 0 than this become float32 by an addition, without the instruction that converts them."""

STATISTICS_ROWS = 128
"""The backward's own numbers of a sequence fill up whole blocks of this many rows, the largest BLOCK_Q.

So the kernels load them without a mask. Packed, sequence b starts at block b + q_begin // STATISTICS_ROWS, which leaves
every sequence the blocks that its length needs.
"""

"""Numbers that kernels and host code have to agree on. Imports nothing, so that kernels may import it."""

import math

LOG2_E = math.log2(math.e)

HIDDEN_BELOW_LOG2 = -(2.0**127 - 2.0**103) * LOG2_E * (1 - 2.0**-22)
"""``spec.masks.HIDDEN_BELOW`` as the exponent of a power of two, less what its rounding may take away."""

STATISTICS_ROWS = 128
"""The backward's own numbers of a sequence fill up whole blocks of this many rows, the largest BLOCK_Q.

So the kernels load them without a mask. Packed, sequence b starts at block b + q_begin // STATISTICS_ROWS, which leaves
every sequence the blocks that its length needs.
"""

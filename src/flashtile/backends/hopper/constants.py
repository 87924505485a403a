"""Numbers that kernels and host code have to agree on. Imports nothing, so that kernels may import it."""

import math

LOG2_E = math.log2(math.e)

ROWS = 64
"""Rows of one warpgroup's product; every consumer partition works on this many rows of the score tile."""

STATISTICS_ROWS = 128
"""The backward's own numbers of a sequence fill up whole blocks of this many rows, a multiple of ``ROWS``.

Packed, sequence b starts at block b + q_begin // STATISTICS_ROWS, which leaves every sequence the blocks it needs.
"""

PARTS = 32
"""How many parts of rows are combined at a time."""

SUM_ROWS = 16
"""The sums of gradients lie in blocks of so many rows, those of one warp's product; sequences start as above."""

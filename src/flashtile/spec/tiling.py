"""How a tiled kernel runs, as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import dataclass

Tiles = tuple[int, int]
"""(block_q, block_kv)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitBackward:
    """A backward without atomics: the kernel for d_k and d_v leaves other gradients to kernels of their own.

    Each of them computes q @ k.T and d_out @ v.T again and keeps its sums on chip.
    """

    q_tiles: Tiles
    """Those of the kernel for d_q."""
    bias_tiles: Tiles | None = None
    """Those of the kernel for the gradient of a bias; None if it does not run."""
    bias_shares: int = 1
    """Partial sums in device memory that the gradient of the bias is added up from; 1: none."""
    rows_block: int = 1
    """Rows to whose multiple the numbers that it keeps of each query row are filled up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a tiled kernel runs: its tiles, and what decides how often operands are read again."""

    block_q: int
    block_kv: int
    is_assumed: bool = False
    """Whether no plan chose these tiles."""
    num_programs: int
    """Programs that run at the same time: SMs of a GPU, cores of a CPU."""
    cache_bytes: int
    """The last cache before device memory."""
    heap_tiles: int = 0
    """Score tiles held in ordinary memory at once; 0 where they stay on chip."""
    sequences_at_once: int | None = None
    """Sequences whose d_q is summed up at a time, beside the result; None: all, and beside it only if it is 16-bit."""
    split: SplitBackward | None = None
    """How the backward avoids that sum; None if it does not."""
    num_parts: int = 1
    """Of the keys, whose float32 results the forward combines; of the queries, whose d_k and d_v are added up."""
    row_statistics: tuple[str, ...] = ("delta",)
    """Of a backward that is not split: one number per query row each."""

"""What a problem costs: FLOPs, device-memory bytes and extra memory, of the naive formula and of a tiled kernel.

Pure functions of sizes; nothing is measured here. The models, in words:

* FLOPs count matrix products only; softmax, masks and random numbers come on top. The naive formula multiplies every
  pair, a tiled kernel the pairs of every tile that the mask leaves something of.
* The naive traffic is the best case of any program that stores the scores: each step of the formula reads its inputs
  and writes its results once. Scores are in the accumulation dtype.
* The tiled traffic counts Q, the output and the lse once. K and V count once if what the running programs share of
  them fits into the last cache, else once per query tile that visits them (the query heads of a group visit together).
  The backward walks the same tiles, and in the same way sums d_k and d_v up.
* Extra memory is the peak beyond inputs and results. For the naive formula it is that of flashtile's own ``naive``
  backend, which holds several score matrices at once and float32 copies of its operands.

Packed problems cost what their lengths say; without lengths every sequence counts as the longest, an upper bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flashtile.spec import masks
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

Direction = Literal["forward", "backward"]
Lengths = Sequence[tuple[int, int]]
"""(seqlen_q, seqlen_kv) of each sequence of a packed batch."""

POSITION_BYTES_PER_PAIR = 12
"""Of the naive masks and ALiBi, whatever the number of heads: an int64 distance, and a float or two booleans."""

PHILOX_BYTES_PER_PAIR = 20
"""The naive dropout's peak: four int64 words per four pairs, the same words side by side, and one product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One line of a bill: what, and how many bytes of it."""

    what: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one method costs in one direction."""

    flops: int
    traffic: tuple[Term, ...]
    """Bytes read from and written to device memory."""
    extra: tuple[Term, ...]
    """Bytes held at the peak beyond inputs and results."""

    @property
    def traffic_bytes(self) -> int:
        return sum(term.num_bytes for term in self.traffic)

    @property
    def extra_bytes(self) -> int:
        return sum(term.num_bytes for term in self.extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a tiled kernel runs: its tiles, and what decides how often K and V are read again."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The least time that peak rates allow."""

    compute_s: float
    memory_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def binds(self) -> Literal["compute", "memory"]:
        """The side that sets the time."""
        return "compute" if self.compute_s >= self.memory_s else "memory"


def roofline(cost: Cost, problem: AttentionProblem, device: DeviceSpec) -> Roofline:
    """Both sides of the bound for a cost on a device."""
    return Roofline(
        compute_s=cost.flops / device.flops_per_s(problem.dtype),
        memory_s=cost.traffic_bytes / device.bytes_per_s,
    )


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def all_pairs(problem: AttentionProblem) -> int:
    """(query, key) pairs of one head over the batch, packed sequences padded to the longest: what naive multiplies."""
    return problem.batch * problem.seqlen_q * problem.seqlen_kv


def visible_pairs(problem: AttentionProblem, lengths: Lengths | None = None) -> int:
    """Pairs of one head over the batch that causality and window leave visible; a boolean mask is not counted."""
    return sum(
        count * masks.visible_pairs(problem.mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
        for (seqlen_q, seqlen_kv), count in _sequences(problem, lengths).items()
    )


def useful_flops(problem: AttentionProblem, direction: Direction, lengths: Lengths | None = None) -> int:
    """FLOPs that no exact method can avoid: those of the visible pairs."""
    return flops_per_pair(problem, direction) * problem.heads_q * visible_pairs(problem, lengths)


def flops_per_pair(problem: AttentionProblem, direction: Direction) -> int:
    """Per visible pair and query head: 2 * (head_dim + head_dim_v) forward; 2.5 times that backward if they agree.

    The backward computes q @ k.T again and has the products for d_p, d_v, d_q and d_k.
    """
    if direction == "forward":
        return 2 * (problem.head_dim + problem.head_dim_v)
    return 2 * (3 * problem.head_dim + 2 * problem.head_dim_v)


def _sequences(problem: AttentionProblem, lengths: Lengths | None) -> Counter[tuple[int, int]]:
    """How many sequences of the batch have which (seqlen_q, seqlen_kv)."""
    if lengths is None:
        return Counter({(problem.seqlen_q, problem.seqlen_kv): problem.batch})
    return Counter(lengths)


# --- the naive formula ------------------------------------------------------------------------------------------------


def naive_cost(problem: AttentionProblem, direction: Direction) -> Cost:
    """The textbook formula; masks save it nothing, and packed sequences are padded to the longest."""
    scores = score_matrix_bytes(problem)
    sizes = _Sizes.of(problem)
    if direction == "forward":
        traffic = [
            Term(what="read q, k", num_bytes=sizes.q + sizes.k),
            Term(what="write scores", num_bytes=scores),
            Term(what="softmax: read scores, write probabilities", num_bytes=2 * scores),
            Term(what="read probabilities, v", num_bytes=scores + sizes.v),
            Term(what="write out, lse", num_bytes=sizes.out + sizes.lse),
        ]
    else:
        traffic = [
            Term(what="read q, k; write scores again", num_bytes=sizes.q + sizes.k + scores),
            Term(what="softmax: read scores, lse, write probabilities", num_bytes=2 * scores + sizes.lse),
            Term(what="read d_out, v; write d_p", num_bytes=sizes.out + sizes.v + scores),
            Term(what="read out, d_out for delta", num_bytes=2 * sizes.out),
            Term(what="read probabilities, d_p; write d_s", num_bytes=3 * scores),
            Term(what="read probabilities, d_out; write d_v", num_bytes=scores + sizes.out + sizes.v),
            Term(what="read d_s, k; write d_q", num_bytes=scores + sizes.k + sizes.q),
            Term(what="read d_s, q; write d_k", num_bytes=scores + sizes.q + sizes.k),
        ]
    return Cost(
        flops=flops_per_pair(problem, direction) * problem.heads_q * all_pairs(problem),
        traffic=(*traffic, *_score_operand_traffic(problem, direction)),
        extra=(_naive_peak(problem, direction), *_naive_copies(problem, direction)),
    )


def score_matrix_bytes(problem: AttentionProblem) -> int:
    """One tensor [batch, heads_q, seqlen_q, seqlen_kv] in the accumulation dtype."""
    return problem.heads_q * all_pairs(problem) * problem.accumulation_dtype.itemsize


def _naive_peak(problem: AttentionProblem, direction: Direction) -> Term:
    """The phase of the naive backend that holds the most score-sized tensors at once."""
    scores = score_matrix_bytes(problem)
    has_softcap, has_dropout = problem.softcap > 0, problem.dropout_p > 0
    positions = all_pairs(problem) * POSITION_BYTES_PER_PAIR
    phases = [Term(what="the scores and every pair's positions", num_bytes=(1 + 2 * has_softcap) * scores + positions)]
    if problem.has_alibi:
        phases.append(
            Term(what="the scores, ALiBi's and positions", num_bytes=(2 + 2 * has_softcap) * scores + positions)
        )
    if has_softcap:
        phases.append(Term(what="the scores, their tanh and its slope", num_bytes=5 * scores))
    if has_dropout:
        words = problem.heads_q * all_pairs(problem) * PHILOX_BYTES_PER_PAIR
        phases.append(
            Term(what="the scores and dropout's random words", num_bytes=(1 + 2 * has_softcap) * scores + words)
        )
    kept = (has_softcap + has_dropout) * scores  # the softcap's slope and the dropout mask live on
    if direction == "forward":
        phases.append(Term(what="scores, scores - lse and probabilities", num_bytes=3 * scores + kept))
    else:
        phases.append(Term(what="scores, probabilities, d_p, d_p - delta and d_s", num_bytes=5 * scores + kept))
    return max(phases, key=lambda phase: phase.num_bytes)


def _naive_copies(problem: AttentionProblem, direction: Direction) -> tuple[Term, ...]:
    """Operands in accumulation dtype, padded, with k and v repeated for each query head."""
    itemsize, rows_kv = problem.accumulation_dtype.itemsize, problem.batch * problem.seqlen_kv * problem.heads_q
    copies = [Term(what="k, v per query head", num_bytes=rows_kv * (problem.head_dim + problem.head_dim_v) * itemsize)]
    is_converted = problem.dtype != problem.accumulation_dtype or problem.layout == "varlen"
    if is_converted:
        rows_q = problem.batch * problem.seqlen_q * problem.heads_q
        dims = problem.head_dim if direction == "forward" else problem.head_dim + 2 * problem.head_dim_v
        what = "q in float32" if direction == "forward" else "q, out, d_out in float32"
        copies.append(Term(what=what, num_bytes=rows_q * dims * itemsize))
    return tuple(copies)


# --- a tiled kernel ---------------------------------------------------------------------------------------------------


def tiled_cost(problem: AttentionProblem, direction: Direction, tiling: Tiling, lengths: Lengths | None = None) -> Cost:
    """Online softmax over tiles, as ``backends/cpu/tiled.py`` spells it out."""
    visited_tiles = visited_pairs = 0
    for (seqlen_q, seqlen_kv), count in _sequences(problem, lengths).items():
        block_q, block_kv = min(tiling.block_q, seqlen_q), min(tiling.block_kv, seqlen_kv)
        if block_q > 0 and block_kv > 0:
            tiles = masks.count_tiles(
                problem.mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, block_q=block_q, block_kv=block_kv
            )
            visited_tiles += count * tiles.visited
            visited_pairs += count * min(tiles.visited * block_q * block_kv, seqlen_q * seqlen_kv)
    sizes = _Sizes.of(problem)
    fits = _shared_kv_bytes(problem, direction, tiling) <= tiling.cache_bytes
    rows_visited = problem.heads_kv * visited_tiles * min(tiling.block_kv, problem.seqlen_kv)
    return Cost(
        flops=flops_per_pair(problem, direction) * problem.heads_q * visited_pairs,
        traffic=(
            *(_tiled_traffic_forward if direction == "forward" else _tiled_traffic_backward)(
                problem, sizes, None if fits else rows_visited
            ),
            *_score_operand_traffic(problem, direction),
        ),
        extra=_tiled_extra(problem, direction, tiling),
    )


def _tiled_traffic_forward(problem: AttentionProblem, sizes: _Sizes, rows_visited: int | None) -> tuple[Term, ...]:
    return (
        Term(what="read q", num_bytes=sizes.q),
        _read_kv(problem, sizes, rows_visited),
        Term(what="write out, lse", num_bytes=sizes.out + sizes.lse),
    )


def _tiled_traffic_backward(problem: AttentionProblem, sizes: _Sizes, rows_visited: int | None) -> tuple[Term, ...]:
    terms = [
        Term(what="read q, out, d_out, lse", num_bytes=sizes.q + 2 * sizes.out + sizes.lse),
        _read_kv(problem, sizes, rows_visited),
        Term(what="write d_q, d_k, d_v", num_bytes=sizes.q + sizes.k + sizes.v),
    ]
    if rows_visited is not None:
        row_bytes = (problem.head_dim + problem.head_dim_v) * problem.accumulation_dtype.itemsize
        terms.append(Term(what="add to d_k, d_v per visit", num_bytes=2 * rows_visited * row_bytes))
    return tuple(terms)


def _read_kv(problem: AttentionProblem, sizes: _Sizes, rows_visited: int | None) -> Term:
    if rows_visited is None:
        return Term(what="read k, v once (the cache holds them)", num_bytes=sizes.k + sizes.v)
    row_bytes = (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    return Term(what="read k, v once per query tile", num_bytes=max(rows_visited * row_bytes, sizes.k + sizes.v))


def _shared_kv_bytes(problem: AttentionProblem, direction: Direction, tiling: Tiling) -> int:
    """What the running programs have in use of K and V (and of the sums d_k, d_v in the backward)."""
    tiles_per_head = max(-(-problem.seqlen_q // tiling.block_q), 1)
    programs_per_kv_head = tiles_per_head * problem.heads_per_kv
    heads = min(-(-tiling.num_programs // programs_per_kv_head), problem.batch * problem.heads_kv)
    rows = problem.seqlen_kv
    if problem.mask.left is not None and problem.mask.right is not None:
        rows_of_q = min(-(-tiling.num_programs // problem.heads_per_kv), tiles_per_head) * tiling.block_q
        rows = min(rows, rows_of_q + problem.mask.left + problem.mask.right)
    itemsize = problem.dtype.itemsize + (problem.accumulation_dtype.itemsize if direction == "backward" else 0)
    return heads * rows * (problem.head_dim + problem.head_dim_v) * itemsize


def _tiled_extra(problem: AttentionProblem, direction: Direction, tiling: Tiling) -> tuple[Term, ...]:
    sizes, accumulated = _Sizes.of(problem), problem.accumulation_dtype.itemsize
    terms = [Term(what="lse" if direction == "forward" else "delta", num_bytes=sizes.lse)]
    if direction == "backward" and problem.dtype != problem.accumulation_dtype:
        num_elements = (sizes.q + sizes.k + sizes.v) // problem.dtype.itemsize
        terms.append(Term(what="float32 sums of d_q, d_k, d_v", num_bytes=num_elements * accumulated))
    if tiling.heap_tiles > 0:
        tile = min(tiling.block_q, problem.seqlen_q) * min(tiling.block_kv, problem.seqlen_kv) * accumulated
        terms.append(Term(what="score tiles", num_bytes=tiling.heap_tiles * tile))
    return tuple(terms)


# --- operands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Bytes of each operand and result."""

    q: int
    k: int
    v: int
    out: int
    lse: int

    @classmethod
    def of(cls, problem: AttentionProblem) -> _Sizes:
        itemsize = problem.dtype.itemsize
        return cls(
            q=problem.tokens_q * problem.heads_q * problem.head_dim * itemsize,
            k=problem.tokens_kv * problem.heads_kv * problem.head_dim * itemsize,
            v=problem.tokens_kv * problem.heads_kv * problem.head_dim_v * itemsize,
            out=math.prod(problem.out_shape) * itemsize,
            lse=math.prod(problem.lse_shape) * problem.accumulation_dtype.itemsize,
        )


def _score_operand_traffic(problem: AttentionProblem, direction: Direction) -> tuple[Term, ...]:
    """Bias (assumed in the problem's dtype) and boolean mask: each stored element once, for either method."""
    terms = []
    if problem.bias_shape is not None:
        bias_bytes = math.prod(problem.bias_shape) * problem.dtype.itemsize
        terms.append(Term(what="read bias", num_bytes=bias_bytes))
        if direction == "backward" and "bias" in problem.gradients:
            terms.append(Term(what="write d_bias", num_bytes=bias_bytes))
    if problem.mask_shape is not None:
        terms.append(Term(what="read mask", num_bytes=math.prod(problem.mask_shape)))
    return tuple(terms)


# --- side by side -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The bill of one direction: the naive formula at its best, against tiles."""

    direction: Direction
    tiling: Tiling
    useful_flops: int
    naive: Cost
    tiled: Cost
    naive_time: Roofline
    tiled_time: Roofline


def compare(
    problem: AttentionProblem, direction: Direction, tiling: Tiling, device: DeviceSpec, lengths: Lengths | None = None
) -> Comparison:
    """Both methods' costs and bounds on a device."""
    naive, tiled = naive_cost(problem, direction), tiled_cost(problem, direction, tiling, lengths)
    return Comparison(
        direction=direction,
        tiling=tiling,
        useful_flops=useful_flops(problem, direction, lengths),
        naive=naive,
        tiled=tiled,
        naive_time=roofline(naive, problem, device),
        tiled_time=roofline(tiled, problem, device),
    )

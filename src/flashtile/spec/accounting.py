"""What a problem costs: FLOPs, device-memory bytes and extra memory, of the naive formula and of a tiled kernel.

Pure functions of sizes; nothing is measured here. The models, in words:

* FLOPs count matrix products only; softmax, masks and random numbers come on top. The naive formula multiplies every
  pair, a tiled kernel the pairs of every tile that the mask leaves something of.
* The naive traffic is the best case of any program that stores the scores: each step of the formula reads its inputs
  and writes its results once. Scores are in the accumulation dtype.
* The tiled traffic counts Q, the output and the lse once. K and V count once if what the running programs share of
  them fits into the last cache, else once per query tile that visits them (the query heads of a group visit together).
  In the backward, tiles of K and V stay and Q and d_out pass by, once or once per visit, as does the sum of d_q in
  device memory. A kernel without that sum (``SplitBackward``) walks the tiles twice instead, and multiplies more.
* Extra memory is the peak beyond inputs and results. For the naive formula it is that of flashtile's own ``naive``
  backend, which holds several score matrices at once and float32 copies of its operands.
* Packed problems cost what their lengths say; without lengths every sequence counts as the longest, an upper bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flashtile.spec import masks, units
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem
from flashtile.spec.tiling import SplitBackward, Tiles, Tiling

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
    model = _Model(problem=problem, tiling=tiling, sequences=_sequences(problem, lengths))
    if direction == "forward":
        flops, traffic = model.flops(direction), model.forward_traffic()
        extra = (Term(what="lse", num_bytes=_Sizes.of(problem).lse),)
        if tiling.num_parts > 1:
            num_bytes = tiling.num_parts * math.prod(problem.lse_shape) * (problem.head_dim_v + 1) * 4
            traffic += (Term(what="write and read out, lse of parts", num_bytes=2 * num_bytes),)
            extra += (Term(what="out, lse of parts", num_bytes=num_bytes),)
    elif tiling.split is None:
        flops, traffic, extra = model.flops(direction), model.backward_traffic(), _extra_backward(problem, tiling)
    else:
        flops, traffic = model.split_flops(tiling.split), model.split_traffic(tiling.split)
        extra = _extra_split(problem, tiling.split)
    if tiling.heap_tiles > 0:
        tile = min(tiling.block_q, problem.seqlen_q) * min(tiling.block_kv, problem.seqlen_kv)
        num_bytes = tiling.heap_tiles * tile * problem.accumulation_dtype.itemsize
        extra = (*extra, Term(what="score tiles", num_bytes=num_bytes))
    return Cost(flops=flops, traffic=(*traffic, *_score_operand_traffic(problem, direction)), extra=extra)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """FLOPs and traffic of tiled kernels."""

    problem: AttentionProblem
    tiling: Tiling
    sequences: Counter[tuple[int, int]]

    @property
    def tiles(self) -> Tiles:
        return self.tiling.block_q, self.tiling.block_kv

    def visits(self, tiles: Tiles) -> tuple[int, int]:
        """Tiles of one query head over the batch that the mask leaves something of, and their pairs."""
        num_tiles = num_pairs = 0
        for (seqlen_q, seqlen_kv), count in self.sequences.items():
            block_q, block_kv = min(tiles[0], seqlen_q), min(tiles[1], seqlen_kv)
            if block_q > 0 and block_kv > 0:
                lengths = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
                visited = masks.count_tiles(self.problem.mask, **lengths, block_q=block_q, block_kv=block_kv).visited
                num_tiles += count * visited
                num_pairs += count * min(visited * block_q * block_kv, seqlen_q * seqlen_kv)
        return num_tiles, num_pairs

    def flops(self, direction: Direction) -> int:
        return flops_per_pair(self.problem, direction) * self.problem.heads_q * self.visits(self.tiles)[1]

    def split_flops(self, split: SplitBackward) -> int:
        """Four products for d_k and d_v, three for d_q, two for the gradient of a bias."""
        dim, dim_v = self.problem.head_dim, self.problem.head_dim_v
        recomputed = dim + dim_v  # q @ k.T and d_out @ v.T
        products = (recomputed + dim + dim_v) * self.visits(self.tiles)[1]
        products += (recomputed + dim) * self.visits(split.q_tiles)[1]
        if split.bias_tiles is not None:
            products += recomputed * self.visits(split.bias_tiles)[1]
        return 2 * products * self.problem.heads_q

    def forward_traffic(self) -> tuple[Term, ...]:
        sizes = _Sizes.of(self.problem)
        return (
            Term(what="read q", num_bytes=sizes.q),
            self._stream_kv(self.tiles, "read k, v"),
            Term(what="write out, lse", num_bytes=sizes.out + sizes.lse),
        )

    def backward_traffic(self) -> tuple[Term, ...]:
        """One kernel, in whose tiles of keys d_k and d_v are summed up, and d_q in memory."""
        sizes, sum_bytes = _Sizes.of(self.problem), self.problem.head_dim * self.problem.accumulation_dtype.itemsize
        return (
            Term(what="read out, d_out, lse for delta", num_bytes=2 * sizes.out + sizes.lse),
            Term(what="read k, v", num_bytes=sizes.k + sizes.v),
            *self._stream_q("read q, d_out", sum_bytes),
            Term(what="write d_q, d_k, d_v", num_bytes=sizes.q + sizes.k + sizes.v),
        )

    def split_traffic(self, split: SplitBackward) -> tuple[Term, ...]:
        sizes, statistics = _Sizes.of(self.problem), _row_statistics(self.problem, split)
        terms = [
            Term(what="read out, d_out, lse for delta", num_bytes=2 * sizes.out + sizes.lse),
            Term(what="d_k, d_v: read k, v", num_bytes=sizes.k + sizes.v),
            *self._stream_q("d_k, d_v: read q, d_out"),
        ]
        kernels = [("d_q", split.q_tiles)]
        if split.bias_tiles is not None:
            kernels.append(("d_bias", split.bias_tiles))
        for name, tiles in kernels:
            terms.append(Term(what=f"{name}: read q, d_out", num_bytes=sizes.q + sizes.out))
            terms.append(self._stream_kv(tiles, f"{name}: read k, v"))
        num_passes = 2 + len(kernels)  # written once, read by the kernel for d_k and d_v and by each of these
        terms.append(Term(what=f"write, read {statistics.what}", num_bytes=num_passes * statistics.num_bytes))
        terms.append(Term(what="write d_q, d_k, d_v", num_bytes=sizes.q + sizes.k + sizes.v))
        return tuple(terms)

    def _stream_kv(self, tiles: Tiles, what: str) -> Term:
        """Reads k and v past tiles of queries."""
        sizes, row_bytes = _Sizes.of(self.problem), self._row_bytes
        once = sizes.k + sizes.v
        if _kv_rows_in_use(self.problem, tiles, self.tiling.num_programs) * row_bytes <= self.tiling.cache_bytes:
            return Term(what=f"{what} once (the cache holds them)", num_bytes=once)
        rows = self.problem.heads_kv * self.visits(tiles)[0] * min(tiles[1], self.problem.seqlen_kv)
        return Term(what=f"{what} once per query tile", num_bytes=max(rows * row_bytes, once))

    def _stream_q(self, what: str, sum_bytes: int = 0) -> list[Term]:
        """Reads q and d_out past tiles of keys, and adds to ``sum_bytes`` of d_q beside each row."""
        sizes, row_bytes = _Sizes.of(self.problem), self._row_bytes
        once, rows = sizes.q + sizes.out, _q_rows_in_use(self.problem, self.tiles, self.tiling.num_programs)
        if rows * (row_bytes + sum_bytes) <= self.tiling.cache_bytes:
            return [Term(what=f"{what} once (the cache holds them)", num_bytes=once)]
        rows = self.problem.heads_q * self.visits(self.tiles)[0] * min(self.tiles[0], self.problem.seqlen_q)
        terms = [Term(what=f"{what} once per key tile", num_bytes=max(rows * row_bytes, once))]
        return [*terms, Term(what="add to d_q per visit", num_bytes=2 * rows * sum_bytes)] if sum_bytes else terms

    @property
    def _row_bytes(self) -> int:
        """A row of k and v, or of q and d_out."""
        return (self.problem.head_dim + self.problem.head_dim_v) * self.problem.dtype.itemsize


def _kv_rows_in_use(problem: AttentionProblem, tiles: Tiles, num_programs: int) -> int:
    """Rows of K and V, over all heads, that the running programs share, each with a tile of queries."""
    tiles_per_head = max(-(-problem.seqlen_q // tiles[0]), 1)
    heads = min(-(-num_programs // (tiles_per_head * problem.heads_per_kv)), problem.batch * problem.heads_kv)
    tiles_at_once = min(-(-num_programs // problem.heads_per_kv), tiles_per_head)
    return heads * _within_reach(problem, problem.seqlen_kv, tiles_at_once * tiles[0])


def _q_rows_in_use(problem: AttentionProblem, tiles: Tiles, num_programs: int) -> int:
    """Rows of Q and d_out, over all heads, that the running programs share, each with a tile of keys."""
    tiles_per_head = max(-(-problem.seqlen_kv // tiles[1]), 1)
    heads = min(-(-num_programs // tiles_per_head), problem.batch * problem.heads_kv) * problem.heads_per_kv
    return heads * _within_reach(problem, problem.seqlen_q, min(num_programs, tiles_per_head) * tiles[1])


def _within_reach(problem: AttentionProblem, length: int, num_rows: int) -> int:
    """How much of the other side's ``length`` adjacent rows reach."""
    left, right = problem.mask.left, problem.mask.right
    return length if left is None or right is None else min(length, num_rows + left + right)


def _extra_backward(problem: AttentionProblem, tiling: Tiling) -> tuple[Term, ...]:
    """d_k and d_v are summed up in tiles, d_q and the gradient of a bias in memory."""
    itemsize, is_converted = problem.accumulation_dtype.itemsize, problem.dtype != problem.accumulation_dtype
    numbers, rows = tiling.row_statistics, math.prod(problem.lse_shape)
    if tiling.sequences_at_once is not None:
        rows = min(rows, tiling.sequences_at_once * problem.heads_q * problem.seqlen_q)
    terms = [Term(what=", ".join(numbers), num_bytes=len(numbers) * rows * itemsize)]
    dtype = units.dtype_name(problem.accumulation_dtype)
    if is_converted or tiling.sequences_at_once is not None:
        terms.append(Term(what=f"{dtype} sums of d_q", num_bytes=rows * problem.head_dim * itemsize))
    if tiling.num_parts > 1:
        rows_kv = problem.batch * problem.seqlen_kv * problem.heads_kv
        num_bytes = rows_kv * (problem.head_dim + problem.head_dim_v) * itemsize
        terms.append(Term(what=f"{dtype} sums of d_k, d_v", num_bytes=num_bytes))
    if is_converted and problem.bias_shape is not None and "bias" in problem.gradients:
        terms.append(Term(what=f"{dtype} sums of d_bias", num_bytes=math.prod(problem.bias_shape) * itemsize))
    return tuple(term for term in terms if term.num_bytes > 0)


def _extra_split(problem: AttentionProblem, split: SplitBackward) -> tuple[Term, ...]:
    """Every sum stays on chip, but for the shares of a bias that many pairs have in common."""
    terms = [_row_statistics(problem, split)]
    if "sinks" in problem.gradients:
        terms.append(Term(what="d_sinks of each query row", num_bytes=_statistics_bytes(problem, split)))
    if split.bias_shares > 1 and problem.bias_shape is not None:
        num_sums = split.bias_shares + (problem.dtype != problem.accumulation_dtype)
        num_bytes = num_sums * math.prod(problem.bias_shape) * problem.accumulation_dtype.itemsize
        terms.append(Term(what="shares of d_bias", num_bytes=num_bytes))
    return tuple(terms)


def _row_statistics(problem: AttentionProblem, split: SplitBackward) -> Term:
    """lse_log2 and delta; with 32-bit inputs also what float32 rounds away from lse_log2."""
    is_16bit = problem.dtype.itemsize == 2
    return Term(
        what="lse_log2, delta" if is_16bit else "lse_log2, its rest, delta",
        num_bytes=(2 if is_16bit else 3) * _statistics_bytes(problem, split),
    )


def _statistics_bytes(problem: AttentionProblem, split: SplitBackward) -> int:
    """One float32 number per query row and head; a packed batch needs up to a block more for each sequence."""
    blocks = problem.batch * -(-problem.seqlen_q // split.rows_block)
    if problem.layout == "varlen":
        blocks = -(-problem.tokens_q // split.rows_block) + problem.batch
    return problem.heads_q * blocks * split.rows_block * problem.accumulation_dtype.itemsize


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

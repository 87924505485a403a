"""What people say FlashAttention does for a transformer, beside what was measured here.

The sentence goes around without a source, a GPU, a batch or a dtype: "small, 12 layers, at 512 tokens: 100 ms -> 25 ms,
4000 MB -> 2000 MB; medium, 24 layers, at 512: 200 -> 50 ms, 8000 -> 4000 MB; large, 48 layers, at 1024: 400 -> 75 ms,
16000 -> 8000 MB; 1.5x to 6x faster; 2x to 4x less memory; up to 5x lower latency". Its milliseconds belong to some
machine; what can be judged on another are its ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.models.cases import ModelCase
from flashtile.bench.results import ModelResults, ModelRow
from flashtile.bench.summary import listed, three_digits

MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class CellClaim:
    """Before and after, for the training step of one model."""

    size: str
    layers: int
    seqlen: int
    naive_ms: float
    tiled_ms: float
    naive_mb: float
    tiled_mb: float


CELLS = (
    CellClaim(size="small", layers=12, seqlen=512, naive_ms=100, tiled_ms=25, naive_mb=4000, tiled_mb=2000),
    CellClaim(size="medium", layers=24, seqlen=512, naive_ms=200, tiled_ms=50, naive_mb=8000, tiled_mb=4000),
    CellClaim(size="large", layers=48, seqlen=1024, naive_ms=400, tiled_ms=75, naive_mb=16000, tiled_mb=8000),
)
FASTER = (1.5, 6.0)
LESS_MEMORY = (2.0, 4.0)
LOWER_LATENCY = 5.0
_NUM_NAMED = 3
"""Cells that a verdict names; the tables have them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One claim, judged."""

    claim: str
    measured: str | None
    """None if this run has nothing to say about it."""
    holds: bool | None
    """Whether the measured ratio is at least the claimed one; None if not measured."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One attention function in one case that ran to the end."""

    ms: float
    peak_mb: float
    state_mb: float
    attention_ms: float
    attention_share: float

    @classmethod
    def of(cls, row: ModelRow) -> Side | None:
        """None if the row has no measurement."""
        if row.timing is None or row.peak_bytes is None or row.state_bytes is None:
            return None
        if row.attention_ms is None or row.attention_share is None:
            return None
        return cls(
            ms=row.timing.median_ms,
            peak_mb=row.peak_bytes / MB,
            state_mb=row.state_bytes / MB,
            attention_ms=row.attention_ms,
            attention_share=row.attention_share,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The naive formula and flashtile in one case."""

    case: ModelCase
    naive: Side
    tiled: Side

    @property
    def speedup(self) -> float:
        return self.naive.ms / self.tiled.ms

    @property
    def memory_ratio(self) -> float:
        return self.naive.peak_mb / self.tiled.peak_mb

    @property
    def limit(self) -> float:
        """Amdahl's: the speed-up if attention took no time at all."""
        return 1 / max(1 - self.naive.attention_share, 1e-9)


def pairs(results: ModelResults) -> tuple[Pair, ...]:
    """The cases in which both ran to the end."""
    sides = {(row.case, row.peer): side for row in results.rows if (side := Side.of(row)) is not None}
    return tuple(
        Pair(case=case, naive=sides[case, NAIVE], tiled=sides[case, FLASHTILE])
        for case in dict.fromkeys(row.case for row in results.rows)
        if (case, NAIVE) in sides and (case, FLASHTILE) in sides
    )


def judged(results: ModelResults) -> tuple[Verdict, ...]:
    """Every claim: those about single cells, then those about ranges."""
    found = pairs(results)
    training = [pair for pair in found if pair.case.mode == "train"]
    inference = [pair for pair in found if pair.case.mode != "train"]
    cells = [verdict for cell in CELLS for verdict in _of_cell(cell, training)]
    return (
        *cells,
        _of_all_speeds(found),
        _of_all_memory(training),
        _of_latency(inference),
    )


# --- one cell ---------------------------------------------------------------------------------------------------------


def _of_cell(cell: CellClaim, training: Sequence[Pair]) -> tuple[Verdict, Verdict]:
    place = f"{cell.size} ({cell.layers} layers) at {cell.seqlen} tokens"
    faster, less = cell.naive_ms / cell.tiled_ms, cell.naive_mb / cell.tiled_mb
    time_claim = f"{place}: {cell.naive_ms:g} ms -> {cell.tiled_ms:g} ms ({faster:.2g}x faster)"
    memory_claim = f"{place}: {cell.naive_mb:g} MB -> {cell.tiled_mb:g} MB ({less:.2g}x less)"
    pair = next((pair for pair in training if (pair.case.size, pair.case.seqlen) == (cell.size, cell.seqlen)), None)
    if pair is None:
        why = f"ask for it: --mode train --size {cell.size} --seqlen {cell.seqlen}"
        unmeasured = partial(Verdict, measured=None, holds=None, why=why)
        return unmeasured(claim=time_claim), unmeasured(claim=memory_claim)
    return (
        Verdict(
            claim=time_claim,
            measured=f"{_ms(pair.naive)} -> {_ms(pair.tiled)} ({pair.speedup:.2f}x) at batch {pair.case.batch}",
            holds=pair.speedup >= faster,
            why=_why_so_fast(pair, faster),
        ),
        Verdict(
            claim=memory_claim,
            measured=f"{_mb(pair.naive)} -> {_mb(pair.tiled)} ({pair.memory_ratio:.2f}x) at batch {pair.case.batch}",
            holds=pair.memory_ratio >= less,
            why=_why_so_much(pair),
        ),
    )


def _why_so_fast(pair: Pair, claimed: float) -> str:
    """Amdahl's law with the share that was measured."""
    fact = f"attention is {pair.naive.attention_share:.0%} of the naive time"
    if pair.limit < claimed:
        return f"{fact}: even attention that takes no time at all would make it {pair.limit:.2f}x faster and no more"
    alone = pair.naive.attention_ms / max(pair.tiled.attention_ms, 1e-9)
    return f"{fact}, so that {pair.limit:.2f}x is the limit; the attention calls alone are {alone:.1f}x faster"


def _why_so_much(pair: Pair) -> str:
    return (
        f"weights, optimizer and inputs hold {pair.tiled.state_mb:,.0f} MB, gradients and activations "
        f"{pair.tiled.peak_mb - pair.tiled.state_mb:,.0f} MB with either; the score matrices raise the peak by "
        f"{pair.naive.peak_mb - pair.tiled.peak_mb:,.0f} MB"
    )


# --- ranges -----------------------------------------------------------------------------------------------------------


def _of_all_speeds(found: Sequence[Pair]) -> Verdict:
    claim = f"{FASTER[0]:g}x to {FASTER[1]:g}x faster"
    names = {
        pair: f"{_place(pair)} (attention is {pair.naive.attention_share:.0%}, limit {pair.limit:.2f}x)"
        for pair in found
    }
    return _of_all(claim, {pair: pair.speedup for pair in found}, FASTER[0], names)


def _of_all_memory(found: Sequence[Pair]) -> Verdict:
    claim = f"{LESS_MEMORY[0]:g}x to {LESS_MEMORY[1]:g}x less memory"
    names = {
        pair: f"{_place(pair)} (scores are {1 - pair.tiled.peak_mb / pair.naive.peak_mb:.0%} of naive's)"
        for pair in found
    }
    return _of_all(claim, {pair: pair.memory_ratio for pair in found}, LESS_MEMORY[0], names)


def _of_all(claim: str, ratios: Mapping[Pair, float], least: float, names: Mapping[Pair, str]) -> Verdict:
    """A claim about every cell."""
    if not ratios:
        return _unmeasured(claim)
    below = sorted((pair for pair in ratios if ratios[pair] < least), key=lambda pair: ratios[pair])
    named = [f"{ratios[pair]:.2f}x {names[pair]}" for pair in below[:_NUM_NAMED]]
    if len(below) > _NUM_NAMED:
        named.append(f"{len(below) - _NUM_NAMED} more")
    return Verdict(
        claim=claim,
        measured=f"{min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x; {len(ratios) - len(below)} of "
        f"{len(ratios)} cells are at {least:g}x or above",
        holds=not below,
        why=f"below: {listed(named)}" if below else "",
    )


def _of_latency(inference: Sequence[Pair]) -> Verdict:
    claim = f"up to {LOWER_LATENCY:g}x lower latency"
    if not inference:
        return _unmeasured(claim)
    best = max(inference, key=lambda pair: pair.speedup)
    return Verdict(
        claim=claim,
        measured=f"up to {best.speedup:.2f}x ({_place(best)})",
        holds=best.speedup >= LOWER_LATENCY,
        why=_why_so_fast(best, LOWER_LATENCY),
    )


def _unmeasured(claim: str) -> Verdict:
    return Verdict(claim=claim, measured=None, holds=None, why="no case of this run has both sides")


def _place(pair: Pair) -> str:
    return f"{pair.case.mode} {pair.case.size} at {pair.case.seqlen}"


def _ms(side: Side) -> str:
    return f"{three_digits(side.ms)} ms"


def _mb(side: Side) -> str:
    return f"{side.peak_mb:,.0f} MB"

"""The tables in the section of a run of whole models: claims, figures, what fits, and every measurement."""

from __future__ import annotations

from collections.abc import Sequence

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.models.cases import ModelCase
from flashtile.bench.models.claims import Verdict
from flashtile.bench.results import LimitRow, ModelResults, ModelRow
from flashtile.bench.summary import peer_title
from flashtile.report import cells
from flashtile.report.cells import EMPTY, Axis
from flashtile.report.page import Cell, Column, Table

_AXES = (
    Axis(column=Column(heading="mode", holds="words"), of=lambda case: Cell(text=case.mode)),
    Axis(column=Column(heading="model", holds="words"), of=lambda case: Cell(text=case.size)),
    Axis(column=Column(heading="layers"), of=lambda case: cells.count(case.shape.layers)),
    Axis(column=Column(heading="tokens"), of=lambda case: cells.count(case.seqlen)),
    Axis(column=Column(heading="batch"), of=lambda case: cells.count(case.batch)),
    Axis(column=Column(heading="dtype", holds="words"), of=lambda case: Cell(text=case.dtype)),
)
_HOLDS = {True: Cell(text="yes", tone="ours"), False: Cell(text="no", tone="behind"), None: Cell(text="not measured")}


def verdicts(judged: Sequence[Verdict]) -> Table:
    """Each claim, what was measured, whether that is as much, and why."""
    return cells.table(
        caption="A claim holds if the measured ratio is at least the claimed one.",
        columns=(
            Column(heading="claim", holds="sentences"),
            Column(heading="measured here", holds="sentences"),
            Column(heading="holds", holds="words"),
            Column(heading="why", holds="sentences"),
        ),
        rows=tuple(
            (_sentence(one.claim), _sentence(one.measured or ""), _HOLDS[one.holds], _sentence(one.why))
            for one in judged
        ),
    )


def _sentence(text: str) -> Cell:
    return Cell(text=text.replace("->", "→"))


def comparison(results: ModelResults) -> Table:
    """A row for each case: milliseconds and memory of each attention function, and what flashtile makes of them."""
    rows = {(row.case, row.peer): row for row in results.rows}
    cases = list(dict.fromkeys(rows_case for rows_case, _ in rows))
    axes, constant = cells.axes(_AXES, cases)
    peers = [peer for peer in (NAIVE, SDPA, FLASHTILE) if any(row.peer == peer for row in results.rows)]
    headings = (
        *(f"{peer_title(peer)}, ms" for peer in peers),
        *(f"x {peer_title(peer)}" for peer in (NAIVE, SDPA)),
        *(f"{peer_title(peer)}, memory" for peer in peers),
        "less memory than naive",
        "attention's share of naive",
        "limit",
    )
    return cells.table(
        caption="x: flashtile's speed as a multiple of the other's, below 1x it is slower. The limit is Amdahl's: the "
        f"speed-up over naive if attention took no time at all.{constant}",
        columns=(*(axis.column for axis in axes), *(Column(heading=heading) for heading in headings)),
        rows=tuple((*(axis.of(case) for axis in axes), *_figures(case, rows, peers)) for case in cases),
    )


def _figures(case: ModelCase, rows: dict[tuple[ModelCase, str], ModelRow], peers: Sequence[str]) -> tuple[Cell, ...]:
    ours, naive = rows.get((case, FLASHTILE)), rows.get((case, NAIVE))
    return (
        *(_ms(rows.get((case, peer))) for peer in peers),
        EMPTY if ours is None else cells.ratio(ours.speedup_over_naive),
        EMPTY if ours is None else cells.ratio(ours.speedup_over_sdpa),
        *(_peak(rows.get((case, peer))) for peer in peers),
        EMPTY if ours is None else cells.ratio(ours.memory_ratio_to_naive),
        EMPTY if naive is None else cells.percent(naive.attention_share),
        EMPTY if naive is None else cells.ratio(naive.amdahl_limit),
    )


def limits(rows: Sequence[LimitRow]) -> Table:
    """The largest batch and the longest sequence that fit, with each attention function."""
    return cells.table(
        caption="Tried: steps of that size ran, and those of the size that is too large ran out of memory; where there "
        "is none, the time was up, and more may fit. Extrapolated: from the memory of small steps; nothing so large "
        "was tried.",
        columns=(
            Column(heading="model", holds="words"),
            Column(heading="what grows", holds="words"),
            Column(heading="attention", holds="words"),
            Column(heading="largest"),
            Column(heading="too large"),
            Column(heading="memory"),
            Column(heading="how it is known", holds="words"),
        ),
        rows=tuple(
            (
                Cell(text=row.case.size),
                Cell(text=_what_grows(row)),
                Cell(text=peer_title(row.peer), tone="ours" if row.peer == FLASHTILE else ""),
                cells.count(row.largest),
                cells.count(row.too_large),
                cells.memory(row.memory_bytes),
                Cell(text=_how(row)),
            )
            for row in rows
        ),
    )


def _how(row: LimitRow) -> str:
    is_open = row.status == "tried" and row.too_large is None
    return "tried, and nothing larger" if is_open else row.reason or row.status


def _what_grows(row: LimitRow) -> str:
    other = f"{row.case.other:,}"
    return f"batch, at {other} tokens each" if row.case.axis == "batch" else f"tokens, at a batch of {other}"


def measurements(results: ModelResults) -> Table:
    """A row for each attention function on each case, with everything that was measured, or why it was not."""
    axes, constant = cells.axes(_AXES, list(dict.fromkeys(row.case for row in results.rows)))
    figures = ("ms", "from", "to", "rounds", "peak", "of it state", "attention ms", "share", "difference")
    return cells.table(
        caption="Medians in ms with their quartiles. State: what is held between two steps. The difference is from "
        f"flashtile's result, over that result's largest magnitude.{constant}",
        columns=(
            *(axis.column for axis in axes),
            Column(heading="attention", holds="words"),
            *(Column(heading=heading) for heading in figures),
            Column(heading="why there is no time", holds="sentences"),
        ),
        rows=tuple(
            (
                *(axis.of(row.case) for axis in axes),
                Cell(text=peer_title(row.peer), tone="ours" if row.peer == FLASHTILE else ""),
                *cells.timing(row.timing),
                cells.memory(row.peak_bytes),
                cells.memory(row.state_bytes),
                cells.figure(row.attention_ms),
                cells.percent(row.attention_share),
                cells.difference(row.difference),
                Cell(text=cells.outcome(row)),
            )
            for row in results.rows
        ),
    )


def _ms(row: ModelRow | None) -> Cell:
    if row is None:
        return EMPTY
    if row.timing is None:
        return Cell(text=summary.WORDS[row.status], hint=row.reason or "")
    return cells.figure(row.timing.median_ms, is_ours=row.peer == FLASHTILE)


def _peak(row: ModelRow | None) -> Cell:
    return EMPTY if row is None else cells.memory(row.peak_bytes)

"""The tables in the section of a kernel run: flashtile beside each peer, and every measurement there is."""

from __future__ import annotations

from collections.abc import Mapping

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.bench.summary import Speedups, peer_title, three_digits
from flashtile.report import cells
from flashtile.report.cells import CALL_AXES, EMPTY
from flashtile.report.page import Cell, Column, Table


def comparison(results: KernelResults, known: Mapping[str, Speedups]) -> Table:
    """A row for each case: flashtile's figures, then its speed as a multiple of each peer's.

    Args:
        results: the run.
        known: the multiples by peer.
    """
    rows = {(row.case, row.peer): row for row in results.rows}
    cases = list(dict.fromkeys(row.case for row in results.rows))
    axes, constant = cells.axes(CALL_AXES, cases)
    peers = summary.rivals(results)
    return cells.table(
        caption=f"flashtile's figures, then its speed as a multiple of each peer's: below 1x it is slower.{constant}",
        columns=(
            *(axis.column for axis in axes),
            Column(heading="TFLOP/s"),
            *(Column(heading=f"x {peer_title(peer)}") for peer in peers),
            Column(heading="% of ceiling"),
            Column(heading="memory"),
        ),
        rows=tuple(
            (
                *(axis.of(case) for axis in axes),
                speed,
                *(_ratio(rows.get((case, peer)), known.get(peer, {}).get(case)) for peer in peers),
                share,
                memory,
            )
            for case in cases
            for speed, share, memory in [_own_figures(rows.get((case, FLASHTILE)))]
        ),
    )


def measurements(results: KernelResults) -> Table:
    """A row for each peer on each case, with everything that was measured, or why it was not."""
    axes, constant = cells.axes(CALL_AXES, list(dict.fromkeys(row.case for row in results.rows)))
    figures = ("ms", "from", "to", "rounds", "TFLOP/s", "% of ceiling", "memory", "difference")
    return cells.table(
        caption="Medians in ms with their quartiles; the difference is from flashtile's result, over that result's "
        f"largest magnitude.{constant}",
        columns=(
            *(axis.column for axis in axes),
            Column(heading="implementation", holds="words"),
            *(Column(heading=heading) for heading in figures),
            Column(heading="kernel, or why there is no time", holds="sentences"),
        ),
        rows=tuple(
            (
                *(axis.of(row.case) for axis in axes),
                Cell(text=peer_title(row.peer), tone="ours" if row.peer == FLASHTILE else ""),
                *cells.timing(row.timing),
                *_own_figures(row),
                cells.difference(row.difference),
                Cell(text=cells.outcome(row) or row.kernel or ""),
            )
            for row in results.rows
        ),
    )


def _own_figures(row: KernelRow | None) -> tuple[Cell, Cell, Cell]:
    """TFLOP/s, percent of the ceiling, memory."""
    if row is None:
        return EMPTY, EMPTY, EMPTY
    if row.timing is None:
        return Cell(text=summary.WORDS[row.status], hint=row.reason or ""), EMPTY, EMPTY
    return (
        cells.figure(row.tflops, is_ours=row.peer == FLASHTILE),
        cells.percent(None if row.percent_of_ceiling is None else row.percent_of_ceiling / 100),
        cells.memory(row.peak_extra_bytes),
    )


def _ratio(row: KernelRow | None, ratio: float | None) -> Cell:
    if row is None:
        return EMPTY
    if row.timing is None:
        return Cell(text=summary.WORDS[row.status], hint=row.reason or "")
    speed = "" if row.tflops is None else f", {three_digits(row.tflops)} TFLOP/s"
    return cells.ratio(ratio, hint=f"{three_digits(row.timing.median_ms)} ms{speed}")

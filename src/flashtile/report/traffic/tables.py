"""The table in the section of a run of ``bench io``."""

from __future__ import annotations

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.summary import peer_title
from flashtile.report import cells
from flashtile.report.cells import CALL_AXES, EMPTY
from flashtile.report.page import Cell, Column, Table
from flashtile.spec.units import in_decimal_bytes


def traffic(results: IoResults) -> Table:
    """A row for each method on each case: predicted, counted and bounded bytes."""
    axes, constant = cells.axes(CALL_AXES, list(dict.fromkeys(row.case for row in results.rows)))
    figures = ("ms", "predicted", "counted", "counted / predicted", "at most", "at copy speed")
    return cells.table(
        caption="Bytes read plus written by one call. At most: what a copy moves in the same time. At copy speed: the "
        "part of the time that the predicted bytes take there; where it is small, something else than memory sets the "
        f"time. Point at a prediction for what it is made of.{constant}",
        columns=(
            *(axis.column for axis in axes),
            Column(heading="method", holds="words"),
            *(Column(heading=heading) for heading in figures),
        ),
        rows=tuple(
            (
                *(axis.of(row.case) for axis in axes),
                Cell(text=peer_title(row.peer), tone="ours" if row.peer == FLASHTILE else ""),
                *_figures(row),
            )
            for row in results.rows
        ),
    )


def _figures(row: IoRow) -> tuple[Cell, ...]:
    made_of = "; ".join(f"{what}: {in_decimal_bytes(num_bytes)}" for what, num_bytes in row.predicted.items())
    predicted = Cell(text=in_decimal_bytes(row.predicted_bytes), value=row.predicted_bytes, hint=made_of)
    if row.timing is None:
        return Cell(text=summary.WORDS[row.status], hint=row.reason or ""), predicted, *(EMPTY,) * 4
    share = row.predicted_bytes / row.bound_bytes if row.bound_bytes else None
    return (
        cells.figure(row.timing.median_ms),
        predicted,
        cells.memory(row.counted_bytes),
        _times(row.counted_bytes, row.predicted_bytes),
        cells.memory(row.bound_bytes),
        cells.percent(share),
    )


def _times(counted: int | None, predicted: int) -> Cell:
    """How many times the predicted bytes were counted; neither more nor less speaks against anybody."""
    if counted is None or not predicted:
        return EMPTY
    return Cell(text=f"{counted / predicted:.2f}x", value=counted / predicted)

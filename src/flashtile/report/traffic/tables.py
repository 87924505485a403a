"""The table in the section of a run of ``bench io``."""

from __future__ import annotations

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.summary import peer_title, three_digits
from flashtile.report import cells
from flashtile.report.cells import CALL_AXES, EMPTY
from flashtile.report.page import Cell, Column, Table
from flashtile.spec.units import in_decimal_bytes


def traffic(results: IoResults) -> Table:
    """A row for each method on each case: predicted, counted and bounded bytes."""
    axes, constant = cells.axes(CALL_AXES, list(dict.fromkeys(row.case for row in results.rows)))
    figures = ("ms", "predicted", "counted", "at most", "measured / predicted")
    return Table(
        caption="Bytes read plus written by one call. At most: what a copy could move in the same time. Measured is "
        f"the count, or where there is none that bound. Point at a prediction for what it is made of.{constant}",
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
        return Cell(text=summary.WORDS[row.status], hint=row.reason or ""), predicted, EMPTY, EMPTY, EMPTY
    measured = row.bound_bytes if row.counted_bytes is None else row.counted_bytes
    ratio = measured / row.predicted_bytes if measured is not None and row.predicted_bytes else None
    sign = "≤ " if row.counted_bytes is None else ""
    return (
        cells.figure(row.timing.median_ms),
        predicted,
        cells.memory(row.counted_bytes),
        cells.memory(row.bound_bytes),
        EMPTY if ratio is None else Cell(text=f"{sign}{three_digits(ratio)}x", value=ratio),
    )

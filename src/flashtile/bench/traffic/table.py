"""Results of ``bench io`` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.summary import WORDS, row_gaps, three_digits
from flashtile.bench.terminal import empty_table, print_lines, print_whole, spread, stacked
from flashtile.bench.traffic.summary import conditions, findings

MB = 10**6
_FIGURES = ("ms", "spread", "predicted MB", "counted MB", "counted / predicted", "at most MB", "at copy speed")


def print_results(results: IoResults, console: Console | None = None) -> None:
    """Prints the conditions, a table for each direction and dtype, what is missing, and the findings."""
    console = console or Console()
    print_lines(conditions(results), console)
    for title, rows in groupby(results.rows, key=lambda row: f"{row.case.direction}, {row.case.dtype}"):
        print_whole(_table(title, list(rows)), console)
    print_lines([*row_gaps(results.rows), *findings(results)], console)


def _table(title: str, rows: Sequence[IoRow]) -> Table:
    """One table row for each case; its cells have a line for each peer."""
    table = empty_table(title, ("case", "peer"), _FIGURES)
    for case, group in groupby(rows, key=lambda row: row.case):
        cell = f"{case.seqlen} {case.mask_name}\nbatch {case.batch}, heads {case.heads_q}, head_dim {case.head_dim}"
        table.add_row(cell, *stacked([(row.peer, *_cells(row)) for row in group]))
    return table


def _cells(row: IoRow) -> tuple[str, ...]:
    """As ``_FIGURES`` says."""
    predicted = three_digits(row.predicted_bytes / MB)
    if row.timing is None or row.bound_bytes is None:
        return WORDS[row.status], "", predicted, "", "", "", ""
    counted = row.counted_bytes
    return (
        three_digits(row.timing.median_ms),
        spread(row.timing),
        predicted,
        "" if counted is None else three_digits(counted / MB),
        "" if counted is None else f"{counted / row.predicted_bytes:.2f}",
        three_digits(row.bound_bytes / MB),
        f"{row.predicted_bytes / row.bound_bytes:.1%}",
    )

"""Results of ``bench io`` as tables for the terminal, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.summary import WORDS, machine, row_gaps, three_digits
from flashtile.bench.terminal import empty_table, print_lines, print_whole, spread, stacked

MB = 10**6
WHAT_A_GPU_ADDS = (
    "With a GPU and Nsight Compute: bytes counted by the device's own counters. A CPU's are not open to ordinary "
    "programs, and its arithmetic takes so much of the time that the bound is loose."
)
_FIGURES = ("ms", "spread", "predicted MB", "counted MB", "at most MB", "measured / predicted")


def print_results(results: IoResults, console: Console | None = None) -> None:
    """Prints the conditions, a table for each direction and dtype, what is missing, and the findings."""
    console = console or Console()
    print_lines(conditions(results), console)
    for title, rows in groupby(results.rows, key=lambda row: f"{row.case.direction}, {row.case.dtype}"):
        print_whole(_table(title, list(rows)), console)
    print_lines([*row_gaps(results.rows), *findings(results)], console)


def conditions(results: IoResults) -> list[str]:
    """Where and how it was measured, and what the figures are."""
    counted = f"Counted by {results.counter}." if results.counter else f"Not counted: {results.no_counter_reason}."
    return [
        machine(results.environment),
        f"Copy {three_digits(results.copy_gb_per_s)} GB/s; about {results.budget_s:g} s for each case. MB are 10**6 "
        "bytes, read plus written.",
        "Predicted: the naive formula at its best, each step reading its operands and writing its results once, scores "
        "in float32; tiles as flashtile plans them.",
        f"{counted} At most: the time at the speed of a copy, an upper bound; what is measured below is the count, or "
        "this bound (<=) where there is none.",
    ]


def findings(results: IoResults) -> list[str]:
    """How bytes and times compare where the sequence is longest, and what this run leaves open."""
    lines = []
    rows = {(row.case, row.peer): row for row in results.rows}
    for direction in dict.fromkeys(row.case.direction for row in results.rows):
        case = max((row.case for row in results.rows if row.case.direction == direction), key=_length)
        naive, tiled = rows[case, NAIVE], rows[case, FLASHTILE]
        line = f"{direction}, {case.seqlen} tokens, {case.mask_name}: the naive formula moves at least "
        line += f"{naive.predicted_bytes / tiled.predicted_bytes:.1f}x the bytes of tiles by prediction"
        if naive.counted_bytes and tiled.counted_bytes:
            line += f", {naive.counted_bytes / tiled.counted_bytes:.1f}x by count"
        if naive.timing and tiled.timing:
            line += f", and takes {naive.timing.median_ms / tiled.timing.median_ms:.1f}x the time"
        lines.append(line + ".")
    if results.environment.device == "cpu":
        lines.append(WHAT_A_GPU_ADDS)
    if not results.is_complete:
        lines.append("The run was interrupted: only the finished cases are here.")
    return lines


def _length(case: BenchCase) -> tuple[int, bool]:
    return case.seqlen, case.is_causal


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
        return WORDS[row.status], "", predicted, "", "", ""
    measured, sign = (row.bound_bytes, "<= ") if row.counted_bytes is None else (row.counted_bytes, "")
    return (
        three_digits(row.timing.median_ms),
        spread(row.timing),
        predicted,
        "" if row.counted_bytes is None else three_digits(row.counted_bytes / MB),
        three_digits(row.bound_bytes / MB),
        f"{sign}{measured / row.predicted_bytes:.2f}",
    )

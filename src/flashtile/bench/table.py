"""Results of ``bench kernels`` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from flashtile.bench.baselines import FLEX, NAIVE, SDPA
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.bench.summary import WORDS, conditions, findings, gaps, three_digits
from flashtile.bench.terminal import empty_table, print_lines, print_whole, spread, stacked
from flashtile.spec import units

_COMPARED = (NAIVE, SDPA, FLEX)
"""The peers whose speed is the unit of a column, where they have timings."""


def print_results(results: KernelResults, console: Console | None = None) -> None:
    """Prints the conditions of the run, a table for each direction, dtype and kind of call, what is missing and why,
    and the findings."""
    console = console or Console()
    print_lines(conditions(results), console)
    for title, rows in groupby(results.rows, key=lambda row: _title(row.case)):
        print_whole(_table(title, list(rows)), console)
    print_lines([*gaps(results), *findings(results)], console)


def _title(case: BenchCase) -> str:
    return f"{case.direction}, {case.dtype}" + ("" if case.option == "plain" else ", with options")


def _table(title: str, rows: Sequence[KernelRow]) -> Table:
    """One table row for each case; its cells have a line for each peer."""
    compared = [peer for peer in _COMPARED if any(row.peer == peer and row.timing for row in rows)]
    figures = ("ms", "spread", "TFLOP/s", "% ceiling", "memory", *(f"x {peer}" for peer in compared))
    table = empty_table(title, ("case", "peer"), figures)
    for case, group in groupby(rows, key=lambda row: row.case):
        of_case = list(group)
        medians_ms = {row.peer: row.timing.median_ms for row in of_case if row.timing}
        lines = [(row.peer, *_cells(row, [medians_ms.get(peer) for peer in compared])) for row in of_case]
        table.add_row(_case_cell(case), *stacked(lines))
    return table


def _case_cell(case: BenchCase) -> str:
    heads = str(case.heads_q) if case.heads_q == case.heads_kv else f"{case.heads_q}/{case.heads_kv}"
    option = "" if case.option == "plain" else f" {case.option}"
    return f"head_dim {case.head_dim}\n{case.seqlen} {case.mask_name}{option}\nbatch {case.batch}, heads {heads}"


def _cells(row: KernelRow, compared_ms: Sequence[float | None]) -> tuple[str, ...]:
    """ms, spread, TFLOP/s, % of ceiling, memory, and the speed-up over each of the compared medians."""
    timing = row.timing
    if timing is None:
        return (WORDS[row.status], *("",) * (4 + len(compared_ms)))
    return (
        three_digits(timing.median_ms),
        spread(timing),
        "" if row.tflops is None else three_digits(row.tflops),
        "" if row.percent_of_ceiling is None else f"{row.percent_of_ceiling:.0f}",
        "" if row.peak_extra_bytes is None else units.in_bytes(row.peak_extra_bytes),
        *("" if other_ms is None else f"{other_ms / timing.median_ms:.2f}" for other_ms in compared_ms),
    )

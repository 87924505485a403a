"""Results of ``bench models`` as tables for the terminal, with the claims that people quote beside them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from flashtile.bench.models.cases import MODES, ModelCase
from flashtile.bench.models.claims import MB, Verdict, judged
from flashtile.bench.models.summary import conditions, findings
from flashtile.bench.results import LimitRow, ModelResults, ModelRow
from flashtile.bench.summary import WORDS, row_gaps, three_digits
from flashtile.bench.terminal import empty_table, print_lines, print_whole, spread, stacked

_FIGURES = ("ms", "spread", "x naive", "x sdpa", "MB", "naive MB / MB", "attention ms", "share", "limit")


def print_results(results: ModelResults, console: Console | None = None) -> None:
    """Prints the conditions, a table for each mode and model, what fits, what is missing, the claims, the findings."""
    console = console or Console()
    print_lines(conditions(results), console)
    for (mode, size), rows in groupby(results.rows, key=lambda row: (row.case.mode, row.case.size)):
        print_whole(_table(f"{size}, {mode}: {MODES[mode].partition(':')[0]}", list(rows)), console)
    if results.limits:
        print_whole(_limits(results.limits), console)
    print_lines(row_gaps(results.rows), console)
    print_whole(_claims(judged(results)), console)
    print_lines(findings(results), console)


def _table(title: str, rows: Sequence[ModelRow]) -> Table:
    """One table row for each length; its cells have a line for each peer."""
    table = empty_table(title, ("case", "peer"), _FIGURES)
    for case, group in groupby(rows, key=lambda row: row.case):
        table.add_row(_case_cell(case), *stacked([(row.peer, *_cells(row)) for row in group]))
    return table


def _case_cell(case: ModelCase) -> str:
    return f"{case.seqlen} tokens\nbatch {case.batch}\n{case.dtype}"


def _cells(row: ModelRow) -> tuple[str, ...]:
    """As ``_FIGURES`` says."""
    if row.timing is None:
        return (WORDS[row.status], *("",) * (len(_FIGURES) - 1))
    return (
        three_digits(row.timing.median_ms),
        spread(row.timing),
        _ratio(row.speedup_over_naive),
        _ratio(row.speedup_over_sdpa),
        "" if row.peak_bytes is None else f"{row.peak_bytes / MB:,.0f}",
        _ratio(row.memory_ratio_to_naive),
        "" if row.attention_ms is None else three_digits(row.attention_ms),
        "" if row.attention_share is None else f"{row.attention_share:.0%}",
        _ratio(row.amdahl_limit),
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _limits(limits: Sequence[LimitRow]) -> Table:
    table = empty_table("The largest training step that fits", ("model", "question", "peer"), ("largest", "how", "MB"))
    for case, group in groupby(limits, key=lambda row: row.case):
        lines = [(row.peer, *_limit_cells(row)) for row in group]
        question = f"batch of {case.other} tokens each" if case.axis == "batch" else f"tokens in each of {case.other}"
        table.add_row(case.size, question, *stacked(lines))
    return table


def _limit_cells(row: LimitRow) -> tuple[str, str, str]:
    """The largest, how that is known, and the memory that there was."""
    memory = "" if row.memory_bytes is None else f"{row.memory_bytes / MB:,.0f}"
    if row.largest is None:
        return "-", row.reason or row.status, memory
    how = "extrapolated" if row.status == "extrapolated" else "nothing larger was tried"
    if row.too_large is not None:
        how = f"{row.too_large:,} ran out of memory"
    return f"{row.largest:,}", how, memory


def _claims(verdicts: Sequence[Verdict]) -> Table:
    """What people quote, and what is measured here."""
    table = empty_table("What people quote, and what is measured here", ("claim", "measured", "holds", "why"), ())
    for column, width in zip(table.columns, (44, 34, None, 60), strict=True):
        column.no_wrap, column.max_width = width is None, width
    for verdict in verdicts:
        holds = {True: "yes", False: "no", None: "-"}[verdict.holds]
        table.add_row(verdict.claim, verdict.measured or "not in this run", holds, verdict.why)
    return table

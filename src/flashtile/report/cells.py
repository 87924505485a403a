"""Cells that the tables of every benchmark have in common, and the columns in which cases differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flashtile.bench import summary
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import Row
from flashtile.bench.summary import three_digits
from flashtile.bench.timing import Timing
from flashtile.report.page import Cell, Column, Table
from flashtile.spec.units import in_decimal_bytes

EMPTY = Cell(text="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A property in which cases may differ."""

    column: Column
    of: Callable[[Any], Cell]


def axes(known: Sequence[Axis], cases: Sequence[Any]) -> tuple[list[Axis], str]:
    """The properties in which the cases differ, to be columns; and those that they share, in words."""
    varying = [axis for axis in known if len({axis.of(case) for case in cases}) > 1]
    shared = [f"{axis.column.heading} {axis.of(cases[0]).text}" for axis in known if cases and axis not in varying]
    return varying, f" All rows: {', '.join(shared)}." if shared else ""


def table(caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> Table:
    """A table of those columns in which some row has something."""
    kept = [idx for idx in range(len(columns)) if any(row[idx].text for row in rows)]
    return Table(
        caption=caption,
        columns=tuple(columns[idx] for idx in kept),
        rows=tuple(tuple(row[idx] for idx in kept) for row in rows),
    )


def count(number: int | None) -> Cell:
    return EMPTY if number is None else Cell(text=f"{number:,}", value=number)


def figure(value: float | None, *, is_ours: bool = False) -> Cell:
    """Three significant digits."""
    return EMPTY if value is None else Cell(text=three_digits(value), value=value, tone="ours" if is_ours else "")


def percent(share: float | None) -> Cell:
    """Of a share from 0 to 1."""
    return EMPTY if share is None else Cell(text=summary.percent(share), value=share)


def memory(num_bytes: int | None) -> Cell:
    return EMPTY if num_bytes is None else Cell(text=in_decimal_bytes(num_bytes), value=num_bytes)


def ratio(value: float | None, *, hint: str = "") -> Cell:
    """A multiple that speaks against flashtile below 1."""
    if value is None:
        return Cell(text="", hint=hint)
    return Cell(text=f"{value:.2f}x", value=value, tone="behind" if value < 1 else "", hint=hint)


def difference(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(text=f"{value:.1e}", value=value)


def timing(found: Timing | None) -> tuple[Cell, Cell, Cell, Cell]:
    """Median, lower and upper quartile in ms, and the number of rounds."""
    if found is None:
        return EMPTY, EMPTY, EMPTY, EMPTY
    return figure(found.median_ms), figure(found.q25_ms), figure(found.q75_ms), count(found.rounds)


def outcome(row: Row) -> str:
    """Why a row has no timing; empty if it has one."""
    if row.status == "ok":
        return ""
    word = "" if row.status == "unavailable" else f"{summary.WORDS[row.status]}: "
    return f"{word}{row.reason}"


# --- columns of attention calls ---------------------------------------------------------------------------------------


def _heads(case: BenchCase) -> Cell:
    """``32``, or ``32/8`` where groups of query heads share a kv head."""
    text = str(case.heads_q) if case.heads_q == case.heads_kv else f"{case.heads_q}/{case.heads_kv}"
    return Cell(text=text, value=case.heads_q)


CALL_AXES = (
    Axis(column=Column(heading="direction", holds="words"), of=lambda case: Cell(text=case.direction)),
    Axis(column=Column(heading="dtype", holds="words"), of=lambda case: Cell(text=case.dtype)),
    Axis(column=Column(heading="mask", holds="words"), of=lambda case: Cell(text=case.mask_name)),
    Axis(column=Column(heading="option", holds="words"), of=lambda case: Cell(text=case.option)),
    Axis(column=Column(heading="head_dim"), of=lambda case: count(case.head_dim)),
    Axis(column=Column(heading="tokens"), of=lambda case: count(case.seqlen)),
    Axis(column=Column(heading="batch"), of=lambda case: count(case.batch)),
    Axis(column=Column(heading="heads"), of=_heads),
)
"""In which attention calls can differ."""

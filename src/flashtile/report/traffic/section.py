"""The section of a results file of ``flashtile bench io``."""

from __future__ import annotations

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.summary import in_words, listed, three_digits, times
from flashtile.bench.traffic.summary import comparisons, conditions, findings
from flashtile.report import provenance
from flashtile.report.page import Headline, Part, Point, Section
from flashtile.report.traffic import charts, tables
from flashtile.spec.units import in_decimal_bytes


def section(source: str, anchor: str, results: IoResults) -> Section:
    """What one run shows; arguments and errors as ``kernels.section.section``."""
    return Section(
        anchor=anchor,
        title=f"Memory traffic on {results.environment.device_name}",
        origin=provenance.origin(source, results.environment, results.created_utc),
        summary=" ".join(comparisons(results)) or "There is nothing to compare flashtile with in this run.",
        lead=_lead(results),
        warnings=() if results.is_complete else (provenance.INTERRUPTED,),
        headlines=_headlines(results),
        parts=(
            Part(heading="What the figures say", points=tuple(Point(term="", text=line) for line in findings(results))),
            Part(
                heading="Over the sequence length",
                note="Bytes read and written by one call, on a logarithmic scale: dashed as predicted, solid as "
                f"measured. {_how_measured(results)}",
                views=charts.views(source, results),
            ),
            Part(heading="Every case", tables=(tables.traffic(results),) if results.rows else ()),
            Part(
                heading="Not measured, and why",
                points=tuple(Point(term="", text=line) for line in summary.row_gaps(results.rows)),
                is_folded=True,
            ),
            Part(
                heading="How it was measured",
                points=tuple(Point(term="", text=line) for line in conditions(results)[1:]),
                is_folded=True,
            ),
        ),
        facts={
            **provenance.facts(source, results.environment, results.created_utc),
            "copy": f"{three_digits(results.copy_gb_per_s)} GB/s, read plus written",
            "counter": results.counter or f"none: {results.no_counter_reason}",
            "time": f"about {results.budget_s:g} s for each case",
        },
    )


def _lead(results: IoResults) -> str:
    cases = list(dict.fromkeys(row.case for row in results.rows))
    if not cases:
        return "No case was finished."
    directions = listed(list(dict.fromkeys(case.direction for case in cases)))
    return (
        f"What {len(cases)} attention calls ({directions}) move between the processor and its memory, with the naive "
        "formula and with flashtile: predicted from the algorithm, and measured."
    )


def _how_measured(results: IoResults) -> str:
    if results.counter:
        return f"Measured by the device's own counters, with {results.counter}."
    return "Without a counter the measurement is a bound: what a copy could move in the time that the call took."


def _headlines(results: IoResults) -> tuple[Headline, ...]:
    """For each direction, the case in which tiles save the most by prediction."""
    rows = {(row.case, row.peer): row for row in results.rows}
    shown = []
    for direction in dict.fromkeys(row.case.direction for row in results.rows):
        pairs = [
            (rows[case, NAIVE], rows[case, FLASHTILE])
            for case in dict.fromkeys(row.case for row in results.rows if row.case.direction == direction)
            if (case, NAIVE) in rows and (case, FLASHTILE) in rows and rows[case, FLASHTILE].predicted_bytes
        ]
        if pairs:
            naive, tiled = max(pairs, key=lambda pair: pair[0].predicted_bytes / pair[1].predicted_bytes)
            shown.append(_headline(naive, tiled, naive.case))
    return tuple(shown)


def _headline(naive: IoRow, tiled: IoRow, case: BenchCase) -> Headline:
    counted = (
        f"; counted {in_decimal_bytes(tiled.counted_bytes)} instead of {in_decimal_bytes(naive.counted_bytes)}"
        if naive.counted_bytes and tiled.counted_bytes
        else ""
    )
    ratio = naive.predicted_bytes / tiled.predicted_bytes
    return Headline(
        value=f"{times(ratio)} fewer",
        label=f"bytes than the naive formula, {case.direction}, by prediction",
        detail=f"{in_decimal_bytes(tiled.predicted_bytes)} instead of {in_decimal_bytes(naive.predicted_bytes)}"
        f"{counted}: {in_words(case)}",
        is_behind=ratio < 1,
    )

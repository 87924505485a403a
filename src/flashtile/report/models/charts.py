"""The charts in the section of a run of whole models: speed-up, time and memory over the sequence length."""

from __future__ import annotations

from collections.abc import Callable

from flashtile.bench import plots
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.models.cases import Mode
from flashtile.bench.plots import Axis, Line
from flashtile.bench.results import ModelRow
from flashtile.bench.summary import peer_title
from flashtile.report import charts
from flashtile.report.charts import Plot
from flashtile.report.models.run import IN_WORDS, Run
from flashtile.report.page import View
from flashtile.spec.units import in_decimal_bytes

_PEERS = (NAIVE, SDPA, FLASHTILE)
"""In the order of drawing: the last lies on top."""
_LIMIT_COLOR = 3


def views(run: Run) -> tuple[View, ...]:
    """One view for each mode, with a chart for each size of model in each of its rows."""
    shown = []
    for mode in run.modes:
        sizes = list(dict.fromkeys(case.size for case in run.cases if case.mode == mode))
        rows = charts.rows(
            [_speedup(run, mode, size) for size in sizes],
            [_time(run, mode, size) for size in sizes],
            [_memory(run, mode, size) for size in sizes],
        )
        if rows:
            shown.append(View(name=IN_WORDS[mode].capitalize(), rows=rows))
    return tuple(shown)


def _speedup(run: Run, mode: Mode, size: str) -> Plot:
    """flashtile's speed over the naive formula's, and Amdahl's limit."""
    found = [pair for pair in run.pairs if (pair.case.mode, pair.case.size) == (mode, size)]
    pairs = sorted(found, key=lambda pair: pair.case.seqlen)
    seqlens = [pair.case.seqlen for pair in pairs]
    limit = Line(
        label="limit, if attention took no time",
        x=seqlens,
        y=[pair.limit for pair in pairs],
        color_idx=_LIMIT_COLOR,
        is_dashed=True,
    )
    speedup = Line(
        label=peer_title(FLASHTILE),
        x=seqlens,
        y=[pair.speedup for pair in pairs],
        color_idx=plots.COLOR_OF_FLASHTILE,
        weight="strong",
    )
    return Plot(
        heading=f"Speed-up over naive, {size}",
        title=f"{run.source}: speed-up over sequence length, {mode}, {size}",
        lines=[limit, speedup] if pairs else [],
        y=Axis(label="times as fast", starts_at_zero=True),
    )


def _time(run: Run, mode: Mode, size: str) -> Plot:
    return Plot(
        heading=f"Time, {size}",
        title=f"{run.source}: time over sequence length, {mode}, {size}",
        lines=_lines(run, mode, size, lambda row: None if row.timing is None else row.timing.median_ms),
        y=Axis(label="ms", is_log=True, format_tick=lambda ms: f"{ms:,g}"),
    )


def _memory(run: Run, mode: Mode, size: str) -> Plot:
    return Plot(
        heading=f"Peak memory, {size}",
        title=f"{run.source}: peak memory over sequence length, {mode}, {size}",
        lines=_lines(run, mode, size, lambda row: row.peak_bytes),
        y=Axis(label="held at one time", is_log=True, format_tick=in_decimal_bytes),
    )


def _lines(run: Run, mode: Mode, size: str, figure: Callable[[ModelRow], float | None]) -> list[Line]:
    cases = [case for case in run.cases if (case.mode, case.size) == (mode, size)]
    lines = []
    for peer in _PEERS:
        points = [(case.seqlen, figure(run.rows[case, peer])) for case in cases if (case, peer) in run.rows]
        lines.append(charts.line_of(peer, peer_title(peer), points, peers=_PEERS))
    return [line for line in lines if line is not None]

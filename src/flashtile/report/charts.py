"""Line charts in rows: one legend for all of them, and the same colour for the same attention function everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashtile.bench import plots
from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.plots import Axis, Line
from flashtile.report.page import Chart, Key, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A line chart over the sequence length, not yet drawn."""

    heading: str
    title: str
    """Said to screen readers; differs from every other title on the page."""
    lines: Sequence[Line]
    y: Axis


def row(plotted: Sequence[Plot]) -> Row | None:
    """The charts that have a line, side by side; None if none has."""
    shown = [plot for plot in plotted if plot.lines]
    if not shown:
        return None
    return Row(
        charts=tuple(
            Chart(
                heading=plot.heading,
                svg=plots.line_chart(
                    plot.lines,
                    title=plot.title,
                    x=plots.length_axis(seqlen for line in plot.lines for seqlen in line.x),
                    y=plot.y,
                    has_legend=False,
                ),
                caption="",
            )
            for plot in shown
        ),
        legend=_legend([line for plot in shown for line in plot.lines]),
    )


def rows(*plotted: Sequence[Plot]) -> tuple[Row, ...]:
    """A row for each group of charts; a single one if no group has more than one chart."""
    groups = plotted if max(map(len, plotted)) > 1 else [[plot for group in plotted for plot in group]]
    return tuple(found for found in map(row, groups) if found is not None)


def _legend(lines: Sequence[Line]) -> tuple[Key, ...]:
    """Each label once; those that stand out come first."""
    keys = {
        line.label: Key(label=line.label, color=plots.css_color(line.color_idx or 0), is_dashed=line.is_dashed)
        for line in sorted(lines, key=lambda line: line.weight != "strong")
    }
    return tuple(keys.values())


def line_of(peer: str, label: str, points: Sequence[tuple[int, float | None]], *, peers: Sequence[str]) -> Line | None:
    """An attention function's line; None if no point has a value.

    Args:
        peer: whose.
        label: what to call it.
        points: (sequence length, value or None).
        peers: all of the page's section, which decide its colour.
    """
    known = sorted((seqlen, value) for seqlen, value in points if value is not None)
    if not known:
        return None
    color_idx = color_idx_of(peer, peers)
    return Line(
        label=label,
        x=[seqlen for seqlen, _ in known],
        y=[value for _, value in known],
        color_idx=color_idx,
        is_dashed=color_idx >= plots.MAX_SERIES,  # the colours' second round
        weight="strong" if peer == FLASHTILE else "normal",
    )


def color_idx_of(peer: str, peers: Sequence[str]) -> int:
    """A peer's colour among ``peers``; the naive formula's and flashtile's are the same everywhere."""
    fixed = {NAIVE: plots.COLOR_OF_NAIVE, FLASHTILE: plots.COLOR_OF_FLASHTILE}
    return fixed[peer] if peer in fixed else 2 + [other for other in peers if other not in fixed].index(peer)

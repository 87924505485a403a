"""The charts in the section of a run of ``bench io``: bytes over the sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.cases import BenchCase
from flashtile.bench.plots import Axis, Line
from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.summary import peer_title
from flashtile.report import charts
from flashtile.report.charts import Plot
from flashtile.report.page import View
from flashtile.spec.units import in_decimal_bytes

_PEERS = (NAIVE, FLASHTILE)


def views(source: str, results: IoResults) -> tuple[View, ...]:
    """One view for each dtype and head_dim, with a chart for each direction and mask."""
    rows = {(row.case, row.peer): row for row in results.rows}
    cases = list(dict.fromkeys(row.case for row in results.rows))
    shown = []
    for dtype, head_dim in dict.fromkeys((case.dtype, case.head_dim) for case in cases):
        of_view = [case for case in cases if (case.dtype, case.head_dim) == (dtype, head_dim)]
        plotted: dict[str, list[Plot]] = {}
        for direction, mask in dict.fromkeys((case.direction, case.mask_name) for case in of_view):
            of_plot = [case for case in of_view if (case.direction, case.mask_name) == (direction, mask)]
            plotted.setdefault(direction, []).append(
                Plot(
                    heading=f"{direction.capitalize()}, {mask}",
                    title=f"{source}: bytes over sequence length, {direction}, {mask}, {dtype}, head_dim {head_dim}",
                    lines=[line for peer in _PEERS for line in _lines(peer, of_plot, rows)],
                    y=Axis(label="read plus written", is_log=True, format_tick=in_decimal_bytes),
                )
            )
        if rows_of_charts := charts.rows(*plotted.values()):
            shown.append(View(name=f"{dtype.capitalize()}, head_dim {head_dim}", rows=rows_of_charts))
    return tuple(shown)


def _lines(peer: str, cases: Sequence[BenchCase], rows: dict[tuple[BenchCase, str], IoRow]) -> list[Line]:
    """What a peer moves as predicted, and as counted or bounded."""
    found = [(case.seqlen, rows[case, peer]) for case in cases if (case, peer) in rows]
    name = peer_title(peer)
    predicted = charts.line_of(
        peer, f"{name}, predicted", [(seqlen, row.predicted_bytes) for seqlen, row in found], peers=_PEERS
    )
    is_counted = any(row.counted_bytes is not None for _, row in found)
    measured = charts.line_of(
        peer,
        f"{name}, {'counted' if is_counted else 'at most'}",
        [(seqlen, row.counted_bytes if is_counted else row.bound_bytes) for seqlen, row in found],
        peers=_PEERS,
    )
    return [
        *([] if predicted is None else [replace(predicted, is_dashed=True, weight="normal")]),
        *([] if measured is None else [measured]),
    ]

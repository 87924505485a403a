"""The speeds of a kernel run as one picture, for pages that can show pictures but no charts of their own."""

from __future__ import annotations

import html
from collections.abc import Sequence

from flashtile.bench import plots
from flashtile.report.kernels import charts
from flashtile.report.kernels.run import Run
from flashtile.report.page import Chart, Key, View

_CHART = tuple(round(72 * inches) for inches in plots.LINE_CHART_IN)
"""Width and height, in points."""
_MARGIN, _GAP, _TITLE, _HEADING, _LEGEND = 16, 14, 24, 22, 28
_KEY_WIDTH = 122
_STYLE = (
    ":root { color-scheme: light dark; font: 11px system-ui, sans-serif; fill: light-dark(#1f2937, #e5e7eb); } "
    ".page { fill: light-dark(#ffffff, #0d1117); } .title { font-size: 14px; font-weight: 600; }"
)


def picture(run: Run) -> str | None:
    """An SVG document: a row for each direction and mask, a chart for each head_dim; None without several lengths."""
    shown = [view for view in charts.views(run) if view.rows and view.rows[0].legend]
    if not shown:
        return None
    num_columns = max(len(view.rows[0].charts) for view in shown)
    width = 2 * _MARGIN + num_columns * (_CHART[0] + _GAP)
    row_height = _TITLE + _HEADING + _CHART[1] + _MARGIN
    height = 2 * _MARGIN + _LEGEND + len(shown) * row_height
    rows = [_row(view, _MARGIN + _LEGEND + index * row_height) for index, view in enumerate(shown)]
    title = html.escape(f"Speed over the sequence length, from {run.source}")
    environment = run.results.environment
    measured = html.escape(f"{environment.device_name}, {run.results.created_utc}, commit {environment.commit}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title><desc>{measured}</desc><style>{plots.THEME_CSS} {_STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}"/>',
            *_legend(shown[0].rows[0].legend),
            *rows,
            "</svg>\n",
        ]
    )


def _legend(keys: Sequence[Key]) -> list[str]:
    lines = []
    for index, key in enumerate(keys):
        x, dashes = _MARGIN + index * _KEY_WIDTH, ' stroke-dasharray="5 3"' if key.is_dashed else ""
        lines.append(
            f'<path d="M {x} {_MARGIN + 8} h 18" stroke="{key.color}" stroke-width="2.5"{dashes}/>'
            f'<text x="{x + 24}" y="{_MARGIN + 12}">{html.escape(key.label)}</text>'
        )
    return lines


def _row(view: View, top: int) -> str:
    drawn = [
        _placed(chart, _MARGIN + index * (_CHART[0] + _GAP), top + _TITLE)
        for index, chart in enumerate(view.rows[0].charts)
    ]
    return f'<text class="title" x="{_MARGIN}" y="{top + 16}">{html.escape(view.name)}</text>' + "".join(drawn)


def _placed(chart: Chart, x: int, top: int) -> str:
    at = f'<svg x="{x}" y="{top + _HEADING}" width="{_CHART[0]}" height="{_CHART[1]}" '
    heading = f'<text x="{x + 8}" y="{top + 14}">{html.escape(chart.heading)}</text>'
    return heading + chart.svg.replace("<svg ", at, 1)

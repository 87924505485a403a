"""Charts as inline SVG whose colours follow the page's light or dark theme.

Matplotlib draws with placeholder colours, which are then replaced by CSS variables; ``THEME_CSS`` defines those, and a
page that embeds a chart includes it once. The SVG holds no script, no address and no font: its text is the page's.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashtile.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN = 4.2, 2.9
"""Small on purpose: a phone shows a chart at about its natural size, so its text stays readable."""
BAR_HEIGHT_IN, BAR_CHART_MARGIN_IN = 0.38, 0.95

# (placeholder, CSS variable, light, dark); blue and orange first: the pair that every kind of colour vision tells apart
_SERIES = (
    ("#fe0100", "--chart-1", "#c2410c", "#fb923c"),
    ("#fe0200", "--chart-2", "#1d4ed8", "#60a5fa"),
    ("#fe0300", "--chart-3", "#047857", "#34d399"),
    ("#fe0400", "--chart-4", "#7e22ce", "#c084fc"),
    ("#fe0500", "--chart-5", "#a16207", "#d4a72c"),
    ("#fe0600", "--chart-6", "#be185d", "#f472b6"),
)
_INK = ("#fe0700", "--chart-ink", "#374151", "#d1d5db")
_GRID = ("#fe0800", "--chart-grid", "#e5e7eb", "#374151")
_COLORS = (*_SERIES, _INK, _GRID)
MAX_SERIES = len(_SERIES)

_LIGHT, _DARK = (" ".join(f"{variable}: {shades[theme]};" for _, variable, *shades in _COLORS) for theme in range(2))
THEME_CSS = f":root {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
"""The colours; include it once in a page's style sheet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a line chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False
    is_wide: bool = False
    """Wide and pale, so that a line drawn over it leaves it visible."""
    color_idx: int | None = None
    """Which of the ``MAX_SERIES`` colours; None takes them in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """One value for each category of a bar chart, or None where there is none."""

    label: str
    values: Sequence[float | None]
    color_idx: int | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    has_log_x: bool = False,
    has_log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """One chart of several lines.

    Args:
        lines: at most ``MAX_SERIES``; those after the first are drawn over it. On a logarithmic axis, points at or
            below 0 are left out.
        title: said to screen readers; it is not drawn, the page has its own headings.
        x_label, y_label: the axes' names, with units.
        has_log_x, has_log_y: logarithmic axes.
        x_ticks: where to put ticks, if the choice matters (powers of two, say).

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = _figure(HEIGHT_IN)
    for line_idx, line in enumerate(lines):
        axes.plot(
            line.x,
            line.y,
            label=line.label,
            color=_color(line_idx if line.color_idx is None else line.color_idx),
            linestyle="--" if line.is_dashed else "-",
            linewidth=5.0 if line.is_wide else 1.5,
            alpha=0.4 if line.is_wide else 1.0,
            marker="o" if len(line.x) < 20 else "",
            markersize=3.5,
        )
    if has_log_x:
        axes.set_xscale("log")
    if has_log_y:
        axes.set_yscale("log", nonpositive="mask")
    if x_ticks is not None:
        axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
        axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=_GRID[0], linewidth=0.7)
    if len(lines) > 1:
        _legend(axes, num_columns=min(len(lines), 3))
    return _svg(figure, title)


def bar_chart(
    series: Sequence[Bars],
    categories: Sequence[str],
    *,
    title: str,
    x_label: str,
    is_stacked: bool = False,
    format_value: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Horizontal bars, the categories from top to bottom, each bar with its value written beside it.

    Args:
        series: at most ``MAX_SERIES``; the bars of a category stand below each other, or end to end if ``is_stacked``.
            A single series is coloured by category instead.
        categories: names, one for each value of a series.
        title: said to screen readers.
        x_label: what the lengths mean, with the unit.
        is_stacked: put a category's bars end to end, and write their sum.
        format_value: how a value is written.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    rows_per_category = 1 if is_stacked else len(series)
    figure, axes = _figure(BAR_CHART_MARGIN_IN + BAR_HEIGHT_IN * len(categories) * max(1.0, 0.7 * rows_per_category))
    ends = [0.0] * len(categories)
    height = 0.72 / rows_per_category
    for series_idx, bars in enumerate(series):
        for category_idx, value in enumerate(bars.values):
            if value is None:
                continue
            color_idx = category_idx if len(series) == 1 else series_idx
            begin = ends[category_idx] if is_stacked else 0.0
            y = category_idx + (0.0 if is_stacked else height * (series_idx - (len(series) - 1) / 2))
            axes.barh(
                y,
                value,
                left=begin,
                height=height,
                color=_color(color_idx if bars.color_idx is None else bars.color_idx),
                label=bars.label if len(series) > 1 and value is _first_value(bars) else None,
            )
            ends[category_idx] = begin + value
            if not is_stacked:
                _write_value(axes, value, y, format_value)
    if is_stacked:
        for category_idx, end in enumerate(ends):
            _write_value(axes, end, category_idx, format_value)
    axes.set_yticks(range(len(categories)), list(categories))
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel(x_label)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GRID[0], linewidth=0.7)
    if len(series) > 1:
        _legend(axes, num_columns=min(len(series), 3))
    return _svg(figure, title)


def _first_value(bars: Bars) -> float | None:
    return next((value for value in bars.values if value is not None), None)


def _figure(height_in: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "bench") from error
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_INK[0])
    axes.tick_params(which="both", colors=_INK[0], labelsize=9)
    axes.xaxis.label.set_color(_INK[0])
    axes.yaxis.label.set_color(_INK[0])
    return figure, axes


def _color(color_idx: int) -> str:
    return _SERIES[color_idx % MAX_SERIES][0]


def _legend(axes: Axes, *, num_columns: int) -> None:
    axes.figure.legend(
        loc="outside upper left",
        ncols=num_columns,
        frameon=False,
        labelcolor=_INK[0],
        fontsize=9,
        handlelength=1.3,
        handletextpad=0.5,
        columnspacing=1.1,
    )


def _write_value(axes: Axes, value: float, y: float, format_value: Callable[[float], str]) -> None:
    axes.annotate(
        format_value(value),
        (value, y),
        xytext=(4, 0),
        textcoords="offset points",
        verticalalignment="center",
        color=_INK[0],
        fontsize=9,
    )


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element with the theme's colours, and without what an HTML page has no use for."""
    import matplotlib

    buffer = io.StringIO()
    # hashsalt: the names of clip paths and markers must differ between the charts of a page, but not between two runs
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="chart" role="img" \1>', svg, count=1)
    svg = svg.replace(">", f"><title>{html.escape(title)}</title>", 1).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for placeholder, variable, light, _ in _COLORS:
        svg = svg.replace(placeholder, f"var({variable}, {light})")
    return svg

"""Charts as inline SVG whose colours follow the page's light or dark theme.

Matplotlib draws with placeholder colours, which are then replaced by CSS variables; ``THEME_CSS`` defines those, and a
page that embeds a chart includes it once. The SVG holds no script, no address and no font: its text is the page's.
Labels may be any text: it is shown as it is, shortened if it is long.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flashtile.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_CHART_IN = (3.5, 2.5)
"""Width and height. Small on purpose: a phone shows a chart at about its natural size, so its text stays readable."""
BAR_CHART_WIDTH_IN, BAR_HEIGHT_IN, BAR_CHART_MARGIN_IN = 4.2, 0.38, 0.95
MAX_LABEL = 40
"""Characters of a label that are drawn."""

# (placeholder, CSS variable, light, dark); blue and orange first: the pair that every kind of colour vision tells apart
_SERIES = (
    ("#fe0100", "--chart-1", "#c2410c", "#fb923c"),
    ("#fe0200", "--chart-2", "#1d4ed8", "#60a5fa"),
    ("#fe0300", "--chart-3", "#15803d", "#4ade80"),
    ("#fe0400", "--chart-4", "#7e22ce", "#c084fc"),
    ("#fe0500", "--chart-5", "#0891b2", "#22d3ee"),
    ("#fe0600", "--chart-6", "#db2777", "#f472b6"),
)
_INK = ("#fe0700", "--chart-ink", "#374151", "#d1d5db")
_GRID = ("#fe0800", "--chart-grid", "#e5e7eb", "#374151")
_COLORS = (*_SERIES, _INK, _GRID)
MAX_SERIES = len(_SERIES)
COLOR_OF_NAIVE, COLOR_OF_FLASHTILE = 0, 1
"""The same in every chart; what is worse and what is better than a limit has these colours too."""

_SHADES = " ".join(f"{variable}: light-dark({light}, {dark});" for _, variable, light, dark in _COLORS)
THEME_CSS = f":root {{ {_SHADES} }}"
"""The colours; include it once in the style sheet of a page whose ``color-scheme`` is light, dark or both."""

_LINE_STYLES = {"pale": (5.0, 0.4), "normal": (1.5, 1.0), "strong": (2.6, 1.0)}
"""Width and opacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a line chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    is_dashed: bool = False
    weight: Literal["pale", "normal", "strong"] = "normal"
    """Pale is wide too, so that a line drawn over it leaves it visible."""
    color_idx: int | None = None
    """Which of the ``MAX_SERIES`` colours; None takes them in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """How one axis is named and divided."""

    label: str
    """With the unit."""
    is_log: bool = False
    """Points at or below 0 are then left out."""
    starts_at_zero: bool = False
    ticks: Sequence[float] | None = None
    """Where ticks are, if the choice matters (powers of two, say)."""
    format_tick: Callable[[float], str] | None = None
    whole: float | None = None
    """What counts as 100%: a second scale on the far side is in percent of it."""
    whole_label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """One value for each category of a bar chart, or None where there is none."""

    label: str
    values: Sequence[float | None]
    color_idx: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """One row of a ratio chart: many ratios, all above 0, and their mean."""

    label: str
    values: Sequence[float]
    mean: float


def length_axis(seqlens: Iterable[float]) -> Axis:
    """Of sequence lengths, which are powers of two more often than not: ``512``, ``1k``, ``16k``."""

    def written(tokens: float) -> str:
        return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 256 == 0 else f"{tokens:g}"

    return Axis(label="tokens in a sequence", is_log=True, ticks=sorted(set(seqlens)), format_tick=written)


def line_chart(lines: Sequence[Line], *, title: str, x: Axis, y: Axis, has_legend: bool = True) -> str:
    """One chart of several lines.

    Args:
        lines: those after the first are drawn over it.
        title: said to screen readers; it is not drawn, the page has its own headings. Titles of one page must differ.
        x, y: the axes.
        has_legend: False where the page has one beside the chart.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = _figure(*LINE_CHART_IN)
    for line_idx, line in enumerate(lines):
        width, opacity = _LINE_STYLES[line.weight]
        axes.plot(
            line.x,
            line.y,
            label=_drawable(line.label),
            color=_color(line_idx if line.color_idx is None else line.color_idx),
            linestyle="--" if line.is_dashed else "-",
            linewidth=width,
            alpha=opacity,
            marker="o" if len(line.x) < 20 else "",
            markersize=3.5,
        )
    _set_scale(axes, "x", x)
    _set_scale(axes, "y", y)
    axes.grid(color=_GRID[0], linewidth=0.7)
    if has_legend and len(lines) > 1:
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
        title: said to screen readers. Titles of one page must differ.
        x_label: what the lengths mean, with the unit.
        is_stacked: put a category's bars end to end, and write their sum.
        format_value: how a value is written.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    rows_per_category = 1 if is_stacked else len(series)
    bars_height = BAR_HEIGHT_IN * len(categories) * max(1.0, 0.7 * rows_per_category)
    figure, axes = _figure(BAR_CHART_WIDTH_IN, BAR_CHART_MARGIN_IN + bars_height)
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
                label=_drawable(bars.label) if len(series) > 1 and value is _first_value(bars) else None,
            )
            ends[category_idx] = begin + value
            if not is_stacked:
                _write_value(axes, value, y, format_value)
    if is_stacked:
        for category_idx, end in enumerate(ends):
            _write_value(axes, end, category_idx, format_value)
    _name_rows(axes, categories)
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel(_drawable(x_label))
    axes.grid(axis="x", color=_GRID[0], linewidth=0.7)
    if len(series) > 1:
        _legend(axes, num_columns=min(len(series), 3))
    return _svg(figure, title)


def ratio_chart(rows: Sequence[Ratios], *, title: str, x_label: str) -> str:
    """Ratios as dots on a logarithmic axis, those below 1 in another colour, with a bar at each row's mean.

    Args:
        rows: from top to bottom; each has a ratio at least.
        title: said to screen readers. Titles of one page must differ.
        x_label: what is compared.

    Returns:
        An ``<svg>`` element.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = _figure(BAR_CHART_WIDTH_IN, BAR_CHART_MARGIN_IN + BAR_HEIGHT_IN * len(rows))
    axes.axvline(1.0, color=_INK[0], linewidth=1.2)
    for row_idx, row in enumerate(rows):
        for color_idx, values in (
            (COLOR_OF_NAIVE, [value for value in row.values if value < 1]),
            (COLOR_OF_FLASHTILE, [value for value in row.values if value >= 1]),
        ):
            heights = [row_idx + (idx % 3 - 1) * 0.13 for idx in range(len(values))]  # so that equal ratios show
            axes.plot(values, heights, "o", color=_color(color_idx), alpha=0.6, markersize=4.5, markeredgewidth=0)
        axes.plot([row.mean] * 2, [row_idx - 0.32, row_idx + 0.32], color=_INK[0], linewidth=2.2)
        axes.annotate(
            f"{row.mean:.2f}x",
            (1.02, row_idx),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            color=_INK[0],
            fontsize=9,
        )
    _name_rows(axes, [row.label for row in rows])
    ratios = [1.0, *(value for row in rows for value in row.values)]
    ticks = _powers_of_two(min(ratios), max(ratios))
    _set_scale(axes, "x", Axis(label=x_label, is_log=True, ticks=ticks, format_tick="{:g}x".format))
    axes.grid(axis="x", color=_GRID[0], linewidth=0.7)
    return _svg(figure, title)


def _powers_of_two(low: float, high: float) -> list[float]:
    """Those between, eight at most, 1 among them if it lies between."""
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    step = max(1, math.ceil((last - first) / 7))
    return [2.0**power for power in range(first, last + 1) if power % step == 0]


def _first_value(bars: Bars) -> float | None:
    return next((value for value in bars.values if value is not None), None)


# --- parts of a figure ------------------------------------------------------------------------------------------------


def _figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    require("matplotlib", extra="bench")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
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


def _set_scale(axes: Axes, name: Literal["x", "y"], wanted: Axis) -> None:
    from matplotlib.ticker import LogLocator

    axis = axes.xaxis if name == "x" else axes.yaxis
    if wanted.is_log:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log", nonpositive="mask")
        low, high = axis.get_data_interval()
        if low > 0 and high < 100 * low:  # powers of ten alone would leave one tick or none
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    if wanted.ticks is not None:
        axis.set_ticks(list(wanted.ticks))
        axis.set_ticks([], minor=True)
    if wanted.format_tick is not None:
        written = wanted.format_tick
        axis.set_major_formatter(lambda value, _position: written(value))
        axis.set_minor_formatter("")
    if wanted.starts_at_zero:
        axes.set(**{f"{name}lim": (0, None)})
    axis.set_label_text(_drawable(wanted.label))
    if wanted.whole is not None:
        whole = wanted.whole
        there_and_back = (lambda value: value / whole * 100, lambda percent: percent * whole / 100)
        scale = (axes.secondary_xaxis if name == "x" else axes.secondary_yaxis)(1.0, functions=there_and_back)
        scale.tick_params(which="both", colors=_INK[0], labelsize=9)
        scale.set(**{f"{name}label": _drawable(wanted.whole_label)})
        (scale.xaxis if name == "x" else scale.yaxis).label.set_color(_INK[0])
        scale.spines[:].set_color(_GRID[0])


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of horizontal rows, from top to bottom."""
    axes.set_yticks(range(len(names)), [_drawable(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _color(color_idx: int) -> str:
    return _SERIES[color_idx % MAX_SERIES][0]


def css_color(color_idx: int) -> str:
    """A line's or bar's colour as CSS has it."""
    return f"var({_SERIES[color_idx % MAX_SERIES][1]})"


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


def _drawable(label: str) -> str:
    """The label on one line, of bounded length, and with nothing in it that matplotlib gives a meaning to."""
    text = "".join(char if char.isprintable() else "?" for char in " ".join(label.split()))
    text = text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"
    text = text.replace("$", r"\$")  # between two bare ones it would set mathematics
    # A legend leaves out what is empty and what starts with an underscore.
    return "\N{ZERO WIDTH SPACE}" + text if not text or text.startswith("_") else text


# --- from the figure to the page --------------------------------------------------------------------------------------


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element with the theme's colours, and without what an HTML page has no use for."""
    import matplotlib

    buffer = io.StringIO()
    # The names of clip paths and markers must differ between the charts of a page, but not between two runs.
    salt = title.encode("utf-8", errors="replace").decode()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has its own fonts
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
    svg = re.sub(r"<[^<>]+>", lambda tag: _themed(tag[0]), svg)  # tags alone: a label may hold any of these words
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg class="chart" role="img" \1>', svg, count=1)
    return svg.replace(">", f"><title>{html.escape(title)}</title>", 1)


def _themed(tag: str) -> str:
    """A tag with the theme's colours and the page's font, and without what only matplotlib needs."""
    tag = re.sub(r'<g id="[^"]*"', "<g", tag).replace("xlink:href", "href")
    tag = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)  # of a point, which is 1/72 in
    for placeholder, variable, light, _ in _COLORS:
        tag = tag.replace(placeholder, f"var({variable}, {light})")
    return tag

"""Charts: their labels as they are, their colours from the page, nothing in them that is not a drawing."""

from __future__ import annotations

import re

import pytest
from reading import HOSTILE, Reader, assert_safe

from flashtile.bench import plots
from flashtile.bench.plots import Axis, Bars, Line, Ratios


def without_variables(svg: str) -> str:
    return re.sub(r"var\([^)]*\)", "", svg)


@pytest.mark.parametrize("has_log_y", [False, True])
def test_line_charts_have_their_labels_and_no_fixed_colour(has_log_y: bool) -> None:
    svg = plots.line_chart(
        [
            Line(label="a <b>", x=[1, 2, 4], y=[0.0, 1.0, 2.0], weight="pale"),
            Line(label="other", x=[1, 2, 4], y=[3.0, 1.0, 0.5], is_dashed=True),
        ],
        title="title & <more>",
        x=plots.length_axis([1, 2, 4]),
        y=Axis(label="time", is_log=has_log_y, whole=4.0, whole_label="% of four"),
    )
    reader = Reader(svg)
    for label in ("a <b>", "other", "title & <more>", "tokens in a sequence", "time", "4", "% of four"):
        assert label in reader.text
    assert not re.search(r"#[0-9a-f]{6}", without_variables(svg)), "all colours are the theme's"


def test_lengths_are_written_short() -> None:
    axis = plots.length_axis([16384, 128, 1536, 1000, 128])
    assert axis.ticks is not None and list(axis.ticks) == [128, 1000, 1536, 16384] and axis.format_tick is not None
    assert [axis.format_tick(tick) for tick in axis.ticks] == ["128", "1000", "1.5k", "16k"]


def test_a_short_logarithmic_axis_has_more_than_one_tick() -> None:
    line = Line(label="x", x=[1024, 4096], y=[3e7, 1.2e8])
    svg = plots.line_chart(
        [line], title="t", x=plots.length_axis(line.x), y=Axis(label="m", is_log=True, format_tick="{:g} B".format)
    )
    assert len(re.findall(r"[\d.e+]+ B", Reader(svg).text)) >= 2


def test_what_a_logarithmic_axis_cannot_show_leaves_a_gap() -> None:
    lines = [Line(label="x", x=[1, 2, 3, 4, 5], y=[1.0, 2.0, 0.0, 2.0, 3.0])]
    axis = Axis(label="x")
    linear, log = (
        plots.line_chart(lines, title="t", x=axis, y=Axis(label="y", is_log=is_log)) for is_log in (False, True)
    )
    color = re.escape(plots.css_color(0)[: -len(")")])
    drawn = [
        re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: {color}', svg)
        for svg in (linear, log)
    ]
    assert [path.count("M") for (path,) in drawn] == [1, 2]


def test_a_legend_can_be_the_page_s() -> None:
    lines = [Line(label="one", x=[1, 2], y=[1.0, 2.0]), Line(label="two", x=[1, 2], y=[2.0, 1.0])]
    shown, hidden = (
        Reader(plots.line_chart(lines, title="t", x=Axis(label="x"), y=Axis(label="y"), has_legend=has_legend)).text
        for has_legend in (True, False)
    )
    assert "one" in shown and "two" in shown
    assert "one" not in hidden and "two" not in hidden


@pytest.mark.parametrize("is_stacked", [False, True])
def test_bar_charts_write_their_values(is_stacked: bool) -> None:
    svg = plots.bar_chart(
        [Bars(label="forward", values=[1.5, 2.0]), Bars(label="backward", values=[3.25, None])],
        ["one", "two"],
        title="times",
        x_label="ms",
        is_stacked=is_stacked,
        format_value="{:.2f} ms".format,
    )
    text = Reader(svg).text
    expected = {"4.75 ms", "2.00 ms"} if is_stacked else {"1.50 ms", "2.00 ms", "3.25 ms"}
    assert set(re.findall(r"\d\.\d\d ms", text)) == expected
    assert all(label in text for label in ("forward", "backward", "one", "two"))
    assert not re.search(r"#[0-9a-f]{6}", without_variables(svg))


def test_ratio_charts_part_what_is_below_one_from_what_is_not() -> None:
    rows = [Ratios(label="slow", values=[0.5, 0.9], mean=0.67), Ratios(label="fast", values=[2.0, 1.0, 30.0], mean=3.9)]
    svg = plots.ratio_chart(rows, title="ratios", x_label="speed")
    text = Reader(svg).text
    assert all(expected in text for expected in ("slow", "fast", "0.67x", "3.90x", "0.5x", "1x", "16x", "speed"))
    behind, ahead = (plots.css_color(idx)[len("var(") : -1] for idx in (plots.COLOR_OF_NAIVE, plots.COLOR_OF_FLASHTILE))
    dots = re.findall(r'<use href="#[^"]*" x="[^"]*" y="[^"]*" style="fill: var\((--chart-\d)', svg)
    assert dots.count(behind) == 2 and dots.count(ahead) == 3


@pytest.mark.parametrize(("low", "high", "ticks"), [(0.9, 2.5, [1, 2]), (1, 1, [1]), (0.3, 3000, None)])
def test_ratio_axes_have_few_ticks_and_one_among_them(low: float, high: float, ticks: list[float] | None) -> None:
    found = plots._powers_of_two(low, high)
    assert 1 in found and len(found) <= 8 and low <= found[0] and found[-1] <= high
    assert ticks is None or found == ticks


@pytest.mark.parametrize("label", [*HOSTILE, "long " * 100, "", "two\nlines"])
def test_any_label_is_drawn_as_it_is(label: str, recwarn: pytest.WarningsRecorder) -> None:
    lines = [Line(label=label, x=[1, 2], y=[1.0, 2.0]), Line(label="other", x=[1, 2], y=[2.0, 1.0])]
    charts = (
        plots.line_chart(lines, title=label, x=Axis(label=label), y=Axis(label=label)),
        plots.bar_chart([Bars(label=label, values=[1.0])] * 2, [label], title=f"b{label}", x_label=label),
        plots.ratio_chart([Ratios(label=label, values=[0.5], mean=0.5)], title=f"r{label}", x_label=label),
    )
    for svg in charts:
        text = assert_safe(f"<section>{svg}</section>", num_scripts=0).text
        drawn = "".join(char if char.isprintable() else "?" for char in " ".join(label.split()))[: plots.MAX_LABEL - 1]
        assert " ".join(drawn.split()) in " ".join(text.split())
    assert not recwarn.list


def test_charts_are_repeatable() -> None:
    first, second = (
        plots.bar_chart([Bars(label="x", values=[1.0])], ["one"], title="t", x_label="ms") for _ in range(2)
    )
    assert first == second

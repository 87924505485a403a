"""The demo's report: safe with any text, whole without a network, honest about what is missing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from flashtile.backends.base import Plan
from flashtile.bench import plots
from flashtile.bench.plots import Bars, Line
from flashtile.bench.transformer import ModelShape
from flashtile.demo import page, summary, training
from flashtile.demo.corpus import Corpus
from flashtile.demo.results import Comparison, RunResult, Sample, StepRecord
from flashtile.demo.training import TrainingSettings

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 7 * 7 }} & \"quoted\""
SETTINGS = TrainingSettings(
    device=torch.device("cpu"),
    steps=3,
    batch=2,
    seqlen=1000,
    shape=ModelShape(layers=3, d_model=32, heads=2),
    seed=0,
    sample_bytes=8,
)
VOID_ELEMENTS = {"meta", "br", "img", "link", "input", "hr"}


def run_result(name: str, speed: float, losses: tuple[float, ...] = (5.5, 4.0, 3.0)) -> RunResult:
    return RunResult(
        name=name,
        tokens_per_step=2000,
        steps=tuple(
            StepRecord(
                loss=loss, seconds=0.4 / speed, attention_forward_s=0.1 / speed, attention_backward_s=0.2 / speed
            )
            for loss in losses
        ),
        peak_bytes=int(80e6 / speed),
        validation_loss=3.25,
        failure=None,
    )


COMPARISON = Comparison(
    naive=run_result("naive", 1.0),
    flashtile=run_result("flashtile", 4.0, (5.5, 4.0001, 3.0003)),
    sample=Sample(prompt=HOSTILE, continuation=HOSTILE, temperature=0.7),
    was_interrupted=False,
)


def render(comparison: Comparison = COMPARISON, source: str = "a test", plan: Plan | None = None) -> str:
    nothing = torch.zeros(10, dtype=torch.uint8)
    text = Corpus(source=source, num_files=1, is_cut=False, train=nothing, validation=nothing)
    return page.render(comparison, SETTINGS, text, plan or training.plan_of(SETTINGS))


class Reader(HTMLParser):
    """Collects tags, attributes and visible text, and insists that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID_ELEMENTS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    comparison = replace(COMPARISON, naive=replace(COMPARISON.naive, failure=HOSTILE))
    reader = Reader(render(comparison, source=HOSTILE))
    assert reader.tags["script"] == reader.tags["img"] == 0
    assert reader.text.count(HOSTILE) == 4, "prompt, continuation, source of the text, failure"
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_the_page_needs_no_network() -> None:
    html = render()
    assert "://" not in html
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    reader = Reader(html)
    assert not {"link", "iframe", "object", "base"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "xlink:href")]
    assert links
    assert all(link.startswith("#") for link in links), "only markers inside the charts"


def test_the_page_has_every_chart_number_and_setting() -> None:
    reader = Reader(render())
    assert reader.tags["svg"] == 5
    for expected in (
        "4.0x faster",
        "4.0x less",
        "80 MB",
        "20 MB",
        "0.0003",
        "at step 3 of 3",
        "75%",  # attention's share of the naive step
        "4.0x faster, and no more",
        "2 x 2 x 1000 x 1000 = 4,000,000",
        "16 MB",  # of float32 scores in each layer,
        "48 MB",  # in all three,
        "64 MB",  # at twice the length
        "16 kB",  # of lse
        torch.__version__,
        "3 layers, width 32, 2 heads",
    ):
        assert expected in reader.text, expected


def test_the_page_follows_the_theme_and_the_width() -> None:
    html = render()
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width' in html
    assert set(re.findall(r"var\((--[\w-]+)", html)) <= set(re.findall(r"(--[\w-]+):", html)), "all colours are defined"


def test_ids_are_unique() -> None:
    ids = Counter(value for name, value in Reader(render()).attributes if name == "id")
    assert ids
    assert max(ids.values()) == 1


def test_a_failed_run_is_reported_beside_the_other() -> None:
    naive = replace(
        COMPARISON.naive, steps=(), peak_bytes=None, validation_loss=None, failure="out of memory: 1 TB wanted"
    )
    comparison = replace(COMPARISON, naive=naive)
    reader = Reader(render(comparison))
    assert "The naive run stopped: out of memory: 1 TB wanted" in reader.text
    assert "80 MB" not in reader.text
    assert "20 MB" in reader.text
    assert "no more" not in reader.text, "no share of a step that was not timed"
    assert [row.naive for row in summary.table(comparison)] == [summary.NOTHING] * 8
    assert summary.headlines(comparison) == []


def test_an_interrupted_run_says_how_far_it_came() -> None:
    flashtile = replace(COMPARISON.flashtile, steps=COMPARISON.flashtile.steps[:2])
    comparison = replace(COMPARISON, flashtile=flashtile, sample=None, was_interrupted=True)
    reader = Reader(render(comparison))
    assert "Interrupted after 2 of 3 steps" in reader.text
    assert "What the model writes" not in reader.text


def test_a_slower_flashtile_is_called_slower() -> None:
    comparison = replace(COMPARISON, flashtile=run_result("flashtile", 0.5))
    verdicts = {row.label: row.verdict for row in summary.table(comparison)}
    assert verdicts["tokens per second"] == verdicts["time per step"] == "2.0x slower"
    assert verdicts["peak memory of a step"] == "2.0x more"
    equal = replace(COMPARISON, flashtile=run_result("flashtile", 1.01))
    assert {row.verdict for row in summary.table(equal)} == {"about equal", ""}


def test_a_plan_that_is_the_formula_itself_promises_nothing() -> None:
    plan = replace(training.plan_of(SETTINGS), backend="naive", rejected=(("cpu", ("runs on CPU tensors only",)),))
    text = Reader(render(plan=plan)).text
    assert "Expect no gain" in text
    assert "cpu: runs on CPU tensors only" in text
    assert "streams the scores" not in text
    text = Reader(render()).text
    assert "Expect no gain" not in text
    assert "streams the scores" in text


def test_losses_that_rounding_cannot_explain_are_called_a_bug() -> None:
    comparison = replace(COMPARISON, flashtile=run_result("flashtile", 4.0, (5.5, 4.0, 3.02)))
    text = Reader(render(comparison)).text
    assert "do not agree: they differ by 0 at the first step and by 0.02 at most" in text
    assert "Why it is not zero" not in text
    at_once = replace(COMPARISON, flashtile=run_result("flashtile", 4.0, (5.501, 4.0, 3.0)))
    assert "by 0.001 at the first step" in Reader(render(at_once)).text
    assert summary.notes(COMPARISON, SETTINGS) == []


def test_equal_losses_are_called_equal() -> None:
    comparison = replace(COMPARISON, flashtile=run_result("flashtile", 4.0))
    reader = Reader(render(comparison))
    assert "equal to the last digit in every step" in reader.text
    assert reader.tags["svg"] == 4, "no logarithm of nothing but zeros"


@pytest.mark.parametrize("has_log_y", [False, True])
def test_line_charts_have_their_labels_and_no_fixed_colour(has_log_y: bool) -> None:
    svg = plots.line_chart(
        [
            Line(label="a <b>", x=[1, 2, 4], y=[0.0, 1.0, 2.0], is_wide=True),
            Line(label="other", x=[1, 2, 4], y=[3.0, 1.0, 0.5], is_dashed=True),
        ],
        title="title & <more>",
        x_label="length",
        y_label="time",
        has_log_x=True,
        has_log_y=has_log_y,
        x_ticks=[1, 2, 4],
    )
    reader = Reader(svg)
    for label in ("a <b>", "other", "title & <more>", "length", "time", "4"):
        assert label in reader.text
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", svg)), "all colours are the theme's"


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
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", svg))


def test_charts_are_repeatable() -> None:
    first, second = (
        plots.bar_chart([Bars(label="x", values=[1.0])], ["one"], title="t", x_label="ms") for _ in range(2)
    )
    assert first == second

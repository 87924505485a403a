"""The report as a person has it: tables that sort, views, both themes, phone and laptop, hostile results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import measured
import pytest
from browsing import WIDTHS, too_wide
from reading import HOSTILE_TEXTS
from test_demo_page import render as render_demo
from test_report import with_every_text

from flashtile.bench import documents
from flashtile.report import command, explanation, page
from flashtile.report.kernels import section as kernels
from flashtile.report.models import section as models
from flashtile.report.traffic import section as traffic

if TYPE_CHECKING:
    from conftest import OpenPage
    from playwright.sync_api import Locator, Page


@pytest.fixture(scope="module")
def html() -> str:
    sections = (
        kernels.section("kernels.json", "run-1", measured.kernels()),
        models.section("models.json", "run-2", measured.models()),
        traffic.section("io.json", "run-3", measured.io()),
    )
    return page.render("report/report.html", sections=sections, explanation="")


@pytest.fixture(scope="module")
def demo() -> str:
    return render_demo()


def every_case(opened: Page) -> Locator:
    """The table of the kernel run that has a row for each case."""
    return opened.locator("#run-1 table.sortable").first


def heading(table: Locator, words: str) -> Locator:
    return table.locator("th").filter(has_text=words)


def column(table: Locator, words: str) -> list[str]:
    return table.evaluate(
        """(table, words) => {
          const idx = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === words);
          return [...table.tBodies[0].rows].map((row) => row.cells[idx].textContent);
        }""",
        words,
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_page(html: str, width: int, dark: bool, open_page: OpenPage) -> None:
    opened = open_page(html, width=width, dark=dark)
    opened.evaluate("() => document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert too_wide(opened) == []
    for button in opened.locator(".choices button").all():
        button.click()
    assert too_wide(opened) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_the_demo_has_the_same_page(width: int, demo: str, open_page: OpenPage) -> None:
    opened = open_page(demo, width=width)
    assert too_wide(opened) == []
    before = background(opened)
    opened.locator("#theme").click()
    assert background(opened) != before


# --- tables -----------------------------------------------------------------------------------------------------------


def test_figures_sort_by_their_value_in_both_directions(html: str, open_page: OpenPage) -> None:
    table = every_case(open_page(html))
    before = column(table, "tokens")
    assert before == ["1,024", "4,096"] * 4 + ["1,024"]
    tokens = heading(table, "tokens")
    assert tokens.get_attribute("aria-sort") == "none"
    tokens.locator("button").click()
    assert column(table, "tokens") == ["1,024"] * 5 + ["4,096"] * 4, "as numbers: as text 1,024 and 4,096 agree"
    assert tokens.get_attribute("aria-sort") == "ascending"
    tokens.locator("button").click()
    assert column(table, "tokens") == ["4,096"] * 4 + ["1,024"] * 5
    assert tokens.get_attribute("aria-sort") == "descending"

    speed = heading(table, "TFLOP/s")
    speed.locator("button").click()
    found = [float(text) for text in column(table, "TFLOP/s")]
    assert found == sorted(found) and len(set(found)) > 2
    assert tokens.get_attribute("aria-sort") == "none", "one column at a time"
    memory = heading(open_page(html).locator("#run-1 table.sortable").nth(1), "memory")
    assert memory.get_attribute("aria-sort") == "none", "and one table at a time"


def test_figures_of_other_lengths_sort_as_numbers(open_page: OpenPage) -> None:
    """As text ``10.0 MB`` would come before ``9.70 MB``, and ``1.08 GB`` before both."""
    cells = [
        page.Cell(text=text, value=value) for text, value in (("9.7 MB", 9.7e6), ("1.08 GB", 1.08e9), ("10 MB", 1e7))
    ]
    rows = tuple((cell, page.Cell(text=cell.text)) for cell in (*cells, page.Cell(text="out of memory")))
    columns = (page.Column(heading="memory"), page.Column(heading="words", holds="words"))
    part = page.Part(heading="a table", tables=(page.Table(caption="c", columns=columns, rows=rows),))
    section = page.Section(
        anchor="a", title="t", origin="o", summary="s", lead="l", warnings=(), headlines=(), parts=(part,), facts={}
    )
    opened = open_page(page.render("report/report.html", sections=[section], explanation=""))
    table = opened.locator("table.sortable")
    heading(table, "memory").locator("button").click()
    assert column(table, "memory") == ["9.7 MB", "10 MB", "1.08 GB", "out of memory"]
    heading(table, "memory").locator("button").click()
    assert column(table, "memory") == ["1.08 GB", "10 MB", "9.7 MB", "out of memory"], "what has no figure stays last"
    heading(table, "words").locator("button").click()
    assert column(table, "words") == ["1.08 GB", "9.7 MB", "10 MB", "out of memory"]
    heading(table, "words").locator("button").click()
    assert column(table, "words") == ["out of memory", "10 MB", "9.7 MB", "1.08 GB"]


def test_words_sort_and_equal_ones_keep_their_order(html: str, open_page: OpenPage) -> None:
    table = every_case(open_page(html))
    heading(table, "mask").locator("button").click()
    assert column(table, "mask") == ["causal"] * 5 + ["full"] * 4
    assert column(table, "tokens") == ["1,024", "4,096", "1,024", "4,096", "1,024", "1,024", "4,096", "1,024", "4,096"]


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts_too(key: str, html: str, open_page: OpenPage) -> None:
    opened = open_page(html)
    table = every_case(opened)
    heading(table, "head").first.locator("button").focus()
    opened.keyboard.press("Tab")
    assert opened.evaluate("() => document.activeElement.textContent") == "TFLOP/s"
    opened.keyboard.press(key)
    found = [float(text) for text in column(table, "TFLOP/s")]
    assert found == sorted(found)
    assert opened.evaluate("() => document.activeElement.textContent") == "TFLOP/s", "the focus stays"


# --- views ------------------------------------------------------------------------------------------------------------


def test_one_view_is_shown_at_a_time_and_all_of_them_in_print(html: str, open_page: OpenPage) -> None:
    opened = open_page(html)
    views, choices = (opened.locator(f"#run-1 {selector}") for selector in (".view", ".choices button"))
    assert choices.all_text_contents() == ["Forward, causal", "Forward, full", "Backward, causal", "Backward, full"]
    assert [view.is_visible() for view in views.all()] == [True, False, False, False]
    choices.nth(2).click()
    assert [view.is_visible() for view in views.all()] == [False, False, True, False]
    pressed = [choice.get_attribute("aria-pressed") for choice in choices.all()]
    assert pressed == ["false", "false", "true", "false"]
    opened.emulate_media(media="print")
    assert all(view.is_visible() for view in views.all())


# --- themes -----------------------------------------------------------------------------------------------------------


def background(opened: Page) -> str:
    return opened.evaluate("() => getComputedStyle(document.body).backgroundColor")


LIGHT, DARK = "rgb(255, 255, 255)", "rgb(18, 21, 28)"


@pytest.mark.parametrize("dark", [False, True])
def test_the_theme_is_the_system_s_until_somebody_chooses(html: str, dark: bool, open_page: OpenPage) -> None:
    opened = open_page(html, dark=dark)
    systems, other = (DARK, LIGHT) if dark else (LIGHT, DARK)
    button = opened.locator("#theme")
    assert background(opened) == systems and button.text_content() == ("Light" if dark else "Dark")
    line = opened.locator("svg.chart path[style*=stroke]").first
    drawn = line.evaluate("(path) => getComputedStyle(path).stroke")
    opened.emulate_media(color_scheme="light" if dark else "dark")
    assert background(opened) == other, "it follows the system"
    opened.emulate_media(color_scheme="dark" if dark else "light")
    button.click()
    assert background(opened) == other and button.text_content() == ("Dark" if dark else "Light")
    assert line.evaluate("(path) => getComputedStyle(path).stroke") != drawn, "charts too"
    opened.emulate_media(color_scheme="light" if dark else "dark")
    opened.emulate_media(color_scheme="dark" if dark else "light")
    assert background(opened) == other, "a choice stays, whatever the system does"
    button.click()
    assert background(opened) == systems


# --- safety -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=["markup", "characters"])
def test_hostile_results_run_nothing(
    text: str, open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``open_page`` fails if anything is logged or asked for, a missing image included."""
    monkeypatch.setattr(explanation, "html", str)
    paths = []
    for make in (measured.kernels, measured.models, measured.io):
        paths.append(tmp_path / f"{make.__name__}.json")
        documents.save(paths[-1], with_every_text(make(), text))
    opened = open_page(command.document(paths).encode("utf-8", errors="replace").decode())
    assert opened.locator("main img, main iframe, [onerror], [onmouseover]").count() == 0
    assert opened.locator("section.run").count() == 3
    opened.locator("table.sortable th button").first.click()
    assert too_wide(opened) == []

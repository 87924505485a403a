"""The tile walk as a person has it: buttons, keys, the end result, both themes, phone and laptop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from browsing import WIDTHS, page_around, too_wide

from flashtile.report import explanation, walk

if TYPE_CHECKING:
    from conftest import OpenPage
    from playwright.sync_api import Page

STATE = """() => {
  const text = (selector) => [...document.querySelectorAll(selector)].map((found) => found.textContent);
  const counter = (name) => Number(document.querySelector(`[data-show=${name}]`).textContent);
  return {
    position: Number(document.querySelector("#walk").dataset.position),
    out: text("#walk .outs .out"), exact: text("#walk .outs .exact"),
    errors: text("#walk .error td > span:first-child"),
    title: text("#walk .walk-caption strong")[0], final: text("#walk .row-out").filter((sign) => sign === "✓").length,
    now: document.querySelectorAll("#walk .walk-grid .tile-now").length,
    skipped: document.querySelectorAll("#walk .walk-grid .tile-skipped").length,
    kept: counter("kept"), naive: counter("naive"), computed: counter("computed"),
    playing: document.querySelector("[data-do=play]").textContent === "Pause",
  };
}"""


@pytest.fixture(scope="module")
def document() -> str:
    return page_around(explanation.html())


def state(page: Page) -> Any:
    return page.evaluate(STATE)


def press(page: Page, name: str, times: int = 1) -> Any:
    for _ in range(times):  # at once; one test has the mouse, which takes ten times as long
        page.eval_on_selector(f"#walk [data-do={name}]", "button => button.click()")
    return state(page)


def number(text: str) -> float:
    return float(text.replace("−", "-"))


@pytest.mark.parametrize("mask", walk.MASKS)
def test_it_steps_to_the_exact_result(mask: str, document: str, open_page: OpenPage) -> None:
    page = open_page(document)
    if mask == "causal":
        page.check("#walk input[type=checkbox]")
    steps = walk.take(mask).steps
    assert state(page)["position"] == 0
    for position, step in enumerate(steps, start=1):
        now = press(page, "next")
        assert now["position"] == position and now["now"] == step.s.numel()
        shown = [number(text) for text in now["out"]]
        assert shown == pytest.approx(step.after.out.T.flatten().tolist(), abs=6e-5)
        is_last_of_rows = position == len(steps) or steps[position].q_tile_idx != step.q_tile_idx
        if is_last_of_rows:
            assert all(number(text) < 1e-6 for text in now["errors"])
            assert shown == pytest.approx([number(text) for text in now["exact"]], abs=1.1e-4)
        else:
            assert max(number(text) for text in now["errors"]) > 1e-3
    now = press(page, "next")
    assert now["position"] == len(steps), "there is nothing behind the last tile"
    assert now["final"] == walk.SEQLEN
    assert (now["naive"], now["kept"], now["computed"]) == (144, walk.take(mask).numbers_kept, 12 * len(steps))
    assert now["skipped"] == 12 * (12 - len(steps))


def test_back_and_reset_undo(document: str, open_page: OpenPage) -> None:
    page = open_page(document)
    before = [state(page), *(press(page, "next") for _ in range(5))]
    for expected in reversed(before[:-1]):
        assert press(page, "back") == expected
    assert press(page, "back") == before[0], "there is nothing before the first tile"
    press(page, "next", times=3)
    assert press(page, "reset") == before[0]


def test_buttons_can_be_reached_with_the_mouse(document: str, open_page: OpenPage) -> None:
    page = open_page(document, width=WIDTHS[0])
    for name, position in (("next", 1), ("next", 2), ("back", 1), ("reset", 0), ("play", 1)):
        page.click(f"#walk [data-do={name}]")
        assert state(page)["position"] == position


def test_the_mask_begins_a_walk_of_its_own(document: str, open_page: OpenPage) -> None:
    page = open_page(document)
    press(page, "next", times=2)
    page.check("#walk input[type=checkbox]")
    assert state(page)["position"] == 0 and state(page)["skipped"] == 36
    page.uncheck("#walk input[type=checkbox]")
    assert state(page)["skipped"] == 0


def test_play_walks_to_the_end_and_pauses(document: str, open_page: OpenPage) -> None:
    page = open_page(document)
    page.clock.install(time=0)
    page.clock.pause_at(1)
    now = press(page, "play")
    assert now["position"] == 1 and now["playing"]
    assert page.get_attribute("#walk .walk-caption", "aria-live") == "off"
    page.clock.run_for(4000)
    assert state(page)["position"] == 3
    assert not press(page, "play")["playing"]
    page.clock.run_for(10_000)
    assert state(page)["position"] == 3
    press(page, "play")
    page.clock.run_for(60_000)
    now = state(page)
    assert now["position"] == len(walk.take("full").steps) and not now["playing"]
    assert page.get_attribute("#walk .walk-caption", "aria-live") == "polite"
    assert press(page, "play")["position"] == 1, "once more from the beginning"


def test_it_works_with_the_keyboard_alone(document: str, open_page: OpenPage) -> None:
    page = open_page(document)
    page.focus("#walk [data-do=next]")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert state(page)["position"] == 2
    for key, position in (("ArrowRight", 3), ("ArrowLeft", 2), ("End", 12), ("Home", 0)):
        page.keyboard.press(key)
        assert state(page)["position"] == position
    page.focus("#walk .walk-range")
    page.keyboard.press("ArrowRight")
    assert state(page)["position"] == 1
    assert "Tile 1 of 12" in (page.get_attribute("#walk .walk-range", "aria-valuetext") or "")
    page.focus("#walk input[type=checkbox]")
    page.keyboard.press("Space")
    assert state(page)["skipped"] == 36
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert state(page)["position"] == 0, "keys outside of the walk belong to the page"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page_and_text_is_readable(
    width: int, dark: bool, document: str, open_page: OpenPage
) -> None:
    page = open_page(document, width=width, dark=dark)
    assert too_wide(page) == []
    page.check("#walk input[type=checkbox]")
    for position in (1, 5, 9):
        page.fill("#walk .walk-range", str(position))
        assert state(page)["position"] == position
        assert too_wide(page) == []
    contrast, where = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, where


def test_motion_can_be_reduced(document: str, open_page: OpenPage) -> None:
    page = open_page(document, reduced_motion=True)
    duration = "getComputedStyle(document.querySelector('#walk .walk-grid td')).transitionDuration"
    assert page.evaluate(duration) == "0s"
    assert press(page, "next")["position"] == 1


# The least contrast (WCAG 2) of a text with its background over the visible texts of the walk and the tables.
LEAST_CONTRAST = """async () => {
  await new Promise((done) => setTimeout(done, 400));  // colours fade
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const rgba = (colour) => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]);
    }
    return known.get(colour);
  };
  const light = (rgb) => rgb.slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, idx) => sum + x * [0.2126, 0.7152, 0.0722][idx], 0);
  const behind = (element) => {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] > 250 || !element.parentElement ? colour : behind(element.parentElement);
  };
  let least = [21, ""];
  const texts = "#how-it-works :is(p, td, th, code, pre span, small, button, dt, b, h5)";
  for (const element of document.querySelectorAll(texts)) {
    if (!element.innerText?.trim() || element.closest("[aria-disabled=true], .hidden")) continue;
    const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least[0]) least = [contrast, `${element.tagName} ${element.className}: ${element.innerText}`];
  }
  return least;
}"""

"""What several browser tests ask of a page."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 1280)
"""A phone and a laptop."""


def page_around(fragment: str) -> str:
    """A document with the style of our pages around a fragment of one."""
    demo = files("flashtile.demo").joinpath("page.html").read_text(encoding="utf-8")
    head = demo[: demo.index("<body>")].replace("{{ theme_css | safe }}", "")
    return f"{head}<body>\n<main>\n{fragment}\n</main>\n</body>\n</html>\n"


def too_wide(page: Page) -> list[str]:
    """The elements that reach beyond the right edge of the page, unless they lie in a box that scrolls."""
    return page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          const scrolls = (element) => element.parentElement !== null
            && (["auto", "scroll", "hidden"].includes(getComputedStyle(element.parentElement).overflowX)
                || scrolls(element.parentElement));
          const found = [...document.body.querySelectorAll("*")]
            .filter((element) => element.getBoundingClientRect().right > width + 0.5 && !scrolls(element))
            .map((element) => `${element.tagName} ${element.className}`);
          return document.documentElement.scrollWidth > width ? [...found, "the page scrolls sideways"] : found;
        }"""
    )

"""What several browser tests ask of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashtile.report.page import render

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (390, 1280)
"""A phone and a laptop."""


def page_around(fragment: str) -> str:
    """The report without results around a fragment of one."""
    return render("report/report.html", sections=(), explanation=fragment)


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

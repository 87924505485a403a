"""The page that ``flashtile report`` and ``flashtile demo`` share: its parts, and how they become one HTML document.

A page is whole in itself: style, script and charts are inside, and its content security policy forbids the network.
Every text is escaped where it meets the HTML, in the templates and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import flashtile
from flashtile.bench import plots
from flashtile.errors import require
from flashtile.report.output import GENERATOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One number that a reader should take away."""

    value: str
    label: str
    detail: str
    is_behind: bool = False
    """Whether it speaks against flashtile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing with its heading and what to see in it."""

    heading: str
    svg: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What one colour means in the charts beside it."""

    label: str
    color: str
    """A CSS colour: ``plots.css_color``."""
    is_dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Charts side by side, with one legend for all of them."""

    charts: tuple[Chart, ...]
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Charts that are looked at together; of several views the page shows one at a time."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A statement in a list, after the term that it is about."""

    term: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What stands in one place of a table."""

    text: str
    value: float | None = None
    """By which a column of figures is sorted; cells without one come last, whichever way it is sorted."""
    tone: Literal["", "behind", "ours"] = ""
    """``behind``: speaks against flashtile. ``ours``: flashtile's own figure."""
    hint: str = ""
    """More about it, shown on pointing at it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column's heading."""

    heading: str
    holds: Literal["figures", "words", "sentences"] = "figures"
    """Figures stand to the right and are sorted by their cells' values; sentences may take several lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that the reader can sort by any column."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something under a heading of its own; the page leaves out what is empty."""

    heading: str
    note: str = ""
    points: tuple[Point, ...] = ()
    charts: tuple[Chart, ...] = ()
    views: tuple[View, ...] = ()
    tables: tuple[Table, ...] = ()
    is_folded: bool = False
    """Whether the reader has to open it."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show; a note alone is nothing."""
        return not (self.points or self.charts or self.views or self.tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one results file shows."""

    anchor: str
    """Its address on the page: letters, digits and ``-``."""
    title: str
    origin: str
    """File, date, commit and versions on one line."""
    summary: str
    """The result in a sentence or two, for the top of the page."""
    lead: str
    """What was measured."""
    warnings: tuple[str, ...]
    """What a reader must know before the figures."""
    headlines: tuple[Headline, ...]
    parts: tuple[Part, ...]
    facts: Mapping[str, str]
    """Where every figure comes from: file, device, versions, commit, date."""


def render(template: str, **values: Any) -> str:
    """A template of the package as a whole document.

    Args:
        template: its path inside the package; it extends ``report/page.html``.
        values: what it shows. Everything but ``Chart.svg`` may be any text.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    require("jinja2", extra="bench")
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flashtile", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = files("flashtile.report")
    style, script = (Markup(own.joinpath(name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    environment.globals.update(
        generator=GENERATOR, version=flashtile.__version__, theme=Markup(plots.THEME_CSS), style=style, script=script
    )
    return environment.get_template(template).render(**values)

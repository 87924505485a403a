"""How FlashAttention works: one text, as the page docs/how_it_works.md and as a section of the report.

``explanation.md`` has the words, ``explanation_numbers.py`` the numbers, ``walk.py`` those of the interactive part.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flashtile.backends.cpu import tiled
from flashtile.bench.summary import percent, times
from flashtile.errors import MissingExtra
from flashtile.report import explanation_figures, explanation_numbers, walk
from flashtile.spec import dropout, units

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

SECTION_ID = "how-it-works"
_ID_PREFIX = "how-"
_WALK, _FIGURES = "<!-- walk -->\n", "<!-- figures -->\n"
"""Where the page has what Markdown cannot."""


def markdown() -> str:
    """The page docs/how_it_works.md.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    return _text(explanation_numbers.facts(), is_page=False)


def html() -> str:
    """The same text as an HTML ``<section>`` with the interactive tile walk; whole without a network.

    Colours are the page's: ``plots.THEME_CSS``, and ``--page``, ``--panel``, ``--edge``, ``--text``, ``--soft``,
    ``--accent`` and ``--warn``.

    Raises:
        MissingExtra: jinja2, markdown-it-py, Pygments or matplotlib is not installed.
    """
    facts = explanation_numbers.facts()
    body, contents = _as_html(_text(facts, is_page=True))
    body = body.replace(_WALK, _read("walk.html")).replace(_FIGURES, explanation_figures.figures(facts))
    data = json.dumps(walk.as_json(), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = (
        f'<section id="{SECTION_ID}">',
        f"<style>\n{_read('explanation.css')}{_read('walk.css')}</style>",
        body.replace("</h2>\n", f"</h2>\n{contents}\n", 1),
        f'<script type="application/json" id="walk-data">{data}</script>',
        f"<script>\n{_read('walk.js')}</script>",
        "</section>",
    )
    return "\n".join(parts)


def _read(name: str) -> str:
    return files("flashtile.report").joinpath(name).read_text(encoding="utf-8")


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(package, "bench") from error


# --- the text ---------------------------------------------------------------------------------------------------------


def _text(facts: dict[str, Any], *, is_page: bool) -> str:
    """The template with its numbers; ``is_page``: for the HTML page, which has the walk."""
    jinja2 = _import("jinja2", "jinja2")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= _FILTERS
    return environment.from_string(_read("explanation.md")).render(
        **facts,
        is_page=is_page,
        excerpt=excerpt,
        forward_code=tiled._forward_sequence,
        backward_code=tiled._backward_sequence,
        delta_code=tiled._delta,
        keep_mask=dropout.keep_mask,
    )


def excerpt(function: Callable[..., Any], first: str, last: str | None = None) -> str:
    """Lines of a function's source: from the one that begins with ``first`` to the one that begins with ``last``.

    Raises:
        LookupError: not exactly one line begins so, because the source has changed; the template needs a new anchor.
    """
    lines = inspect.getsource(function).splitlines()
    begin, end = (_only_line(lines, anchor, function.__name__) for anchor in (first, last or first))
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def _only_line(lines: Sequence[str], anchor: str, name: str) -> int:
    found = [idx for idx, line in enumerate(lines) if line.strip().startswith(anchor)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} lines of {name} begin with {anchor!r}; explanation.md expects one")
    return found[0]


def _seconds(seconds: float) -> str:
    return units.in_seconds(seconds).replace(" us", " µs")


def _decimals(number: float, digits: int) -> str:
    text = f"{number:.{digits}f}" if math.isfinite(number) else "∞" if number > 0 else "-∞"
    return text.replace("-", "−")


_FILTERS: dict[str, Callable[..., str]] = {
    "bytes": units.in_bytes,
    "flops": units.in_flops,
    "seconds": _seconds,
    "decimals": _decimals,
    "times": times,
    "percent": percent,
    "count": "{:,}".format,
    "rate": lambda bytes_per_s: f"{bytes_per_s / 1e9:,.0f} GB/s",
    "tflops": lambda flops_per_s: f"{flops_per_s / 1e12:,.0f} TFLOP/s",
    "dtype": units.dtype_name,
    "side": {"compute": "arithmetic", "memory": "memory"}.__getitem__,
}


# --- HTML -------------------------------------------------------------------------------------------------------------


def _as_html(text: str) -> tuple[str, str]:
    """(the text, its contents): headings one level down and with ids, tables that scroll, code in colours."""
    parser: MarkdownIt = _import("markdown_it", "markdown-it-py").MarkdownIt(
        "commonmark", {"html": True, "highlight": _highlighted}
    )
    parser.enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(text)
    entries: list[str] = []
    for heading, content in pairwise(tokens):
        if heading.type == "heading_open":
            entries += _prepare_heading(heading, content)
        elif heading.type == "heading_close":
            heading.tag = _one_down(heading.tag)
    for token in tokens:
        if token.children is not None:
            token.children = _without_links_to_files(token.children)
    contents = f'<nav aria-label="Contents of this explanation"><ol>{"".join(entries)}</ol></nav>'
    return parser.renderer.render(tokens, parser.options, {}), contents


def _prepare_heading(heading: Token, content: Token) -> list[str]:
    """Gives a heading its level and id; returns its entry in the contents, if it is one of the sections."""
    is_section = heading.tag == "h2"
    heading.tag = _one_down(heading.tag)
    name = _ID_PREFIX + re.sub(r"[^a-z0-9]+", "-", content.content.lower()).strip("-")
    heading.attrSet("id", name)
    return [f'<li><a href="#{name}">{content.content}</a></li>'] if is_section else []


def _one_down(tag: str) -> str:
    return f"h{int(tag[1]) + 1}"


def _without_links_to_files(tokens: Sequence[Token]) -> list[Token]:
    """The page travels alone: of links, those within it and into the web make sense there."""
    kept, is_inside = [], False
    for token in tokens:
        target = str(token.attrGet("href"))
        if token.type == "link_open" and target.startswith("#"):
            token.attrSet("href", f"#{_ID_PREFIX}{target[1:]}")
        if token.type == "link_open" and not target.startswith(("#", "https:")):
            is_inside = True
        elif token.type == "link_close" and is_inside:
            is_inside = False
        else:
            kept.append(token)
    return kept


def _highlighted(code: str, language: str, _attributes: str) -> str:
    """Python in spans of Pygments' classes; "" leaves other blocks to the parser."""
    if language not in ("py", "python"):
        return ""
    pygments = _import("pygments", "Pygments")
    lexers, formatters = _import("pygments.lexers", "Pygments"), _import("pygments.formatters", "Pygments")
    return pygments.highlight(code, lexers.PythonLexer(), formatters.HtmlFormatter(nowrap=True))

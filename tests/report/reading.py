"""Pages and fragments as a parser of HTML sees them."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

VOID_ELEMENTS = {"br", "hr", "img", "input", "link", "meta"}

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</script></style></title></svg></pre><script>alert(3)</script>",
    "' onmouseover='alert(4)' {{ 7 * 7 }} {% raw %} & &lt; $x_1$ $",
    "_leading font: 1px <g id=",
    "\ud800 \u202e \x00 😀",
)
"""What a page shows as it is, or a replacement for characters that no page can hold, and never obeys."""
HOSTILE_TEXTS = ("".join(HOSTILE[:4]), "".join(HOSTILE[4:]))
"""All of it."""


class Reader(HTMLParser):
    """Collects elements, attributes and text, and insists that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        """(tag, name, value)"""
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID_ELEMENTS:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        """Every value that an attribute of this name has."""
        return [value for _, name, value in self.attributes if name == attribute]


def assert_safe(html: str, *, num_scripts: int) -> Reader:
    """The page runs no script but its own, has no handler in an attribute, and links to nothing but itself."""
    reader = Reader(html)
    assert reader.tags["script"] == num_scripts
    assert reader.tags["img"] == 0
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert not {"iframe", "object", "embed", "base", "form"} & set(reader.tags)
    assert not reader.values("src") and not reader.values("srcset")
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    links = [(tag, value) for tag, name, value in reader.attributes if name in ("href", "xlink:href")]
    outside = [(tag, value) for tag, value in links if not value.startswith("#")]
    assert all(
        (tag, value) == ("link", "data:,") or (tag == "a" and value.startswith("https://arxiv.org/abs/"))
        for tag, value in outside
    ), outside
    ids = Counter(reader.values("id"))
    assert max(ids.values()) == 1, ids.most_common(3)
    assert {value[1:] for _, value in links if value.startswith("#")} <= set(ids)
    return reader

"""Cases have labels, made of words; a filter selects among cases by those words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from flashtile.errors import InvalidArgument


class Labelled(Protocol):
    """A case of any benchmark."""

    @property
    def label(self) -> str:
        """The case in words, one space between them."""
        ...


C = TypeVar("C", bound=Labelled)


def filtered(cases: Sequence[C], expression: str) -> tuple[C, ...]:
    """The cases whose label has every word of ``expression``.

    Args:
        cases: what to select from.
        expression: words of the labels joined by ``and``, each optionally after ``not``. Words match whole:
            ``forward`` does not select ``forward+backward``.

    Raises:
        InvalidArgument: a word that no case has, or a combination that selects nothing.

    Example:
        >>> from flashtile.bench.cases import CPU_GRID
        >>> from flashtile.bench.labels import filtered
        >>> len(filtered(CPU_GRID.cases(), "causal and head_dim=64 and not backward"))
        4
    """
    known = {word for case in cases for word in case.label.split()}
    selected = cases
    for term in (part.split() for part in expression.replace(" and ", "\n").split("\n")):
        is_wanted, words = (False, term[1:]) if term[:1] == ["not"] else (True, term)
        if len(words) != 1 or words[0] not in known:
            raise InvalidArgument(
                "--filter",
                got=f"{' '.join(term)!r} in {expression!r}",
                wanted="words joined by 'and', each optionally after 'not', out of: " + ", ".join(sorted(known)),
                remedy="join words of that list, for example 'causal and not float32'; the other options "
                "change what there is to select from",
            )
        selected = [case for case in selected if (words[0] in case.label.split()) == is_wanted]
    if not selected:
        raise InvalidArgument(
            "--filter",
            got=repr(expression),
            wanted="a filter that selects at least one case",
            remedy="drop a term: each of its words occurs, but in no case together",
        )
    return tuple(selected)

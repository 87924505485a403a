"""The file that a page is written to, and what it may replace."""

from __future__ import annotations

from pathlib import Path

from flashtile.bench.files import check_place
from flashtile.errors import InvalidArgument

GENERATOR = "flashtile"
"""What our pages say in ``<meta name="generator">``; by this they are known again."""
_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
_HEAD_BYTES = 1024
"""Within how many bytes from its beginning a page has its mark."""


def check(flag: str, path: Path) -> None:
    """Finds out before the work whether a page can be written there; makes the folders that are missing.

    A page of ours may be replaced, and an empty file; nothing else, so that a slip of the hand costs nobody's data.

    Raises:
        InvalidArgument: naming ``flag``.
    """
    check_place(flag, path)
    if not path.exists():
        return
    try:
        with path.open("r+b") as file:
            head = file.read(_HEAD_BYTES)
        found = "is no page of flashtile's" if head and _MARK not in head else None
    except OSError as error:
        found = f"cannot be opened ({error.strerror})"
    if found is not None:
        raise InvalidArgument(
            flag,
            got=f"{path}, which exists and {found}",
            wanted="a new file, or a page to replace",
            remedy="choose another name, or delete the file if nobody needs it",
        )

"""Files that commands write: possible or not is found out before the work, and each is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from flashtile.errors import InvalidArgument


def check_place(flag: str, path: Path) -> None:
    """Finds out whether ``write_whole`` can write there; makes the folders that are missing.

    Raises:
        InvalidArgument: it cannot; names ``flag``.
    """
    try:
        is_odd = path.exists() and not path.is_file()
        if not is_odd:
            path.parent.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(path.parent, os.W_OK)
    except OSError:
        is_odd = is_writable = False
    if is_odd or not is_writable:
        got = f"{path}, which is a directory or a device" if is_odd else str(path)
        remedy = "choose another name" if is_odd else "choose another folder"
        raise InvalidArgument(flag, got=got, wanted="a file in a folder that can be written", remedy=remedy)


def write_whole(path: Path, text: str) -> None:
    """Writes or replaces the file: readers, and a Ctrl-C, never see half of it. A symbolic link stays one.

    What UTF-8 cannot hold (half a surrogate pair, from JSON that has one) becomes a question mark.
    """
    target = path.resolve()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(text.encode("utf-8", errors="replace"))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

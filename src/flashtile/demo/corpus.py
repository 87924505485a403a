"""The bytes that the demo trains on: the Python standard library's own sources, or the user's text."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashtile.errors import InvalidArgument

MAX_BYTES = 4_000_000
"""More is not read: the demo sees a fraction of it anyway."""
VALIDATION_SHARE = 0.1
_NOT_LIBRARY_CODE = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_TABLES = {"encodings", "pydoc_data"}  # character tables and help texts, megabytes that are hardly code
_BINARY_PROBE_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training and validation bytes, and where they came from."""

    source: str
    num_files: int
    is_cut: bool
    """Whether there was more text than ``MAX_BYTES``."""
    train: Tensor  # [bytes] uint8
    validation: Tensor  # [bytes] uint8: the last tenth, from other files if there are many

    @property
    def description(self) -> str:
        """One line for people."""
        size = (len(self.train) + len(self.validation)) / 1e6
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        return f"{self.source}: {files}, {size:.2f} MB{' (the rest was not read)' if self.is_cut else ''}"


def load(text: Path | None, *, seqlen: int) -> Corpus:
    """Reads the text and splits it.

    Args:
        text: a file, or a directory whose text files are joined in an order that depends on their paths alone; None
            stands for the standard library of the running Python.
        seqlen: the training and the validation part must each hold one sequence of this length and the byte after it.

    Returns:
        The corpus; the same files give the same bytes in the same order.

    Raises:
        InvalidArgument: names ``--text``: it does not exist, cannot be read, or holds too little text.
    """
    source, paths = _standard_library() if text is None else _users_files(text)
    pieces: list[bytes] = []
    total = 0
    for path in paths:
        if total > MAX_BYTES:
            break
        piece = _read(path)
        if piece:
            pieces.append(piece)
            total += len(piece) + 1
    joined = b"\n".join(pieces)
    train, validation = _split(joined[:MAX_BYTES], source=source, seqlen=seqlen)
    return Corpus(
        source=source, num_files=len(pieces), is_cut=len(joined) > MAX_BYTES, train=train, validation=validation
    )


def draw_batch(data: Tensor, *, batch: int, seqlen: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(inputs, targets), both [batch, seqlen] int64; targets are the inputs one byte later."""
    starts = torch.randint(len(data) - seqlen, (batch,), generator=generator)
    windows = data[starts[:, None] + torch.arange(seqlen + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def _standard_library() -> tuple[str, Iterable[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = (path for path in _walk(root, skip=_NOT_LIBRARY_CODE | _TABLES) if path.suffix == ".py")
    return f"the standard library of Python {platform.python_version()}", _in_order(root, sources)


def _users_files(text: Path) -> tuple[str, Iterable[Path]]:
    if text.is_file():
        return str(text), [text]
    if text.is_dir():
        return str(text), _in_order(text, _walk(text))
    raise InvalidArgument(
        "--text",
        got=f"{str(text)!r}, which does not exist",
        wanted="a text file or a directory of text files",
        remedy="check the path, or leave --text away to train on Python's standard library",
    )


def _walk(root: Path, *, skip: Collection[str] = ()) -> Iterator[Path]:
    """All files below ``root`` but hidden ones and those in folders of a name to skip."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _in_order(root: Path, paths: Iterable[Path]) -> list[Path]:
    """Shuffled, the same way each time: a directory's files resemble each other, and the split takes the last ones."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def _read(path: Path) -> bytes:
    """The file's bytes; none for a binary file, which would only teach the model noise."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(
            "--text",
            got=f"{str(path)!r}, which cannot be read ({error.strerror})",
            wanted="files that you may read",
            remedy="change its permissions, or name the readable files' directory",
        ) from error
    return b"" if b"\0" in content[:_BINARY_PROBE_BYTES] else content


def _split(text: bytes, *, source: str, seqlen: int) -> tuple[Tensor, Tensor]:
    shortest = seqlen + 1
    if len(text) < 2 * shortest:
        raise InvalidArgument(
            "--text",
            got=f"{len(text)} bytes of text in {source}",
            wanted=f"at least {2 * shortest}: {shortest} to train on and as many to validate on, for --seqlen {seqlen}",
            remedy="give more text, or a smaller --seqlen",
        )
    num_validation = max(int(len(text) * VALIDATION_SHARE), shortest)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[:-num_validation], data[-num_validation:]

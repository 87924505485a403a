"""The text that the demo trains on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashtile.demo import corpus
from flashtile.errors import InvalidArgument


def all_bytes(loaded: corpus.Corpus) -> bytes:
    return bytes(torch.cat((loaded.train, loaded.validation)).tolist())


def test_the_standard_library_is_the_default_and_always_the_same() -> None:
    loaded = corpus.load(None, seqlen=1024)
    text = all_bytes(loaded)
    assert 1_000_000 < len(text) <= corpus.MAX_BYTES
    assert text.count(b"\ndef ") > 100
    assert b"unittest.main()" not in text[:200_000], "tests of the standard library are left out"
    assert text == all_bytes(corpus.load(None, seqlen=1024))
    assert "standard library" in loaded.description
    assert abs(len(loaded.validation) / len(text) - corpus.VALIDATION_SHARE) < 0.01


def test_a_directory_is_read_in_an_order_of_its_paths_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for root, names in (("one", "abcdef"), ("two", "fedcba")):
        for name in names:
            path = tmp_path / root / f"folder_{name}" / "x.txt"
            path.parent.mkdir(parents=True)
            path.write_text(name * 100)
        (tmp_path / root / ".git").mkdir()
        (tmp_path / root / ".git" / "config").write_text("hidden")
        (tmp_path / root / "picture").write_bytes(b"\x89PNG\0\0" + b"z" * 100)
    one, two = (corpus.load(tmp_path / root, seqlen=16) for root in ("one", "two"))
    assert all_bytes(one) == all_bytes(two)
    assert set(all_bytes(one)) == set(b"abcdef\n")
    assert one.num_files == 6


def test_a_file_is_split_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(1, 201)))
    loaded = corpus.load(path, seqlen=9)
    assert bytes(loaded.train.tolist()) == bytes(range(1, 181))
    assert bytes(loaded.validation.tolist()) == bytes(range(181, 201))
    assert not loaded.is_cut


def test_more_text_than_the_cap_is_cut_and_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_BYTES", 500)
    for name in "abcd":
        (tmp_path / name).write_text(name * 300)
    loaded = corpus.load(tmp_path, seqlen=16)
    assert len(all_bytes(loaded)) == 500
    assert loaded.is_cut
    assert "not read" in loaded.description


@pytest.mark.parametrize(
    ("content", "got"),
    [(None, "does not exist"), (b"", "0 bytes"), (b"x" * 65, "65 bytes"), (b"\0" * 1000, "0 bytes")],
    ids=["missing", "empty", "short", "binary"],
)
def test_text_that_cannot_serve_is_refused(tmp_path: Path, content: bytes | None, got: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidArgument, match="--text") as caught:
        corpus.load(path, seqlen=32)
    assert got in caught.value.got


def test_the_shortest_text_that_serves(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 66)
    loaded = corpus.load(path, seqlen=32)
    inputs, targets = corpus.draw_batch(loaded.train, batch=3, seqlen=32, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (3, 32)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("x" * 1000)

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path), mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InvalidArgument, match=r"secret\.txt.*Permission denied"):
        corpus.load(path, seqlen=32)


def test_batches_are_windows_of_the_text_and_repeat_with_their_seed() -> None:
    data = torch.arange(200, dtype=torch.uint8)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return corpus.draw_batch(data, batch=64, seqlen=190, generator=torch.Generator().manual_seed(3))

    inputs, targets = draw()
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs, draw()[0])
    assert inputs.min() == 0
    assert targets.max() == 199, "the last byte is reached"

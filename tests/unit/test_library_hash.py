"""Triton's hash of its library is computed by one process, and read by those that come after it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton import knobs
from triton.runtime import cache

from flashtile.backends import library_hash
from flashtile.backends.library_hash import known_hash


class Computed:
    """Stands for Triton's function in a new process: counts how often it is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        @lru_cache
        def triton_key() -> str:
            self.count += 1
            return "of the library"

        self.triton_key = triton_key
        monkeypatch.setattr(cache, "triton_key", triton_key)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library of two files, and a kernel cache that is empty."""
    folder = tmp_path / "triton"
    for name in ("_C/libtriton.so", "language/core.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("contents")
    monkeypatch.setattr(library_hash, "_LIBRARY", folder)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    library_hash._kept.cache_clear()
    return folder


def in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> int:
    """How often it computes the hash, which it asks for twice."""
    computed = Computed(monkeypatch)
    with known_hash():
        assert [cache.triton_key() for _ in range(2)] == ["of the library"] * 2
    assert cache.triton_key is computed.triton_key  # other kernels than ours find what they know
    return computed.count


def test_only_the_first_process_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [in_a_new_process(monkeypatch) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("change", ["size", "time", "a file more", "a file less", "place"])
def test_another_library_has_another(change: str, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_new_process(monkeypatch)
    core = library / "language" / "core.py"
    if change == "size":
        stat = core.stat()
        core.write_text("other contents")
        os.utime(core, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(core, ns=(0, core.stat().st_mtime_ns + 1))
    elif change == "a file more":
        (library / "more.py").touch()
    elif change == "a file less":
        core.unlink()
    else:
        monkeypatch.setattr(library_hash, "_LIBRARY", library.rename(library.with_name("moved")))
    assert in_a_new_process(monkeypatch) == 1


def test_what_is_no_code_of_the_library_does_not_matter(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_new_process(monkeypatch)
    (library / "language" / "core.pyc").touch()
    assert in_a_new_process(monkeypatch) == 0


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()  # a file where the folder would be
    assert [in_a_new_process(monkeypatch) for _ in range(2)] == [1, 1]


def test_a_process_that_has_computed_it_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = Computed(monkeypatch)
    cache.triton_key()
    with known_hash():
        assert cache.triton_key is computed.triton_key


def test_a_triton_without_such_a_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cache, "triton_key")
    with known_hash():
        assert not hasattr(cache, "triton_key")


def test_an_error_within_leaves_triton_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = Computed(monkeypatch)
    with pytest.raises(KeyboardInterrupt), known_hash():
        raise KeyboardInterrupt
    assert cache.triton_key is computed.triton_key


def test_it_is_the_hash_that_triton_computes(tmp_path: Path) -> None:
    """Of the real library, in two processes."""
    program = (
        "from flashtile.backends.library_hash import known_hash; from triton.runtime import cache\n"
        "with known_hash(): first = cache.triton_key()\n"
        "print(first == cache.triton_key())"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "kernels")}
    for _ in range(2):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "True"
    (kept,) = (tmp_path / "kernels").iterdir()
    assert time.time() - kept.stat().st_mtime < 600 and kept.name.startswith("flashtile_library_")

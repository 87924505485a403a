"""Triton's hash of its own library, kept in its kernel cache from process to process.

Triton looks kernels up by a hash of, among others, its own 400 MB. Every process computes it anew before its first
kernel, which takes longer than all else in a first call whose kernels are in the cache. Here it is computed once for
files of these paths, sizes and times, and read from then on.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.runtime import cache

_triton: Any = cache
_LIBRARY = Path(triton.__file__).parent


@contextmanager
def known_hash() -> Iterator[None]:
    """Within it Triton takes the hash that an earlier process computed, if there is one, and else leaves its own."""
    compute: Any = getattr(_triton, "triton_key", None)
    if not hasattr(compute, "cache_info") or compute.cache_info().currsize:  # unknown here, or computed already
        yield
        return
    _triton.triton_key = partial(_kept, compute)
    try:
        yield
    finally:
        _triton.triton_key = compute


@lru_cache(maxsize=1)
def _kept(compute: Callable[[], str]) -> str:
    path = Path(knobs.cache.dir) / f"flashtile_library_{_state_of_files()}"
    with suppress(OSError):
        return path.read_text()
    found = compute()
    with suppress(OSError):  # a cache that cannot be written is none
        _write(path, found)
    return found


def _state_of_files() -> str:
    """Changes with the path, size or time of any file of Triton's library."""
    state = hashlib.sha256()
    for folder, _, names in sorted(os.walk(_LIBRARY)):
        for name in sorted(names):
            if name.endswith((".py", ".so", ".pyd")):
                stat = Path(folder, name).lstat()
                state.update(f"{folder}/{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return state.hexdigest()


def _write(path: Path, text: str) -> None:
    """At once or not at all: other processes may read or write it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    whole.write_text(text)
    whole.replace(path)

"""Which of its two assemblers (ptxas) Triton takes for our kernels on a Hopper GPU.

From 3.9 on it would be the newer one (CUDA 13), told to allocate registers in a way that keeps clear of an error of its
own; kernels that fill the registers then spill up to 2 KB. The older one (CUDA 12.9), which Triton brings for GPUs
before Hopper, has neither the error nor these spills.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from triton import knobs
from triton.runtime import driver

from flashtile import settings

_HOPPER = 90
_FIRST_WITH_SPILLS = 13
"""CUDA's version."""
_CHOICE = "ptxas_blackwell"
"""Triton's name of the choice, among its knobs."""


class _Thread(threading.local):
    """Whether the thread compiles one of our kernels; others may compile theirs beside it."""

    takes_older = False


_thread = _Thread()


@contextmanager
def older_assembler() -> Iterator[dict[str, int]]:
    """Within it this thread assembles with the older one, where Triton would take the newer one for the current GPU.

    Yields:
        Compiler options: kernels come as PTX of a version that the older one reads, and the cache tells them apart.
    """
    ptx_version = None if settings.interprets_triton() else _let_threads_choose()
    if ptx_version is None or _has_been_chosen() or not _is_for_hopper():
        yield {}
        return
    before, _thread.takes_older = _thread.takes_older, True
    try:
        yield {"ptx_version": ptx_version}
    finally:
        _thread.takes_older = before


def _is_for_hopper() -> bool:
    target: Any = driver.active.get_current_target()
    return target.arch == _HOPPER


def _has_been_chosen() -> bool:
    """Whether somebody has said which one to take."""
    return settings.names_assembler() or _CHOICE in vars(knobs.nvidia)


@lru_cache(maxsize=1)
def _let_threads_choose() -> int | None:
    """Has Triton ask the thread from now on.

    Returns:
        The newest PTX that the older one reads, as Triton writes it (88 is 8.8); None if there is nothing to choose.
    """
    try:
        from triton.backends.nvidia import compiler  # not there in a Triton for AMD's GPUs alone

        nvidia: Any = compiler
        take, older = nvidia.get_ptxas, knobs.nvidia.ptxas
        if older.path == take(_HOPPER).path or int(older.version.split(".")[0]) >= _FIRST_WITH_SPILLS:
            return None
        # Part of the key of every kernel in the cache, and asked for once: it must not depend on who is the first.
        nvidia.get_ptxas_version(_HOPPER)
        ptx_version = nvidia.ptx_get_version(older.version)
    except (AttributeError, ImportError, RuntimeError):  # a Triton that has done away with it
        return None
    nvidia.get_ptxas = lambda arch: knobs.nvidia.ptxas if _thread.takes_older and arch == _HOPPER else take(arch)
    return ptx_version

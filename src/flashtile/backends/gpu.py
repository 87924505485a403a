"""What the backends for GPUs have in common: options as named tuples, and questions about the machine.

Imports no Triton: plans are made on any machine.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

COMPILER_OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel. What has to round alike fuses on its own; the rest is faster so, and Triton 3.10 no longer does it
unasked."""


class Slopes(NamedTuple):
    """The ALiBi slope of each head, [batch, heads]."""

    ptr: Any
    batch_stride: Any
    head_stride: Any


class Softcap(NamedTuple):
    """``cap * tanh(score / cap)``, with the factors that the kernel needs."""

    scale_by_cap: Any
    """scale / cap: from the product q @ k.T to tanh's argument."""
    cap: Any


class Window(NamedTuple):
    """How far a query sees to each side of its aligned position; ``None`` means unlimited."""

    left: Any
    right: Any


class Sequences(NamedTuple):
    """Where the sequences of the batch lie: side by side (dense, both ``None``), or between boundaries (packed)."""

    cu_seqlens_q: Any
    cu_seqlens_kv: Any


class Heads(NamedTuple):
    """``num_q`` query heads, of which ``per_kv`` share each key/value head."""

    num_q: Any
    per_kv: Any


def window(problem: AttentionProblem) -> Window:
    """Reaches beyond the sequences are cut to where they still reach everything, so that positions fit into 32 bits."""
    farthest = problem.seqlen_q + problem.seqlen_kv
    left, right = problem.mask.left, problem.mask.right
    return Window(None if left is None else min(left, farthest), None if right is None else min(right, farthest))


def softcap(problem: AttentionProblem) -> Softcap | None:
    return Softcap(problem.scale / problem.softcap, problem.softcap) if problem.softcap else None


def slopes(operands: Operands) -> Slopes | None:
    """[heads] are those of every sequence."""
    found = operands.alibi_slopes
    return None if found is None else Slopes(found, *((0, *found.stride())[-2:]))


@lru_cache(maxsize=1)
def lacks_triton() -> bool:
    """Whether this machine has a GPU but no Triton; without a GPU, plans are made for other machines."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is None


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's; entering the current one is slow too."""
    is_current = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    return contextlib.nullcontext() if is_current else torch.cuda.device(tensor.device)


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Puts off Python's search for garbage while kernels are imported, compiled or loaded.

    Nearly all the objects that they make stay, but by their number they set off a search among all that torch holds,
    which takes longer than importing Triton.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()

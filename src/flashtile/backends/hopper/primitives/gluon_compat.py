"""The names of Gluon that differ between Triton 3.6 and 3.9, and those whose types mislead a checker, bound once.

Gluon's own annotations describe what its compiler sees: a jitted function cannot be called, constants are no numbers.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

jit: Any = gluon.jit
constexpr_function: Any = gluon.constexpr_function
static_range: Any = gl.static_range
zeros: Any = gl.zeros
full_like: Any = gl.full_like
inline_asm: Any = gl.inline_asm_elementwise
warpgroup_mma: Any = hopper.warpgroup_mma
warpgroup_mma_wait: Any = hopper.warpgroup_mma_wait

barrier: Any = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)
"""All threads of the partition wait for each other."""

_descriptor: Any = gl.shared_memory_descriptor
reinterpreted: Any = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret
"""The same bytes of shared memory with another dtype, shape and layout."""

_tma: Any = hopper.tma
tma_load: Any = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
tma_store: Any = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global

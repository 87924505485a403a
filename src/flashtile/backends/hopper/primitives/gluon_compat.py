"""The names of Gluon that differ between Triton 3.6 and 3.9, bound once."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""All threads of the partition wait for each other."""

if hasattr(gl.shared_memory_descriptor, "reinterpret"):
    reinterpreted = gl.shared_memory_descriptor.reinterpret
    """The same bytes of shared memory with another dtype, shape and layout."""
else:
    reinterpreted = gl.shared_memory_descriptor._reinterpret

if hasattr(tma, "async_load"):
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):
    tma_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Adds a tile in shared memory to one in global memory, element by element, asynchronously."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)

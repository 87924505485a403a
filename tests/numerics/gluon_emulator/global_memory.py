"""Pointers, and the descriptors of tiles."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.program import Program
from gluon_emulator.ptx import KernelError
from gluon_emulator.registers import DTYPE_OF, Dtype, Registers, as_scalar, plain, tensor_of


class Pointer:
    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    @staticmethod
    def of(tensor: Tensor) -> Pointer:
        begin = tensor.storage_offset()
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - begin
        return Pointer(tensor.detach().as_strided((size,), (1,), begin))

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=DTYPE_OF[self.memory.dtype])

    def to(self, dtype: Dtype, *, bitcast: bool) -> Pointer:
        """As a number: assembly takes pointers so."""
        return self

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def places(self, *others: Any) -> tuple[Tensor, ...]:
        """(offsets, others) where the last of them, a mask, is true."""
        offsets, *values, mask = torch.broadcast_tensors(tensor_of(self.offset), *map(tensor_of, others))
        offsets = offsets[mask].long()
        if offsets.numel() and (int(offsets.min()) < 0 or int(offsets.max()) >= len(self.memory)):
            raise KernelError(f"memory of {len(self.memory)} is accessed at {int(offsets.min())}..{int(offsets.max())}")
        return offsets, *(value[mask] for value in values)


def load(pointer: Pointer, mask: Any = True, other: Any = torch.nan) -> Any:
    offset = plain(pointer.offset)
    if isinstance(offset, int):
        if not 0 <= offset < len(pointer.memory):
            raise KernelError(f"a load at {offset} of {len(pointer.memory)}")
        return as_scalar(pointer.memory[offset].item())
    (offsets,) = pointer.places(mask)
    offset, mask = torch.broadcast_tensors(offset, tensor_of(mask))
    loaded = torch.full(offset.shape, other, dtype=pointer.memory.dtype)
    loaded[mask] = pointer.memory[offsets]
    return Registers(loaded)


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    offsets, data = pointer.places(value, mask)
    pointer.memory[offsets] = data.to(pointer.memory.dtype)


def add(pointer: Pointer, value: Registers, mask: Any = True) -> None:
    """At once, like a reduction in memory."""
    offsets, data = pointer.places(value, mask)
    with Program.current.changed:
        pointer.memory.index_add_(0, offsets, data)


def atomic_add(pointer: Pointer, value: int, sem: str) -> Any:
    offset = int(pointer.offset)
    before = as_scalar(pointer.memory[offset].item())
    pointer.memory[offset] += value
    return before


def atomic_xchg(pointer: Pointer, value: int, sem: str) -> Any:
    offset = int(pointer.offset)
    before = as_scalar(pointer.memory[offset].item())
    pointer.memory[offset] = value
    return before


class TensorDescriptor:
    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any

    @property
    def dtype(self) -> Dtype:
        return DTYPE_OF[self.base.dtype]

    @property
    def block_type(self) -> Any:
        size = 1
        for extent in self.block_shape:
            size *= extent
        return types.SimpleNamespace(nbytes=size * self.base.element_size())

    def inside(self, place: list[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """(the part of the tile at ``place`` that exists, and where in the tile it lies)."""
        matrix = self.base.detach().as_strided(self.shape, self.strides, self.base.storage_offset())
        in_memory, in_tile = [], []
        for at, block, size in zip(place, self.block_shape, self.shape, strict=True):
            begin, end = max(int(at), 0), min(int(at) + block, size)
            end = max(begin, end)
            in_memory.append(slice(begin, end))
            in_tile.append(slice(begin - int(at), end - int(at)))
        return matrix[tuple(in_memory)], tuple(in_tile)

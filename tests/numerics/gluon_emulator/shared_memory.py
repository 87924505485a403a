"""Shared memory, and the asynchronous units that read and write it: TMA and the tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gluon_emulator.global_memory import TensorDescriptor
from gluon_emulator.program import Barrier, Barriers, Program
from gluon_emulator.ptx import KernelError
from gluon_emulator.registers import DTYPE_OF, Dtype, Registers, Unfinished, plain


class Shared:
    """A view of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> Dtype:
        return DTYPE_OF[self.data.dtype]

    @property
    def allocation(self) -> int:
        return self.data.untyped_storage().data_ptr()

    def index(self, slot: Any) -> Shared:
        if not 0 <= int(slot) < self.data.shape[0]:
            raise KernelError(f"slot {slot} of {self.data.shape[0]}")
        return Shared(self.data[int(slot)])

    def reshape(self, shape: Any) -> Shared:
        return Shared(self.data.view(tuple(shape)))

    def permute(self, axes: Any) -> Shared:
        return Shared(self.data.permute(tuple(axes)))

    def slice(self, begin: int, size: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, begin, size))

    def load(self, layout: Any) -> Registers:
        return Registers(self.data.clone(), layout)

    def store(self, value: Registers) -> None:
        if plain(value).dtype != self.data.dtype:
            value = Registers(plain(value).to(self.data.dtype))
        if plain(value).shape != self.data.shape:
            raise KernelError(f"{list(value.shape)} stored as {list(self.shape)}")
        self.data.copy_(value.data)
        Program.current.issued.unfenced.add(self.allocation)

    def reinterpret(self, dtype: Dtype, shape: list[int], layout: Any) -> Any:
        return LinesOfTile(self.data, dtype, shape)


class LinesOfTile:
    """The 128-byte rows of a swizzled tile of 16-bit numbers: those of its first 64 columns, then of the next."""

    def __init__(self, tile: Tensor, dtype: Dtype, shape: list[int]) -> None:
        self.tile, self.dtype = tile, dtype
        if shape != [tile.numel() * tile.element_size() // 128, 32] or dtype.primitive_bitwidth != 32:
            raise KernelError("only lines of 128 bytes are known here")

    def index(self, line: Any) -> Shared:
        block, row = divmod(int(line), self.tile.shape[0])
        per_line = 128 // self.tile.element_size()
        return Shared(self.tile[row, block * per_line : (block + 1) * per_line].view(self.dtype.torch))


def allocate_shared_memory(dtype: Dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        Program.current.num_barriers += 1
        return Barriers(f"barriers {Program.current.num_barriers}", shape[0])
    poison = torch.nan if dtype.torch.is_floating_point else -12345
    return Shared(torch.full(tuple(shape), poison, dtype=dtype.torch))


def tma_load(desc: TensorDescriptor, place: list[Any], barrier: Barrier, tile: Shared) -> None:
    found, where = desc.inside(place)
    program = Program.current
    if program.issued.waited_for is not None:
        program.guarded[program.issued.waited_for] = tile.data
    tile.data.fill_(torch.nan)
    program.pause()
    tile.data.zero_()
    tile.data[where] = found
    barrier.advance(num_bytes=-tile.data.numel() * tile.data.element_size())


def expect(barrier: Barrier, num_bytes: int) -> None:
    barrier.advance(arrivals=1, num_bytes=num_bytes)


def tma_store(desc: TensorDescriptor, place: list[Any], tile: Shared) -> None:
    Program.current.issued.assert_fenced(tile)

    def copy() -> None:
        target, where = desc.inside(place)
        target.copy_(tile.data[where])

    Program.current.issued.stores.append(copy)


def store_wait(pendings: int) -> None:
    queue = Program.current.issued.stores
    while len(queue) > pendings:
        queue.pop(0)()


class Pending(Unfinished):
    """A product that was issued."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.result: Registers | None = None
        self.shape, self.dtype = acc.shape, acc.dtype

    def reads(self, tile: Tensor) -> bool:
        return any(isinstance(each, Shared) and each.data.data_ptr() == tile.data_ptr() for each in (self.a, self.b))

    def finish(self) -> None:
        product = self.a.data.float() @ self.b.data.float()
        acc = self.acc.result if isinstance(self.acc, Pending) else self.acc
        self.result = Registers(product + plain(acc) if self.use_acc else product)


def warpgroup_mma(a: Any, b: Shared, acc: Registers, *, use_acc: bool = True, is_async: bool = False) -> Any:
    if a.data.dtype != b.data.dtype or a.data.element_size() != 2 or acc.dtype is not DTYPE_OF[torch.float32]:
        raise KernelError(f"a product of {a.dtype} and {b.dtype} into {acc.dtype}")
    if a.shape[1] != b.shape[0] or acc.shape != (a.shape[0], b.shape[1]):
        raise KernelError(f"a product {a.shape} @ {b.shape} into {acc.shape}")
    Program.current.issued.assert_fenced(a, b)
    product = Pending(a, b, acc, use_acc)
    Program.current.issued.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=[product])


def warpgroup_mma_wait(num_outstanding: int, deps: list[Any]) -> Any:
    Program.current.pause()
    queue = Program.current.issued.products
    while len(queue) > num_outstanding:
        queue.pop(0).finish()
    results = tuple(each.result if isinstance(each, Pending) else each for each in deps)
    if any(result is None for result in results):
        raise KernelError("a product is asked for that may still run")
    return results[0] if len(results) == 1 else results

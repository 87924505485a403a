"""Scalars, and tensors in registers."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.ptx import KernelError


class Dtype:
    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.torch = name, dtype
        self.primitive_bitwidth = 8 * dtype.itemsize

    def __repr__(self) -> str:
        return self.name


DTYPES = {
    name: Dtype(name, getattr(torch, name))
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64")
}
DTYPE_OF = {dtype.torch: dtype for dtype in DTYPES.values()}


class Float(float):
    """A number that was loaded."""

    @property
    def value(self) -> float:
        return float(self)

    def to(self, dtype: Dtype) -> Any:
        return as_scalar(torch.tensor(float(self), dtype=torch.float64).to(dtype.torch).item())


class Int(int):
    """A 32-bit or 64-bit integer: as in C, it may not be divided like in Python below 0."""

    @property
    def value(self) -> int:
        return int(self)

    def to(self, dtype: Dtype) -> Any:
        return Float(self) if dtype.torch.is_floating_point else self

    def __neg__(self) -> Int:
        return Int(-int(self))

    @staticmethod
    def operator(name: str) -> Callable[[Any, Any], Any]:
        of_int = getattr(int, name)
        divides = "div" in name or "mod" in name

        def apply(self: Int, other: Any) -> Any:
            result = of_int(self, other)
            if result is NotImplemented or isinstance(result, bool):
                return result
            if divides and (int(self) < 0 or int(other) < 0):
                raise KernelError(f"{name} of {int(self)} and {int(other)}: C and Python differ")
            if not -(2**63) <= result < 2**63:
                raise KernelError("a 64-bit integer overflows")
            return Int(result)

        return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    for _prefix in ("", "r"):
        setattr(Int, f"__{_prefix}{_name}__", Int.operator(f"__{_prefix}{_name}__"))


def as_scalar(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return Int(value)
    return Float(value) if isinstance(value, float) else value


class Unfinished:
    """A product that may still run."""


class Registers:
    """A tensor in registers."""

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data = data
        self.type = types.SimpleNamespace(layout=layout)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> Dtype:
        return DTYPE_OF[self.data.dtype]

    def reshape(self, shape: Any) -> Registers:
        return Registers(self.data.reshape(tuple(shape)))

    def permute(self, axes: Any) -> Registers:
        return Registers(self.data.permute(tuple(axes)))

    def split(self) -> tuple[Registers, Registers]:
        first, second = self.data.unbind(-1)
        return Registers(first), Registers(second)

    def to(self, dtype: Dtype) -> Registers:
        return Registers(self.data.to(dtype.torch), self.type.layout)

    def __getitem__(self, place: Any) -> Registers:
        return Registers(self.data[place])

    def __neg__(self) -> Registers:
        return Registers(-self.data, self.type.layout)

    def __bool__(self) -> bool:
        raise KernelError("a branch on a tensor")

    @staticmethod
    def operator(name: str) -> Callable[[Registers, Any], Any]:
        of_torch = getattr(Tensor, name)

        def apply(self: Registers, other: Any) -> Any:
            return Registers(of_torch(self.data, plain(other)), self.type.layout)

        return apply


ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "and", "or")
for _name in (*ARITHMETIC, "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Registers, f"__{_name}__", Registers.operator(f"__{_name}__"))


def plain(value: Any) -> Any:
    if isinstance(value, Registers):
        return value.data
    if isinstance(value, Unfinished):
        raise KernelError("a product is read before it was waited for")
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    return float(value) if isinstance(value, float) else value


def tensor_of(value: Any) -> Tensor:
    value = plain(value)
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else None)


def elementwise(of_scalars: Callable[..., Any], of_tensors: Callable[..., Tensor]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        if any(isinstance(value, (Registers, Unfinished)) for value in values):
            layout = next(value.type.layout for value in values if isinstance(value, Registers))
            return Registers(of_tensors(*map(plain, values)), layout)
        return as_scalar(of_scalars(*values))

    return apply


def minimum(a: Any, b: Any) -> Tensor:
    return a.clamp(max=b) if not isinstance(b, Tensor) else b.clamp(max=a)


def maximum(a: Any, b: Any) -> Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.fmax(a, b)
    return a.clamp(min=b) if not isinstance(b, Tensor) else b.clamp(min=a)


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, Registers):
        return Registers(torch.where(condition.data, plain(a), plain(b)), condition.type.layout)
    return as_scalar(a if condition else b)


def fma(a: Any, b: Any, c: Any) -> Registers:
    """Rounded once."""
    exact = tensor_of(a).double() * tensor_of(b).double() + tensor_of(c).double()
    return Registers(exact.float(), a.type.layout if isinstance(a, Registers) else None)


def reduced(kind: str) -> Callable[..., Any]:
    def apply(value: Registers, axis: int) -> Any:
        data = plain(value)
        if kind == "sum":
            result = data.sum(axis, dtype=data.dtype)
        else:  # as the hardware's maximum: NaN only of NaN alone
            result = torch.where(data.isnan(), -torch.inf, data).amax(axis)
        return as_scalar(result.item()) if result.dim() == 0 else Registers(result)

    return apply

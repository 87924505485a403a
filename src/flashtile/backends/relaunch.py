"""Launching a compiled kernel once more, with other tensors of the same sizes, straight through the CUDA driver.

Triton's launcher encodes every TMA descriptor and reads every argument anew, 30 us on an H200's host. Between two
launches of one form only addresses change, so the parameters that the kernel's PTX declares are written once, and each
launch writes addresses into them. What does not look as expected here is left to Triton's launcher.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

_WORD = 8
_MAP_BYTES = 128
"""Of a TMA descriptor (CUtensorMap), whose address is a multiple of 64."""
_ALIGNMENT = 64
_L2_PROMOTION_128B = 2
_CODES = {"i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q"} | {
    "fp32": "f",
    "fp64": "d",
}
"""Triton's names of numbers, and struct's."""
_DECLARED = re.compile(r"\.param (?:\.align (\d+) )?\.[a-z](\d+) [^\[,\n]*(?:\[(\d+)\])?")
_CONFIG = struct.Struct("7I4xQQI4x")
"""CUlaunchConfig: grid, block, bytes of shared memory, stream, attributes, their number."""
_STREAM_WORD = 4


class _Address(NamedTuple):
    """A parameter that is where a tensor begins."""

    tensor: Any


class _Map(NamedTuple):
    """A parameter that is a TMA descriptor: Triton's object of the host, and how its compiler tiles it."""

    descriptor: Any
    tiling: dict[str, Any]


class _Number(NamedTuple):
    code: str
    value: float


class Relaunch:
    """One form of one compiled kernel, ready to be launched; safe to be shared between threads."""

    def __init__(self, compiled: Any, grid: tuple[int, ...], device: int) -> None:
        self._compiled = compiled  # owns the function
        self._function = compiled.function
        self._device = device
        self._lock = threading.Lock()
        self._addresses: list[tuple[int, int]] = []  # (word of the block, index of the tensor)
        self._maps: list[tuple[int, int]] = []  # (address of the descriptor, index); those the driver has to change
        # The block: the launch's configuration, the addresses of the parameters, the parameters.
        sizes = _declared(compiled)
        begin = _rounded_up(_CONFIG.size + _WORD * len(sizes), _ALIGNMENT)
        offsets, end = _offsets(sizes)
        self._offsets = [begin + offset for offset in offsets]
        num_bytes = _rounded_up(begin + end, _WORD)
        block = bytearray(num_bytes + _ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        shift = -address % _ALIGNMENT
        self._block = memoryview(block)[shift : shift + num_bytes]
        self._words = self._block.cast("Q")
        self._config = address + shift
        self._parameters = self._config + _CONFIG.size
        shared, num_threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
        _CONFIG.pack_into(self._block, 0, *(*grid, 1, 1)[:3], num_threads, 1, 1, shared, 0, 0, 0)
        for word, offset in enumerate(self._offsets, _CONFIG.size // _WORD):
            self._words[word] = self._config + offset

    @classmethod
    def of(
        cls,
        compiled: Any,
        grid: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        arguments: Callable[..., tuple[Any, ...]],
        constants: tuple[Any, ...],
    ) -> Relaunch | None:
        """Ready for tensors like these, or None if the kernel takes what this file does not know how to hand over.

        Args:
            arguments: the kernel's arguments, from the tensors; the constants come after them.
        """
        device = next(tensor.device for tensor in tensors if tensor is not None)
        if device.type != "cuda" or torch.version.hip is not None or not _is_plain(compiled):
            return None
        # One tensor may come twice (as q and k); its stand-ins tell which of the parameters follows which.
        stand_ins = tuple(None if tensor is None else _stand_in(tensor) for tensor in tensors)
        parameters = parameters_of(compiled, (*arguments(*stand_ins), *constants))
        if parameters is None:
            return None
        made = cls(compiled, grid, device.index)
        return made if made._fill(parameters, stand_ins) else None

    def _fill(self, parameters: list[_Address | _Map | _Number], tensors: tuple[Tensor | None, ...]) -> bool:
        index_of = {id(tensor): index for index, tensor in enumerate(tensors) if tensor is not None}
        for at, parameter in zip(self._offsets, parameters, strict=False):
            if isinstance(parameter, _Number):
                struct.pack_into(parameter.code, self._block, at, parameter.value)
                continue
            tensor = parameter.tensor if isinstance(parameter, _Address) else parameter.descriptor.base
            if id(tensor) not in index_of:
                return False
            index = index_of[id(tensor)]
            if isinstance(parameter, _Address):
                self._addresses.append((at // _WORD, index))
            elif not _encode(self._config + at, parameter, tensor.data_ptr()):
                return False
            elif (word := self._word_of_address(at, parameter)) is not None:
                self._addresses.append((word, index))
            else:
                self._maps.append((self._config + at, index))
        return True

    def _word_of_address(self, at: int, parameter: _Map) -> int | None:
        """Where the address lies in a TMA descriptor, whose form is the driver's own: what changes, if it is one word.

        Writing it takes a tenth of the time of ``cuTensorMapReplaceAddress``.
        """
        address, moved = parameter.descriptor.base.data_ptr(), parameter.descriptor.base.data_ptr() + _ALIGNMENT
        first, num_words = at // _WORD, _MAP_BYTES // _WORD
        before = list(self._words[first : first + num_words])
        is_moved = _encode(self._config + at, parameter, moved)
        after = list(self._words[first : first + num_words])
        _encode(self._config + at, parameter, address)
        changed = [word for word in range(num_words) if before[word] != after[word]]
        if not is_moved or len(changed) != 1 or (before[changed[0]], after[changed[0]]) != (address, moved):
            return None
        return first + changed[0]

    @staticmethod
    def is_watched() -> bool:
        """Whether someone has asked Triton to be told of launches."""
        hooks = knobs.runtime
        return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)

    def __call__(self, tensors: tuple[Any, ...]) -> None:
        """Launches the kernel on the current stream of its device, which is the current one."""
        with self._lock:
            error = self._launch(tensors)
            if error:  # as in a thread that has not used CUDA yet
                _use_cuda(self._device)
                error = self._launch(tensors)
        if error:
            raise RuntimeError(f"CUDA driver error {error} ({_error_name(error)}) from the launch of a kernel")

    def _launch(self, tensors: tuple[Any, ...]) -> int:
        driver, words = _driver(), self._words
        words[_STREAM_WORD] = torch._C._cuda_getCurrentRawStream(self._device)
        for word, index in self._addresses:
            words[word] = tensors[index].data_ptr()
        for at, index in self._maps:
            if error := driver.cuTensorMapReplaceAddress(at, tensors[index].data_ptr()):
                return error
        return driver.cuLaunchKernelEx(self._config, self._function, self._parameters, None)


class Relaunches:
    """Kernels that are launched one after the other, all of the same tensors."""

    def __init__(self, *launches: Relaunch) -> None:
        self._launches = launches

    is_watched = staticmethod(Relaunch.is_watched)

    def __call__(self, tensors: tuple[Any, ...]) -> None:
        for launch in self._launches:
            launch(tensors)


def _stand_in(tensor: Tensor) -> Tensor:
    """Truth values as the bytes that kernels read."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()


def parameters_of(compiled: Any, arguments: tuple[Any, ...]) -> list[_Address | _Map | _Number] | None:
    """The values of the parameters that the kernel's PTX declares first, or None if they do not fit together.

    After them come addresses of scratch memory, 0 as long as a kernel needs none.
    """
    tilings = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    try:
        found = list(_parameters(compiled.src.signature.values(), arguments, tilings))
    except (KeyError, ValueError):  # a type, or a descriptor, of a kind that is not known here
        return None
    needed, declared = [_needs(parameter) for parameter in found], _declared(compiled)
    scratch = declared[len(needed) :]
    fits = declared == (*needed, *scratch) and set(scratch) <= {(_WORD, _WORD)}
    return found if fits else None


def _needs(parameter: _Address | _Map | _Number) -> tuple[int, int]:
    """(alignment, bytes)"""
    if isinstance(parameter, _Map):
        return _ALIGNMENT, _MAP_BYTES
    size = struct.calcsize(parameter.code) if isinstance(parameter, _Number) else _WORD
    return size, size


def _parameters(types: Any, values: Any, tilings: Iterator[dict[str, Any]]) -> Iterator[_Address | _Map | _Number]:
    """Without what is known when the kernel is compiled; tuples in place, and descriptors with their numbers."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value, tilings)
        elif kind.startswith("*"):
            yield _Address(value)
        elif kind.startswith("tensordesc"):
            tiling = next(tilings, None)
            if tiling is None:
                raise KeyError(kind)
            yield _Map(value, tiling)
            yield from (_Number("i", size) for size in value.shape)
            yield from (_Number("q", stride) for stride in value.strides)
        elif kind != "constexpr":
            yield _Number(_CODES[kind], value)


def _is_plain(compiled: Any) -> bool:
    """Whether a launch takes nothing but a grid and parameters."""
    metadata = compiled.metadata
    extras = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    return "ptx" in compiled.asm and metadata.num_ctas == 1 and not any(getattr(metadata, name, 0) for name in extras)


@lru_cache(maxsize=1024)
def _declared(compiled: Any) -> tuple[tuple[int, int], ...]:
    """(alignment, bytes) of each parameter, as the PTX says."""
    ptx = compiled.asm["ptx"]
    begin = ptx.index(".entry")
    found = _DECLARED.findall(ptx[begin : ptx.index(")", begin)])
    sizes = [(int(bits) // 8, int(align or 0), int(count or 1)) for align, bits, count in found]
    return tuple((align or size, size * count) for size, align, count in sizes)


def _offsets(declared: tuple[tuple[int, int], ...]) -> tuple[list[int], int]:
    """Where each parameter may begin, one after another, and where the last one ends."""
    offsets, end = [], 0
    for alignment, size in declared:
        begin = _rounded_up(end, alignment)
        offsets.append(begin)
        end = begin + size
    return offsets, end


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _encode(at: int, parameter: _Map, address: int) -> bool:
    """Writes the TMA descriptor as Triton's launcher would; False if it is of a kind that is not known here."""
    descriptor, tiling = parameter
    if tiling.get("fp4_padded") or tiling.get("is_im2col") or descriptor.padding != "zero":
        return False
    host_types = {8: 10, 9: 8, 10: 9}  # Triton's numbers are those of the device
    shape, strides, box = descriptor.shape[::-1], descriptor.strides[-2::-1], tiling["block_size"][::-1]
    rank = len(shape)
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        host_types.get(tiling["elem_type"], tiling["elem_type"]),
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * rank)(*(stride * tiling["elem_size"] for stride in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        tiling["swizzle"],
        _L2_PROMOTION_128B,
        0,
    )
    return error == 0


def _use_cuda(device: int) -> None:
    """The runtime, which torch uses, gives the thread the context that the driver asks for."""
    torch.zeros(1, device=f"cuda:{device}")


@lru_cache(maxsize=1)
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuTensorMapReplaceAddress.argtypes = [ctypes.c_void_p] * 2
    return library


def _error_name(error: int) -> str:
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(error, ctypes.byref(name))
    return (name.value or b"unknown").decode()

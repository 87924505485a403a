"""Gluon's names for Hopper, executed by torch on a CPU: what a kernel computes, and that its partitions do not race.

``install`` puts this in the place of Triton, for a whole process, before a kernel is imported. Kernels are then plain
Python functions, and their partitions threads that wait for each other at barriers of the same rules as the GPU's:

- a product that was issued reads shared memory only when it is waited for, so a slot given back too early is seen;
- a TMA store reads shared memory only when it is waited for, and a TMA load makes the tile NaN until it has arrived;
- a slot given back while the partition's own product reads it, a turn that is passed twice, an arrival too many, a
  store to shared memory that no fence follows, and a wait that nobody ends are errors;
- the PTX of inline assembly is executed, on all threads of the warps.

Layouts mean nothing here: Gluon's compiler checks those, and orders the threads of one partition among themselves.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gluon_emulator.global_memory import Pointer, TensorDescriptor, add, atomic_add, atomic_xchg, load, store
from gluon_emulator.program import Pauses, Program, arrive, pass_turn, take_turn, wait
from gluon_emulator.ptx import NUM_LANES, NUM_WARPS, KernelError, by_thread, from_threads, run_ptx
from gluon_emulator.registers import (
    DTYPES,
    Dtype,
    Int,
    Registers,
    as_scalar,
    elementwise,
    fma,
    maximum,
    minimum,
    plain,
    reduced,
    where,
)
from gluon_emulator.shared_memory import (
    Shared,
    allocate_shared_memory,
    expect,
    store_wait,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["Pauses", "Program", "install"]


def inline_asm(
    asm: str,
    constraints: str,
    args: list[Any],
    *,
    dtype: Dtype,
    is_pure: bool,
    pack: int,
) -> Registers | None:
    if named := re.fullmatch(r"bar\.(sync|arrive) (\d+), 256; mov\.b32 \$0, \$1;", asm):
        (take_turn if named[1] == "sync" else pass_turn)(int(named[2]))
        return None
    if "@stored st.global" in asm:
        pointers, numbers, is_stored = args
        (store if is_stored else add)(pointers, numbers)
        return None
    if "red.relaxed.gpu.global.add" in asm:
        add(*args[:2], *(each != 0 for each in args[2:]))
        return None
    if dtype is not DTYPES["float32"]:
        raise KernelError(f"assembly with results in {dtype}")
    tensors = torch.broadcast_tensors(*map(plain, args))
    inputs = [register for tensor in tensors for register in by_thread(tensor)]
    if len(inputs) != pack * len(args):
        raise KernelError(f"a thread has {len(inputs)} numbers, and the assembly takes {pack} of each")
    ties = [constraint for constraint in constraints.split(",") if not constraint.startswith("=")]
    registers = {f"${index}": torch.full((NUM_WARPS, NUM_LANES), torch.nan) for index in range(pack)}
    for index, (tie, value) in enumerate(zip(ties, inputs, strict=True)):
        registers[f"${tie}" if tie.isdigit() else f"${pack + index}"] = value.clone()
    run_ptx(asm, registers)
    return Registers(from_threads([registers[f"${index}"] for index in range(pack)], tensors[0].shape))


class Kernel:
    """A jitted function: called as itself, or launched on a grid, whose programs run one after another."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **constants: Any) -> Any:
        return self.function(*args, **constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
            arguments = [_argument(arg) for arg in args]
            for place in itertools.product(*map(range, grid)):
                Program.current = Program(place, grid)
                self.function(*arguments, **constants)

        return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer.of(value)
    if isinstance(value, tuple):
        inner = [_argument(each) for each in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return as_scalar(value)


def _jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Kernel if function is None else Kernel(function)


class Layout:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def get_default_for(cls, *args: Any) -> Layout:
        return cls(*args)


def _language() -> dict[str, Any]:
    layouts = (
        *("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "DistributedLinearLayout"),
        *("BlockedLayout", "SwizzledSharedLayout", "SliceLayout"),
    )
    return {
        **DTYPES,
        **dict.fromkeys(layouts, Layout),
        "constexpr": as_scalar,
        "static_range": range,
        "shared_memory_descriptor": Shared,
        "inline_asm_elementwise": inline_asm,
        "allocate_shared_memory": allocate_shared_memory,
        "warp_specialize": lambda *args: Program.current.run(*args),
        "barrier": lambda: None,
        "program_id": lambda axis: Int(Program.current.place[axis]),
        "num_programs": lambda axis: Int(Program.current.grid[axis]),
        "load": load,
        "store": store,
        "atomic_add": atomic_add,
        "atomic_xchg": atomic_xchg,
        "to_tensor": as_scalar,
        "cast": lambda value, dtype: as_scalar(value).to(dtype),
        "reshape": lambda value, shape: value.reshape(shape),
        "permute": lambda value, axes: value.permute(axes),
        "cdiv": lambda a, b: (a + b - 1) // b,
        "minimum": elementwise(min, minimum),
        "maximum": elementwise(max, maximum),
        "where": where,
        "fma": fma,
        "abs": elementwise(abs, torch.abs),
        "exp2": elementwise(lambda value: 2.0**value, torch.exp2),
        "log2": elementwise(math.log2, torch.log2),
        "sum": reduced("sum"),
        "max": reduced("max"),
        "arange": lambda begin, end, layout=None: Registers(torch.arange(begin, end, dtype=torch.int32), layout),
        "expand_dims": lambda value, axis: Registers(plain(value).unsqueeze(axis)),
        "convert_layout": lambda value, layout: Registers(plain(value), layout),
        "zeros": lambda shape, dtype, layout=None: Registers(torch.zeros(tuple(shape), dtype=dtype.torch), layout),
        "zeros_like": lambda value: Registers(torch.zeros_like(plain(value)), value.type.layout),
        "full_like": lambda value, number: Registers(torch.full_like(plain(value), number), value.type.layout),
    }


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents, __path__=[])
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], own, module)
    return module


def install() -> None:
    """Takes Triton's place in this process, in which it must not have been imported."""
    gluon = "triton.experimental.gluon"
    plain_names = {"jit": _jit, "constexpr_function": lambda function: function}
    mbarrier = types.SimpleNamespace(
        init=lambda barrier, count: barrier.init(count),
        wait=wait,
        arrive=arrive,
        expect=expect,
        MBarrierLayout=lambda: "barriers",
    )
    tma = types.SimpleNamespace(async_load=tma_load, async_store=tma_store, store_wait=store_wait)
    hopper = {
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
        "fence_async_shared": lambda: Program.current.issued.unfenced.clear(),
        "mbarrier": mbarrier,
        "tma": tma,
    }
    _module("triton", **plain_names, cdiv=lambda a, b: -(-a // b), __file__=__file__)
    _module("triton.knobs")
    _module("triton.runtime", driver=None)
    _module("triton.runtime.cache")
    _module("triton.language", **_language())
    _module("triton.experimental")
    _module(gluon, **plain_names)
    _module(f"{gluon}.language", **_language())
    _module(f"{gluon}.language.nvidia")
    _module(f"{gluon}.language.nvidia.hopper", **hopper)
    _module(f"{gluon}.nvidia")
    _module(f"{gluon}.nvidia.hopper", TensorDescriptor=TensorDescriptor)

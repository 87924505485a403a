"""Compiles the Triton kernels of one family's tile table for a GPU that is not there, and tells what they need.

    python triton_variants.py FAMILY KERNEL COLUMNS     prints one JSON object per variant

It goes through the launcher, with a driver that only knows the target: what is compiled is what would be launched.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from absent_gpu import DEVICES, needs, pretend

from flashtile.backends import relaunch
from flashtile.backends.assembler import older_assembler
from flashtile.backends.base import KernelPlan, Saved
from flashtile.backends.gpu import COMPILER_OPTIONS
from flashtile.backends.launcher import KernelLauncher
from flashtile.backends.triton import launch, plan, tiles
from flashtile.spec import devices, validation
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

BATCH, SEQLEN, HEADS_Q, HEADS_KV = 2, 256, 4, 2


def options(column: int, dtype: torch.dtype) -> dict[str, Any]:
    """Everything at once that a column of the tables stands for."""
    pairs = (BATCH, HEADS_Q, SEQLEN, SEQLEN)
    found: dict[str, Any] = {
        "causal": True,
        "window": (100, 0),
        "scale": None,
        "softcap": 0.0,
        "bias": None,
        "mask": None,
        "alibi_slopes": None,
        "sinks": torch.ones(HEADS_Q),
        "dropout_p": 0.0,
        "dropout_seed": None,
        "deterministic": False,
    }
    if column >= 1:
        bias = torch.zeros(pairs, dtype=dtype, requires_grad=True)
        found |= {"softcap": 30.0, "alibi_slopes": torch.ones(HEADS_Q)}
        found |= {"bias": bias, "mask": torch.ones(pairs, dtype=torch.bool)}
    if column >= 2:
        found |= {"dropout_p": 0.1, "dropout_seed": 1}
    return found


def special_case(case: str, dtype: torch.dtype) -> dict[str, Any]:
    """The one option that a special row of the tables is for."""
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "bias": {"bias": torch.zeros(1, HEADS_Q, SEQLEN, SEQLEN, dtype=dtype)},
        "mask": {"mask": torch.ones(1, 1, SEQLEN, SEQLEN, dtype=torch.bool)},
        "alibi": {"alibi_slopes": torch.ones(HEADS_Q)},
        "softcap": {"softcap": 30.0},
    }
    return cases[case]


def compiled(
    family: str, kernel: str, column: int, width: int, dtype: torch.dtype, heads_kv: int = HEADS_KV, **changes: Any
) -> Any:
    """The compiled kernel that a launch with these inputs would run."""
    shape = (BATCH, SEQLEN, HEADS_Q, width)
    q = torch.zeros(shape, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(BATCH, SEQLEN, heads_kv, width, dtype=dtype, requires_grad=True) for _ in range(2))
    call = options(column, dtype) | changes
    problem, operands = validation.check_call(q, k, v, **call, wants_lse=True, is_packed=False)
    wanted = {"forward": (), "backward_kv": ("k", "v"), "backward_q": ("q",), "bias_gradient": ("bias",)}[kernel]
    problem = replace(problem, gradients=frozenset(wanted))
    return launched(family, problem, operands)[kernel]


def compiled_packed(family: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every kernel for packed sequences, by name, with a gradient of the lse."""
    q = torch.zeros(SEQLEN, HEADS_Q, 64, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(SEQLEN, HEADS_KV, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    boundaries = torch.tensor([0, 100, SEQLEN], dtype=torch.int32)
    packing = {"cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries, "max_seqlen_q": SEQLEN, "max_seqlen_kv": SEQLEN}
    call = options(2, dtype) | packing
    problem, operands = validation.check_call(q, k, v, **call, wants_lse=True, is_packed=True)
    return launched(family, problem, operands)


def launched(family: str, problem: AttentionProblem, operands: Operands) -> dict[str, Any]:
    """What the launcher would launch, forward and backward, compiled, by the kernels' names."""
    made = plan.plan(problem, devices.by_name(DEVICES[family]))
    kernels: dict[str, Any] = {}

    def compile_only(
        launcher: KernelLauncher, planned: KernelPlan, _problem: Any, tensors: Any, arguments: Any, **constants: Any
    ) -> None:
        row = planned.tiles
        assert isinstance(row, tiles.GpuTiles)
        args = arguments(*tensors)
        constants |= {"BLOCK_Q": row.block_q, "BLOCK_KV": row.block_kv}
        options: dict[str, Any] = {"num_warps": row.num_warps, "num_stages": row.num_stages, **COMPILER_OPTIONS}
        with older_assembler() as more:
            kernel = launcher.kernel.warmup(*args, grid=(1,), **constants, **options, **more)
        if "ptx" in kernel.asm:
            values = (*args, *(constants[name] for name in kernel.src.signature if name in constants))
            assert relaunch.parameters_of(kernel, values) is not None, "the driver would not know what to launch"
        kernels[planned.kernel] = kernel

    launch._launch = compile_only
    with torch.no_grad():
        if not problem.gradients:
            launch.forward(problem, operands, made)
            return kernels
        if problem.layout == "varlen":
            launch.forward(problem, operands, made)
        saved = Saved(out=torch.zeros(problem.out_shape, dtype=problem.dtype), lse=torch.zeros(problem.lse_shape))
        launch.backward(problem, operands, saved, torch.zeros_like(saved.out), torch.zeros_like(saved.lse), made)
    return kernels


def mixes(family: str) -> Iterator[dict[str, Any]]:
    """The forward with every subset of the options: each is a tuple of its own among the arguments, or ``None``."""
    dtype, width = torch.bfloat16, 64
    choices = {name: special_case(name, dtype) for name in ("bias", "mask", "alibi", "softcap")}
    choices["dropout"] = {"dropout_p": 0.1, "dropout_seed": 1}
    for size in range(len(choices) + 1):
        for names in itertools.combinations(choices, size):
            changes = {key: value for name in names for key, value in choices[name].items()}
            found = needs(compiled(family, "forward", 0, width, dtype, **changes))
            yield {"dtype": str(dtype), "width": width, "column": "+".join(names), **found}


def odd_heads(family: str) -> Iterator[dict[str, Any]]:
    """Heads whose rows begin at no multiples of 16 bytes, which no kernel can copy ahead."""
    for width, kernel in itertools.product((9, 23, 50, 99), ("forward", "backward_kv", "backward_q")):
        found = needs(compiled(family, kernel, 0, width, torch.bfloat16))
        yield {"dtype": "torch.bfloat16", "width": width, "column": kernel, **found}


def negative_scales(family: str) -> Iterator[dict[str, Any]]:
    """Kernels that take a bias of 0, where the planner takes the problem."""
    kernels = {torch.bfloat16: ("forward", "backward_kv", "backward_q"), torch.float32: ("forward",)}
    for dtype, width in itertools.product(kernels, tiles.WIDTHS):
        rows = [tiles._TABLE[family][name, dtype.itemsize][width][1] for name in tiles.KERNELS[:-1]]
        for kernel in kernels[dtype] if None not in rows else ():
            changes: dict[str, Any] = {"window": None, "causal": False, "sinks": None, "scale": -0.5}
            found = needs(compiled(family, kernel, 0, width, dtype, HEADS_Q, **changes))
            yield {"dtype": str(dtype), "width": width, "column": kernel, **found}


def variants(family: str, kernel: str, columns: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """What the rows of the family's table need, special rows too; or another set of variants, by its name."""
    if kernel == "mixes":
        yield from mixes(family)
        return
    if kernel == "odd heads":
        yield from odd_heads(family)
        return
    if kernel == "negative scales":
        yield from negative_scales(family)
        return
    if kernel == "packed":
        for dtype in (torch.bfloat16, torch.float32):
            for name, found in compiled_packed(family, dtype).items():
                yield {"dtype": str(dtype), "width": 64, "column": name, **needs(found)}
        return
    for dtype, width in itertools.product((torch.bfloat16, torch.float32), tiles.WIDTHS):
        for column in columns:
            rows = [tiles._TABLE[family][name, dtype.itemsize][width][column] for name in tiles.KERNELS]
            if None in rows:
                continue  # the planner declines such problems
            if column > 0 or kernel != "bias_gradient":
                found = needs(compiled(family, kernel, column, width, dtype))
                yield {"dtype": str(dtype), "width": width, "column": column, **found}
        for case in tiles._SPECIAL.get((family, kernel, dtype.itemsize, width), {}) if 0 in columns else ():
            for causal in (False,) if case == "full" else (False, True):
                found = needs(
                    compiled(
                        family,
                        kernel,
                        0,
                        width,
                        dtype,
                        HEADS_Q,
                        window=None,
                        causal=causal,
                        **special_case(case, dtype),
                    )
                )
                yield {"dtype": str(dtype), "width": width, "column": case, **found}


if __name__ == "__main__":
    table, name, chosen = sys.argv[1:]
    pretend(table)
    for variant in variants(table, name, tuple(int(column) for column in chosen.split(","))):
        print(json.dumps(variant), flush=True)

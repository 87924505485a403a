"""The PTX of inline assembly, executed by torch on all threads of a partition at once: registers are [warps, lanes]."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NUM_WARPS = 4
"""Of a partition that computes."""
NUM_LANES = 32


class KernelError(AssertionError):
    """What the hardware would do wrong, or wait for forever."""


def by_thread(tensor: Tensor) -> list[Tensor]:
    """Registers [warps, 32 lanes] of [64, 4] or [64, groups, 4, 2], in the order in which a thread holds them.

    A warp has 16 rows, a thread two of them 8 apart, and neighbours of each row in turn.
    """
    rows = tensor.reshape(NUM_WARPS, 2, 8, -1, 4, 2 if tensor.dim() == 4 else 1)  # warp, half, row, group, thread, next
    return list(rows.permute(3, 1, 5, 0, 2, 4).reshape(-1, NUM_WARPS, NUM_LANES))


def from_threads(registers: list[Tensor], shape: Any) -> Tensor:
    neighbours = 2 if len(shape) == 4 else 1
    threads = torch.stack(registers).reshape(-1, 2, neighbours, NUM_WARPS, 8, 4)
    return threads.permute(3, 1, 4, 0, 5, 2).reshape(shape)


def run_ptx(asm: str, registers: dict[str, Tensor]) -> None:
    """Executes PTX for all warps at once; a warp that branches takes no part until the label."""
    statements = [part.strip() for part in asm.strip().removeprefix("{").removesuffix("}").split(";")]
    target = torch.full((NUM_WARPS, 1), -1)  # the statement that a warp has branched to
    labels = {part.partition(":")[0]: place for place, part in enumerate(statements) if ":" in part}

    def value(name: str) -> Tensor:
        if name.startswith("0f"):
            return torch.tensor(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return registers[name] if name in registers else torch.tensor(float(name))

    for place, statement in enumerate(statements):
        statement = statement.rpartition(":")[2].strip()
        if not statement or statement.startswith(".reg"):
            continue
        active = (target <= place).expand(NUM_WARPS, NUM_LANES)
        if branch := re.fullmatch(r"@!(\w+) bra\.uni (\w+)", statement):
            leaves = registers[branch[1]] == 0
            if bool((leaves.any(1) != leaves.all(1)).any()):
                raise KernelError("the threads of a warp branch apart")
            target = torch.where(leaves[:, :1] & active[:, :1], labels[branch[2]], target)
            continue
        operation, _, operands = statement.partition(" ")
        to, *names = (name.strip() for name in operands.split(","))
        if operation not in PTX:
            raise KernelError(f"unknown instruction: {statement}")
        result = PTX[operation](*map(value, names)).float().expand(NUM_WARPS, NUM_LANES)
        registers[to] = torch.where(active, result, registers.get(to, torch.nan))


def _shuffled(data: Tensor, lane: Tensor, clamp: Tensor, members: Tensor) -> Tensor:
    if (clamp, members) != (31, -1):
        raise KernelError("a shuffle of a part of a warp")
    return data[:, torch.arange(NUM_LANES) ^ int(lane)]


PTX: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "sub.f32": lambda a, b: a - b,
    "mul.f32": lambda a, b: a * b,
    "max.f32": torch.fmax,
    "setp.gt.f32": lambda a, b: a > b,
    "setp.gt.or.f32": lambda a, b, c: (a > b) | (c != 0),
    "setp.ne.u32": lambda a, b: a != b,
    "setp.neu.f32": lambda a, b: a != b,  # true of NaN, as in torch
    "setp.neu.or.f32": lambda a, b, c: (a != b) | (c != 0),
    "selp.f32": lambda a, b, c: torch.where(c != 0, a, b),
    "vote.sync.any.pred": lambda a, _: (a != 0).any(1, keepdim=True),
    "shfl.sync.bfly.b32": _shuffled,
}
"""Instructions on registers [warps, 32]; predicates are 0 or 1."""

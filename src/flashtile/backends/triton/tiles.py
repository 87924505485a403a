"""The tile tables: one literal row per GPU family, kernel, item size and head width. Nothing is tuned at run time.

The sm_90 rows for 16-bit inputs up to width 256 were chosen by timing candidates on an H200 (docs/triton.md). All
others are the largest candidates that do not spill registers and fit the family's shared memory, as the compilers of
Triton 3.6 and 3.9 report; nobody has timed them yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from flashtile.backends.base import TileConfig
from flashtile.backends.triton.constants import STATISTICS_ROWS
from flashtile.spec.devices import KIB, DeviceSpec
from flashtile.spec.problem import AttentionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTiles(TileConfig):
    """Tiles of a GPU kernel, and how it is compiled."""

    num_warps: int
    num_stages: int
    """Tiles of the streamed operands in flight."""


FAMILIES = {"sm_90": 227 * KIB, "sm_80": 163 * KIB, "sm_86": 99 * KIB, "gfx942": 64 * KIB}
"""Shared memory per program decides the family: newer GPUs use the rows of the largest that fits them."""

KERNELS = ("forward", "backward_kv", "backward_q", "bias_gradient")
WIDTHS = (64, 128, 256, 512)

Row = tuple[int, int, int, int]
"""(block_q, block_kv, num_warps, num_stages)"""

_TABLE: dict[str, dict[tuple[str, int], dict[int, tuple[Row | None, Row | None, Row | None]]]] = {
    "sm_90": {
        ("forward", 2): {
            64: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
            128: ((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
            256: ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
            512: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
        },
        ("forward", 4): {
            64: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
            128: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
            512: ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("backward_kv", 2): {
            64: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
            128: ((64, 128, 8, 3), (32, 128, 8, 2), (32, 32, 4, 2)),
            256: ((64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            512: ((32, 32, 8, 1), (16, 32, 8, 2), (32, 16, 8, 2)),
        },
        ("backward_kv", 4): {
            64: ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            128: ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
            256: ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
            512: ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
        },
        ("backward_q", 2): {
            64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)),
            128: ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
            256: ((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
            512: ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        },
        ("backward_q", 4): {
            64: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            128: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            512: ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
        },
        ("bias_gradient", 2): {
            64: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
            128: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1)),
            512: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
        },
        ("bias_gradient", 4): {
            64: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        },
    },
    "sm_80": {
        ("forward", 2): {
            64: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3)),
            128: ((128, 128, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2)),
            256: ((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
            512: ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        },
        ("forward", 4): {
            64: ((128, 32, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
            128: ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
            512: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("backward_kv", 2): {
            64: ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
            256: ((64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            512: ((32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1)),
        },
        ("backward_kv", 4): {
            64: ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            128: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            256: ((16, 32, 8, 2), (16, 32, 8, 2), (32, 16, 8, 2)),
            512: ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
        },
        ("backward_q", 2): {
            64: ((128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2)),
            128: ((128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
            512: ((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        },
        ("backward_q", 4): {
            64: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            128: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
            512: (None, (16, 16, 4, 2), (16, 16, 4, 2)),
        },
        ("bias_gradient", 2): {
            64: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 4, 1)),
            128: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 8, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        },
        ("bias_gradient", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        },
    },
    "sm_86": {
        ("forward", 2): {
            64: ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
            128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
            256: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            512: ((32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
        },
        ("forward", 4): {
            64: ((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
            128: ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
        },
        ("backward_kv", 2): {
            64: ((64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
            128: ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
            256: ((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            512: ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
        },
        ("backward_kv", 4): {
            64: ((32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
            128: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
            256: ((16, 32, 8, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
            512: (None, None, None),
        },
        ("backward_q", 2): {
            64: ((128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2)),
            128: ((128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
            256: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
            512: ((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
        },
        ("backward_q", 4): {
            64: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
            128: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
            256: ((16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
            512: (None, None, None),
        },
        ("bias_gradient", 2): {
            64: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 8, 1)),
            128: ((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 4, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        },
        ("bias_gradient", 4): {
            64: ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        },
    },
    "gfx942": {
        ("forward", 2): {
            64: ((128, 64, 8, 3), (16, 32, 4, 2), (16, 16, 4, 2)),
            128: ((128, 64, 8, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
            256: ((64, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
            512: ((32, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
        },
        ("forward", 4): {
            64: ((64, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
            128: ((64, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
            256: ((32, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
            512: ((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
        },
        ("backward_kv", 2): {
            64: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
            128: ((32, 32, 8, 1), (16, 32, 8, 2), (16, 32, 8, 1)),
            256: ((16, 32, 4, 2), (16, 32, 8, 2), (16, 32, 8, 1)),
            512: ((16, 16, 4, 2), (16, 16, 4, 1), None),
        },
        ("backward_kv", 4): {
            64: ((32, 32, 8, 1), (16, 32, 8, 2), (16, 32, 8, 1)),
            128: ((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
            256: ((16, 32, 4, 2), (16, 16, 4, 2), None),
            512: (None, None, None),
        },
        ("backward_q", 2): {
            64: ((128, 64, 8, 3), (32, 32, 8, 1), (16, 16, 4, 2)),
            128: ((64, 64, 4, 2), (32, 32, 8, 1), (16, 16, 4, 2)),
            256: ((64, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2)),
            512: ((64, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
        },
        ("backward_q", 4): {
            64: ((128, 32, 8, 2), (32, 32, 8, 1), (16, 32, 4, 2)),
            128: ((64, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
            256: ((64, 16, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
            512: (None, None, None),
        },
        ("bias_gradient", 2): {
            64: ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 8, 1)),
            128: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
            256: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            512: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        },
        ("bias_gradient", 4): {
            64: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
            128: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1)),
            256: ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
            512: ((16, 16, 4, 1), (16, 16, 4, 1), None),
        },
    },
}
"""Family -> (kernel, bytes of an item) -> width of a head -> rows by what is computed for each pair (``demand``).

``None`` where no tiles fit.
"""

_ONE_OPTION = ("bias", "mask", "alibi", "softcap")
_SPECIAL: dict[tuple[str, str, int, int], dict[str, Row]] = {
    ("sm_90", "forward", 2, 64): dict.fromkeys(_ONE_OPTION, (64, 64, 4, 3)),
    ("sm_90", "forward", 2, 128): {
        "full": (128, 128, 8, 3),
        "mask": (64, 64, 4, 2),
        "alibi": (64, 64, 4, 3),
        "softcap": (64, 64, 4, 3),
    },
    ("sm_90", "forward", 2, 256): dict.fromkeys(_ONE_OPTION, (128, 64, 8, 2)),
    ("sm_90", "backward_kv", 2, 64): dict.fromkeys(_ONE_OPTION, (64, 64, 4, 3)),
    ("sm_90", "backward_kv", 2, 128): dict.fromkeys(_ONE_OPTION, (64, 128, 8, 3)),
    ("sm_90", "backward_kv", 2, 256): dict.fromkeys(("bias", "mask", "alibi"), (64, 32, 4, 2)),
    ("sm_90", "backward_q", 2, 128): {"mask": (64, 64, 4, 2)},
}
"""Better rows for problems that are special in one way (``special_case``): kernels that do less have registers left."""

NEWER = (3, 9)
"""The first Triton that keeps a bias or mask of the dK/dV kernel in registers."""

_NEWER: dict[tuple[str, str, int, int], dict[str, Row]] = {
    ("sm_90", "backward_kv", 2, 128): dict.fromkeys(("bias", "mask", "alibi"), (64, 128, 8, 2)),
}
"""Special rows that ``NEWER`` Tritons use instead, since their kernels are faster so (docs/triton.md)."""


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """Of the installed Triton, which is not imported; (0, 0) where there is none, and plans are for other machines."""
    try:
        numbers = re.match(r"(\d+)\.(\d+)", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        return (0, 0)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def widths(problem: AttentionProblem) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_DV), the widths of tiles that hold a head: the matrix units take powers of two from 16 on.

    Below 64 both are alike: shared memory is arranged by width there, and where Triton 3.6 put tiles of two
    arrangements into the same place, an H200 multiplied wrong numbers.
    """
    width, width_v = (1 << (head_dim - 1).bit_length() for head_dim in (problem.head_dim, problem.head_dim_v))
    narrowest = max(16, min(64, max(width, width_v)))
    return max(width, narrowest), max(width_v, narrowest)


def family(device: DeviceSpec) -> str:
    """The table that serves a device."""
    if device.kind in ("cpu", "rocm"):  # on a CPU the interpreter runs, and no tile is better than another
        return "gfx942"
    return next((name for name, size in FAMILIES.items() if device.shared_memory_bytes >= size), "gfx942")


def takes_bias(problem: AttentionProblem) -> bool:
    """Whether kernels add a bias: one of 0 where scores come with no option, and a scale that is not positive.

    Without options they find each row's maximum before they scale, which needs a positive scale.
    """
    is_plain = not (problem.softcap or problem.has_alibi)
    return problem.bias_shape is not None or (is_plain and problem.scale <= 0)


def demand(problem: AttentionProblem) -> int:
    """What a pair needs beyond its product: 0 nothing but a window, 1 other changes of its score, 2 random numbers."""
    if problem.dropout_p > 0:
        return 2
    has_pair_operand = takes_bias(problem) or problem.mask_shape is not None
    return int(has_pair_operand or problem.has_alibi or problem.softcap > 0)


def special_case(problem: AttentionProblem) -> str:
    """The only option, if neither groups nor a left window; "full": no option, no window; else "ordinary"."""
    is_there = (takes_bias(problem), problem.mask_shape is not None, problem.has_alibi, problem.softcap > 0)
    found = [name for name, is_used in zip(_ONE_OPTION, is_there, strict=True) if is_used]
    if problem.dropout_p > 0 or len(found) > 1:
        return "ordinary"
    if not found:
        return "full" if problem.mask.is_unlimited else "ordinary"
    return found[0] if problem.heads_per_kv == 1 and problem.mask.left is None else "ordinary"


def tiles_for(problem: AttentionProblem, table: str) -> dict[str, GpuTiles]:
    """The tiles of the problem's kernels by name, from one family's table; those that fit nowhere are left out."""
    width = max(WIDTHS[0], *widths(problem))
    itemsize, column, case = problem.dtype.itemsize, demand(problem), special_case(problem)
    rows: dict[str, Row | None] = {"row_statistics": (max(8, min(STATISTICS_ROWS, 4096 // width)), 1, 4, 1)}
    for kernel in kernels_of(problem):
        key = (table, kernel, itemsize, width)
        special = _SPECIAL.get(key, {})
        if triton_version() >= NEWER:
            special = special | _NEWER.get(key, {})
        rows[kernel] = special.get(case, _TABLE[table][kernel, itemsize][width][column])
    return {
        kernel: GpuTiles(block_q=row[0], block_kv=row[1], num_warps=row[2], num_stages=row[3])
        for kernel, row in rows.items()
        if row is not None
    }


def kernels_of(problem: AttentionProblem) -> tuple[str, ...]:
    """The kernels with a row in the tables that the problem runs, forward and backward."""
    return KERNELS if "bias" in problem.gradients else KERNELS[:-1]

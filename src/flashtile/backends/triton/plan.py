"""Which tiles the Triton kernels run with, and what they decline. Imports no Triton: plans are made on any machine."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flashtile import settings
from flashtile.backends import gpu
from flashtile.backends.base import KernelPlan, Plan
from flashtile.backends.triton.constants import FARTHEST_ROWS, STATISTICS_ROWS
from flashtile.backends.triton.tiles import GpuTiles, family, kernels_of, tiles_for, widths
from flashtile.spec import units
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 512
LONGEST = 2**30
"""Positions, and sums of two of them, are 32-bit integers in the kernels."""
MOST_PROGRAMS = 2**31 - 1
PROGRAMS_PER_SM = 2
"""What a sum that is shared between programs is cut into."""


def rejects(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
    reasons = list(_rejects_device(device))
    if problem.dtype not in DTYPES:
        reasons.append(f"multiplies float16, bfloat16 and float32, not {units.dtype_name(problem.dtype)}")
    for name, head_dim in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if head_dim > LARGEST_HEAD_DIM:
            reasons.append(f"takes head_dim up to {LARGEST_HEAD_DIM}, and {name} is {head_dim}")
    token_items = problem.heads_q * max(problem.head_dim, problem.head_dim_v)
    if token_items > FARTHEST_ROWS:
        reasons.append(f"takes tokens of up to {FARTHEST_ROWS:,} elements in all heads, and these have {token_items:,}")
    for name, length in (("seqlen_q", problem.seqlen_q), ("seqlen_kv", problem.seqlen_kv)):
        if length > LONGEST:
            reasons.append(f"takes sequences up to {LONGEST:,} tokens, and {name} is {length:,}")
    if not reasons:
        tiles = tiles_for(problem, family(device))
        lacking = [kernel for kernel in kernels_of(problem) if kernel not in tiles]
        if lacking:
            widest = max(problem.head_dim, problem.head_dim_v)
            reasons.append(
                f"has no tiles that fit {device.name} for its {' and '.join(lacking)} kernel, with "
                f"{units.dtype_name(problem.dtype)}, head_dim {widest} and these options"
            )
    if not reasons:
        made = plan(problem, device)
        sizes = {kernel.kernel: math.prod(kernel.grid) for kernel in (made.forward, made.backward)}
        reasons += [
            f"its {kernel} kernel would need {size:,} programs, and a GPU takes {MOST_PROGRAMS:,}"
            for kernel, size in sizes.items()
            if size > MOST_PROGRAMS
        ]
    return tuple(reasons)


def _rejects_device(device: DeviceSpec) -> tuple[str, ...]:
    if device.kind == "cpu":
        if settings.interprets_triton():
            return ()
        return ("runs on GPUs, and on CPU tensors only if TRITON_INTERPRET=1 is set",)
    if device.kind not in ("cuda", "rocm"):
        return (f"runs on NVIDIA and AMD GPUs, these tensors are on {device.name}",)
    if device.compute_capability is not None and device.compute_capability < (8, 0):
        major, minor = device.compute_capability
        return (f"needs compute capability 8.0 or newer, {device.name} has {major}.{minor}",)
    if gpu.lacks_triton():
        return ("Triton is not installed; torch's GPU wheels bring it on Linux, else: pip install triton",)
    return ()


def plan(problem: AttentionProblem, device: DeviceSpec) -> Plan:
    return plan_with(problem, device, tiles_for(problem, family(device)))


def plan_with(problem: AttentionProblem, device: DeviceSpec, tiles: dict[str, GpuTiles]) -> Plan:
    """The plan with given tiles for each kernel, as ``tiles_for`` returns them."""
    kernels = {name: _kernel_plan(name, problem, device, tiles[name]) for name in tiles}
    names = ["row_statistics", "backward_q"]
    if "bias" in problem.gradients:
        names.append("bias_gradient")
    return Plan(
        backend="triton",
        forward=kernels["forward"],
        backward=replace(kernels["backward_kv"], companions=tuple(kernels[name] for name in names)),
        reason=f"Triton kernels with the tiles of {family(device)}",
    )


def _kernel_plan(kernel: str, problem: AttentionProblem, device: DeviceSpec, tiles: GpuTiles) -> KernelPlan:
    return KernelPlan(
        kernel=kernel,
        tiles=tiles,
        grid=_grid(kernel, problem, device, tiles),
        shared_memory_bytes=shared_memory_bytes(kernel, problem, tiles),
        reason=f"{tiles.num_warps} warps, {tiles.num_stages} stages",
    )


def _grid(kernel: str, problem: AttentionProblem, device: DeviceSpec, tiles: GpuTiles) -> tuple[int, ...]:
    num_q_tiles, num_kv_tiles = -(-problem.seqlen_q // tiles.block_q), -(-problem.seqlen_kv // tiles.block_kv)
    if kernel == "backward_kv":
        return (problem.batch, problem.heads_kv, num_kv_tiles)
    if kernel == "row_statistics":  # fills up whole blocks
        num_blocks = -(-problem.seqlen_q // STATISTICS_ROWS)
        return (problem.batch, problem.heads_q, num_blocks * (STATISTICS_ROWS // tiles.block_q))
    if kernel == "bias_gradient":
        return _bias_gradient_grid((problem.batch, problem.heads_q, num_q_tiles, num_kv_tiles), problem, device)
    return (problem.batch, problem.heads_q, num_q_tiles)


def _bias_gradient_grid(
    score_tiles: tuple[int, int, int, int], problem: AttentionProblem, device: DeviceSpec
) -> tuple[int, int]:
    """(tiles of the bias, shares into which the sum over the axes that it broadcasts is cut)."""
    shape = problem.bias_shape or (1, 1, 1, 1)
    num_tiles = math.prod(1 if size == 1 else count for size, count in zip(shape, score_tiles, strict=True))
    num_terms = math.prod(score_tiles) // max(num_tiles, 1)
    return num_tiles, max(1, min(num_terms, PROGRAMS_PER_SM * device.num_sms // max(num_tiles, 1)))


def shared_memory_bytes(kernel: str, problem: AttentionProblem, tiles: GpuTiles) -> int:
    """What one program keeps in shared memory: its own tiles, and ``num_stages`` of those that stream past."""
    (width, width_v), itemsize = widths(problem), problem.dtype.itemsize
    rows_of_q, rows_of_kv = {
        "forward": (tiles.block_q * width, tiles.block_kv * (width + width_v)),
        "backward_q": (tiles.block_q * (width + width_v), tiles.block_kv * (width + width_v)),
        "backward_kv": (tiles.block_kv * (width + width_v), tiles.block_q * (width + width_v)),
    }.get(kernel, (0, 0))
    return (rows_of_q + tiles.num_stages * rows_of_kv) * itemsize

"""Which CPU kernel serves a problem: torch's fused op where it serves the whole of it, else our tiles."""

from __future__ import annotations

import torch

from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

TILES = TileConfig(block_q=256, block_kv=512)
TILES_16BIT, TILES_16BIT_MANY_HEADS = TileConfig(block_q=512, block_kv=512), TileConfig(block_q=256, block_kv=256)
FEW_HEADS = 4
"""A tile holds every head of a sequence; up to this many, the larger one stays in the cache."""
LONG, WIDE = 1024, 64
"""Keys and head_dim from which bfloat16 tiles beat torch's fused op, given ``FEW_HEADS * LONG`` keys over all heads; by
1.1x to 2.5x (benchmarks/results/cpu_epyc_2core.json). Below, the steps between the products cost more."""


def rejects(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
    return () if device.kind == "cpu" else (f"runs on CPU tensors only, these are on {device.name}",)


def plan(problem: AttentionProblem, device: DeviceSpec) -> Plan:
    kernel, tiles, reason = _kernel(problem, device)
    planned = KernelPlan(
        kernel=kernel,
        tiles=tiles,
        grid=(-(-max(problem.tokens_q, 1) // tiles.block_q),),
        shared_memory_bytes=problem.heads_q * tiles.block_q * tiles.block_kv * problem.accumulation_dtype.itemsize,
        reason=reason,
    )
    return Plan(backend="cpu", forward=planned, backward=planned, reason=reason)


def _kernel(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, TileConfig, str]:
    """(kernel, tiles, reason)."""
    has_fast_bfloat16 = device.flops_per_s_16bit > device.flops_per_s_32bit
    is_long = problem.seqlen_kv >= LONG and problem.seqlen_kv * problem.heads_q >= LONG * FEW_HEADS
    if problem.dtype == torch.bfloat16 and has_fast_bfloat16 and is_long and problem.head_dim >= WIDE:
        tiles = TILES_16BIT if problem.heads_q <= FEW_HEADS else TILES_16BIT_MANY_HEADS
        return "tiled_16bit", tiles, f"from {LONG} keys and head_dim {WIDE} on, bfloat16 tiles are the fastest here"
    beyond_fused = _beyond_fused(problem)
    if beyond_fused:
        return "tiled", TILES, "tiles in plain torch, because torch's fused CPU op lacks " + ", ".join(beyond_fused)
    return "torch_fused", TILES, "torch's fused CPU op serves the whole problem and is faster than tiles in Python"


def _beyond_fused(problem: AttentionProblem) -> tuple[str, ...]:
    """What the problem has that torch's fused CPU op lacks."""
    is_plain_causal = problem.mask.is_causal and problem.mask.left is None
    checks = {
        "packed sequences": problem.layout == "varlen",
        "a scale that is not positive": problem.scale <= 0,
        "empty tensors": problem.is_empty,
        "windows": not (problem.mask.is_unlimited or is_plain_causal),
        "bottom-right causal alignment": is_plain_causal and problem.seqlen_q != problem.seqlen_kv,
        "head_dim_v != head_dim": problem.head_dim_v != problem.head_dim,
        "softcap": problem.softcap > 0,
        "a bias": problem.bias_shape is not None,
        "a boolean mask": problem.mask_shape is not None,
        "ALiBi": problem.has_alibi,
        "sinks": problem.has_sinks,
        "dropout": problem.dropout_p > 0,
        "a gradient through the lse": "lse" in problem.gradients,
    }
    return tuple(name for name, is_present in checks.items() if is_present)

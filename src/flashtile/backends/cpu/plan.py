"""Which CPU kernel serves a problem: torch's fused op where it serves the whole of it, else our tiles."""

from __future__ import annotations

from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

TILES = TileConfig(block_q=256, block_kv=512)
"""The fastest of 128, 256, 512 by 512 for 4k tokens, float32 and bfloat16, on two cores."""


def rejects(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
    return () if device.kind == "cpu" else (f"runs on CPU tensors only, these are on {device.name}",)


def plan(problem: AttentionProblem, device: DeviceSpec) -> Plan:
    beyond_fused = _beyond_fused(problem)
    kernel = "tiled" if beyond_fused else "torch_fused"
    why = (
        "torch's fused CPU op does not take " + ", ".join(beyond_fused)
        if beyond_fused
        else "torch's fused CPU op takes the whole problem and measures faster than tiles in Python"
    )
    num_q_tiles = -(-max(problem.tokens_q, 1) // TILES.block_q)
    planned = KernelPlan(
        kernel=kernel,
        tiles=TILES,
        grid=(num_q_tiles,),
        shared_memory_bytes=problem.heads_q * TILES.block_q * TILES.block_kv * problem.accumulation_dtype.itemsize,
        reason=why,
    )
    return Plan(backend="cpu", forward=planned, backward=planned, reason=why)


def _beyond_fused(problem: AttentionProblem) -> tuple[str, ...]:
    """What the problem has that torch's fused CPU op lacks."""
    is_plain_causal = problem.mask.is_causal and problem.mask.left is None
    checks = {
        "packed sequences": problem.layout == "varlen",
        "empty tensors": problem.is_empty,
        "a window": not (problem.mask.is_unlimited or is_plain_causal),
        "causal attention with seqlen_q != seqlen_kv": is_plain_causal and problem.seqlen_q != problem.seqlen_kv,
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

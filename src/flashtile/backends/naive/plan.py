"""The naive formula takes every problem on every device."""

from __future__ import annotations

from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem


def rejects(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
    return ()


def plan(problem: AttentionProblem, device: DeviceSpec) -> Plan:
    kernel = KernelPlan(
        kernel="formula",
        tiles=TileConfig(block_q=max(problem.seqlen_q, 1), block_kv=max(problem.seqlen_kv, 1)),
        grid=(1,),
        shared_memory_bytes=0,
        reason="one tile, the whole score matrix, in device memory",
    )
    return Plan(
        backend="naive",
        forward=kernel,
        backward=kernel,
        reason="the textbook formula runs everywhere, at the price of storing every score",
    )

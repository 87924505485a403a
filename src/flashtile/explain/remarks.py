"""Where tiles gain nothing, and what to know when reading the numbers: rules derived from the numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flashtile.backends.base import Plan
from flashtile.spec import accounting, units
from flashtile.spec.accounting import Comparison, Term
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

CALL_S = 100e-6
"""What Python and torch's dispatcher take for one call at least: less work than this waits for them."""

NEAR = 1.5
"""Bounds closer than this factor decide nothing: real kernels miss their bounds by more."""


def not_faster(problem: AttentionProblem, device: DeviceSpec, plan: Plan | None, forward: Comparison) -> Iterator[str]:
    """Why tiles gain little or nothing over the naive formula, one sentence or two each."""
    if problem.is_empty:
        yield "There is no (query, key) pair, so nothing is computed."
        return
    yield from _limits_of_the_plan(device, plan)
    yield from _limits_of_the_problem(problem, device, forward)
    yield from _limits_of_the_device(problem, device, forward)


def _limits_of_the_plan(device: DeviceSpec, plan: Plan | None) -> Iterator[str]:
    if plan is not None and plan.backend == "naive":
        yield (
            "Nothing is faster today: this plan is the naive formula itself. The tiled column shows what a tiled "
            f"kernel on {device.name} would need."
        )
    if plan is not None and plan.forward.kernel == "torch_fused":
        yield "This plan runs torch's own fused CPU op: as fast as F.scaled_dot_product_attention, not faster."


def _limits_of_the_problem(problem: AttentionProblem, device: DeviceSpec, forward: Comparison) -> Iterator[str]:
    scores = accounting.score_matrix_bytes(problem)
    if scores <= device.l2_bytes:
        yield (
            f"The whole score matrix ({units.in_bytes(scores)}) fits into the cache "
            f"({units.in_bytes(device.l2_bytes)}): storing it costs little, and the naive formula can beat its bound."
        )
    operands = _sum(forward.tiled.traffic, "read q", "read k")
    if 2 * operands > forward.naive.traffic_bytes:
        yield (
            f"Reading q, k and v is {min(operands / forward.naive.traffic_bytes, 1):.0%} of the naive formula's "
            "traffic as well (few queries for many keys, or short sequences), and tiles cannot save that."
        )
    score_operands = _sum(forward.tiled.traffic, "read bias", "read mask")
    if 2 * score_operands > forward.tiled.traffic_bytes:
        yield (
            f"Bias and mask are {units.in_bytes(score_operands)} of the {units.in_bytes(forward.tiled.traffic_bytes)} "
            "that tiles move. causal, window and alibi_slopes move nothing: use them where they say the same."
        )
    naive_s, tiled_s = forward.naive_time.seconds, forward.tiled_time.seconds
    if naive_s < NEAR * tiled_s:
        yield (
            f"The naive formula's bound is near the tiled one ({units.in_seconds(naive_s)} against "
            f"{units.in_seconds(tiled_s)}, set by {forward.tiled_time.binds}): tiles save memory here, hardly time."
        )


def _limits_of_the_device(problem: AttentionProblem, device: DeviceSpec, forward: Comparison) -> Iterator[str]:
    if not device.has_matrix_units_for(problem.dtype):
        yield (
            f"{device.name} has no matrix units for {units.dtype_name(problem.dtype)}: its real rate is far below "
            "the peak that the bounds use."
        )
    if forward.tiled_time.seconds < CALL_S:
        remedy = "put more work into a call" + ("" if device.kind == "cpu" else ", or capture a CUDA graph")
        yield (
            f"The bound of {units.in_seconds(forward.tiled_time.seconds)} is shorter than what a call takes in Python "
            f"(about {units.in_seconds(CALL_S)}): {remedy}."
        )
    if device.kind == "cpu":
        return
    programs = problem.batch * problem.heads_q * -(-problem.seqlen_q // forward.tiling.block_q)
    if programs < device.num_sms:
        yield (
            f"Only {programs} program{'s' if programs > 1 else ''} (batch x heads x query tiles) for {device.num_sms} "
            "SMs: the others idle unless a kernel splits the keys as well."
        )


def notes(
    problem: AttentionProblem,
    device: DeviceSpec,
    plan: Plan | None,
    costs: Sequence[Comparison],
    *,
    are_lengths_known: bool,
) -> Iterator[str]:
    """What to know when reading the numbers."""
    for cost in costs:
        if device.kind in ("cuda", "rocm") and device.memory_bytes < cost.naive.extra_bytes:
            yield (
                f"The naive {cost.direction} does not fit: beyond its operands it holds "
                f"{units.in_bytes(cost.naive.extra_bytes)}, and {device.name} has "
                f"{units.in_bytes(device.memory_bytes)}."
            )
    if problem.layout == "varlen" and not are_lengths_known:
        yield "Lengths unknown: every sequence counts as the longest, so FLOPs and bytes are upper bounds."
    if problem.mask_shape is not None:
        yield "Pairs that the boolean mask hides count as visible, so the FLOPs are an upper bound."
    for split in (cost.tiling.split for cost in costs if cost.tiling.split is not None):
        yield (
            "Backward: q @ k.T and d_out @ v.T are computed twice, for d_k, d_v and for d_q: seven products instead "
            "of five, in exchange for no atomics (bitwise repeatable) and no sums of d_q in memory."
            + (" The gradient of the bias computes both once more." if split.bias_tiles is not None else "")
        )
    if plan is not None and plan.backend == "naive":
        dtype = problem.accumulation_dtype
        rate = f"{units.dtype_name(dtype)}, {device.flops_per_s(dtype) / 1e12:.3g} TFLOP/s here"
        yield (
            "The naive column is the formula at its best, one pass for each step. flashtile's naive backend makes a "
            f"pass for each torch op and multiplies in {rate}: expect several times the least time."
        )
    if device.is_guess:
        yield f"The rates of {device.name} are {device.source}. Trust the ratios more than the times."
    yield "FLOPs are matrix products; softmax, masks and random numbers come on top. Kernels stay below peak rates."


def _sum(terms: Sequence[Term], *beginnings: str) -> int:
    return sum(term.num_bytes for term in terms if term.what.startswith(beginnings))

"""Fills the kernels' arguments from operands and plan, and launches them. Reads no tensor value on the host."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, Plan, Saved
from flashtile.backends.gpu import Heads, Sequences, device_of
from flashtile.backends.hopper import arguments
from flashtile.backends.hopper.arguments import tma_ready
from flashtile.backends.hopper.backward import attention_backward
from flashtile.backends.hopper.backward_narrow import attention_backward_narrow
from flashtile.backends.hopper.backward_wide import attention_backward_wide
from flashtile.backends.hopper.combine import attention_combine
from flashtile.backends.hopper.constants import LOG2_E, ROWS, STATISTICS_ROWS, SUM_ROWS
from flashtile.backends.hopper.forward import attention_forward
from flashtile.backends.hopper.plan import (
    BackwardTiles,
    ForwardTiles,
    forward_problem,
    heads_together,
    num_q_slots,
    num_shares,
    order_of_heads,
    out_columns,
    takes_further_shares,
    widths,
)
from flashtile.backends.hopper.statistics import attention_row_statistics, attention_scale_d_q
from flashtile.backends.launcher import (
    MOST_FORMS,
    KernelLauncher,
    operands_of,
    result_maker,
    shortest,
    tensor_maker,
)
from flashtile.backends.relaunch import Relaunch, Relaunches
from flashtile.spec import devices
from flashtile.spec.operands import Operands, tensors_of
from flashtile.spec.problem import AttentionProblem

_FORWARD = KernelLauncher(attention_forward)
_COMBINE = KernelLauncher(attention_combine)
_ROW_STATISTICS = KernelLauncher(attention_row_statistics)
_SCALE_D_Q = KernelLauncher(attention_scale_d_q)

_BACKWARD: dict[str, tuple[KernelLauncher, dict[str, int]]] = {
    "backward_narrow": (
        KernelLauncher(attention_backward_narrow),
        {"CONSUMER_REGISTERS": 200, "D_Q_REGISTERS": 88, "LOADER_REGISTERS": 24},
    ),
    "backward": (KernelLauncher(attention_backward), {"CONSUMER_REGISTERS": 240, "LOADER_REGISTERS": 24}),
    "backward_wide": (
        KernelLauncher(attention_backward_wide),
        {"CONSUMER_REGISTERS": 240, "LOADER_REGISTERS": 24},
    ),
}
"""Kernel -> itself, and the registers of its partitions' threads."""

_REGISTERS = {2: (240, 24), 3: (160, 32)}
"""By the number of consumers: registers of a consumer's threads and of the loader's; in all 64 Ki for an SM."""


def forward(problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
    return _forward(problem, operands, plan)[0]


def forward_again(
    problem: AttentionProblem, operands: Operands, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Callable[..., tuple[Tensor, Tensor]] | None]:
    """``forward``, and the shortest way to it for tensors of these sizes, strides and dtypes, if there is one."""
    results, launch = _forward(problem, operands, plan)
    make_results = _results_of(problem, plan, operands.q.device)
    return results, shortest(launch, operands, make_results, lambda operands: forward(problem, operands, plan))


def _forward(
    problem: AttentionProblem, operands: Operands, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Relaunch | Relaunches | None]:
    """(out, lse), and what launches the same with other tensors, unless those have to be copied first."""
    out, lse, *others = _results_of(problem, plan, operands.q.device)()
    if problem.layout == "varlen":  # rows that belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)
    computed = forward_problem(problem)
    q, rows = operands.q, out
    if computed is not problem:
        q, rows = (arguments.heads_as_rows(tensor, problem.heads_per_kv) for tensor in (q, out))
    ready = [tma_ready(tensor) for tensor in (q, operands.k, operands.v)]
    is_copied = any(map(operator.is_not, ready, (q, operands.k, operands.v)))
    operands = replace(operands, **dict(zip("qkv", ready, strict=True)))
    tensors = (*tensors_of(operands), rows, lse.view(computed.lse_shape), *others)
    with device_of(operands.q):
        launch: Relaunch | Relaunches | None = _launch_forward(computed, tensors, plan)
        if plan.forward.companions:
            second = _launch_combine(computed, tensors, plan)
            launch = None if launch is None or second is None else Relaunches(launch, second)
    return (out, lse), None if is_copied else launch


def _launch_forward(computed: AttentionProblem, tensors: tuple[Any, ...], plan: Plan) -> Relaunch | None:
    """Fills out and lse, or those of the parts of the keys; returns what launches the same with other tensors.

    Args:
        tensors: the operands, and what ``_results_of`` makes.
    """
    tiles = _tiles_of(plan)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (out, lse, counter, *parts) = operands_of(tensors)
        sinks = operands.sinks
        if parts:  # which have no sink, or it would count in each
            out, lse, sinks = *parts, None
        width, width_v = widths(computed)
        columns = out_columns(computed, tiles)
        return (
            arguments.descriptor(operands.q, ROWS, width),
            arguments.descriptor(operands.k, tiles.block_kv, width),
            arguments.descriptor(operands.v, tiles.block_kv, width_v),
            arguments.descriptor(out, ROWS, columns) if columns else None,
            arguments.matrix(out),
            lse,
            lse.shape[-1],
            sinks,
            arguments.score_rules(computed, operands),
            Sequences(operands.cu_seqlens_q, operands.cu_seqlens_kv),
            Heads(computed.heads_q, computed.heads_per_kv),
            computed.batch,
            *order_of_heads(computed, tiles, devices.detect(out.device)),
            tiles.num_splits if parts else None,
            counter,
            computed.seqlen_q,
            computed.seqlen_kv,
        )

    consumer_registers, loader_registers = _REGISTERS[tiles.num_consumers]
    return _FORWARD(
        (computed, tiles),
        plan.forward.grid,
        tensors,
        kernel_arguments,
        num_warps=4,
        HEAD_DIM_V=computed.head_dim_v,
        BLOCK_KV=tiles.block_kv,
        NUM_CONSUMERS=tiles.num_consumers,
        NUM_Q_SLOTS=num_q_slots(computed),
        NUM_STAGES=tiles.num_stages,
        IN_TURN=tiles.is_in_turn,
        CONSUMER_REGISTERS=consumer_registers,
        LOADER_REGISTERS=loader_registers,
    )


def _launch_combine(computed: AttentionProblem, tensors: tuple[Any, ...], plan: Plan) -> Relaunch | None:
    """Fills out and lse from those of the parts; as ``_launch_forward``."""
    tiles = _tiles_of(plan)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (out, lse, _counter, out_parts, lse_parts) = operands_of(tensors)
        return (
            out_parts,
            lse_parts,
            tiles.num_splits,
            operands.sinks,
            arguments.matrix(out),
            lse,
        )

    (combine,) = plan.forward.companions
    return _COMBINE(
        (computed, tiles),
        combine.grid,
        tensors,
        kernel_arguments,
        num_warps=4,
        HEAD_DIM_V=computed.head_dim_v,
        BLOCK_DV=widths(computed)[1],
    )


def _tiles_of(plan: Plan) -> ForwardTiles:
    tiles = plan.forward.tiles
    assert isinstance(tiles, ForwardTiles), "the planner of this backend makes these"
    return tiles


@lru_cache(maxsize=MOST_FORMS)
def _results_of(problem: AttentionProblem, plan: Plan, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Makes out, lse, the counter of the shares that programs take after their first one, and out and lse of parts.

    Without any such share nobody reads the counter, and one that holds anything will do. Parts of the keys have results
    [parts * batch, ..] of what ``forward_problem`` says, float32.
    """
    tiles, computed = _tiles_of(plan), forward_problem(problem)
    is_read = num_shares(computed, tiles) > plan.forward.grid[0]
    unread = None if is_read else _unread_counter(device)
    make_two = result_maker(problem, device)
    makers: list[Callable[[], Tensor]] = []
    if tiles.num_splits > 1:
        of_parts = replace(computed, batch=tiles.num_splits * computed.batch)
        makers = [tensor_maker(shape, torch.float32, device) for shape in (of_parts.out_shape, of_parts.lse_shape)]

    def make() -> tuple[Tensor, ...]:
        counter = _counter(device) if unread is None else unread
        return (*make_two(), counter, *(make_one() for make_one in makers))

    return make


def _counter(device: torch.device) -> Tensor:
    """A counter that is 0 when a kernel on the device's current stream begins.

    Kernels set it back to 0 (``scheduling.next_share``), and those of one stream run one after another: so all calls on
    the default stream, whose handle is 0, take the same one. A launch that fails runs no program, and leaves it 0; a
    kernel that is broken off takes the process's use of the device with it. Calls on any other stream may run beside
    those, or be captured in a graph: each has a counter of its own.
    """
    if device.type == "cuda" and torch._C._cuda_getCurrentRawStream(device.index) == 0:
        return _counter_of_default_stream(device)
    return _new_counter(device)


@lru_cache(maxsize=64)
def _counter_of_default_stream(device: torch.device) -> Tensor:
    """Asked for only where that is the current one: the zero is written before the kernels that read it."""
    return _new_counter(device)


def _new_counter(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _unread_counter(device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.int32, device=device)


def backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> Gradients:
    tiles = plan.backward.tiles
    assert isinstance(tiles, BackwardTiles), "the planner of this backend makes these"
    wanted = problem.gradients
    d_out = saved.out.new_zeros(saved.out.shape) if d_out is None else d_out
    q, k, v, d_out = (tma_ready(tensor) for tensor in (operands.q, operands.k, operands.v, d_out))

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, others = operands_of(tensors)
        d_out, lse_log2, delta, d_q_sums, counter, d_k, d_v = others
        width, width_v = widths(problem)
        num_kv_tiles = -(-problem.seqlen_kv // tiles.block_kv)
        return (
            arguments.descriptor(operands.q, ROWS, width),
            arguments.descriptor(operands.k, ROWS, width),
            arguments.descriptor(operands.v, ROWS, width_v),
            arguments.descriptor(d_out, ROWS, width_v),
            arguments.numbers_descriptor(lse_log2, ROWS),
            arguments.numbers_descriptor(delta, ROWS),
            d_q_sums,
            d_q_sums.shape[1],
            arguments.matrix(d_k),
            arguments.matrix(d_v),
            problem.scale,
            arguments.score_rules(problem, operands),
            Sequences(operands.cu_seqlens_q, operands.cu_seqlens_kv),
            Heads(problem.heads_q, problem.heads_per_kv),
            problem.batch * problem.heads_kv,
            heads_together(problem, num_kv_tiles, devices.detect(d_out.device)),
            counter,
            problem.seqlen_q,
            problem.seqlen_kv,
        )

    with device_of(q):
        counter = (
            torch.empty(1, dtype=torch.int32, device=q.device) if takes_further_shares(plan.backward.kernel) else None
        )
        lse_log2, delta, d_q_sums = _row_statistics(problem, operands, saved, d_out, d_lse, counter)
        make = torch.zeros_like if problem.layout == "varlen" else torch.empty_like  # rows of no sequence
        d_k, d_v = (make(tensor, memory_format=torch.contiguous_format) for tensor in (operands.k, operands.v))
        kernel, constants = _BACKWARD[plan.backward.kernel]
        if plan.backward.kernel == "backward_narrow":
            constants = {"TWO_LOOPS": tiles.has_two_loops, **constants}
        kernel(
            (problem, tiles),
            plan.backward.grid,
            (*tensors_of(replace(operands, q=q, k=k, v=v)), d_out, lse_log2, delta, d_q_sums, counter, d_k, d_v),
            kernel_arguments,
            num_warps=4,
            HEAD_DIM=problem.head_dim,
            HEAD_DIM_V=problem.head_dim_v,
            NUM_STAGES=tiles.num_stages,
            **constants,
        )
        d_q = _scaled(d_q_sums, problem, operands)
        d_sinks = None if operands.sinks is None else _sink_gradient(operands.sinks, lse_log2, delta)
    found = {"q": d_q, "k": d_k, "v": d_v, "sinks": d_sinks}
    return Gradients(**{name: gradient for name, gradient in found.items() if name in wanted})


def _row_statistics(
    problem: AttentionProblem,
    operands: Operands,
    saved: Saved,
    d_out: Tensor,
    d_lse: Tensor | None,
    counter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_log2, delta, sums of d_q that are 0); sets the counter of shares to 0 if there is one.

    The numbers are [batch, heads, rows] or packed [heads, rows], in whole blocks of ``STATISTICS_ROWS``, and the sums
    [batch * heads or heads, blocks of ``SUM_ROWS``, SUM_ROWS * BLOCK_D].
    """
    if problem.layout == "varlen":
        length = (-(-problem.tokens_q // STATISTICS_ROWS) + problem.batch) * STATISTICS_ROWS
        num_sum_blocks = problem.tokens_q // SUM_ROWS + problem.batch
        shape: tuple[int, ...] = (problem.heads_q, length)
    else:
        length = -(-problem.seqlen_q // STATISTICS_ROWS) * STATISTICS_ROWS
        num_sum_blocks = -(-problem.seqlen_q // ROWS) * (ROWS // SUM_ROWS)
        shape = (problem.batch, problem.heads_q, length)
    width, width_v = widths(problem)
    lse_log2, delta = (torch.empty(shape, dtype=torch.float32, device=d_out.device) for _ in range(2))
    if problem.layout == "varlen" and problem.has_sinks:  # what lies between the sequences counts nothing in their sums
        lse_log2.fill_(math.inf)
        delta.zero_()
    lines = math.prod(shape[:-1])
    d_q_sums = torch.empty((lines, num_sum_blocks, SUM_ROWS * width), dtype=torch.float32, device=d_out.device)
    block_rows = max(SUM_ROWS, min(STATISTICS_ROWS, 4096 // width_v))
    num_blocks = -(-problem.seqlen_q // STATISTICS_ROWS) * (STATISTICS_ROWS // block_rows)

    def kernel_arguments(
        out: Tensor,
        d_out: Tensor,
        lse: Tensor,
        d_lse: Tensor | None,
        lse_log2: Tensor,
        delta: Tensor,
        d_q_sums: Tensor,
        counter: Tensor | None,
        cu_seqlens_q: Tensor | None,
    ) -> tuple[Any, ...]:
        return (
            arguments.matrix(out),
            arguments.matrix(d_out),
            lse,
            d_lse,
            lse.shape[-1],
            lse_log2,
            delta,
            length,
            d_q_sums,
            num_sum_blocks,
            counter,
            cu_seqlens_q,
            problem.heads_q,
            problem.seqlen_q,
        )

    lse, d_lse = saved.lse.contiguous(), None if d_lse is None else d_lse.contiguous()
    _ROW_STATISTICS(
        problem,
        (num_blocks * problem.heads_q * problem.batch,),
        (saved.out, d_out, lse, d_lse, lse_log2, delta, d_q_sums, counter, operands.cu_seqlens_q),
        kernel_arguments,
        num_warps=4,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=width,
        BLOCK_DV=width_v,
        BLOCK_ROWS=block_rows,
    )
    return lse_log2, delta, d_q_sums


def _scaled(d_q_sums: Tensor, problem: AttentionProblem, operands: Operands) -> Tensor:
    """d_q from its sums: scaled, and rounded once."""
    make = torch.zeros if problem.layout == "varlen" else torch.empty  # rows of no sequence
    d_q = make(operands.q.shape, dtype=problem.dtype, device=d_q_sums.device)
    width = widths(problem)[0]
    block_rows = max(SUM_ROWS, 4096 // width)

    def kernel_arguments(d_q_sums: Tensor, d_q: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Any, ...]:
        return (
            d_q_sums,
            d_q_sums.shape[1],
            arguments.matrix(d_q),
            problem.scale,
            cu_seqlens_q,
            problem.heads_q,
            problem.seqlen_q,
        )

    _SCALE_D_Q(
        problem,
        (-(-problem.seqlen_q // block_rows) * problem.heads_q * problem.batch,),
        (d_q_sums, d_q, operands.cu_seqlens_q),
        kernel_arguments,
        num_warps=4,
        HEAD_DIM=problem.head_dim,
        BLOCK_D=width,
        BLOCK_ROWS=block_rows,
    )
    return d_q


def _sink_gradient(sinks: Tensor, lse_log2: Tensor, delta: Tensor) -> Tensor:
    """A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta)."""
    exponent = sinks.float()[:, None] * LOG2_E - lse_log2  # [batch, heads, rows] or [heads, rows]
    per_row = exponent.exp2_().mul_(delta).neg_()
    return per_row.sum(dim=(0, 2) if per_row.dim() == 3 else 1).to(sinks.dtype)

"""Fills the kernels' arguments from operands and plan, and launches them. Reads no tensor value on the host."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
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
    num_stored_rows,
    order_of_heads,
    out_columns,
    takes_further_shares,
    widths,
)
from flashtile.backends.hopper.statistics import attention_row_statistics, attention_scale_gradient
from flashtile.backends.launcher import (
    MOST_FORMS,
    KernelLauncher,
    given_to_backward,
    nothing,
    operands_of,
    relaunches,
    result_maker,
    shortest,
    shortest_backward,
    tensor_maker,
)
from flashtile.backends.relaunch import Relaunch, Relaunches
from flashtile.spec import devices
from flashtile.spec.operands import Operands, tensors_of
from flashtile.spec.problem import AttentionProblem

_FORWARD = KernelLauncher(attention_forward)
_COMBINE = KernelLauncher(attention_combine)
_ROW_STATISTICS = KernelLauncher(attention_row_statistics)
_SCALE = KernelLauncher(attention_scale_gradient)

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
        launches = [_launch_forward(computed, tensors, plan)]
        if plan.forward.companions:
            launches.append(_launch_combine(computed, tensors, plan))
    return (out, lse), None if is_copied else relaunches(launches)


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
            computed.seqlen_q,
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
        ROWS=combine.tiles.block_q,
        PARTS=combine.tiles.block_kv,
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
    return _backward(problem, operands, saved, d_out, d_lse, plan)[0]


def backward_again(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> tuple[Gradients, Callable[..., Gradients] | None]:
    """``backward``, and the shortest way to it for tensors of these sizes, strides and dtypes, if there is one."""
    found, launch, tensors = _backward(problem, operands, saved, d_out, d_lse, plan)
    given = given_to_backward(operands, saved, d_out, d_lse)
    make = _made_by_backward(problem, plan, operands.q.device)
    otherwise = partial(backward, problem, plan=plan)
    return found, shortest_backward(launch, given, tensors, make, partial(_gradients, problem), otherwise)


def _backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> tuple[Gradients, Relaunch | Relaunches | None, tuple[Any, ...]]:
    """The gradients, what launches the same with other tensors, and the tensors that were launched with."""
    d_out = saved.out.new_zeros(saved.out.shape) if d_out is None else d_out
    q, k, v, d_out = (tma_ready(tensor) for tensor in (operands.q, operands.k, operands.v, d_out))
    operands = replace(operands, q=q, k=k, v=v)
    saved = Saved(out=saved.out, lse=saved.lse.contiguous())
    given = given_to_backward(operands, saved, d_out, None if d_lse is None else d_lse.contiguous())
    with device_of(q):
        made = _made_by_backward(problem, plan, q.device)()
        if problem.layout == "varlen":
            lse_log2, delta, _sums, _counter, d_q, d_k, d_v, *_kv_sums = made
            for gradient in (d_q, d_k, d_v):  # rows of no sequence
                gradient.zero_()
            if problem.has_sinks:  # what lies between the sequences counts nothing in their sums
                lse_log2.fill_(math.inf)
                delta.zero_()
        tensors = (*given, *made)
        launches = [launch(problem, tensors, plan) for launch in (_launch_row_statistics, _launch_gradients)]
        names = ("q", "k", "v") if _backward_tiles_of(plan).num_splits > 1 else ("q",)
        launches += [_launch_scale(problem, tensors, name) for name in names]
        found = _gradients(problem, given, made)
    return found, relaunches(launches), tensors


def _gradients(problem: AttentionProblem, given: tuple[Any, ...], made: tuple[Any, ...]) -> Gradients:
    """Those that are wanted, after the kernels."""
    lse_log2, delta, _sums, _counter, d_q, d_k, d_v, *_kv_sums = made
    found = {"q": d_q, "k": d_k, "v": d_v}
    sinks = operands_of(given)[0].sinks if "sinks" in problem.gradients else None
    if sinks is not None:
        found["sinks"] = _sink_gradient(sinks, lse_log2, delta)
    return Gradients(**{name: gradient for name, gradient in found.items() if name in problem.gradients})


@lru_cache(maxsize=MOST_FORMS)
def _made_by_backward(problem: AttentionProblem, plan: Plan, device: torch.device) -> Callable[[], tuple[Any, ...]]:
    """Makes lse_log2, delta, the sums of d_q, the counter of shares or None, d_q, d_k, d_v, and their sums or None.

    The two numbers of each row are [batch, heads, rows] or packed [heads, rows], in whole blocks of
    ``STATISTICS_ROWS``, and the sums [batch * heads or heads, blocks of ``SUM_ROWS``, SUM_ROWS * BLOCK_D]. Those of d_k
    and d_v, for tiles whose steps are split, are 0.
    """
    if problem.layout == "varlen":
        length = (-(-problem.tokens_q // STATISTICS_ROWS) + problem.batch) * STATISTICS_ROWS
        num_sum_blocks = problem.tokens_q // SUM_ROWS + problem.batch
        rows: tuple[int, ...] = (problem.heads_q, length)
        tokens_q, tokens_kv = (problem.tokens_q,), (problem.tokens_kv,)
    else:
        length = -(-problem.seqlen_q // STATISTICS_ROWS) * STATISTICS_ROWS
        num_sum_blocks = -(-problem.seqlen_q // ROWS) * (ROWS // SUM_ROWS)
        rows = (problem.batch, problem.heads_q, length)
        tokens_q, tokens_kv = (problem.batch, problem.seqlen_q), (problem.batch, problem.seqlen_kv)
    sums = (math.prod(rows[:-1]), num_sum_blocks, SUM_ROWS * widths(problem)[0])
    make_rows, make_sums = (tensor_maker(shape, torch.float32, device) for shape in (rows, sums))
    make_counter = tensor_maker((1,), torch.int32, device) if takes_further_shares(plan.backward.kernel) else nothing
    make_d_q = tensor_maker((*tokens_q, problem.heads_q, problem.head_dim), problem.dtype, device)
    make_d_k = tensor_maker((*tokens_kv, problem.heads_kv, problem.head_dim), problem.dtype, device)
    make_d_v = tensor_maker((*tokens_kv, problem.heads_kv, problem.head_dim_v), problem.dtype, device)
    make_kv_sums: tuple[Callable[[], Tensor | None], ...] = (nothing, nothing)
    tiles = _backward_tiles_of(plan)
    if tiles.num_splits > 1:
        num_blocks = -(-problem.seqlen_kv // tiles.block_kv) * (tiles.block_kv // SUM_ROWS)
        shapes = [(problem.batch * problem.heads_kv, num_blocks, SUM_ROWS * width) for width in widths(problem)]
        make_kv_sums = tuple(partial(torch.zeros, shape, dtype=torch.float32, device=device) for shape in shapes)
    makers = (make_rows, make_rows, make_sums, make_counter, make_d_q, make_d_k, make_d_v, *make_kv_sums)
    return lambda: tuple(make() for make in makers)


def _backward_tiles_of(plan: Plan) -> BackwardTiles:
    tiles = plan.backward.tiles
    assert isinstance(tiles, BackwardTiles), "the planner of this backend makes these"
    return tiles


def _launch_gradients(problem: AttentionProblem, tensors: tuple[Any, ...], plan: Plan) -> Relaunch | None:
    """Adds d_q up, and fills d_k and d_v, or adds them up too where tiles of keys are split."""
    tiles = _backward_tiles_of(plan)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (_out, d_out, _lse, _d_lse, lse_log2, delta, d_q_sums, counter, _d_q, *of_keys) = operands_of(tensors)
        d_k, d_v, d_k_sums, d_v_sums = of_keys
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
            arguments.matrix(d_k) if d_k_sums is None else d_k_sums,
            arguments.matrix(d_v) if d_v_sums is None else d_v_sums,
            problem.scale,
            arguments.score_rules(problem, operands),
            Sequences(operands.cu_seqlens_q, operands.cu_seqlens_kv),
            Heads(problem.heads_q, problem.heads_per_kv),
            problem.batch * problem.heads_kv,
            heads_together(problem, num_kv_tiles, devices.detect(d_out.device)),
            tiles.num_splits if tiles.num_splits > 1 else None,
            counter,
            problem.seqlen_q,
            problem.seqlen_kv,
            num_stored_rows(problem, tiles),
        )

    kernel, constants = _BACKWARD[plan.backward.kernel]
    if plan.backward.kernel == "backward_narrow":
        constants = {"TWO_LOOPS": tiles.has_two_loops, **constants}
    return kernel(
        (problem, tiles),
        plan.backward.grid,
        tensors,
        kernel_arguments,
        num_warps=4,
        HEAD_DIM=problem.head_dim,
        HEAD_DIM_V=problem.head_dim_v,
        NUM_STAGES=tiles.num_stages,
        **constants,
    )


def _launch_row_statistics(problem: AttentionProblem, tensors: tuple[Any, ...], plan: Plan) -> Relaunch | None:
    """Fills lse_log2 and delta, and sets to 0 the sums of d_q that are added to, and the counter of shares."""
    tiles = _backward_tiles_of(plan)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (out, d_out, lse, d_lse, lse_log2, delta, d_q_sums, counter, *_) = operands_of(tensors)
        return (
            arguments.matrix(out),
            arguments.matrix(d_out),
            lse,
            d_lse,
            lse.shape[-1],
            lse_log2,
            delta,
            delta.shape[-1],
            d_q_sums,
            d_q_sums.shape[1],
            num_stored_rows(problem, tiles),
            counter,
            operands.cu_seqlens_q,
            problem.heads_q,
            problem.seqlen_q,
        )

    width, width_v = widths(problem)
    block_rows = max(SUM_ROWS, min(STATISTICS_ROWS, 4096 // width_v))
    num_blocks = -(-problem.seqlen_q // STATISTICS_ROWS) * (STATISTICS_ROWS // block_rows)
    return _ROW_STATISTICS(
        (problem, tiles),
        (num_blocks * problem.heads_q * problem.batch,),
        tensors,
        kernel_arguments,
        num_warps=4,
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=width,
        BLOCK_DV=width_v,
        BLOCK_ROWS=block_rows,
    )


def _launch_scale(problem: AttentionProblem, tensors: tuple[Any, ...], name: str) -> Relaunch | None:
    """Fills d_q, d_k or d_v from its sums: rounded once, and d_q scaled, which d_k has been before it was added."""
    num_heads, seqlen = (problem.heads_q, problem.seqlen_q) if name == "q" else (problem.heads_kv, problem.seqlen_kv)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (*_, d_q_sums, _counter, d_q, d_k, d_v, d_k_sums, d_v_sums) = operands_of(tensors)
        sums, gradient = {"q": (d_q_sums, d_q), "k": (d_k_sums, d_k), "v": (d_v_sums, d_v)}[name]
        return (
            sums,
            sums.shape[1],
            arguments.matrix(gradient),
            problem.scale if name == "q" else 1.0,
            operands.cu_seqlens_q,
            num_heads,
            seqlen,
        )

    width, width_v = widths(problem)
    columns = width_v if name == "v" else width
    block_rows = max(SUM_ROWS, 4096 // columns)
    return _SCALE(
        (problem, name),
        (-(-seqlen // block_rows) * num_heads * problem.batch,),
        tensors,
        kernel_arguments,
        num_warps=4,
        HEAD_DIM=problem.head_dim_v if name == "v" else problem.head_dim,
        BLOCK_D=columns,
        BLOCK_ROWS=block_rows,
    )


def _sink_gradient(sinks: Tensor, lse_log2: Tensor, delta: Tensor) -> Tensor:
    """A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta)."""
    exponent = sinks.float()[:, None] * LOG2_E - lse_log2  # [batch, heads, rows] or [heads, rows]
    per_row = exponent.exp2_().mul_(delta).neg_()
    return per_row.sum(dim=(0, 2) if per_row.dim() == 3 else 1).to(sinks.dtype)

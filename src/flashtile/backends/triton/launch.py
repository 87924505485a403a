"""Fills the kernels' arguments from operands and plan, and launches them. Reads no tensor value on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, KernelPlan, Plan, Saved
from flashtile.backends.gpu import Heads, Sequences, device_of
from flashtile.backends.launcher import KernelLauncher, Tensors, operands_of, result_maker, shortest
from flashtile.backends.relaunch import Relaunch
from flashtile.backends.triton import arguments
from flashtile.backends.triton.arguments import Matrix, Statistics
from flashtile.backends.triton.backward import attention_backward_kv, attention_backward_q, attention_row_statistics
from flashtile.backends.triton.bias_gradient import attention_bias_gradient
from flashtile.backends.triton.constants import LOG2_E
from flashtile.backends.triton.forward import attention_forward
from flashtile.backends.triton.tiles import GpuTiles, widths
from flashtile.spec.operands import Operands, tensors_of
from flashtile.spec.problem import AttentionProblem

_FORWARD = KernelLauncher(attention_forward)
_ROW_STATISTICS = KernelLauncher(attention_row_statistics)
_BACKWARD_KV = KernelLauncher(attention_backward_kv)
_BACKWARD_Q = KernelLauncher(attention_backward_q)
_BIAS_GRADIENT = KernelLauncher(attention_bias_gradient)

_RowStatistics = tuple[Statistics, Statistics | None, Statistics]


def forward(problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
    return _forward(problem, operands, plan)[0]


def forward_again(
    problem: AttentionProblem, operands: Operands, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Callable[..., tuple[Tensor, Tensor]] | None]:
    """``forward``, and the shortest way to it for tensors of these sizes, strides and dtypes, if there is one."""
    results, launch = _forward(problem, operands, plan)
    make_results = result_maker(problem, operands.q.device)
    return results, shortest(launch, operands, make_results, lambda operands: forward(problem, operands, plan))


def _forward(
    problem: AttentionProblem, operands: Operands, plan: Plan
) -> tuple[tuple[Tensor, Tensor], Relaunch | None]:
    """(out, lse), and what launches the same with other tensors, unless those have to be copied first."""
    ready = _side_by_side(operands)
    out, lse = result_maker(problem, operands.q.device)()
    if problem.layout == "varlen":  # rows that belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (out, lse) = operands_of(tensors)
        return (
            *_qkv(operands),
            arguments.token_matrix(out),
            lse,
            lse.shape[-1],
            operands.sinks,
            arguments.score_rules(problem, operands, may_be_natural=True, may_be_near=True),
            *_sizes(problem, operands),
        )

    with device_of(operands.q):
        tensors = (*tensors_of(ready), out, lse)
        launch = _launch(_FORWARD, plan.forward, problem, tensors, kernel_arguments, **_dims(problem))
    return (out, lse), launch if ready is operands else None


def backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> Gradients:
    wanted = problem.gradients
    operands = _side_by_side(operands)
    if d_out is None:
        d_out = saved.out.new_zeros(()).expand(saved.out.shape)
    kernels = {kernel.kernel: kernel for kernel in (plan.backward, *plan.backward.companions)}
    with device_of(operands.q):
        statistics = _row_statistics(problem, operands, saved, d_out, d_lse, kernels["row_statistics"])
        recomputed = (*tensors_of(operands), d_out, *(rows and rows.ptr for rows in statistics))

        def kernel_arguments(may_be_natural: bool, *tensors: Any) -> tuple[Any, ...]:
            operands, (*others,) = operands_of(tensors)
            rules = arguments.score_rules(problem, operands, may_be_natural=may_be_natural)
            targets = map(arguments.token_matrix, others[4:])
            from_forward = _from_forward(operands, statistics, others)
            return (*from_forward, *targets, problem.scale, rules, *_sizes(problem, operands))

        dims = _dims(problem)
        d_q = d_k = d_v = d_bias = d_sinks = None
        if wanted & {"k", "v"}:
            d_k, d_v = _empty_gradient(problem, operands.k), _empty_gradient(problem, operands.v)
            tensors, powers = (*recomputed, d_k, d_v), partial(kernel_arguments, False)
            _launch(_BACKWARD_KV, kernels["backward_kv"], problem, tensors, powers, **dims)
        if "q" in wanted:
            d_q = _empty_gradient(problem, operands.q)
            tensors, natural = (*recomputed, d_q), partial(kernel_arguments, True)
            _launch(_BACKWARD_Q, kernels["backward_q"], problem, tensors, natural, **dims)
        if "bias" in wanted:
            assert operands.bias is not None
            d_bias = _bias_gradient(problem, operands.bias, kernels["bias_gradient"], recomputed, statistics, dims)
        if "sinks" in wanted:
            assert operands.sinks is not None
            d_sinks = _sink_gradient(operands.sinks, *statistics)
    found = {"q": d_q, "k": d_k, "v": d_v, "bias": d_bias, "sinks": d_sinks}
    return Gradients(**{name: gradient for name, gradient in found.items() if name in wanted})


def _from_forward(
    operands: Operands, statistics: _RowStatistics, others: list[Any]
) -> tuple[Matrix | Statistics | None, ...]:
    """What every kernel computes the scores again from; ``others`` begin with d_out and the statistics' memory."""
    rows = (of and of._replace(ptr=ptr) for of, ptr in zip(statistics, others[1:4], strict=True))
    return (*_qkv(operands), arguments.token_matrix(others[0]), *rows)


def _row_statistics(
    problem: AttentionProblem,
    operands: Operands,
    saved: Saved,
    d_out: Tensor,
    d_lse: Tensor | None,
    kernel: KernelPlan,
) -> _RowStatistics:
    """lse_log2, the probabilities' factor (16-bit inputs have no use for it), and delta; see ``MIDDLE_LOG2``."""
    lse_log2 = arguments.statistics(problem, math.inf, operands.q.device)
    is_16bit = problem.dtype.itemsize == 2
    factor = None if is_16bit else arguments.statistics(problem, 0.0, operands.q.device)
    delta = arguments.statistics(problem, 0.0, operands.q.device)
    statistics = (lse_log2, factor, delta)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (out, d_out, lse, d_lse, *memory) = operands_of(tensors)
        return (
            arguments.token_matrix(out),
            arguments.token_matrix(d_out),
            lse,
            d_lse,
            lse.shape[-1],
            *(rows and rows._replace(ptr=ptr) for rows, ptr in zip(statistics, memory, strict=True)),
            *_sizes(problem, operands),
        )

    lse, d_lse = saved.lse.contiguous(), None if d_lse is None else d_lse.contiguous()
    tensors = (*tensors_of(operands), saved.out, d_out, lse, d_lse, *(rows and rows.ptr for rows in statistics))
    dims = {"HEAD_DIM_V": problem.head_dim_v, "BLOCK_DV": widths(problem)[1]}
    _launch(_ROW_STATISTICS, kernel, problem, tensors, kernel_arguments, **dims)
    return statistics


def _bias_gradient(
    problem: AttentionProblem,
    bias: Tensor,
    kernel: KernelPlan,
    recomputed: tuple[Tensor | None, ...],
    statistics: _RowStatistics,
    dims: dict[str, Any],
) -> Tensor:
    """Adds up the shares of the sum that the programs left, in order."""
    assert problem.bias_shape is not None
    num_shares = kernel.grid[-1]
    shares = bias.new_empty((num_shares, *problem.bias_shape), dtype=bias.dtype if num_shares == 1 else torch.float32)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (*others, target) = operands_of(tensors)
        strides = (0 if size == 1 else stride for size, stride in zip(target.shape, target.stride(), strict=True))
        return (
            *_from_forward(operands, statistics, others),
            Matrix(target, *strides),
            shares.stride(0),
            arguments.score_rules(problem, operands),
            *_sizes(problem, operands),
            problem.batch,
            num_shares,
        )

    shared = zip(
        ("SHARED_BATCH", "SHARED_HEADS", "SHARED_ROWS", "SHARED_COLS"),
        (size == 1 for size in problem.bias_shape),
        strict=True,
    )
    tensors = (*recomputed, shares[0])
    _launch(_BIAS_GRADIENT, kernel, problem, tensors, kernel_arguments, **dict(shared), **dims)
    return shares.sum(0).to(bias.dtype).view(bias.shape) if num_shares > 1 else shares.view(bias.shape)


def _sink_gradient(sinks: Tensor, lse_log2: Statistics, factor: Statistics | None, delta: Statistics) -> Tensor:
    """A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta)."""
    exponent = sinks.float()[:, None] * LOG2_E - lse_log2.ptr  # [batch, heads, rows] or [heads, rows]
    per_row = exponent.exp2_().mul_(delta.ptr).neg_()
    if factor is not None:
        per_row *= factor.ptr
    return per_row.sum(dim=(0, 2) if per_row.dim() == 3 else 1).to(sinks.dtype)


def _launch(
    launcher: KernelLauncher,
    plan: KernelPlan,
    problem: AttentionProblem,
    tensors: Tensors,
    kernel_arguments: Callable[..., tuple[Any, ...]],
    **constants: Any,
) -> Relaunch | None:
    tiles = plan.tiles
    assert isinstance(tiles, GpuTiles), "the planner of this backend makes these"
    num_programs = math.prod(plan.grid)
    if not num_programs:
        return None
    return launcher(
        (problem, tiles),
        (num_programs,),
        tensors,
        kernel_arguments,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        BLOCK_Q=tiles.block_q,
        BLOCK_KV=tiles.block_kv,
        **constants,
    )


def _side_by_side(operands: Operands) -> Operands:
    q, k, v = (arguments.side_by_side(tensor) for tensor in (operands.q, operands.k, operands.v))
    is_ready = q is operands.q and k is operands.k and v is operands.v
    return operands if is_ready else replace(operands, q=q, k=k, v=v)


def _qkv(operands: Operands) -> tuple[Matrix, Matrix, Matrix]:
    q, k, v = operands.q, operands.k, operands.v
    return arguments.token_matrix(q), arguments.token_matrix(k), arguments.token_matrix(v)


def _sizes(problem: AttentionProblem, operands: Operands) -> tuple[Sequences, Heads, int, int]:
    return (
        Sequences(operands.cu_seqlens_q, operands.cu_seqlens_kv),
        Heads(problem.heads_q, problem.heads_per_kv),
        problem.seqlen_q,
        problem.seqlen_kv,
    )


def _dims(problem: AttentionProblem) -> dict[str, Any]:
    width, width_v = widths(problem)
    is_tf32 = problem.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "BLOCK_D": width,
        "BLOCK_DV": width_v,
        "PRECISION": "tf32" if is_tf32 else "ieee",
    }


def _empty_gradient(problem: AttentionProblem, tensor: Tensor) -> Tensor:
    """Contiguous and not filled, but for rows that no kernel visits: those of packed buffers outside all sequences."""
    make = torch.zeros if problem.layout == "varlen" else torch.empty
    return make(tensor.shape, dtype=tensor.dtype, device=tensor.device)

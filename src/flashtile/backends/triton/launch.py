"""Fills the kernels' arguments from operands and plan, and launches them. Reads no tensor value on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, KernelPlan, Plan, Saved
from flashtile.backends.gpu import Heads, Sequences, device_of
from flashtile.backends.launcher import (
    MOST_FORMS,
    KernelLauncher,
    Tensors,
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
    return _backward(problem, operands, saved, d_out, d_lse, plan)[0]


def backward_again(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> tuple[Gradients, Callable[..., Gradients] | None]:
    """``backward``, and the shortest way to it for tensors of these sizes, strides and dtypes, if there is one."""
    found, launch, tensors = _backward(problem, operands, saved, d_out, d_lse, plan)
    given = given_to_backward(operands, saved, d_out, d_lse)
    make = _made_by_backward(problem, operands.q.device)
    otherwise = partial(backward, problem, plan=plan)
    return found, shortest_backward(launch, given, tensors, make, partial(_gradients, problem), otherwise)


def _backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> tuple[Gradients, Relaunch | Relaunches | None, Tensors]:
    """The gradients, what launches the same with other tensors, and the tensors that were launched with."""
    operands = _side_by_side(operands)
    if d_out is None:
        d_out = saved.out.new_zeros(()).expand(saved.out.shape)
    saved = Saved(out=saved.out, lse=saved.lse.contiguous())
    given = given_to_backward(operands, saved, d_out, None if d_lse is None else d_lse.contiguous())
    wanted, d_bias = problem.gradients, None
    kernels = {kernel.kernel: kernel for kernel in (plan.backward, *plan.backward.companions)}
    with device_of(operands.q):
        made = _made_by_backward(problem, operands.q.device)()
        tensors = (*given, *made)
        launches = [_launch_row_statistics(problem, tensors, kernels["row_statistics"])]
        if wanted & {"k", "v"}:
            launches.append(_launch_backward(_BACKWARD_KV, problem, tensors, kernels["backward_kv"], of_keys=True))
        if "q" in wanted:
            launches.append(_launch_backward(_BACKWARD_Q, problem, tensors, kernels["backward_q"], of_keys=False))
        if "bias" in wanted:
            d_bias = _bias_gradient(problem, tensors, kernels["bias_gradient"])
            launches.append(None)
        found = _gradients(problem, given, made, d_bias)
    return found, relaunches(launches), tensors


def _gradients(problem: AttentionProblem, given: Tensors, made: Tensors, d_bias: Tensor | None = None) -> Gradients:
    """Those that are wanted, after the kernels."""
    lse_log2, factor, delta, d_q, d_k, d_v = made
    found = {"q": d_q, "k": d_k, "v": d_v, "bias": d_bias}
    sinks = operands_of(given)[0].sinks if "sinks" in problem.gradients else None
    if sinks is not None:
        found["sinks"] = _sink_gradient(sinks, lse_log2, factor, delta)
    return Gradients(**{name: gradient for name, gradient in found.items() if name in problem.gradients})


@lru_cache(maxsize=MOST_FORMS)
def _made_by_backward(problem: AttentionProblem, device: torch.device) -> Callable[[], Tensors]:
    """Makes lse_log2, the probabilities' factor (16-bit inputs have no use for it), delta, d_q, d_k and d_v.

    See ``MIDDLE_LOG2``. Gradients that are not wanted are None. What no kernel visits is filled: rows of packed buffers
    that belong to no sequence, and the numbers between sequences.
    """
    is_packed, wanted = problem.layout == "varlen", problem.gradients

    def filled(shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> Callable[[], Tensor]:
        if is_packed:
            return partial(torch.full, shape, fill, dtype=dtype, device=device)
        return tensor_maker(shape, dtype, device)

    def gradient(is_wanted: bool, tokens: tuple[int, ...], *sizes: int) -> Callable[[], Tensor | None]:
        return filled((*tokens, *sizes), problem.dtype, 0.0) if is_wanted else nothing

    tokens_q = (problem.tokens_q,) if is_packed else (problem.batch, problem.seqlen_q)
    tokens_kv = (problem.tokens_kv,) if is_packed else (problem.batch, problem.seqlen_kv)
    has_keys = bool(wanted & {"k", "v"})
    rows = arguments.statistics_shape(problem)
    makers = (
        filled(rows, torch.float32, math.inf),
        nothing if problem.dtype.itemsize == 2 else filled(rows, torch.float32, 0.0),
        filled(rows, torch.float32, 0.0),
        gradient("q" in wanted, tokens_q, problem.heads_q, problem.head_dim),
        gradient(has_keys, tokens_kv, problem.heads_kv, problem.head_dim),
        gradient(has_keys, tokens_kv, problem.heads_kv, problem.head_dim_v),
    )
    return lambda: tuple(make() for make in makers)


def _launch_row_statistics(problem: AttentionProblem, tensors: Tensors, kernel: KernelPlan) -> Relaunch | None:
    """Fills lse_log2, the factor and delta."""

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (out, d_out, lse, d_lse, *made) = operands_of(tensors)
        return (
            arguments.token_matrix(out),
            arguments.token_matrix(d_out),
            lse,
            d_lse,
            lse.shape[-1],
            *(arguments.statistics(problem, rows) for rows in made[:3]),
            *_sizes(problem, operands),
        )

    dims = {"HEAD_DIM_V": problem.head_dim_v, "BLOCK_DV": widths(problem)[1]}
    return _launch(_ROW_STATISTICS, kernel, problem, tensors, kernel_arguments, **dims)


def _launch_backward(
    launcher: KernelLauncher, problem: AttentionProblem, tensors: Tensors, kernel: KernelPlan, *, of_keys: bool
) -> Relaunch | None:
    """Fills d_k and d_v, or d_q."""

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        operands, (*_, d_q, d_k, d_v) = operands_of(tensors)
        return (
            *_from_forward(problem, tensors),
            *map(arguments.token_matrix, (d_k, d_v) if of_keys else (d_q,)),
            problem.scale,
            arguments.score_rules(problem, operands, may_be_natural=not of_keys),
            *_sizes(problem, operands),
        )

    return _launch(launcher, kernel, problem, tensors, kernel_arguments, **_dims(problem))


def _from_forward(problem: AttentionProblem, tensors: Tensors) -> tuple[Matrix | Statistics | None, ...]:
    """What every kernel computes the scores again from."""
    operands, (_out, d_out, _lse, _d_lse, *made) = operands_of(tensors)
    rows = (arguments.statistics(problem, each) for each in made[:3])
    return (*_qkv(operands), arguments.token_matrix(d_out), *rows)


def _bias_gradient(problem: AttentionProblem, tensors: Tensors, kernel: KernelPlan) -> Tensor:
    """Adds up the shares of the sum that the programs left, in order."""
    bias = operands_of(tensors)[0].bias
    assert bias is not None and problem.bias_shape is not None
    num_shares = kernel.grid[-1]
    shares = bias.new_empty((num_shares, *problem.bias_shape), dtype=bias.dtype if num_shares == 1 else torch.float32)

    def kernel_arguments(*tensors: Any) -> tuple[Any, ...]:
        *others, target = tensors
        operands, _ = operands_of(tensors)
        strides = (0 if size == 1 else stride for size, stride in zip(target.shape, target.stride(), strict=True))
        return (
            *_from_forward(problem, tuple(others)),
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
    _launch(_BIAS_GRADIENT, kernel, problem, (*tensors, shares[0]), kernel_arguments, **dict(shared), **_dims(problem))
    return shares.sum(0).to(bias.dtype).view(bias.shape) if num_shares > 1 else shares.view(bias.shape)


def _sink_gradient(sinks: Tensor, lse_log2: Tensor, factor: Tensor | None, delta: Tensor) -> Tensor:
    """A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta)."""
    exponent = sinks.float()[:, None] * LOG2_E - lse_log2  # [batch, heads, rows] or [heads, rows]
    per_row = exponent.exp2_().mul_(delta).neg_()
    if factor is not None:
        per_row *= factor
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

"""Fills the kernels' arguments from operands and plan, and launches them. Reads no tensor value on the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, KernelPlan, Plan, Saved
from flashtile.backends.gpu import COMPILER_OPTIONS, Heads, Sequences, device_of
from flashtile.backends.triton import arguments
from flashtile.backends.triton.arguments import Matrix, Statistics
from flashtile.backends.triton.backward import attention_backward_kv, attention_backward_q, attention_row_statistics
from flashtile.backends.triton.bias_gradient import attention_bias_gradient
from flashtile.backends.triton.constants import LOG2_E
from flashtile.backends.triton.forward import attention_forward
from flashtile.backends.triton.tiles import GpuTiles, widths
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


def forward(problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
    q = operands.q
    out = q.new_empty(problem.out_shape)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    if problem.layout == "varlen":  # rows that belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)
    with device_of(q):
        _launch(
            attention_forward,
            plan.forward,
            *_qkv(operands),
            arguments.token_matrix(out),
            lse,
            lse.shape[-1],
            operands.sinks,
            arguments.score_rules(problem, operands, may_be_natural=True),
            *_sizes(problem, operands),
            **_dims(problem),
        )
    return out, lse


def backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> Gradients:
    wanted = problem.gradients
    if d_out is None:
        d_out = saved.out.new_zeros(()).expand(saved.out.shape)
    kernels = {kernel.kernel: kernel for kernel in (plan.backward, *plan.backward.companions)}
    with device_of(operands.q):
        statistics = _row_statistics(problem, operands, saved, d_out, d_lse, kernels["row_statistics"])
        recomputed = (*_qkv(operands), arguments.token_matrix(d_out), *statistics)
        rules, sizes, dims = arguments.score_rules(problem, operands), _sizes(problem, operands), _dims(problem)
        d_q = d_k = d_v = d_bias = d_sinks = None
        if wanted & {"k", "v"}:
            d_k, d_v = _empty_gradient(problem, operands.k), _empty_gradient(problem, operands.v)
            targets = (arguments.token_matrix(d_k), arguments.token_matrix(d_v))
            scale = problem.scale
            _launch(attention_backward_kv, kernels["backward_kv"], *recomputed, *targets, scale, rules, *sizes, **dims)
        if "q" in wanted:
            d_q = _empty_gradient(problem, operands.q)
            target, scale = arguments.token_matrix(d_q), problem.scale
            rules_of_q = arguments.score_rules(problem, operands, may_be_natural=True)
            _launch(attention_backward_q, kernels["backward_q"], *recomputed, target, scale, rules_of_q, *sizes, **dims)
        if "bias" in wanted:
            assert operands.bias is not None
            d_bias = _bias_gradient(problem, operands.bias, kernels["bias_gradient"], recomputed, rules, sizes, dims)
        if "sinks" in wanted:
            assert operands.sinks is not None
            d_sinks = _sink_gradient(operands.sinks, *statistics)
    found = {"q": d_q, "k": d_k, "v": d_v, "bias": d_bias, "sinks": d_sinks}
    return Gradients(**{name: gradient for name, gradient in found.items() if name in wanted})


def _row_statistics(
    problem: AttentionProblem,
    operands: Operands,
    saved: Saved,
    d_out: Tensor,
    d_lse: Tensor | None,
    kernel: KernelPlan,
) -> tuple[Statistics, Statistics | None, Statistics]:
    """lse_log2, the probabilities' factor (16-bit inputs have no use for it), and delta; see ``MIDDLE_LOG2``."""
    lse_log2 = arguments.statistics(problem, math.inf, operands.q.device)
    is_16bit = problem.dtype.itemsize == 2
    factor = None if is_16bit else arguments.statistics(problem, 0.0, operands.q.device)
    delta = arguments.statistics(problem, 0.0, operands.q.device)
    _launch(
        attention_row_statistics,
        kernel,
        arguments.token_matrix(saved.out),
        arguments.token_matrix(d_out),
        saved.lse.contiguous(),
        None if d_lse is None else d_lse.contiguous(),
        saved.lse.shape[-1],
        lse_log2,
        factor,
        delta,
        *_sizes(problem, operands),
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_DV=widths(problem)[1],
    )
    return lse_log2, factor, delta


def _bias_gradient(
    problem: AttentionProblem,
    bias: Tensor,
    kernel: KernelPlan,
    recomputed: tuple[Matrix | Statistics | None, ...],
    rules: arguments.ScoreRules,
    sizes: tuple[Any, ...],
    dims: dict[str, Any],
) -> Tensor:
    """Adds up the shares of the sum that the programs left, in order."""
    assert problem.bias_shape is not None
    num_shares = kernel.grid[-1]
    shares = bias.new_empty((num_shares, *problem.bias_shape), dtype=bias.dtype if num_shares == 1 else torch.float32)
    target = Matrix(
        shares[0],
        *(0 if size == 1 else stride for size, stride in zip(shares.shape[1:], shares.stride()[1:], strict=True)),
    )
    shared = (size == 1 for size in problem.bias_shape)
    _launch(
        attention_bias_gradient,
        kernel,
        *recomputed,
        target,
        shares.stride(0),
        rules,
        *sizes,
        problem.batch,
        num_shares,
        **dict(zip(("SHARED_BATCH", "SHARED_HEADS", "SHARED_ROWS", "SHARED_COLS"), shared, strict=True)),
        **dims,
    )
    return shares.sum(0).to(bias.dtype).view(bias.shape) if num_shares > 1 else shares.view(bias.shape)


def _sink_gradient(sinks: Tensor, lse_log2: Statistics, factor: Statistics | None, delta: Statistics) -> Tensor:
    """A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta)."""
    exponent = sinks.float()[:, None] * LOG2_E - lse_log2.ptr  # [batch, heads, rows] or [heads, rows]
    per_row = exponent.exp2_().mul_(delta.ptr).neg_()
    if factor is not None:
        per_row *= factor.ptr
    return per_row.sum(dim=(0, 2) if per_row.dim() == 3 else 1).to(sinks.dtype)


def _launch(kernel: Any, plan: KernelPlan, *args: Any, **constants: Any) -> None:
    tiles = plan.tiles
    assert isinstance(tiles, GpuTiles), "the planner of this backend makes these"
    num_programs = math.prod(plan.grid)
    if num_programs:
        kernel[(num_programs,)](
            *args,
            **constants,
            BLOCK_Q=tiles.block_q,
            BLOCK_KV=tiles.block_kv,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **COMPILER_OPTIONS,
        )


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

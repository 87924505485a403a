"""Runs the kernel that the plan names."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, KernelPlan, Plan, Saved
from flashtile.backends.cpu import fused, tiled
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


def forward(problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
    if plan.forward.kernel == "torch_fused":
        return fused.forward(problem, operands)
    return tiled.forward(problem, operands, plan.forward.tiles, _products(problem, plan.forward))


def backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> Gradients:
    d_out = torch.zeros_like(saved.out) if d_out is None else d_out
    if plan.backward.kernel == "torch_fused":
        assert d_lse is None, "the plan knew that the lse has a gradient"
        return fused.backward(problem, operands, saved, d_out)
    products = _products(problem, plan.backward)
    return tiled.backward(problem, operands, saved, d_out, d_lse, plan.backward.tiles, products)


def _products(problem: AttentionProblem, kernel: KernelPlan) -> torch.dtype:
    """The dtype in which the tiles are multiplied."""
    return problem.dtype if kernel.kernel == "tiled_16bit" else problem.accumulation_dtype

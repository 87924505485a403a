"""PyTorch's own fused attention for the CPU, for the problems that it serves whole.

It is the same algorithm in C++, reached through the aten ops behind ``F.scaled_dot_product_attention`` because those
also return the lse. ``plan.py`` decides when; here are only the transposes between its layout and ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, Saved
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(problem: AttentionProblem, operands: Operands) -> tuple[Tensor, Tensor]:
    out, lse = _forward(
        *_heads_first(operands.q, operands.k, operands.v),
        dropout_p=0.0,
        is_causal=problem.mask.is_causal,
        scale=problem.scale,
    )
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def backward(problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor) -> Gradients:
    d_q, d_k, d_v = _backward(
        *_heads_first(d_out, operands.q, operands.k, operands.v, saved.out),
        saved.lse,
        dropout_p=0.0,
        is_causal=problem.mask.is_causal,
        scale=problem.scale,
    )
    grads = {"q": d_q, "k": d_k, "v": d_v}
    return Gradients(
        **{name: grad.transpose(1, 2).contiguous() for name, grad in grads.items() if name in problem.gradients}
    )


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[batch, heads, seqlen, dim] views; the op reads garbage, without a word, unless the last axis has stride 1."""
    return [(tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2) for tensor in tensors]

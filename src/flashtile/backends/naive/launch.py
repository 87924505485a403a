"""Pads the operands, applies the formula, and undoes the padding. Reads no tensor value on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, Plan, Saved
from flashtile.backends.naive import formula
from flashtile.backends.naive.formula import PaddedOperands
from flashtile.backends.naive.padding import Padding
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


def forward(problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
    padding_q, padding_kv = _paddings(problem, operands)
    out, lse = formula.forward(problem, _padded(problem, operands, padding_q, padding_kv), operands)
    out = padding_q.unpad(out.transpose(1, 2)).to(problem.dtype)
    lse = padding_q.unpad(lse.transpose(1, 2), fill=-torch.inf)
    return out.contiguous(), lse.transpose(-1, -2).contiguous()


def backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> Gradients:
    padding_q, padding_kv = _paddings(problem, operands)

    def padded_rows(rows: Tensor) -> Tensor:  # [..., rows, heads, dim] -> [batch, heads, seqlen_q, dim]
        return padding_q.pad(rows).to(problem.accumulation_dtype).transpose(1, 2)

    def padded_lse(lse: Tensor) -> Tensor:  # [..., heads, rows] -> [batch, heads, seqlen_q]
        return padding_q.pad(lse.transpose(-1, -2)).transpose(1, 2)

    padded_grads = formula.backward(
        problem,
        _padded(problem, operands, padding_q, padding_kv),
        operands,
        out=padded_rows(saved.out),
        d_out=padded_rows(torch.zeros_like(saved.out) if d_out is None else d_out),
        d_lse=None if d_lse is None else padded_lse(d_lse),
    )

    def shared_by_group(grad: Tensor) -> Tensor:  # the query heads of a group share one kv head
        return grad.unflatten(1, (problem.heads_kv, problem.heads_per_kv)).sum(2)

    grads = {
        "q": padding_q.unpad(padded_grads.q.transpose(1, 2)),
        "k": padding_kv.unpad(shared_by_group(padded_grads.k).transpose(1, 2)),
        "v": padding_kv.unpad(shared_by_group(padded_grads.v).transpose(1, 2)),
        "bias": padded_grads.bias,
        "sinks": padded_grads.sinks,
    }
    wanted = {name: grad for name, grad in grads.items() if name in problem.gradients}
    return Gradients(**{name: grad.to(getattr(operands, name).dtype).contiguous() for name, grad in wanted.items()})


def _paddings(problem: AttentionProblem, operands: Operands) -> tuple[Padding, Padding]:
    device = operands.q.device
    return (
        Padding.of(
            operands.cu_seqlens_q,
            batch=problem.batch,
            longest=problem.seqlen_q,
            tokens=problem.tokens_q,
            device=device,
        ),
        Padding.of(
            operands.cu_seqlens_kv,
            batch=problem.batch,
            longest=problem.seqlen_kv,
            tokens=problem.tokens_kv,
            device=device,
        ),
    )


def _padded(problem: AttentionProblem, operands: Operands, padding_q: Padding, padding_kv: Padding) -> PaddedOperands:
    def per_query_head(packed: Tensor) -> Tensor:
        padded = padding_kv.pad(packed).to(problem.accumulation_dtype).transpose(1, 2)
        return padded.repeat_interleave(problem.heads_per_kv, dim=1)

    return PaddedOperands(
        q=padding_q.pad(operands.q).to(problem.accumulation_dtype).transpose(1, 2),
        k=per_query_head(operands.k),
        v=per_query_head(operands.v),
        lengths_q=padding_q.lengths,
        lengths_kv=padding_kv.lengths,
    )

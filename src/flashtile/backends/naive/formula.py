"""Attention as the textbook writes it, every option included, on padded operands [batch, heads, seqlen, dim].

    s = scale * q @ k.T; s = softcap * tanh(s / softcap); s += bias; s[s <= HIDDEN_BELOW] = -inf;
    s += alibi; s[hidden] = -inf
    p = exp(s) / z, z = sum(exp(s)) + exp(sink), lse = log(z); out = dropout(p) @ v

Memory: the score matrix and its likes, [batch, heads_q, seqlen_q, seqlen_kv], several times over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile.spec import dropout, masks
from flashtile.spec.merge import guarded
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedOperands:
    """The operands in accumulation dtype with one head axis, and each sequence's lengths."""

    q: Tensor  # [batch, heads_q, seqlen_q, head_dim]
    k: Tensor  # [batch, heads_q, seqlen_kv, head_dim], each kv head repeated for its query heads
    v: Tensor  # [batch, heads_q, seqlen_kv, head_dim_v]
    lengths_q: Tensor  # [batch, 1, 1, 1] int64
    lengths_kv: Tensor  # [batch, 1, 1, 1] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedGradients:
    """Gradients of padded operands; bias and sinks have none if they are absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The final scores, and what their gradient needs; all [batch, heads_q, seqlen_q, seqlen_kv]."""

    s: Tensor
    softcap_slope: Tensor | None  # d(capped) / d(raw)
    keep: Tensor | None  # dropout's factor: 0 or 1 / (1 - p)


def forward(problem: AttentionProblem, padded: PaddedOperands, operands: Operands) -> tuple[Tensor, Tensor]:
    """(out [batch, heads_q, seqlen_q, head_dim_v], lse [batch, heads_q, seqlen_q]) in accumulation dtype."""
    scores = _scores(problem, padded, operands)
    p, _, lse = _softmax(scores.s, operands.sinks)
    return _dropped(p, scores) @ padded.v, lse


def backward(
    problem: AttentionProblem,
    padded: PaddedOperands,
    operands: Operands,
    out: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> PaddedGradients:
    """All gradients in accumulation dtype, padded like the operands; those of k and v still one per query head."""
    scores = _scores(problem, padded, operands)
    p, p_sink, _ = _softmax(scores.s, operands.sinks)
    delta = (out * d_out).sum(dim=-1, keepdim=True)
    if d_lse is not None:
        delta = delta - d_lse[..., None]
    d_p = _dropped(d_out @ padded.v.mT, scores)
    d_s = p * (d_p - delta)
    d_raw = d_s if scores.softcap_slope is None else d_s * scores.softcap_slope
    return PaddedGradients(
        q=problem.scale * (d_raw @ padded.k),
        k=problem.scale * (d_raw.mT @ padded.q),
        v=_dropped(p, scores).mT @ d_out,
        bias=None if operands.bias is None else d_s.sum_to_size(operands.bias.shape),
        sinks=None if operands.sinks is None else -(p_sink * delta).sum(dim=(0, 2, 3)),
    )


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(p like s, the sink's own probability [batch, heads_q, seqlen_q, 1], lse [batch, heads_q, seqlen_q])."""
    sink = s.new_full((1, 1, 1), -torch.inf) if sinks is None else sinks.to(s.dtype)[:, None, None]
    row_max = torch.maximum(s.amax(dim=-1, keepdim=True), sink) if s.shape[-1] > 0 else sink.expand(*s.shape[:-1], 1)
    shift = guarded(row_max)  # a row that sees nothing is shifted by 0, not by -inf
    p, p_sink = torch.exp(s - shift), torch.exp(sink - shift)
    row_sum = p.sum(dim=-1, keepdim=True) + p_sink
    lse = (shift + torch.log(row_sum)).squeeze(-1)
    row_sum = row_sum.masked_fill(row_sum == 0, 1.0)
    return p.div_(row_sum), p_sink / row_sum, lse


def _dropped(p: Tensor, scores: Scores) -> Tensor:
    return p if scores.keep is None else p * scores.keep


def _scores(problem: AttentionProblem, padded: PaddedOperands, operands: Operands) -> Scores:
    device, dtype = padded.q.device, padded.q.dtype
    q_pos = torch.arange(problem.seqlen_q, device=device)[:, None]
    kv_pos = torch.arange(problem.seqlen_kv, device=device)
    offset = padded.lengths_kv - padded.lengths_q  # [batch, 1, 1, 1]

    s = problem.scale * (padded.q @ padded.k.mT)
    softcap_slope = None
    if problem.softcap > 0:
        tanh = torch.tanh(s / problem.softcap)
        s, softcap_slope = problem.softcap * tanh, 1 - tanh * tanh
    if operands.bias is not None:
        s = s + operands.bias
        s = s.masked_fill(s <= masks.HIDDEN_BELOW, -torch.inf)
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.to(dtype)[..., None, None]  # [heads_q, 1, 1] or [batch, heads_q, 1, 1]
        s = s - slopes * (q_pos + offset - kv_pos).abs()
    visible = masks.is_visible(problem.mask, q_pos, kv_pos, offset)
    visible = visible & (q_pos < padded.lengths_q) & (kv_pos < padded.lengths_kv)
    if operands.mask is not None:
        visible = visible & operands.mask
    s = s.to(dtype).masked_fill(~visible, -torch.inf)

    keep = None
    if operands.dropout_seed is not None:
        keep = dropout.keep_mask(
            operands.dropout_seed,
            dropout_p=problem.dropout_p,
            batch_idx=torch.arange(problem.batch, device=device)[:, None, None, None],
            head_idx=torch.arange(problem.heads_q, device=device)[:, None, None],
            q_pos=q_pos,
            kv_begin=0,
            kv_end=problem.seqlen_kv,
        ).to(dtype) / (1 - problem.dropout_p)
    return Scores(s=s, softcap_slope=softcap_slope, keep=keep)

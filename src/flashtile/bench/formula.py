"""Attention as people write it: the naive formula of every benchmark and of the demo."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> out, all [batch, seqlen, heads, head_dim], differentiable."""


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, hidden: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """The textbook formula in plain torch, in the dtype of its operands.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim].
        k, v: [batch, seqlen_kv, heads_kv, head_dim]; heads_kv divides heads_q.
        hidden: boolean, True = may not attend, broadcastable to [batch, heads_q, seqlen_q, seqlen_kv].
        added: what is added to the scores, likewise broadcastable.

    Returns:
        [batch, seqlen_q, heads_q, head_dim].
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if added is not None:
        scores = scores + added
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def future(seqlen: int, device: torch.device) -> Tensor:
    """What a causal mask hides: boolean [seqlen, seqlen], True above the diagonal."""
    return torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).triu(1)

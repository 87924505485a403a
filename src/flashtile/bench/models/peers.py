"""The attention functions that a model is measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashtile
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.formula import AttentionFn, future, naive_attention
from flashtile.bench.models.cases import ModelCase


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPeer:
    """One way to compute the attention of a model."""

    name: str
    make: Callable[[], AttentionFn]
    """A function that is causal and aligned at the last key, for as many queries as keys or for a single query."""
    scratch_bytes: Callable[[ModelCase], int] = lambda _: 0
    """A lower bound of what it holds beside what every peer holds."""


def _flashtile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flashtile.attention(q, k, v, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's function as its users call it. Its own causality is aligned at the first key."""
    is_causal = q.shape[1] > 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)


class _Naive:
    """The formula, with its mask made once for all layers and steps, as a module's buffer would be."""

    def __init__(self) -> None:
        self._hidden: Tensor | None = None  # [seqlen, seqlen] bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seqlen = q.shape[1]
        if seqlen == 1:
            return naive_attention(q, k, v)
        if self._hidden is None or self._hidden.shape[0] != seqlen:
            self._hidden = future(seqlen, q.device)
        return naive_attention(q, k, v, hidden=self._hidden)


def _naive_scratch_bytes(case: ModelCase) -> int:
    """To train, the probabilities of every layer wait for the backward; else there are two matrices at a time."""
    return case.score_matrix_bytes * (case.shape.layers if case.mode == "train" else 2)


PEERS: tuple[ModelPeer, ...] = (
    ModelPeer(name=FLASHTILE, make=lambda: _flashtile),
    ModelPeer(name=NAIVE, make=_Naive, scratch_bytes=_naive_scratch_bytes),
    ModelPeer(name=SDPA, make=lambda: _sdpa),
)
"""In the order of the tables."""

"""The tensors of a case: made once, at random, and the same for every peer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashtile.bench.cases import BenchCase


@dataclass(frozen=True, kw_only=True)  # without slots, which leave no room for what cached_property keeps
class CaseTensors:
    """What one case computes with. Only q, k and v have gradients, and only if the case has a backward."""

    case: BenchCase
    q: Tensor  # [batch, seqlen, heads_q, head_dim]
    k: Tensor  # [batch, seqlen, heads_kv, head_dim]
    v: Tensor  # [batch, seqlen, heads_kv, head_dim]
    d_out: Tensor  # [batch, seqlen, heads_q, head_dim]
    bias: Tensor | None  # [1, heads_q, seqlen, seqlen]
    mask: Tensor | None  # [1, 1, seqlen, seqlen] bool
    alibi_slopes: Tensor | None  # [heads_q] float32

    @classmethod
    def random(cls, case: BenchCase, device: torch.device) -> CaseTensors:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

        rows = (case.batch, case.seqlen)
        needs_grad = case.direction != "forward"
        q, k, v = (
            draw(*rows, heads, case.head_dim).requires_grad_(needs_grad)
            for heads in (case.heads_q, case.heads_kv, case.heads_kv)
        )
        d_out = draw(*rows, case.heads_q, case.head_dim)
        mask = None
        if case.mask_shape is not None:
            mask = torch.rand(case.mask_shape, generator=generator, device=device) < 0.5
            mask.diagonal(dim1=-2, dim2=-1).fill_(True)  # a row that sees nothing is NaN in the formula
        return cls(
            case=case,
            q=q,
            k=k,
            v=v,
            d_out=d_out,
            bias=None if case.bias_shape is None else draw(*case.bias_shape),
            mask=mask,
            alibi_slopes=_alibi_slopes(case.heads_q, device) if case.option == "alibi" else None,
        )

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def call_options(self) -> dict[str, Any]:
        """The keyword arguments of ``flashtile.attention``."""
        return {
            "causal": self.case.is_causal,
            "window": self.case.window,
            "bias": self.bias,
            "mask": self.mask,
            "alibi_slopes": self.alibi_slopes,
        }

    @cached_property
    def dense_mask(self) -> Tensor | None:
        """All that decides about the scores beside q and k as one tensor, for the peers that take nothing else.

        None if every key is visible; boolean [1, 1, seqlen, seqlen] (True = may attend) where nothing is added to the
        scores, else what is added, [1, heads_q, seqlen, seqlen] in the case's dtype, -inf where hidden. It is made
        when first asked for, and all who ask share it.
        """
        if self.bias is None and self.alibi_slopes is None:
            return self._visible
        added = self._alibi_bias if self.bias is None else self.bias
        return added if self._visible is None else added.masked_fill(~self._visible, -math.inf)

    @cached_property
    def _visible(self) -> Tensor | None:  # [1, 1, seqlen, seqlen]
        left, right = self.case.window or (None, 0 if self.case.is_causal else None)
        visible = self.mask
        if left is not None or right is not None:
            band = torch.ones(1, 1, self.case.seqlen, self.case.seqlen, dtype=torch.bool, device=self.device)
            band = band if right is None else band.tril(right)
            band = band if left is None else band.triu(-left)
            visible = band if visible is None else visible & band
        return visible

    @property
    def _alibi_bias(self) -> Tensor:  # [1, heads_q, seqlen, seqlen]
        assert self.alibi_slopes is not None, "the caller asked"
        position = torch.arange(self.case.seqlen, device=self.device)
        distance = (position[:, None] - position).abs().to(self.case.problem.accumulation_dtype)
        bias = torch.empty(1, len(self.alibi_slopes), *distance.shape, dtype=self.case.torch_dtype, device=self.device)
        for head_idx, slope in enumerate(self.alibi_slopes.to(distance.dtype)):
            bias[0, head_idx] = -slope * distance  # head by head: all at once would need twice the memory
        return bias


def _alibi_slopes(heads_q: int, device: torch.device) -> Tensor:
    """2 ** (-8 / heads_q), its square, and so on down to 2 ** -8."""
    return torch.exp2(-8 / heads_q * torch.arange(1, heads_q + 1, device=device, dtype=torch.float32))

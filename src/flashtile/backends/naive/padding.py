"""Lays packed sequences out as one padded batch and back, without reading a length on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Where each row of [batch, longest] comes from. For dense operands both directions are the identity."""

    lengths: Tensor  # [batch, 1, 1, 1] int64
    tokens: int
    rows: Tensor | None  # [batch, longest] int64, a row of the packed buffer, or `tokens` for padding

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, *, batch: int, longest: int, tokens: int, device: torch.device) -> Padding:
        if cu_seqlens is None:
            lengths = torch.full((batch, 1, 1, 1), longest, device=device)
            return cls(lengths=lengths, tokens=tokens, rows=None)
        begin, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
        rows = begin + torch.arange(longest, device=device)
        return cls(lengths=(end - begin)[..., None, None], tokens=tokens, rows=torch.where(rows < end, rows, tokens))

    def pad(self, packed: Tensor) -> Tensor:
        """[tokens, ...] -> [batch, longest, ...]; padding is 0, whatever lies between the sequences."""
        if self.rows is None:
            return packed
        extended = torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])])
        return extended[self.rows]

    def unpad(self, padded: Tensor, *, fill: float = 0.0) -> Tensor:
        """[batch, longest, ...] -> [tokens, ...]; rows that belong to no sequence become ``fill``."""
        if self.rows is None:
            return padded
        extended = padded.new_full((self.tokens + 1, *padded.shape[2:]), fill)
        extended[self.rows] = padded
        return extended[:-1]

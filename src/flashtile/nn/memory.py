"""The memory that cross-attention attends to, projected into keys and values once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashtile.nn.padding import Packing


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Keys and values of one cross-attention layer, from ``MultiheadAttention.new_memory``.

    k: [batch, seqlen_kv, heads_kv, head_dim]; with a packing [tokens, heads_kv, head_dim], of the tokens alone.
    v: likewise, [..., heads_kv, head_dim].
    packing: where the tokens of each sequence lie; None if there is no padding.

    Example:
        >>> import torch
        >>> from flashtile.nn import MultiheadAttention
        >>> attention = MultiheadAttention(64, 8, n_head_kv=2)
        >>> memory = attention.new_memory(torch.randn(3, 100, 64))
        >>> memory.k.shape, attention(torch.randn(3, 1, 64), memory).shape
        (torch.Size([3, 100, 2, 8]), torch.Size([3, 1, 64]))
    """

    k: Tensor
    v: Tensor
    packing: Packing | None = None

    @property
    def batch(self) -> int:
        return self.k.shape[0] if self.packing is None else self.packing.batch

    def packed(self) -> tuple[Tensor, Tensor, Packing]:
        """k, v and packing, also without padding."""
        if self.packing is not None:
            return self.k, self.v, self.packing
        rows = Packing.full(*self.k.shape[:2], device=self.k.device)
        return self.k.flatten(0, 1), self.v.flatten(0, 1), rows

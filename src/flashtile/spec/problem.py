"""AttentionProblem: everything about one attention call except the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from flashtile.spec.operands import Operands

Layout = Literal["dense", "varlen"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What q, k and v may be."""

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
"""The operands that have a gradient, in the order in which every backward returns them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskSpec:
    """Which keys a query may see, as far as positions alone decide it.

    Query ``i`` sees keys ``j`` with ``i + offset - left <= j <= i + offset + right``, both ends inclusive,
    where ``offset = seqlen_kv - seqlen_q`` (bottom-right alignment). ``None`` on a side means unlimited.
    Causal attention is ``right == 0``.
    """

    left: int | None = None
    right: int | None = None

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    @property
    def is_unlimited(self) -> bool:
        return self.left is None and self.right is None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Sizes, dtypes and options of one attention call; hashable, holds no tensor and no device.

    For ``layout="varlen"``, ``seqlen_q`` and ``seqlen_kv`` are the longest sequence of the batch and ``tokens_q``,
    ``tokens_kv`` count the rows of the packed buffers. For ``layout="dense"`` tokens are batch times seqlen.
    ``bias_shape`` and ``mask_shape`` are padded with ones to four axes; ``None`` means there is none.
    """

    layout: Layout = "dense"
    batch: int
    seqlen_q: int
    seqlen_kv: int
    tokens_q: int
    tokens_kv: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    scale: float
    mask: MaskSpec = MaskSpec()
    softcap: float = 0.0
    bias_shape: tuple[int, ...] | None = None
    mask_shape: tuple[int, ...] | None = None
    has_alibi: bool = False
    has_sinks: bool = False
    dropout_p: float = 0.0
    gradients: frozenset[str] = frozenset()
    """Names out of ``DIFFERENTIABLE`` whose gradient is wanted, and ``"lse"`` if the lse may receive one."""
    deterministic: bool = False

    @property
    def heads_per_kv(self) -> int:
        """How many query heads share one key/value head (1 unless grouped-query attention)."""
        return self.heads_q // self.heads_kv

    @property
    def is_empty(self) -> bool:
        """Whether there is no (query, key) pair at all."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_kv, self.tokens_q, self.tokens_kv)

    @property
    def accumulation_dtype(self) -> torch.dtype:
        """The dtype of softmax statistics, accumulators and the lse: float64 for float64 inputs, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[batch, seqlen_q, heads_q, head_dim_v], packed [tokens_q, heads_q, head_dim_v]."""
        return (*self._rows, self.heads_q, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[batch, heads_q, seqlen_q], packed [heads_q, tokens_q]."""
        return (*self._rows[:-1], self.heads_q, self._rows[-1])

    @property
    def _rows(self) -> tuple[int, ...]:
        return (self.batch, self.seqlen_q) if self.layout == "dense" else (self.tokens_q,)

    @classmethod
    def of(
        cls,
        operands: Operands,
        *,
        mask: MaskSpec,
        scale: float,
        softcap: float,
        dropout_p: float,
        gradients: frozenset[str],
        deterministic: bool,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
    ) -> AttentionProblem:
        """The problem that checked operands and options pose; ``max_seqlen_*`` are given for packed operands only."""
        q_shape, k_shape = operands.q.shape, operands.k.shape
        if operands.cu_seqlens_q is None:
            layout, batch, seqlen_q, seqlen_kv = "dense", q_shape[0], q_shape[1], k_shape[1]
            tokens_q, tokens_kv = batch * seqlen_q, batch * seqlen_kv
        else:
            assert max_seqlen_q is not None and max_seqlen_kv is not None, (
                "packed operands come with their longest lengths"
            )
            layout, batch = "varlen", operands.cu_seqlens_q.shape[0] - 1
            seqlen_q, seqlen_kv = max_seqlen_q, max_seqlen_kv
            tokens_q, tokens_kv = q_shape[0], k_shape[0]
        if mask.is_causal and seqlen_q == 1:
            mask = MaskSpec(left=mask.left)  # the only query is the last one: no key lies after it
        return cls(
            layout=layout,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            tokens_q=tokens_q,
            tokens_kv=tokens_kv,
            heads_q=q_shape[-2],
            heads_kv=k_shape[-2],
            head_dim=q_shape[-1],
            head_dim_v=operands.v.shape[-1],
            dtype=operands.q.dtype,
            scale=scale,
            mask=mask,
            softcap=softcap,
            bias_shape=None if operands.bias is None else _four_axes(operands.bias),
            mask_shape=None if operands.mask is None else _four_axes(operands.mask),
            has_alibi=operands.alibi_slopes is not None,
            has_sinks=operands.sinks is not None,
            dropout_p=dropout_p,
            gradients=gradients,
            deterministic=deterministic,
        )


def _four_axes(tensor: torch.Tensor) -> tuple[int, ...]:
    return (1,) * (4 - tensor.dim()) + tuple(tensor.shape)

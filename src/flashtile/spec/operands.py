"""Operands: the tensors of one attention call. Their shapes are documented here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """The tensors of one attention call; holds no option.

    | field | dense | packed (varlen) |
    |---|---|---|
    | q | [batch, seqlen_q, heads_q, head_dim] | [tokens_q, heads_q, head_dim] |
    | k | [batch, seqlen_kv, heads_kv, head_dim] | [tokens_kv, heads_kv, head_dim] |
    | v | [batch, seqlen_kv, heads_kv, head_dim_v] | [tokens_kv, heads_kv, head_dim_v] |
    | bias, mask | broadcasts to [batch, heads_q, seqlen_q, seqlen_kv] | the same, with the longest lengths |
    | alibi_slopes | [heads_q] or [batch, heads_q] | the same |
    | sinks | [heads_q] | the same |
    | dropout_seed | [] int64 | the same |
    | cu_seqlens_q, cu_seqlens_kv | None | [batch + 1] int32, sequence b owns rows cu[b] to cu[b + 1] |
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Operands:
        """Of tensors in the order of the fields; the last ones may be left out."""
        return cls(**dict(zip(FIELDS, tensors, strict=False)))


FIELDS = tuple(field.name for field in fields(Operands))

tensors_of: Callable[[Operands], tuple[Any, ...]] = attrgetter(*FIELDS)
"""The tensors in the order of the fields, ``None`` for what is not used."""

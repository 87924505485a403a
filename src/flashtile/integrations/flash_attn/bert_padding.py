"""``flash_attn.bert_padding``: from padded batches to packed ones and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.integrations.flash_attn.translation import check_tensor
from flashtile.nn.padding import Packing, spread
from flashtile.spec.options import check_count, describe

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch, one sequence after the other; differentiable.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: [batch, seqlen], boolean or integer; nonzero where there is a token.
        unused_mask: the same for tokens that get room in the packed buffer although nothing uses them.

    Returns:
        hidden_states: [total, ...], the tokens of both masks.
        indices: [total] int64, where they were in the flattened batch.
        cu_seqlens: [batch + 1] int32.
        max_seqlen: the longest sequence; reading it, and ``total``, makes the host wait for the mask.
        seqused: [batch] int32, the number of tokens of ``attention_mask`` alone.
    """
    used = _as_boolean("attention_mask", attention_mask)
    present = used if unused_mask is None else used | _as_boolean("unused_mask", unused_mask)
    if not isinstance(hidden_states, Tensor) or hidden_states.shape[:2] != used.shape:
        raise invalid(
            "hidden_states",
            got=describe(hidden_states),
            wanted=f"a tensor [batch, seqlen, ...] with the axes of attention_mask, {list(used.shape)}",
            remedy="pass the mask of this very batch, one entry per token",
        )
    packing = Packing.of(present)
    tokens = packing.pack(hidden_states)
    return tokens, packing.indices, packing.cu_seqlens, packing.max_seqlen, used.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Undoes ``unpad_input``: [total, ...] -> [batch, seqlen, ...], 0 where there is no token; differentiable.

    Args:
        hidden_states: [total, ...].
        indices: [total] integers, as ``unpad_input`` returned them.
        batch, seqlen: of the result.
    """
    check_count("batch", batch, minimum=0)
    check_count("seqlen", seqlen, minimum=0)
    _check_indices(indices)
    if not isinstance(hidden_states, Tensor) or hidden_states.shape[:1] != indices.shape:
        raise invalid(
            "hidden_states",
            got=describe(hidden_states),
            wanted=f"a tensor [total, ...] with total = {len(indices)}, the number of indices",
            remedy="pass the indices that unpad_input returned for this batch",
        )
    return spread(hidden_states, indices, batch=batch, seqlen=seqlen)


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:  # noqa: A002 -- flash_attn's name
    """``input[indices]`` for [rows, ...] and [total] integers; differentiable."""
    _check_indices(indices)
    if not isinstance(input, Tensor) or input.dim() == 0:
        raise invalid("input", got=describe(input), wanted="a tensor [rows, ...]", remedy="flatten batch and seqlen")
    return input.index_select(0, indices)


def _as_boolean(name: str, mask: Any) -> Tensor:
    check_tensor(name, mask, "[batch, seqlen]")
    if mask.is_floating_point() or mask.is_complex():
        raise invalid(
            name,
            got=describe(mask),
            wanted="a boolean or integer mask, nonzero where there is a token",
            remedy="compare it with something; an additive mask, 0 and -inf, becomes mask == 0",
        )
    return mask.bool()


def _check_indices(indices: Any) -> None:
    check_tensor("indices", indices, "[total]", dtypes=(torch.int32, torch.int64))

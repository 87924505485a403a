"""One call of ``F.scaled_dot_product_attention`` as a call of ``flashtile.attention``: layouts, masks, alignment."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flashtile import functional
from flashtile.integrations.autocast import autocast_dtype
from flashtile.spec.problem import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class SdpaCall:
    """The arguments of a call, under torch's names.

    | field | shape |
    |---|---|
    | query | [..., heads_q, seqlen_q, head_dim], or [batch, seqlen_q, head_dim] |
    | key | [..., heads_kv, seqlen_kv, head_dim], as many axes as query |
    | value | [..., heads_kv, seqlen_kv, head_dim_v], as many axes as query |
    | attn_mask | broadcasts to [..., heads_q, seqlen_q, seqlen_kv]; boolean (True = may attend), or added to scores |
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


def refusal(call: SdpaCall) -> str | None:
    """Why a call is left to torch, which serves it or has its own words for what is wrong; None if flashtile does."""
    return _refuses_tensors(call) or _refuses_shapes(call) or _refuses_options(call)


def attend(call: SdpaCall) -> Tensor:
    """The attention of a call that ``refusal`` lets pass: [..., heads_q, seqlen_q, head_dim_v].

    torch aligns ``is_causal`` top-left: query i sees the keys j <= i. With more keys than queries, none sees a key past
    ``seqlen_q``, so those are cut off; with fewer keys, the bottom-right window is shifted to the right.
    """
    call = _as_autocast(call)
    call, is_top_left, is_bottom_right = _without_causal_bias(call)
    lacks_head_axis = call.query.dim() == 2 or (call.query.dim() == 3 and not call.enable_gqa)
    if lacks_head_axis:
        call = _with_head_axis(call)
    q, k, v = call.query, call.key, call.value
    seqlen_q, seqlen_kv = q.shape[-2], k.shape[-2]
    if is_top_left and seqlen_kv > seqlen_q:
        k, v = k[..., :seqlen_q, :], v[..., :seqlen_q, :]
    window = (None, seqlen_q - seqlen_kv) if is_top_left and seqlen_q > seqlen_kv else None

    lead = _batch_axes(q.shape, k.shape, v.shape)
    assert lead is not None
    mask = _with_one_batch_axis(call.attn_mask, lead)
    has_boolean_mask = mask is not None and mask.dtype == torch.bool
    out = functional.attention(
        _sequence_first(q, lead),
        _sequence_first(k, lead),
        _sequence_first(v, lead),
        causal=is_bottom_right or (is_top_left and window is None),
        window=window,
        scale=call.scale,
        mask=mask if has_boolean_mask else None,
        bias=None if has_boolean_mask else mask,
        dropout_p=call.dropout_p,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    out = out.transpose(1, 2).reshape(*lead, *out.shape[2:0:-1], out.shape[-1])
    return out.squeeze(-3) if lacks_head_axis else out


# --- what is left to torch -------------------------------------------------------------------------------------------


def _refuses_tensors(call: SdpaCall) -> str | None:
    for name in ("query", "key", "value", "attn_mask"):
        tensor = getattr(call, name)
        if name == "attn_mask" and (tensor is None or _is_causal_bias(tensor)):
            continue
        if not isinstance(tensor, Tensor):
            return f"{name} is no tensor"
        if tensor.is_nested or tensor.layout != torch.strided:
            return f"{name} is nested or not strided"
        if is_traceable_wrapper_subclass(tensor):
            return f"{name} is a {type(tensor).__name__}, a tensor made of tensors"
    q, k, v = (autocast_dtype(tensor) for tensor in (call.query, call.key, call.value))
    if q not in DTYPES or not q == k == v:
        return f"query, key and value are {q}, {k} and {v}"
    if call.query.device != call.key.device or call.query.device != call.value.device:
        return "query, key and value are on different devices"
    return None


def _refuses_shapes(call: SdpaCall) -> str | None:
    q, k, v = call.query.shape, call.key.shape, call.value.shape
    if len(q) < 2 or not len(q) == len(k) == len(v):
        return f"query, key and value have {len(q)}, {len(k)} and {len(v)} axes"
    if q[-1] != k[-1] or k[-2] != v[-2] or 0 in (q[-1], v[-1]):
        return "head_dim or seqlen_kv disagree, or are 0"
    if len(q) >= 3:
        heads_q, heads_kv, heads_v = q[-3], k[-3], v[-3]
        if heads_kv != heads_v or 0 in (heads_q, heads_kv):
            return f"query, key and value have {heads_q}, {heads_kv} and {heads_v} heads"
        if heads_q != heads_kv and (heads_q % heads_kv != 0 or (heads_kv != 1 and not call.enable_gqa)):
            return f"query has {heads_q} heads and key {heads_kv}, with enable_gqa={call.enable_gqa}"
    return "the batch axes of query, key and value do not broadcast" if _batch_axes(q, k, v) is None else None


def _refuses_options(call: SdpaCall) -> str | None:
    mask: Any = call.attn_mask
    if not 0 <= call.dropout_p < 1:
        return f"dropout_p is {call.dropout_p}"
    if mask is None:
        return None
    if call.is_causal:
        return "there are both is_causal and attn_mask"
    if _is_causal_bias(mask):
        sizes = (mask.seq_len_q, mask.seq_len_kv)
        return None if sizes == (call.query.shape[-2], call.key.shape[-2]) else f"attn_mask is for the lengths {sizes}"
    if mask.dtype not in (torch.bool, torch.float32, call.query.dtype, autocast_dtype(call.query)):
        return f"attn_mask is {mask.dtype} beside a query in {call.query.dtype}"
    if mask.device != call.query.device:
        return f"attn_mask is on {mask.device}"
    lead = _batch_axes(call.query.shape, call.key.shape, call.value.shape) or ()
    scores = (*lead, *call.query.shape[-3:-1], call.key.shape[-2])
    fits = mask.dim() <= len(scores) and all(
        have in (1, want) for have, want in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    return None if fits else f"attn_mask has shape {list(mask.shape)}, and the scores {list(scores)}"


# --- from torch's conventions to flashtile's -------------------------------------------------------------------------


def _as_autocast(call: SdpaCall) -> SdpaCall:
    """The call as autocast hands it to torch's kernels; a mask keeps its exact numbers."""
    dtype = autocast_dtype(call.query)
    if dtype == call.query.dtype == call.key.dtype == call.value.dtype:
        return call
    return replace(call, query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))


def _without_causal_bias(call: SdpaCall) -> tuple[SdpaCall, bool, bool]:
    """(call, is_top_left, is_bottom_right): torch.nn.attention.bias says by an object what a window says here."""
    bias: Any = call.attn_mask
    if bias is None or not _is_causal_bias(bias):
        return call, call.is_causal, False
    is_top_left = bias.variant.name == "UPPER_LEFT"
    return replace(call, attn_mask=None), is_top_left, not is_top_left


def _is_causal_bias(mask: Any) -> bool:
    """Whether it is a ``torch.nn.attention.bias.CausalBias``; importing that module would load torch's compiler."""
    return type(mask) is not Tensor and type(mask).__qualname__ == "CausalBias"


def _with_head_axis(call: SdpaCall) -> SdpaCall:
    """[batch, seqlen, dim] as [batch, 1, seqlen, dim], the mask likewise."""
    mask = call.attn_mask
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(-3)
    q, k, v = (tensor.unsqueeze(-3) for tensor in (call.query, call.key, call.value))
    return replace(call, query=q, key=k, value=v, attn_mask=mask)


def _batch_axes(*shapes: torch.Size) -> torch.Size | None:
    """The axes before the heads, broadcast; None if they do not."""
    first, *others = (shape[:-3] for shape in shapes)
    if all(other == first for other in others):
        return first
    try:
        return torch.broadcast_shapes(first, *others)
    except RuntimeError:
        return None


def _sequence_first(tensor: Tensor, lead: torch.Size) -> Tensor:
    """[..., heads, seqlen, dim] as [batch, seqlen, heads, dim]: a view, unless several batch axes cannot be one."""
    heads_first = tensor.expand(*lead, *tensor.shape[-3:]).reshape(math.prod(lead), *tensor.shape[-3:])
    return heads_first.transpose(1, 2)


def _with_one_batch_axis(mask: Tensor | None, lead: torch.Size) -> Tensor | None:
    """The mask with at most four axes; batch axes along which it varies are spelled out and folded into one."""
    if mask is None or mask.dim() <= 3 or len(lead) == 1:
        return mask
    varies = any(size != 1 for size in mask.shape[:-3])
    rest = mask.shape[-3:]
    return mask.expand(*lead, *rest).reshape(math.prod(lead), *rest) if varies else mask.reshape(1, *rest)

"""The attention function that transformers' layers call, for ``AttentionInterface``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashtile import functional
from flashtile.errors import invalid
from flashtile.integrations.autocast import autocast_dtype
from flashtile.integrations.transformers.visibility import Visibility, Window
from flashtile.spec.options import describe

_HARMLESS = frozenset(
    {
        "sliding_window",  # what transformers built the mask from
        "indices",  # so are the keys that sparse models select
        "position_ids",
        "cache_position",
        "use_cache",
        "seq_idx",  # for layers that are no attention
        "num_items_in_batch",  # for the loss
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
    }
)
"""Options that layers pass on and that change nothing here; of the rest, any but None and False is refused."""
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the queries of a call see, in flashtile's terms."""

    window: Window = (None, None)
    mask: Tensor | None = None  # boolean
    bias: Tensor | None = None  # additive


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Visibility | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, for transformers' ``AttentionInterface``.

    Args:
        module: the layer; its ``is_causal`` counts where there is no mask at all.
        query: [batch, heads_q, seqlen_q, head_dim].
        key: [batch, heads_kv, seqlen_kv, head_dim].
        value: [batch, heads_kv, seqlen_kv, head_dim_v].
        attention_mask: what our mask function returned, or a mask of the user's, [batch, heads, seqlen_q, seqlen_kv] or
            broadcasting to it: boolean (True = may attend), or added to the scores. It is the whole truth, as for the
            "eager" implementation: causality and windows are in it.
        options: ``dropout``, ``scaling``, ``softcap``, ``s_aux`` (sinks), ``position_bias``, ``is_causal``,
            ``deterministic``, and ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` of packed
            sequences.

    Returns:
        ([batch, seqlen_q, heads_q, head_dim_v], None): there are no attention weights to return.

    Raises:
        InvalidArgument: an option that flashtile does not know and that may change the result.
    """
    options = {name: value for name, value in options.items() if value is not None and name not in _HARMLESS}
    seen, packing = _seen(module, query, key, attention_mask, options)
    q, k, v = (tensor.transpose(1, 2).to(autocast_dtype(tensor)) for tensor in (query, key, value))
    common: dict[str, Any] = {
        "window": seen.window,
        "mask": seen.mask,
        "bias": _sum(seen.bias, options.pop("position_bias", None)),
        "scale": options.pop("scaling", None),
        "softcap": options.pop("softcap", 0.0),
        "sinks": options.pop("s_aux", None),
        "dropout_p": float(options.pop("dropout", 0.0)),
        "deterministic": options.pop("deterministic", False) or torch.are_deterministic_algorithms_enabled(),
    }
    _refuse_unknown(options)
    if packing is None:
        return functional.attention(q, k, v, **common), None
    out = functional.attention_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **common, **packing)
    return out.unflatten(0, q.shape[:2]), None


def _seen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | Visibility | None,
    options: dict[str, Any],
) -> tuple[_Seen, dict[str, Any] | None]:
    """(what is seen, the packing for ``attention_varlen`` or None for dense tensors); uses up the options for it."""
    packing = _packing_of_caller(options)
    is_causal = options.pop("is_causal", getattr(module, "is_causal", True)) and query.shape[2] > 1
    if isinstance(attention_mask, Tensor):
        return _seen_by_mask(attention_mask), None
    if attention_mask is None:
        if is_causal and packing is None and query.shape[2] != key.shape[2]:
            raise invalid(
                "attention_mask",
                got=f"None in a causal layer with {query.shape[2]} queries and {key.shape[2]} keys",
                wanted="a mask, because which keys the queries see is open",
                remedy="build it with transformers.masking_utils.create_causal_mask, or pass is_causal=False",
            )
        return _Seen(window=(None, 0 if is_causal else None)), packing
    if attention_mask.keys is not None and packing is not None:
        raise invalid(
            "cu_seq_lens_q",
            got="boundaries of packed sequences beside an attention_mask with padding",
            wanted="one of the two",
            remedy="leave attention_mask out: packed sequences have no padding",
        )
    has_bias = "position_bias" in options
    if attention_mask.sequences is not None and packing is None and _may_read(query) and not has_bias:
        packing = _packing_of(attention_mask.sequences)
    if packing is not None:
        return _Seen(window=attention_mask.window), packing
    return _Seen(window=attention_mask.window, mask=attention_mask.compact_mask()), None


def _seen_by_mask(mask: Tensor) -> _Seen:
    if mask.dim() != 4:
        raise invalid(
            "attention_mask",
            got=describe(mask),
            wanted="four axes that broadcast to [batch, heads, seqlen_q, seqlen_kv]",
            remedy="register flashtile's mask function too: flashtile.integrations.transformers.register()",
        )
    return _Seen(mask=mask) if mask.dtype == torch.bool else _Seen(bias=mask)


def _packing_of_caller(options: dict[str, Any]) -> dict[str, Any] | None:
    """The packed sequences that the caller described."""
    cu_q, cu_kv, max_q, max_kv = (options.pop(name, None) for name in _BOUNDARIES)
    if cu_q is None and cu_kv is None:
        return None
    if cu_q is None or cu_kv is None or max_q is None or max_kv is None or "position_bias" in options:
        raise invalid(
            "cu_seq_lens_q",
            got="boundaries of packed sequences "
            + ("beside a position_bias" if "position_bias" in options else "alone"),
            wanted=f"all of {', '.join(_BOUNDARIES)}, and no position_bias",
            remedy="take them from transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)",
        )
    return {
        "cu_seqlens_q": cu_q.to(torch.int32),
        "cu_seqlens_kv": cu_kv.to(torch.int32),
        "max_seqlen_q": int(max_q),
        "max_seqlen_kv": int(max_kv),
    }


def _packing_of(sequences: Tensor) -> dict[str, Any]:
    """Boundaries of the runs of equal numbers, row after row."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    cu = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([sequences.numel()])]).to(torch.int32)
    longest = int(cu.diff().max()) if sequences.numel() else 0
    return {"cu_seqlens_q": cu, "cu_seqlens_kv": cu, "max_seqlen_q": longest, "max_seqlen_kv": longest}


def _may_read(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device, and without breaking a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _sum(bias: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    if bias is None or position_bias is None:
        return position_bias if bias is None else bias
    return bias + position_bias


def _refuse_unknown(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is False:
            continue
        weights = name == "output_attentions"
        raise invalid(
            name,
            got=describe(value),
            wanted="False: the weights are never stored" if weights else "no option that flashtile does not know",
            remedy='load the model with attn_implementation="eager"',
        )

"""flash_attn 2.8's functions, argument for argument, on flashtile's kernels; they run on CPU tensors too.

All of them take ``T``, the arguments documented in ``flash_attn_func``. With ``return_attn_probs=True`` they return
``(out, lse, S_dmask)`` instead of ``out``, as they do there, hence their return type.

What differs from flash_attn:

* float32 and float64, any head_dim, a head_dim_v that differs, and CPU tensors work.
* lse is differentiable. Where a query sees no key it is -inf.
* Dropout draws its seed from torch's generator, but drops other weights than flash_attn does for the same seed.
* S_dmask is None unless ``dropout_p > 0``, and has no rows or columns of padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.functional import attention, attention_varlen, attention_varlen_with_lse, attention_with_lse
from flashtile.integrations.flash_attn.cache import Cache, check_slopes
from flashtile.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from flashtile.integrations.flash_attn.s_dmask import probabilities_with_signs
from flashtile.integrations.flash_attn.translation import check_packed, check_tensor, in_callers_words, options_of
from flashtile.nn.kv_cache import attention_over_cache
from flashtile.spec.dropout import draw_seed
from flashtile.spec.options import check_count, check_dropout_p, check_flag

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

_KV = {"q, k and v": "q and kv", "k and v": "kv", "k": "kv", "v": "kv"}
_QKV = {
    "q, k and v": "qkv",
    "k and v": "qkv",
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "cu_seqlens_q": "cu_seqlens",
    "cu_seqlens_kv": "cu_seqlens",
    "max_seqlen_q": "max_seqlen",
    "max_seqlen_kv": "max_seqlen",
}


@in_callers_words()
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q to k and v; differentiable.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        k, v: [batch, seqlen_k, heads_k, head_dim]; heads_k divides heads.
        dropout_p: probability of dropping an attention weight. There is no train or eval mode: pass 0.0 to evaluate.
        softmax_scale: factor on q @ k.T; None is head_dim ** -0.5.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (bottom-right alignment).
        window_size: (left, right); query i sees keys from i + seqlen_k - seqlen_q - left to ... + right, both
            inclusive; -1 on a side means unlimited.
        softcap: c > 0 replaces scores s by c * tanh(s / c); 0.0 means none.
        alibi_slopes: [heads] or [batch, heads] float32; adds -slope * |i + seqlen_k - seqlen_q - j| to the scores.
        deterministic: ask for a bitwise repeatable backward.
        return_attn_probs: also return lse and S_dmask.

    Returns:
        out: [batch, seqlen_q, heads, head_dim] in q's dtype. A query that sees no key gets 0.
        lse, if return_attn_probs: [batch, heads, seqlen_q] float32, the natural logarithm of the softmax denominator.
        S_dmask, if return_attn_probs: [batch, heads, seqlen_q, seqlen_k] in q's dtype, the attention weights before
            dropout, with a negative sign where dropout drops them. For tests: it stores the score matrix. None if
            dropout_p is 0.

    Raises:
        InvalidArgument: a wrong argument; a ValueError that names it, what it got, what was wanted and the remedy.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return _dense(q, k, v, options, return_attn_probs)


@in_callers_words(_KV)
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with keys and values in one tensor.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        kv: [batch, seqlen_k, 2, heads_k, head_dim].
        The rest is T.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    k, v = check_packed("kv", kv, "[batch, seqlen_k, 2, heads_k, head_dim]").unbind(-3)
    return _dense(q, k, v, options, return_attn_probs)


@in_callers_words(_QKV)
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_func`` with queries, keys and values in one tensor.

    Args:
        qkv: [batch, seqlen, 3, heads, head_dim].
        The rest is T.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = check_packed("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]").unbind(-3)
    return _dense(q, k, v, options, return_attn_probs)


@in_callers_words()
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """``flash_attn_func`` over sequences of different lengths, packed one after the other without padding.

    Args:
        q: [total_q, heads, head_dim].
        k, v: [total_k, heads_k, head_dim]; with a block_table [num_blocks, page_block_size, heads_k, head_dim].
        cu_seqlens_q, cu_seqlens_k: [batch + 1] int32; sequence b owns the rows from entry b to entry b + 1.
        max_seqlen_q, max_seqlen_k: Python ints, the longest sequence or more.
        The rest is T; alibi_slopes and dropout as there.
        block_table: [batch, blocks per sequence] int32; key j of sequence b is row j % page_block_size of block
            block_table[b, j // page_block_size], and cu_seqlens_k says only how many keys each sequence has. The pages
            are copied into one buffer. No dropout.

    Returns:
        As ``flash_attn_func``, with out [total_q, heads, head_dim], lse [heads, total_q], and S_dmask
        [batch, heads, max_seqlen_q, max_seqlen_k]. Rows that belong to no sequence get 0 and -inf.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        return _paged(q, k, v, block_table, packing, options, return_attn_probs)
    return _packed(q, k, v, packing, options, return_attn_probs)


@in_callers_words(_KV)
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with keys and values in one tensor.

    Args:
        q: [total_q, heads, head_dim].
        kv: [total_k, 2, heads_k, head_dim].
        The rest is as there.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    k, v = check_packed("kv", kv, "[total_k, 2, heads_k, head_dim]").unbind(-3)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, packing, options, return_attn_probs)


@in_callers_words(_QKV)
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` with queries, keys and values in one tensor.

    Args:
        qkv: [total, 3, heads, head_dim].
        cu_seqlens: [batch + 1] int32, the boundaries of queries and keys alike.
        max_seqlen: the longest sequence, or more.
        The rest is as there.
    """
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    q, k, v = check_packed("qkv", qkv, "[total, 3, heads, head_dim]").unbind(-3)
    packing = _packing(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _packed(q, k, v, packing, options, return_attn_probs)


# --- the names of flash_attn 1.x -------------------------------------------------------------------------------------


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """``flash_attn_varlen_func`` under its 1.x name and argument order.

    Causality is aligned bottom-right, as since flash_attn 2.1; 1.x aligned it top-left, which differs only where a
    sequence has unlike numbers of queries and keys.
    """
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """``flash_attn_varlen_kvpacked_func`` under its 1.x name; see ``flash_attn_unpadded_func``."""
    return flash_attn_varlen_kvpacked_func(
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """``flash_attn_varlen_qkvpacked_func`` under its 1.x name; see ``flash_attn_unpadded_func``."""
    return flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


# --- what they have in common ----------------------------------------------------------------------------------------


def _packing(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_kv": max_seqlen_k,
    }


def _dense(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], return_attn_probs: bool) -> Any:
    check_flag("return_attn_probs", return_attn_probs)
    if not return_attn_probs:
        return attention(q, k, v, **options)
    options = _seeded(options, q)
    out, lse = attention_with_lse(q, k, v, **options)
    if options["dropout_p"] == 0:
        return out, lse, None
    batch, seqlen_q, seqlen_k = *q.shape[:2], k.shape[1]
    rows_q, rows_k = (
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length for length in (seqlen_q, seqlen_k)
    )
    packing = _packing(rows_q, rows_k, seqlen_q, seqlen_k)
    return out, lse, probabilities_with_signs(q.flatten(0, 1), k.flatten(0, 1), **packing, **options)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, packing: dict[str, Any], options: dict[str, Any], return_attn_probs: bool
) -> Any:
    check_flag("return_attn_probs", return_attn_probs)
    if not return_attn_probs:
        return attention_varlen(q, k, v, **packing, **options)
    options = _seeded(options, q)
    out, lse = attention_varlen_with_lse(q, k, v, **packing, **options)
    has_dropout = options["dropout_p"] > 0
    return out, lse, probabilities_with_signs(q, k, **packing, **options) if has_dropout else None


@in_callers_words({"k_cache": "k", "v_cache": "v", "cache_seqlens": "cu_seqlens_k"})
def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    packing: dict[str, Any],
    options: dict[str, Any],
    return_attn_probs: bool,
) -> Any:
    check_flag("return_attn_probs", return_attn_probs)
    if check_dropout_p(options["dropout_p"]) > 0:
        raise invalid(
            "dropout_p",
            got=f"{options['dropout_p']} beside a block_table",
            wanted="0.0: pages are for generation",
            remedy="pass dropout_p=0.0, or packed k and v without a block_table",
        )
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        check_tensor(name, packing[name], "[batch + 1]", dtypes=(torch.int32,))
    check_count("max_seqlen_kv", packing["max_seqlen_kv"], minimum=0)
    lengths = packing["cu_seqlens_kv"].diff()
    check_tensor("q", q, "[total_q, heads, head_dim]")
    check_slopes(options["alibi_slopes"], batch=len(lengths), heads=q.shape[1])
    cache = Cache.checked(k, v, batch=len(lengths), num_new=0, seqlens=lengths, block_table=block_table)
    out, lse = attention_over_cache(
        q,
        *cache.by_sequence(lengths),
        cu_seqlens_q=packing["cu_seqlens_q"],
        max_seqlen_q=packing["max_seqlen_q"],
        lengths=lengths,
        **options,
    )
    return (out, lse, None) if return_attn_probs else out


def _seeded(options: dict[str, Any], q: Tensor) -> dict[str, Any]:
    """The options with a seed of dropout that out and S_dmask share."""
    if check_dropout_p(options["dropout_p"]) == 0:
        return options
    return options | {"dropout_seed": draw_seed(q.device)}

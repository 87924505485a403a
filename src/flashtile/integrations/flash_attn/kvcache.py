"""flash_attn_with_kvcache: one step of generation, on a dense or a paged cache.

It appends with indexing, then runs ``flashtile.attention_varlen`` over the cache where it lies. Only pages, rows picked
by ``cache_batch_idx``, and caches whose rows are not adjacent in memory are copied first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.integrations.flash_attn.cache import Cache, check_pair, check_slopes
from flashtile.integrations.flash_attn.translation import check_tensor, in_callers_words, may_read, options_of
from flashtile.nn.kv_cache import attention_over_cache
from flashtile.nn.rotary import apply_rotary
from flashtile.spec import validation
from flashtile.spec.options import check_count, check_flag, describe

_check_call = in_callers_words({"q, k and v": "q, k_cache and v_cache", "k": "k_cache", "v": "v_cache"})(
    validation.check_call
)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of a few new queries to a cache of keys and values, to which new ones are appended first.

    Nothing here has a gradient, and no tensor is read on the host.

    Args:
        q: [batch, seqlen_q, heads, head_dim].
        k_cache, v_cache: [batch or more, seqlen_cache, heads_k, head_dim], or with a block_table
            [num_blocks, page_block_size, heads_k, head_dim]. What lies beyond a sequence's length is never read.
        k, v: [batch, seqlen_new, heads_k, head_dim], written into the caches in place behind cache_seqlens.
        rotary_cos, rotary_sin: [at least seqlen_cache, rotary_dim / 2]; turn k, and q, at positions cache_seqlens,
            cache_seqlens + 1, ...; without causality and window, every query at cache_seqlens. They need k.
        cache_seqlens: how many keys the caches hold, an int for all sequences or [batch] int32, counted from the start
            of the cache, left padding included. None: the caches are full.
        cache_batch_idx: [batch] int32, the row of the caches that belongs to each sequence; None: 0, 1, 2, ...
        cache_leftpad: [batch] int32, where each sequence's first key lies; None: at 0.
        block_table: [batch, blocks per sequence] int32; key j of sequence b is row j % page_block_size of block
            block_table[b, j // page_block_size].
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in ``flash_attn_func``; appended keys count.
        rotary_interleaved: pairs are coordinates (0, 1), (2, 3), ...; otherwise (0, rotary_dim / 2), ...
        num_splits: a hint about speed, which flashtile does not need; the result is the same.
        return_softmax_lse: also return lse.

    Returns:
        out: [batch, seqlen_q, heads, head_dim] in q's dtype. A query that sees no key gets 0.
        lse, if return_softmax_lse: [batch, heads, seqlen_q] float32.

    Raises:
        InvalidArgument: a wrong argument; a ValueError that names it, what it got, what was wanted and the remedy.
            On CPU tensors the values of lengths, indices and tables are checked too, on a GPU with
            FLASHTILE_CHECK_VALUES=1.
    """
    options = options_of(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    check_count("num_splits", num_splits, minimum=0)
    check_flag("return_softmax_lse", return_softmax_lse)
    batch, seqlen_q = check_tensor("q", q, "[batch, seqlen_q, heads, head_dim]").shape[:2]
    num_new = _check_new(k, v, q)
    cache = Cache.checked(
        k_cache,
        v_cache,
        batch=batch,
        num_new=num_new,
        seqlens=cache_seqlens,
        leftpad=cache_leftpad,
        batch_idx=cache_batch_idx,
        block_table=block_table,
    )
    _check_belongs(k, v, cache)
    _check_attention(q, cache, options)
    rotation = _Rotation.checked(rotary_cos, rotary_sin, rotary_interleaved, cache=cache, q=q, num_new=num_new)

    with torch.no_grad():
        if rotation is not None and k is not None:
            moves = causal or options["window"] != (None, None)
            q = rotation.turned(q, moves=moves)
            k = rotation.turned(k, moves=True)
        if k is not None and v is not None:
            cache.append(k, v)
        lengths = cache.seqlens + num_new
        keys, values = cache.by_sequence(lengths)
        out, lse = attention_over_cache(
            q.flatten(0, 1),
            keys,
            values,
            cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q,
            max_seqlen_q=seqlen_q,
            lengths=lengths,
            starts=cache.leftpad,
            **options,
        )
    out = out.unflatten(0, (batch, seqlen_q))
    return (out, lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1).contiguous()) if return_softmax_lse else out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rotation:
    """The tables of a rotary embedding, and the position of each sequence's first new token."""

    cos: Tensor  # [positions, rotary_dim / 2]
    sin: Tensor
    is_interleaved: bool
    begin: Tensor  # [batch]

    @classmethod
    def checked(
        cls, cos: Any, sin: Any, is_interleaved: Any, *, cache: Cache, q: Tensor, num_new: int
    ) -> _Rotation | None:
        check_flag("rotary_interleaved", is_interleaved)
        if cos is None and sin is None:
            return None
        cos = check_tensor("rotary_cos", cos, "[positions, rotary_dim / 2]")
        sin = check_tensor("rotary_sin", sin, "[positions, rotary_dim / 2]")
        if sin.shape != cos.shape or sin.device != cos.device:
            raise invalid(
                "rotary_sin",
                got=f"shape {list(sin.shape)} on {sin.device}",
                wanted=f"what rotary_cos is, {list(cos.shape)} on {cos.device}",
                remedy="make both from the same positions",
            )
        if num_new == 0:
            raise invalid(
                "rotary_cos",
                got="a table, but no k",
                wanted="new keys to turn",
                remedy="pass k and v, or turn q yourself with layers.rotary.apply_rotary_emb",
            )
        longest = cache.capacity
        if cache.seqlens.numel() and may_read(cache.seqlens):
            longest = max(longest, int(cache.seqlens.max()) + q.shape[1])
        if len(cos) < longest or 2 * cos.shape[1] > q.shape[-1]:
            raise invalid(
                "rotary_cos",
                got=describe(cos),
                wanted=f"at least {longest} positions, one per key and query, and at most {q.shape[-1] // 2} angles",
                remedy="make a longer table; an angle turns two of head_dim's coordinates",
            )
        return cls(cos=cos, sin=sin, is_interleaved=is_interleaved, begin=cache.seqlens)

    def turned(self, x: Tensor, *, moves: bool) -> Tensor:
        """x [batch, seqlen, heads, head_dim] at positions begin, begin + 1, ...; at begin alone unless it moves."""
        positions = self.begin[:, None]
        if moves:
            positions = positions + torch.arange(x.shape[1], device=x.device)
        return apply_rotary(x, self.cos[positions], self.sin[positions], interleaved=self.is_interleaved)


def _check_new(k: Any, v: Any, q: Tensor) -> int:
    """How many keys k and v bring for each sequence; 0 if there are none."""
    if k is None and v is None:
        return 0
    k, _ = check_pair("k", k, "v", v, "[batch, seqlen_new, heads_k, head_dim]")
    if k.shape[0] != q.shape[0]:
        raise invalid(
            "k", got=f"batch {k.shape[0]}", wanted=f"q's, {q.shape[0]}", remedy="pass new keys for every sequence of q"
        )
    return k.shape[1]


def _check_belongs(k: Tensor | None, v: Tensor | None, cache: Cache) -> None:
    """Raises unless k and v can be written into the caches."""
    for name, new, old in (("k", k, cache.k), ("v", v, cache.v)):
        if new is not None and (new.shape[2:] != old.shape[2:] or new.dtype != old.dtype or new.device != old.device):
            raise invalid(
                name,
                got=f"{list(new.shape[2:])} per token, {new.dtype} on {new.device}",
                wanted=f"what {name}_cache holds: {list(old.shape[2:])} per token, {old.dtype} on {old.device}",
                remedy=f"allocate {name}_cache like {name}",
            )


def _check_attention(q: Tensor, cache: Cache, options: dict[str, Any]) -> None:
    """Checks the call before anything is appended: shapes and options, on no sequences at all."""
    slopes = options["alibi_slopes"]
    check_slopes(slopes, batch=q.shape[0], heads=q.shape[2])
    if slopes is not None and slopes.dim() == 2:
        options = options | {"alibi_slopes": slopes[:0]}
    others = {"bias": None, "mask": None, "sinks": None, "dropout_seed": None, "wants_lse": True}
    _check_call(q[:0], cache.k[:0], cache.v[:0], **options, **others)

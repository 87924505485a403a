"""Key/value caches for generation: buffers with room for more keys than each sequence has.

A cache is dense, [batch, capacity, heads_kv, head_dim], or paged: [num_pages, page_size, heads_kv, head_dim] with a
``page_table`` [batch, pages per sequence] int32, whose entry i names the page of keys i * page_size and following.
Lengths stay on the device: nothing here reads a tensor on the host. Keys beyond a sequence's length are never read, so
new buffers may come from ``torch.empty``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile.functional import attention_varlen_with_lse


def append(cache: Tensor, new: Tensor, *, lengths: Tensor, rows: Tensor | None = None) -> None:
    """Writes new keys, or values, into a dense cache behind each sequence's last, in place.

    Args:
        cache: [rows, capacity, heads_kv, head_dim].
        new: [batch, seqlen_new, heads_kv, head_dim].
        lengths: [batch], how many keys each sequence has so far; with the new ones no more than ``capacity``.
        rows: [batch] integers, the row of the cache that belongs to each sequence; by default its first ``batch`` rows.
    """
    if rows is None:
        rows = torch.arange(new.shape[0], device=new.device)
    cache[rows.long()[:, None], _positions_of_new(new, lengths)] = new


def append_to_pages(pages: Tensor, new: Tensor, *, lengths: Tensor, page_table: Tensor) -> None:
    """``append`` for a paged cache; the pages of the new keys are already in the table.

    Args:
        pages: [num_pages, page_size, heads_kv, head_dim].
        new: [batch, seqlen_new, heads_kv, head_dim].
        lengths: [batch], how many keys each sequence has so far.
        page_table: [batch, pages per sequence] integers.
    """
    page_size = pages.shape[1]
    positions = _positions_of_new(new, lengths)
    pages[page_table.long().gather(1, positions // page_size), positions % page_size] = new


def gather_pages(pages: Tensor, *, lengths: Tensor, page_table: Tensor) -> Tensor:
    """Copies each sequence's pages into one row: [batch, pages per sequence * page_size, heads_kv, head_dim].

    Args:
        pages: [num_pages, page_size, heads_kv, head_dim].
        lengths: [batch], how many keys each sequence has; what comes after them in the result has no meaning.
        page_table: [batch, pages per sequence] integers; entries beyond a sequence's length are not used.
    """
    first_key = torch.arange(page_table.shape[1], device=pages.device) * pages.shape[1]
    in_use = first_key < lengths[:, None]
    return pages[torch.where(in_use, page_table, 0).long()].flatten(1, 2)


def attention_over_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    lengths: Tensor,
    starts: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Packed queries over the keys that each row of a dense cache holds; the cache is not copied if rows are adjacent.

    Args:
        q: [tokens_q, heads_q, head_dim].
        k: [batch, capacity, heads_kv, head_dim].
        v: [batch, capacity, heads_kv, head_dim_v].
        cu_seqlens_q: [batch + 1] int32.
        max_seqlen_q: the longest query sequence, or more.
        lengths: [batch] integers; row b holds keys up to, not including, ``lengths[b]``.
        starts: [batch] integers, the first key of each row, for batches padded on the left; by default 0.
        alibi_slopes: [heads_q] or [batch, heads_q].
        options: further ones of ``flashtile.attention_varlen``. Queries are aligned with the last keys.

    Returns:
        out [tokens_q, heads_q, head_dim_v] and lse [heads_q, tokens_q], as ``attention_varlen_with_lse``.

    The rows of the cache, one after the other, are a packed buffer in which the keys of a sequence are followed by a
    gap. Each gap is stated as a sequence of its own, one without queries, before the sequence whose keys come next.
    """
    batch, capacity = k.shape[:2]
    row_begin = torch.arange(batch, device=k.device) * capacity
    begin = row_begin if starts is None else row_begin + starts
    boundaries = torch.stack([begin, row_begin + lengths], dim=1).flatten()
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        alibi_slopes = alibi_slopes.repeat_interleave(2, dim=0)
    return attention_varlen_with_lse(
        q,
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=cu_seqlens_q.repeat_interleave(2)[:-1],
        cu_seqlens_kv=torch.nn.functional.pad(boundaries, (1, 0)).to(torch.int32),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=capacity if starts is None else 2 * capacity,  # a gap may take up the ends of two rows
        alibi_slopes=alibi_slopes,
        **options,
    )


def _positions_of_new(new: Tensor, lengths: Tensor) -> Tensor:
    """[batch, seqlen_new] int64."""
    return lengths.long()[:, None] + torch.arange(new.shape[1], device=new.device)

"""Key/value caches for generation: buffers with room for more keys than each sequence has.

A cache is dense, [batch, capacity, heads_kv, head_dim], or paged: [num_pages, page_size, heads_kv, head_dim] with a
``page_table`` [batch, pages per sequence] int32, whose entry i names the page of keys i * page_size and following.
Lengths stay on the device, and the functions read no tensor on the host. Keys beyond a sequence's length are never
read, so new buffers may come from ``torch.empty``. ``KVCache`` is a dense one with its lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile.errors import InvalidArgument, invalid
from flashtile.functional import attention_varlen_with_lse
from flashtile.nn.padding import Packing, packed_positions
from flashtile.spec.options import check_count, describe


class KVCache:
    """The keys and values of one attention layer while it generates, for sequences of different lengths.

    Padding is never stored: of prompts padded on either side only the tokens are kept.

    Args:
        batch: how many sequences.
        capacity: how many keys each of them can have.
        heads_kv, head_dim: of the keys; the values' ``head_dim_v`` may differ.
        device, dtype: of the buffers.

    Attributes:
        lengths: [batch] int32, how many keys each sequence has.
        k: [batch, capacity + 1, heads_kv, head_dim]; entries from ``lengths`` on have no meaning, the last takes what
            is padding in compiled code.
        v: [batch, capacity + 1, heads_kv, head_dim_v].

    Raises:
        InvalidArgument: sizes that are no counts.

    Example:
        >>> import torch
        >>> from flashtile.nn import KVCache
        >>> cache = KVCache(2, 128, heads_kv=4, head_dim=16)
        >>> cache.append(torch.randn(2, 5, 4, 16), torch.randn(2, 5, 4, 16))
        >>> cache.attend(torch.randn(2, 1, 8, 16), causal=True).shape
        torch.Size([2, 1, 8, 16])
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        heads_kv: int,
        head_dim: int,
        head_dim_v: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        check_count("batch", batch, minimum=0)
        for name, size in (
            ("capacity", capacity),
            ("heads_kv", heads_kv),
            ("head_dim", head_dim),
            ("head_dim_v", head_dim_v),
        ):
            check_count(name, size, minimum=1)
        self.k = torch.empty(batch, capacity + 1, heads_kv, head_dim, device=device, dtype=dtype)
        self.v = torch.empty(batch, capacity + 1, heads_kv, head_dim_v, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._longest = 0  # no length is above it; known without reading a tensor

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        return self.k.shape[1] - 1

    def __repr__(self) -> str:
        _, _, heads_kv, head_dim = self.k.shape
        return f"KVCache({self.batch}, {self.capacity}, {heads_kv=}, {head_dim=}, dtype={self.k.dtype})"

    def append(self, k: Tensor, v: Tensor, *, packing: Packing | None = None) -> None:
        """Writes new keys and values behind each sequence's last, in place.

        Args:
            k: [batch, new, heads_kv, head_dim]; with a packing [tokens, heads_kv, head_dim], any number per sequence.
            v: likewise, [..., heads_kv, head_dim_v].
            packing: where the tokens of each sequence lie.

        Raises:
            InvalidArgument: keys or values that the cache was not made for; a cache that is full, before anything is
                written. On a GPU lengths are read only when the sequences might be too long, and never in compiled
                code, where a full cache is an error of the device.
        """
        self._check_new(k, v, packing)
        if packing is None:
            packing, k, v = Packing.full(*k.shape[:2], device=k.device), k.flatten(0, 1), v.flatten(0, 1)
        self._make_room(packing)
        rows, slots = self.next_positions(packing)
        if packing.has_spare_rows:
            is_spare = torch.arange(len(slots), device=slots.device) >= packing.cu_seqlens[-1]
            slots = slots.masked_fill(is_spare, self.capacity)
        self.k[rows, slots] = k
        self.v[rows, slots] = v
        self.lengths += packing.cu_seqlens.diff()

    def next_positions(self, packing: Packing) -> tuple[Tensor, Tensor]:
        """Where the tokens of a packing would go: sequence and position of each, both [tokens] int64."""
        sequence_idx, positions = packed_positions(packing.cu_seqlens, num_tokens=packing.indices.shape[0])
        return sequence_idx, self.lengths[sequence_idx] + positions

    def attend(self, q: Tensor, *, packing: Packing | None = None, **options: Any) -> Tensor:
        """Attention of queries to each sequence's keys; the last query is aligned with the last key.

        Args:
            q: [batch, seqlen_q, heads_q, head_dim]; with a packing [tokens, heads_q, head_dim].
            packing: where the queries of each sequence lie.
            options: further ones of ``flashtile.attention_varlen``.

        Returns:
            Like q, with head_dim_v.
        """
        if packing is None:
            rows = Packing.full(*q.shape[:2], device=q.device)
            return rows.unpack(self.attend(q.flatten(0, 1), packing=rows, **options))
        out, _ = attention_over_cache(
            q,
            self.k,
            self.v,
            cu_seqlens_q=packing.cu_seqlens,
            max_seqlen_q=packing.max_seqlen,
            lengths=self.lengths,
            **options,
        )
        return out

    def reorder(self, rows: Tensor) -> None:
        """Replaces sequence i by what was sequence ``rows[i]``, as beam search does; the buffers are new ones.

        Args:
            rows: integers [any number], also repeated ones; the new batch has as many sequences.

        Raises:
            InvalidArgument: no vector of integers; on CPU tensors also a sequence that is not there.
        """
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
            raise _wrong_rows(describe(rows), self.batch)
        if rows.device.type == "cpu" and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch:
            raise _wrong_rows(str(rows.tolist()), self.batch)
        self.k, self.v, self.lengths = (held.index_select(0, rows) for held in (self.k, self.v, self.lengths))

    def reset(self) -> None:
        """Forgets every key; the buffers stay."""
        self.lengths.zero_()
        self._longest = 0

    def _check_new(self, k: Any, v: Any, packing: Packing | None) -> None:
        """Raises unless k and v can be written into the buffers."""
        if packing is not None and packing.batch != self.batch:
            raise invalid(
                "packing",
                got=f"{packing.batch} sequences",
                wanted=f"{self.batch}, as the cache holds",
                remedy="make one cache per batch; reorder() changes how many sequences it holds",
            )
        new = k.shape[1] if isinstance(k, Tensor) and k.dim() == 4 else "new"
        leading = (self.batch, new) if packing is None else (packing.indices.shape[0],)
        for name, tensor, held in (("k", k, self.k), ("v", v, self.v)):
            shape = (*leading, *held.shape[2:])
            wrong = not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape
            if wrong or tensor.dtype != held.dtype or tensor.device != held.device:
                raise invalid(
                    name,
                    got=describe(tensor),
                    wanted=f"[{', '.join(map(str, shape))}] in {held.dtype} on {held.device}, as the cache was made",
                    remedy="make the cache for this batch, layer, dtype and device: MultiheadAttention.new_cache(...)",
                )

    def _make_room(self, packing: Packing) -> None:
        """Raises if some sequence of the packing has no room for its tokens."""
        longest = self._longest + packing.max_seqlen
        if longest > self.capacity and not torch.compiler.is_compiling():
            longest = max((self.lengths + packing.cu_seqlens.diff()).tolist(), default=0)
            if longest > self.capacity:
                raise invalid(
                    "cache",
                    got=f"{longest} keys for one sequence, up to {packing.max_seqlen} of them new",
                    wanted=f"at most its capacity, {self.capacity}",
                    remedy="make it for the prompt and all that is to be generated, or reset() it for a new batch",
                )
        self._longest = longest


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


def _wrong_rows(got: str, batch: int) -> InvalidArgument:
    return invalid(
        "rows",
        got=got,
        wanted=f"a vector of integers from 0 to {batch - 1}, the sequence that each new one continues",
        remedy="pass the beam indices, flattened over the batch: beam + width * torch.arange(batch)[:, None]",
    )

"""The key/value caches that a caller hands over, dense or paged: checked, appended to, and read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashtile.errors import InvalidArgument, invalid
from flashtile.integrations.flash_attn.translation import (
    check_per_sequence,
    check_position,
    check_tensor,
    may_read,
)
from flashtile.nn import kv_cache
from flashtile.spec.options import describe

DENSE_AXES = "[batch, seqlen_cache, heads_k, head_dim]"
PAGED_AXES = "[num_blocks, page_block_size, heads_k, head_dim]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The caches, and where in them each sequence's keys lie; named in errors as ``flash_attn_with_kvcache`` does."""

    k: Tensor  # DENSE_AXES, or PAGED_AXES if there is a block_table
    v: Tensor
    seqlens: Tensor  # [batch], before anything is appended
    leftpad: Tensor | None = None  # [batch]
    batch_idx: Tensor | None = None  # [batch]
    block_table: Tensor | None = None  # [batch, blocks per sequence]

    @classmethod
    def checked(
        cls,
        k: Any,
        v: Any,
        *,
        batch: int,
        num_new: int,
        seqlens: Any,
        leftpad: Any = None,
        batch_idx: Any = None,
        block_table: Any = None,
    ) -> Cache:
        """The caches as the caller passed them, for ``batch`` sequences of which each will get ``num_new`` keys."""
        k, v = check_pair("k_cache", k, "v_cache", v, DENSE_AXES if block_table is None else PAGED_AXES)
        of_batch: dict[str, Any] = {"batch": batch, "device": k.device}
        if block_table is not None:
            check_per_sequence("block_table", block_table, **of_batch, axes="[batch, blocks per sequence]")
        for name, value in (("cache_batch_idx", batch_idx), ("cache_leftpad", leftpad)):
            if value is not None:
                check_per_sequence(name, value, **of_batch)
        _check_rows(k, batch, batch_idx, block_table)
        capacity = _capacity(k, block_table)
        length = capacity if seqlens is None else check_position("cache_seqlens", seqlens, **of_batch)
        if not isinstance(length, Tensor):
            if length + num_new > capacity:
                raise _no_room(str(seqlens), capacity, num_new)
            length = torch.full((batch,), length, device=k.device)
        cache = cls(k=k, v=v, seqlens=length, leftpad=leftpad, batch_idx=batch_idx, block_table=block_table)
        if batch > 0 and may_read(length):
            cache._check_values(num_new)
        return cache

    @property
    def capacity(self) -> int:
        """How many keys a sequence can have."""
        return _capacity(self.k, self.block_table)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes k and v [batch, num_new, heads_k, head_dim] behind each sequence's last key, in place."""
        for cache, new in ((self.k, k), (self.v, v)):
            if self.block_table is None:
                kv_cache.append(cache, new, lengths=self.seqlens, rows=self.batch_idx)
            else:
                kv_cache.append_to_pages(cache, new, lengths=self.seqlens, page_table=self.block_table)

    def by_sequence(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [batch, capacity, heads_k, head_dim], row b for sequence b, of which ``lengths`` are in use."""
        if self.block_table is not None:
            pages = {"lengths": lengths, "page_table": self.block_table}
            return kv_cache.gather_pages(self.k, **pages), kv_cache.gather_pages(self.v, **pages)
        if self.batch_idx is not None:
            return self.k.index_select(0, self.batch_idx), self.v.index_select(0, self.batch_idx)
        return self.k[: len(lengths)], self.v[: len(lengths)]

    def _check_values(self, num_new: int) -> None:
        """Reads lengths, indices and the table and checks them."""
        first = torch.zeros_like(self.seqlens) if self.leftpad is None else self.leftpad
        if bool((first < 0).any()):
            raise invalid("cache_leftpad", got=str(first.tolist()), wanted="no negative entry", remedy="count from 0")
        if bool((first > self.seqlens).any()) or int(self.seqlens.max()) + num_new > self.capacity:
            beside = "" if self.leftpad is None else f" beside cache_leftpad {first.tolist()}"
            raise _no_room(f"{self.seqlens.tolist()}{beside}", self.capacity, num_new)
        if self.batch_idx is not None and not 0 <= int(self.batch_idx.min()) <= int(self.batch_idx.max()) < len(self.k):
            raise invalid(
                "cache_batch_idx",
                got=str(self.batch_idx.tolist()),
                wanted=f"rows of the cache, 0 to {len(self.k) - 1}",
                remedy="pass the index of each sequence's row",
            )
        if self.block_table is not None:
            first_key = torch.arange(self.block_table.shape[1]) * self.k.shape[1]
            used = self.block_table.cpu()[first_key < (self.seqlens + num_new).cpu()[:, None]]
            if bool(((used < 0) | (used >= len(self.k))).any()):
                raise invalid(
                    "block_table",
                    got=f"entries from {int(used.min())} to {int(used.max())} within the sequences",
                    wanted=f"blocks of the cache, 0 to {len(self.k) - 1}",
                    remedy="allocate a block before its first key is appended",
                )


def check_pair(name_k: str, k: Any, name_v: str, v: Any, axes: str) -> tuple[Tensor, Tensor]:
    """k and v if they are tensors of ``axes`` that hold one value for each key."""
    k, v = check_tensor(name_k, k, axes), check_tensor(name_v, v, axes)
    if v.shape[:-1] != k.shape[:-1] or v.dtype != k.dtype or v.device != k.device:
        raise invalid(
            name_v,
            got=f"a {v.dtype} tensor of shape {list(v.shape)} on {v.device}",
            wanted=f"what {name_k} is, {k.dtype}, {list(k.shape)} on {k.device}; only head_dim may differ",
            remedy=f"make {name_v} beside {name_k}, one value for each key",
        )
    return k, v


def check_slopes(slopes: Any, *, batch: int, heads: int) -> None:
    """Raises unless the slopes of ALiBi, if there are any, are a tensor with one for each head."""
    if slopes is None:
        return
    if not isinstance(slopes, Tensor) or tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise invalid(
            "alibi_slopes",
            got=describe(slopes),
            wanted=f"a floating-point tensor [heads] = [{heads}] or [batch, heads] = [{batch}, {heads}]",
            remedy="pass one slope per query head",
        )


def _capacity(k: Tensor, block_table: Tensor | None) -> int:
    return k.shape[1] * (1 if block_table is None else block_table.shape[1])


def _check_rows(k: Tensor, batch: int, batch_idx: Tensor | None, block_table: Tensor | None) -> None:
    """Raises unless it is clear which row of the cache, or which blocks, belong to each sequence."""
    if block_table is not None and batch_idx is not None:
        raise invalid(
            "cache_batch_idx",
            got="a tensor beside a block_table",
            wanted="one of the two",
            remedy="pass block_table[cache_batch_idx] as the block_table",
        )
    if block_table is None and batch_idx is None and k.shape[0] < batch:
        raise invalid(
            "k_cache",
            got=f"{k.shape[0]} rows for {batch} sequences",
            wanted="a row for each sequence",
            remedy="allocate a larger cache; cache_batch_idx says which row belongs to which sequence",
        )


def _no_room(got: str, capacity: int, num_new: int) -> InvalidArgument:
    new = f", {num_new} of them new" if num_new else ""
    return invalid(
        "cache_seqlens",
        got=got,
        wanted=f"0 to {capacity - num_new} keys, no fewer than cache_leftpad: there is room for {capacity}{new}",
        remedy="pass how many keys the cache holds before this call, and allocate a longer one when it is full",
    )

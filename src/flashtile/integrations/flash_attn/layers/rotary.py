"""``flash_attn.layers.rotary``: rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.integrations.flash_attn.translation import check_packed, check_position, check_tensor, may_read
from flashtile.nn.padding import packed_positions
from flashtile.nn.rotary import apply_rotary, rotary_cos_sin, xpos_decay
from flashtile.spec.options import check_count, check_flag, describe

__all__ = ["RotaryEmbedding", "apply_rotary_emb"]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Turns the first rotary_dim coordinates of each head by its token's angles; differentiable.

    Args:
        x: [batch, seqlen, heads, head_dim], or with cu_seqlens [total, heads, head_dim].
        cos, sin: [positions, rotary_dim / 2], row p for position p.
        interleaved: pairs are coordinates (0, 1), (2, 3), ...; otherwise (0, rotary_dim / 2), ...
        inplace: write into x, and return it.
        seqlen_offsets: the position of each sequence's first token, an int or [batch] integers.
        cu_seqlens: [batch + 1] int32, the boundaries of packed sequences.
        max_seqlen: the longest sequence, required with cu_seqlens.

    Returns:
        A tensor like x; x itself if inplace.

    Raises:
        InvalidArgument: a wrong argument, which it names; also positions beyond the tables, where that is known
            without reading a tensor, or the tensors are on the CPU.
    """
    check_flag("interleaved", interleaved)
    check_flag("inplace", inplace)
    if inplace:
        _check_may_change("x", x)
    _check_tables(x, cos, sin, is_packed=cu_seqlens is not None)
    if cu_seqlens is None:
        batch, longest = x.shape[:2]
        positions = torch.arange(longest, device=x.device)
        sequence_idx = None
    else:
        check_tensor("cu_seqlens", cu_seqlens, "[batch + 1]", dtypes=(torch.int32,))
        batch, longest = len(cu_seqlens) - 1, check_count("max_seqlen", max_seqlen, minimum=0)
        sequence_idx, positions = packed_positions(cu_seqlens, num_tokens=x.shape[0])
    check_position("seqlen_offsets", seqlen_offsets, batch=batch, device=x.device)
    _check_length(cos, longest, seqlen_offsets)
    if isinstance(seqlen_offsets, Tensor):
        seqlen_offsets = seqlen_offsets[:, None] if sequence_idx is None else seqlen_offsets[sequence_idx]
    positions = positions + seqlen_offsets
    turned = apply_rotary(x, cos[positions], sin[positions], interleaved=interleaved)
    return x.copy_(turned) if inplace else turned


class RotaryEmbedding(torch.nn.Module):
    """Rotary position embedding of queries and keys, in place, as models of flash_attn use it.

    Angles are computed in float32 for the positions at hand and not kept, so there is no table to outgrow, and nothing
    in the state dict.

    Args:
        dim: how many coordinates of each head turn; even.
        base: larger bases turn more slowly.
        interleaved: pairs are coordinates (0, 1), (2, 3), ...; otherwise (0, dim / 2), ...
        scale_base: xPos: far pairs weigh less, by a factor per ``scale_base`` positions; None for none.
        device: accepted for the interface; there is nothing to place on it.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,  # noqa: ARG002 -- the interface's
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim, minimum=2)
        if dim % 2:
            raise invalid("dim", got=str(dim), wanted="an even number", remedy="coordinates turn in pairs; drop one")
        self.base = base
        self.interleaved = interleaved
        self.scale_base = scale_base

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns queries and keys in place.

        Args:
            qkv: [batch, seqlen, 3, heads, head_dim]; or [batch, seqlen, num_heads_q + 2 * heads_k, head_dim]; or the
                queries alone, [batch, seqlen, heads, head_dim], if there is a kv.
            kv: [batch, seqlen_k, 2, heads_k, head_dim].
            seqlen_offset: the position of each sequence's first token, an int or [batch] integers.
            max_seqlen: the longest sequence there will be. Only scale_base needs it: with a cache of keys, pass the
                same in every call; by default it is the length so far.
            num_heads_q: required for the second form of qkv.

        Returns:
            qkv, or (q, kv): the same tensors.

        Raises:
            InvalidArgument: a wrong argument, which it names; among them a leaf of autograd that requires a gradient,
                which torch does not allow to change in place.
        """
        _check_may_change("qkv", qkv)
        if kv is not None:
            check_tensor("qkv", qkv, "[batch, seqlen, heads, head_dim]")
            _check_may_change("kv", kv)
            check_packed("kv", kv, "[batch, seqlen_k, 2, heads_k, head_dim]")
            queries, keys = qkv, kv[:, :, 0]
        elif isinstance(qkv, Tensor) and qkv.dim() == 4:
            queries, keys = _split_heads(qkv, num_heads_q)
        else:
            check_packed("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]")
            queries, keys = qkv[:, :, 0], qkv[:, :, 1]
        check_position("seqlen_offset", seqlen_offset, batch=qkv.shape[0], device=qkv.device)
        begin = seqlen_offset[:, None] if isinstance(seqlen_offset, Tensor) else seqlen_offset
        if max_seqlen is None:
            max_seqlen = self._length(queries.shape[1], seqlen_offset)
        for part, is_key in ((queries, False), (keys, True)):
            positions = torch.arange(part.shape[1], device=part.device) + begin
            part.copy_(self.turned(part, positions, is_key=is_key, max_seqlen=max_seqlen))
        return qkv if kv is None else (qkv, kv)

    def turned(self, x: Tensor, positions: Tensor, *, is_key: bool, max_seqlen: int) -> Tensor:
        """x [..., seqlen, heads, head_dim] at the positions [..., seqlen] or [seqlen] of its tokens; not in place."""
        cos, sin = rotary_cos_sin(positions, self.dim, base=self.base)
        if self.scale_base is not None:
            # Counted from the middle, so that neither end leaves the range of 16 bits.
            decay = xpos_decay(positions - max_seqlen // 2, self.dim, scale_base=self.scale_base)
            decay = 1 / decay if is_key else decay
            cos, sin = cos * decay, sin * decay
        return apply_rotary(x, cos, sin, interleaved=self.interleaved)

    def _length(self, seqlen: int, seqlen_offset: int | Tensor) -> int:
        if not isinstance(seqlen_offset, Tensor):
            return seqlen + seqlen_offset
        if self.scale_base is not None:
            raise invalid(
                "max_seqlen",
                got="None beside a tensor of seqlen_offset, with scale_base",
                wanted="the longest sequence there will be: xPos counts from its middle",
                remedy="pass the length of your cache, the same in every call",
            )
        return seqlen


def _check_tables(x: Any, cos: Any, sin: Any, *, is_packed: bool) -> None:
    check_tensor("x", x, "[total, heads, head_dim]" if is_packed else "[batch, seqlen, heads, head_dim]")
    check_tensor("cos", cos, "[positions, rotary_dim / 2]")
    check_tensor("sin", sin, "[positions, rotary_dim / 2]")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != x.device:
            raise invalid(
                name,
                got=f"a tensor on {table.device}",
                wanted=f"the device of x, {x.device}",
                remedy=f"pass {name}.to({str(x.device)!r})",
            )


def _check_length(cos: Tensor, longest: int, offsets: int | Tensor) -> None:
    """Raises if the tables end before the last position, as far as that is known without making a GPU wait."""
    if isinstance(offsets, Tensor):
        offsets = int(offsets.max()) if len(offsets) > 0 and may_read(offsets) else 0
    if longest > 0 and longest + offsets > len(cos):
        raise invalid(
            "cos",
            got=f"{len(cos)} positions",
            wanted=f"at least {longest + offsets}, the longest sequence and its offset",
            remedy="make longer tables",
        )


def _check_may_change(name: str, tensor: Any) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
        raise invalid(
            name,
            got=f"{describe(tensor)}, a leaf of autograd that requires a gradient",
            wanted="a tensor that may be changed in place",
            remedy=f"pass {name}.clone()",
        )


def _split_heads(qkv: Tensor, num_heads_q: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys of [batch, seqlen, num_heads_q + 2 * heads_k, head_dim]."""
    num_heads_kv = qkv.shape[2] - check_count("num_heads_q", num_heads_q, minimum=1)
    if num_heads_kv < 2 or num_heads_kv % 2:
        raise invalid(
            "num_heads_q",
            got=f"{num_heads_q} of the {qkv.shape[2]} heads in qkv",
            wanted="queries, and as many keys as values",
            remedy="pass the number of query heads; or pass queries as qkv, keys and values as kv",
        )
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + num_heads_kv // 2]

"""From padded batches to packed ones and back, so that padding costs nothing in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.spec.options import describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where the tokens of a padded batch lie once they are packed, one sequence after the other.

    Example:
        >>> import torch, flashtile
        >>> from flashtile.nn import Packing
        >>> x = torch.randn(2, 5, 3, 4, 16)  # [batch, seqlen, q k v, heads, head_dim]
        >>> packing = Packing.of(torch.arange(5) < torch.tensor([[3], [5]]))
        >>> q, k, v = packing.pack(x).unbind(1)
        >>> out = flashtile.attention_varlen(q, k, v, **packing.for_self_attention, causal=True)
        >>> packing.unpack(out).shape
        torch.Size([2, 5, 4, 16])
    """

    indices: Tensor  # [tokens] int64, rows of the flattened batch, ascending
    cu_seqlens: Tensor  # [batch + 1] int32
    max_seqlen: int
    batch: int
    seqlen: int
    has_spare_rows: bool = False  # then rows from cu_seqlens[-1] on are padding

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """The packing of the tokens at which ``mask`` [batch, seqlen] is True, wherever in their sequence they are.

        Raises:
            InvalidArgument: a mask that is not boolean or not two-dimensional.

        Reads two numbers on the host, how many tokens there are and how long the longest sequence is, so on a GPU it
        waits for the mask. Make one packing per batch, not one per layer.
        """
        batch, seqlen = _check_mask(mask)
        lengths = mask.sum(dim=1, dtype=torch.int32)
        return cls(
            indices=mask.flatten().nonzero().squeeze(1),
            cu_seqlens=_cu_seqlens(lengths),
            max_seqlen=int(lengths.max()) if batch > 0 else 0,
            batch=batch,
            seqlen=seqlen,
        )

    @classmethod
    def without_reading(cls, mask: Tensor) -> Packing:
        """``of``, but nothing is read on the host: for compiled code and CUDA graphs.

        All ``batch * seqlen`` rows are kept, the padding behind the tokens. Attention skips it; what works row by row,
        as projections do, computes it.
        """
        batch, seqlen = _check_mask(mask)
        tokens_first = mask.flatten().byte().argsort(descending=True, stable=True)
        return cls(
            indices=tokens_first,
            cu_seqlens=_cu_seqlens(mask.sum(dim=1, dtype=torch.int32)),
            max_seqlen=seqlen,
            batch=batch,
            seqlen=seqlen,
            has_spare_rows=True,
        )

    @classmethod
    def full(cls, batch: int, seqlen: int, *, device: torch.device | str | None = None) -> Packing:
        """The packing of a batch without padding."""
        return cls(
            indices=torch.arange(batch * seqlen, device=device),
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen,
            max_seqlen=seqlen,
            batch=batch,
            seqlen=seqlen,
        )

    @property
    def mask(self) -> Tensor:
        """[batch, seqlen] boolean, True = a token."""
        return self.unpack(torch.ones_like(self.indices, dtype=torch.bool))

    @property
    def for_self_attention(self) -> dict[str, Tensor | int]:
        """The arguments of ``attention_varlen`` that describe packed sequences attending to themselves."""
        return {
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_kv": self.cu_seqlens,
            "max_seqlen_q": self.max_seqlen,
            "max_seqlen_kv": self.max_seqlen,
        }

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, seqlen, ...] -> [tokens, ...], 0 in spare rows; differentiable."""
        return self._without_spare(padded.flatten(0, 1).index_select(0, self.indices))

    def unpack(self, packed: Tensor) -> Tensor:
        """[tokens, ...] -> [batch, seqlen, ...], 0 where there is no token; differentiable."""
        return spread(self._without_spare(packed), self.indices, batch=self.batch, seqlen=self.seqlen)

    def _without_spare(self, packed: Tensor) -> Tensor:
        """``packed`` [tokens, ...] with 0 in its spare rows, whatever they held, NaN too."""
        if not self.has_spare_rows:
            return packed
        is_spare = torch.arange(packed.shape[0], device=packed.device) >= self.cu_seqlens[-1]
        return packed.masked_fill(is_spare.view(-1, *(1,) * (packed.dim() - 1)), 0)


def packing_of(name: str, pad_mask: Tensor | Packing, x: Tensor) -> Packing:
    """The packing of x [batch, seqlen, ...] by what the caller passed as its padding mask, the argument ``name``.

    Args:
        pad_mask: boolean [batch, seqlen], True = a token, or its packing.

    Raises:
        InvalidArgument: a mask of another kind or of another batch.

    Reads the mask on the host, as ``Packing.of`` does, unless torch compiles, exports or captures a CUDA graph.
    """
    expected = tuple(x.shape[:2])
    if isinstance(pad_mask, Packing):
        if (pad_mask.batch, pad_mask.seqlen) != expected:
            raise invalid(
                name,
                got=f"the packing of a batch [{pad_mask.batch}, {pad_mask.seqlen}]",
                wanted=f"[batch, seqlen] = {list(expected)}",
                remedy="make one packing per batch, from its own mask",
            )
        return pad_mask
    if not isinstance(pad_mask, Tensor) or pad_mask.dtype != torch.bool or tuple(pad_mask.shape) != expected:
        raise invalid(
            name,
            got=describe(pad_mask),
            wanted=f"a torch.bool tensor [batch, seqlen] = {list(expected)}, True = a token, False = padding",
            remedy="compare with something: input_ids != pad_token_id, attention_mask == 1 for one of 1 and 0, "
            "additive_mask == 0 for one of 0 and -inf, ~key_padding_mask for torch's, where True = padding",
        )
    if pad_mask.device != x.device:
        raise invalid(
            name,
            got=f"a tensor on {pad_mask.device}",
            wanted=f"the device of the input, {x.device}",
            remedy=f"pass {name}.to({str(x.device)!r})",
        )
    may_read = not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    return Packing.of(pad_mask) if may_read else Packing.without_reading(pad_mask)


def _check_mask(mask: Tensor) -> torch.Size:
    """The shape of what must be a boolean mask [batch, seqlen]."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        raise invalid(
            "mask",
            got=describe(mask),
            wanted="a boolean tensor [batch, seqlen], True = a token",
            remedy="compare with something, for example input_ids != pad_token_id",
        )
    return mask.shape


def _cu_seqlens(lengths: Tensor) -> Tensor:
    """[batch] int32 -> [batch + 1] int32."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def spread(packed: Tensor, indices: Tensor, *, batch: int, seqlen: int) -> Tensor:
    """Puts row r of ``packed`` [tokens, ...] at row ``indices[r]`` of [batch * seqlen, ...], and 0 elsewhere.

    Args:
        packed: [tokens, ...].
        indices: [tokens] integers, no row twice.
        batch, seqlen: the first two axes of the result.

    Returns:
        [batch, seqlen, ...]; differentiable.
    """
    rows = packed.new_zeros(batch * seqlen, *packed.shape[1:]).index_copy(0, indices.long(), packed)
    return rows.unflatten(0, (batch, seqlen))


def packed_positions(cu_seqlens: Tensor, *, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Which sequence each row of a packed buffer belongs to, and the row's position in it; reads nothing on the host.

    Args:
        cu_seqlens: [batch + 1] int32, batch at least 1.
        num_tokens: rows of the buffer.

    Returns:
        sequence_idx: [num_tokens] int64; for rows that belong to no sequence, the last one's.
        positions: [num_tokens] int64; for rows that belong to no sequence, 0.

    Example:
        >>> import torch
        >>> from flashtile.nn.padding import packed_positions
        >>> sequence_idx, positions = packed_positions(torch.tensor([0, 2, 2, 5], dtype=torch.int32), num_tokens=5)
        >>> sequence_idx.tolist(), positions.tolist()
        ([0, 0, 2, 2, 2], [0, 1, 0, 1, 2])
    """
    rows = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence_idx = (torch.searchsorted(cu_seqlens, rows, right=True) - 1).clamp(max=cu_seqlens.shape[0] - 2)
    return sequence_idx, torch.where(rows < cu_seqlens[-1], rows - cu_seqlens[sequence_idx], 0).long()

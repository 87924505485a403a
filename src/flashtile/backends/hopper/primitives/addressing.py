"""Where tiles lie in memory: the only place that knows packed from dense.

Descriptors have four axes, [batch, heads, rows, columns], and packed tensors one long batch entry. What lies beyond the
end of an axis is read as 0 and not written; the end of a packed sequence is no such end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

from flashtile.backends.hopper import constants
from flashtile.backends.hopper.primitives.gluon_compat import jit

STATISTICS_ROWS = gl.constexpr(constants.STATISTICS_ROWS)
SUM_ROWS = gl.constexpr(constants.SUM_ROWS)


class Sequence(NamedTuple):
    """One sequence of the batch: its place in memory, its first rows there (0 if dense), and its lengths."""

    buffer_idx: Any
    q_begin: Any
    kv_begin: Any
    seqlen_q: Any
    seqlen_kv: Any


class RowNumbers(NamedTuple):
    """One number per query row: contiguous [batch, num_heads, length], packed [num_heads, length]."""

    ptr: Any
    num_heads: Any
    length: Any


class Sums(NamedTuple):
    """Sums of a gradient [lines, num_blocks, SUM_ROWS * columns]: a line for a head, a block for ``SUM_ROWS`` rows."""

    ptr: Any
    num_blocks: Any
    num_stored_rows: Any
    """Of d_q: how many of the first rows see the first tile of keys alone: theirs is stored, not added; or ``None``."""


@jit
def find_sequence(sequences, batch_idx, seqlen_q, seqlen_kv):
    """The sequence ``batch_idx``; ``seqlen_q`` and ``seqlen_kv`` are its lengths if dense, upper bounds if packed."""
    if sequences.cu_seqlens_q is None:
        return Sequence(batch_idx, 0, 0, seqlen_q, seqlen_kv)
    else:
        q_begin = gl.load(sequences.cu_seqlens_q + batch_idx)
        kv_begin = gl.load(sequences.cu_seqlens_kv + batch_idx)
        q_end = gl.load(sequences.cu_seqlens_q + batch_idx + 1)
        kv_end = gl.load(sequences.cu_seqlens_kv + batch_idx + 1)
        return Sequence(0, q_begin, kv_begin, q_end - q_begin, kv_end - kv_begin)


@jit
def stored_sequence(sequence, splits, split_idx):
    """The sequence in tensors of results, which have ``batch`` entries for each part of the keys."""
    if splits is None:
        return sequence
    else:
        buffer_idx = split_idx * splits.batch + sequence.buffer_idx
        return Sequence(buffer_idx, sequence.q_begin, sequence.kv_begin, sequence.seqlen_q, sequence.seqlen_kv)


@jit
def row_offset(row_numbers, sequence, head_idx, row_idx):
    """Where the number of a query row of a head lies; the buffer of packed sequences has index 0."""
    line = gl.to_tensor(sequence.buffer_idx * row_numbers.num_heads + head_idx).to(gl.int64)
    return line * row_numbers.length + sequence.q_begin + row_idx


@jit
def statistics_row(call, sequence, batch_idx, head_idx, row):
    """[head, row] of the backward's number for one query row; see ``STATISTICS_ROWS``."""
    if call.sequences.cu_seqlens_q is None:
        return batch_idx * call.heads.num_q + head_idx, row
    else:
        return head_idx, (batch_idx + sequence.q_begin // STATISTICS_ROWS) * STATISTICS_ROWS + row


@jit
def sums_block(call, sequence, batch_idx, head_idx):
    """(line, block) in ``Sums`` at which a sequence's head starts."""
    if call.sequences.cu_seqlens_q is None:
        return batch_idx * call.heads.num_q + head_idx, 0
    else:
        return head_idx, batch_idx + sequence.q_begin // SUM_ROWS

"""Dense and packed operands as one sequence after the other: the only place that knows the difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Which rows of every tensor belong to one sequence of the batch."""

    batch_idx: int
    seqlen_q: int
    seqlen_kv: int
    q_begin: int  # first row in a packed buffer, 0 if dense
    kv_begin: int
    is_packed: bool

    def q_rows(self, tensor: Tensor) -> Tensor:
        """A view [heads, seqlen_q, dim] of q, out or d_out."""
        return self._rows(tensor, self.q_begin, self.seqlen_q)

    def kv_rows(self, tensor: Tensor) -> Tensor:
        """A view [heads_kv, seqlen_kv, dim] of k or v."""
        return self._rows(tensor, self.kv_begin, self.seqlen_kv)

    def lse_rows(self, lse: Tensor) -> Tensor:
        """A view [heads_q, seqlen_q] of lse or d_lse."""
        return lse[:, self.q_begin : self.q_begin + self.seqlen_q] if self.is_packed else lse[self.batch_idx]

    def _rows(self, tensor: Tensor, begin: int, length: int) -> Tensor:
        rows = tensor[begin : begin + length] if self.is_packed else tensor[self.batch_idx]
        return rows.transpose(0, 1)


def sequences(problem: AttentionProblem, operands: Operands) -> Iterator[Sequence]:
    """The sequences of the batch, in order."""
    if operands.cu_seqlens_q is None or operands.cu_seqlens_kv is None:
        for batch_idx in range(problem.batch):
            yield Sequence(
                batch_idx=batch_idx,
                seqlen_q=problem.seqlen_q,
                seqlen_kv=problem.seqlen_kv,
                q_begin=0,
                kv_begin=0,
                is_packed=False,
            )
        return
    boundaries_q, boundaries_kv = operands.cu_seqlens_q.tolist(), operands.cu_seqlens_kv.tolist()
    for batch_idx in range(problem.batch):
        yield Sequence(
            batch_idx=batch_idx,
            seqlen_q=boundaries_q[batch_idx + 1] - boundaries_q[batch_idx],
            seqlen_kv=boundaries_kv[batch_idx + 1] - boundaries_kv[batch_idx],
            q_begin=boundaries_q[batch_idx],
            kv_begin=boundaries_kv[batch_idx],
            is_packed=True,
        )

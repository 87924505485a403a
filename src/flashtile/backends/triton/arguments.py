"""What the kernels take, as named tuples: a few objects in place of dozens of pointers, strides and flags.

The launcher fills them with tensors and numbers, and inside a kernel the same fields are pointers and scalars. A field
that is ``None`` is known to be ``None`` when the kernel is compiled, so an option that is not used costs nothing and
needs no flag.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.backends.gpu import Slopes, Softcap, Window, slopes, softcap, window
from flashtile.backends.triton.constants import FARTHEST_NEAR, FARTHEST_ROWS, LOG2_E, STATISTICS_ROWS
from flashtile.backends.triton.tiles import takes_bias
from flashtile.spec.dropout import drop_threshold
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


class Matrix(NamedTuple):
    """A tensor of [batch, heads, rows, columns], in that order of strides whatever the order in memory.

    A broadcast axis has stride 0; packed tensors have batch stride 0, and rows count from the start of the buffer.
    """

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    col_stride: Any


class PairMatrix(NamedTuple):
    """A bias or mask of [batch, heads, queries, keys], and its number of keys, broadcast axes with stride 0."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    col_stride: Any
    num_cols: Any


class Statistics(NamedTuple):
    """The backward's own number per query row and head, in whole blocks of rows; see ``STATISTICS_ROWS``."""

    ptr: Any
    batch_stride: Any
    head_stride: Any


class Dropout(NamedTuple):
    """The seed's address, the words below which a pair is dropped, and the factor of the survivors, 1 / (1 - p)."""

    seed_ptr: Any
    threshold: Any
    survivor_scale: Any


class ScoreRules(NamedTuple):
    """Everything between the product q @ k.T and the probabilities that are multiplied with V."""

    scale_log2: Any
    """scale * log2(e): from products to powers of two."""
    scale: Any
    """If given, scores with a bias stay natural until the exponential, a multiplication less for each; ``None`` where
    they are powers of two at once."""
    window: Window
    softcap: Softcap | None
    bias: PairMatrix | None
    mask: PairMatrix | None
    alibi: Slopes | None
    dropout: Dropout | None
    near: int | None = None
    """1 if all distances are below ``FARTHEST_NEAR`` and ALiBi may use that, else ``None``; only for kernels that have
    queries as the rows of a tile."""
    end: None = None
    """Always ``None``: Triton 3.6 forgets compile-time numbers (a stride of 1) in tuples of a tuple that come after the
    last ``None`` of the outer one."""


def token_matrix(tensor: Tensor) -> Matrix:
    """A tensor of [batch, tokens, heads, dim], or packed [tokens, heads, dim]; copied if they are too far apart."""
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    batch_stride, row_stride, head_stride = strides[:3] if tensor.dim() == 4 else (0, *strides[:2])
    if max(row_stride, tensor.stride(-1)) > FARTHEST_ROWS:
        return token_matrix(tensor.contiguous())
    return Matrix(tensor, batch_stride, head_stride, row_stride, tensor.stride(-1))


def side_by_side(tensor: Tensor) -> Tensor:
    """q, k or v itself if its columns lie side by side, else a copy.

    Where those of keys do not and those of values do, the ptxas of CUDA 12.8, which Triton 3.6 brings, makes the
    address of a product's operand out of a register that nothing has written.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)


def pair_matrix(tensor: Tensor, problem: AttentionProblem) -> PairMatrix:
    """A bias or mask that broadcasts to [batch, heads_q, seqlen_q, seqlen_kv]."""
    view = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    spread = view.expand(problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_kv)
    strides = (0 if size == 1 else stride for size, stride in zip(spread.shape, spread.stride(), strict=True))
    return PairMatrix(view, *strides, num_cols=problem.seqlen_kv)


def statistics_shape(problem: AttentionProblem) -> tuple[int, ...]:
    """Of one number per query row and head, in whole blocks of rows: [batch, heads, rows], packed [heads, rows]."""
    if problem.layout == "varlen":
        return problem.heads_q, (-(-problem.tokens_q // STATISTICS_ROWS) + problem.batch) * STATISTICS_ROWS
    return problem.batch, problem.heads_q, -(-problem.seqlen_q // STATISTICS_ROWS) * STATISTICS_ROWS


def statistics(problem: AttentionProblem, numbers: Tensor | None) -> Statistics | None:
    """Numbers of ``statistics_shape`` with their strides."""
    if numbers is None:
        return None
    length = numbers.shape[-1]
    is_packed = problem.layout == "varlen"
    return Statistics(numbers, STATISTICS_ROWS if is_packed else problem.heads_q * length, length)


def score_rules(
    problem: AttentionProblem, operands: Operands, *, may_be_natural: bool = False, may_be_near: bool = False
) -> ScoreRules:
    """The problem's options, with the tensors that they come with.

    Args:
        may_be_natural: not in the dK/dV kernel, whose loop would wait for the bias. For float32, forward and backward
            have to round scores alike, so none of them are.
        may_be_near: in the forward, which has the registers for it. Near distances are those of the other kernels.
    """
    bias = operands.bias
    is_natural = may_be_natural and bias is not None and problem.dtype.itemsize == 2
    reach = problem.seqlen_q + problem.seqlen_kv + 2 * STATISTICS_ROWS
    if bias is None and takes_bias(problem):
        bias = torch.zeros((), device=operands.q.device)
    return ScoreRules(
        scale_log2=problem.scale * LOG2_E,
        scale=problem.scale if is_natural else None,
        window=window(problem),
        softcap=softcap(problem),
        bias=None if bias is None else pair_matrix(bias, problem),
        mask=None if operands.mask is None else pair_matrix(operands.mask, problem),
        alibi=slopes(operands),
        dropout=None
        if operands.dropout_seed is None
        else Dropout(operands.dropout_seed, drop_threshold(problem.dropout_p), 1 / (1 - problem.dropout_p)),
        near=1 if may_be_near and problem.has_alibi and reach < FARTHEST_NEAR else None,
    )

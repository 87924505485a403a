"""What the kernels take, as named tuples and TMA descriptors.

The launcher fills them with tensors and numbers, and inside a kernel the same fields are pointers and scalars. A field
that is ``None`` is known to be ``None`` when the kernel is compiled, so an option that is not used costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper.constants import LOG2_E
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

ALIGNMENT_BYTES = 16
"""Of addresses and strides, for TMA."""

_ELEMENTS = {torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}


class Matrix(NamedTuple):
    """A tensor of [batch, heads, rows, columns] whose columns lie side by side; packed tensors have batch stride 0."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


class RowNumbers(NamedTuple):
    """One number per query row: contiguous [batch, heads, rows], packed [heads, rows]."""

    ptr: Any
    batch_stride: Any
    head_stride: Any


class Slopes(NamedTuple):
    """The ALiBi slope of each head, [batch, heads]."""

    ptr: Any
    batch_stride: Any
    head_stride: Any


class Softcap(NamedTuple):
    """``cap * tanh(score / cap)``, with the factors that the kernel needs."""

    scale_by_cap: Any
    """scale / cap: from the product q @ k.T to tanh's argument."""
    cap_log2: Any
    """cap * log2(e)"""


class Window(NamedTuple):
    """How far a query sees to each side of its aligned position; ``None`` means unlimited."""

    left: Any
    right: Any


class ScoreRules(NamedTuple):
    """Everything between the product q @ k.T and the probabilities that are multiplied with V."""

    scale_log2: Any
    """scale * log2(e): scores are powers of two throughout."""
    window: Window
    softcap: Softcap | None
    alibi: Slopes | None
    end: None = None
    """Always ``None``: Triton 3.6 forgets compile-time numbers (a stride of 1) in tuples of a tuple that come after the
    last ``None`` of the outer one."""


class Sequences(NamedTuple):
    """Where the sequences of the batch lie: side by side (dense, both ``None``), or between boundaries (packed)."""

    cu_seqlens_q: Any
    cu_seqlens_kv: Any


class Heads(NamedTuple):
    """``num_q`` query heads, of which ``per_kv`` share each key/value head."""

    num_q: Any
    per_kv: Any


def by_heads(tensor: Tensor) -> Tensor:
    """A view [batch, heads, rows, columns] of tokens, packed ones as one batch entry."""
    return (tensor if tensor.dim() == 4 else tensor[None]).transpose(1, 2)


def tma_ready(tensor: Tensor) -> Tensor:
    """The tokens themselves if TMA can address them, else a copy in rows of a length that it can."""
    unit = ALIGNMENT_BYTES // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    is_ready = tensor.stride(-1) == 1 and all(stride and stride % unit == 0 for stride in strides if stride != 1)
    if is_ready and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    *outer, width = tensor.shape
    copy = tensor.new_empty((*outer, -(-width // unit) * unit))[..., :width]
    return copy.copy_(tensor)


def descriptor(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of tiles [1, 1, rows, cols] of ``by_heads(tensor)``, for tensors that are ``tma_ready``."""
    view = by_heads(tensor)
    shape = list(view.shape)
    unit = ALIGNMENT_BYTES // tensor.element_size()
    # An axis of one entry may have any stride in torch; TMA wants a multiple of 16 bytes there too.
    strides = [unit if size == 1 else stride for size, stride in zip(shape[:-1], view.stride()[:-1], strict=True)]
    block = [1, 1, rows, cols]
    layout = NVMMASharedLayout.get_default_for(block, _ELEMENTS[tensor.dtype])
    return TensorDescriptor(view, shape, [*strides, 1], block, layout)


def numbers_descriptor(numbers: Tensor, rows: int) -> TensorDescriptor:
    """Of ``rows`` numbers in a row of a contiguous [batch, heads, rows], packed [heads, rows], as a matrix."""
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor.from_tensor(numbers.view(-1, numbers.shape[-1]), [1, rows], layout)


def matrix(tensor: Tensor) -> Matrix:
    """The tokens as a matrix whose columns lie side by side."""
    view = by_heads(tensor)
    return Matrix(
        tensor, *(0 if size == 1 else stride for size, stride in zip(view.shape[:3], view.stride()[:3], strict=True))
    )


def row_numbers(numbers: Tensor) -> RowNumbers:
    """The lse or another [batch, heads, rows], packed [heads, rows]."""
    batch_stride, head_stride, _ = (numbers if numbers.dim() == 3 else numbers[None]).stride()
    return RowNumbers(numbers, batch_stride, head_stride)


def score_rules(problem: AttentionProblem, operands: Operands) -> ScoreRules:
    """The problem's options, with the tensors that they come with."""
    slopes = operands.alibi_slopes
    return ScoreRules(
        scale_log2=problem.scale * LOG2_E,
        window=_window(problem),
        softcap=Softcap(problem.scale / problem.softcap, problem.softcap * LOG2_E) if problem.softcap else None,
        alibi=None if slopes is None else Slopes(slopes, *((0, *slopes.stride())[-2:])),
    )


def _window(problem: AttentionProblem) -> Window:
    """Reaches beyond the sequences are cut to where they still reach everything, so that positions fit into 32 bits."""
    farthest = problem.seqlen_q + problem.seqlen_kv
    left, right = problem.mask.left, problem.mask.right
    return Window(None if left is None else min(left, farthest), None if right is None else min(right, farthest))

"""What the kernels take, as named tuples and TMA descriptors.

The launcher fills them with tensors and numbers, and inside a kernel the same fields are pointers and scalars. A field
that is ``None`` is known to be ``None`` when the kernel is compiled, so an option that is not used costs nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16, float32
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.gpu import Slopes, Softcap, Window, slopes, softcap, window
from flashtile.backends.hopper.constants import LOG2_E
from flashtile.backends.launcher import ALIGNMENT_BYTES
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

_ELEMENTS = {torch.float16: float16, torch.bfloat16: bfloat16, torch.float32: float32}


class Matrix(NamedTuple):
    """A tensor of [batch, heads, rows, columns] whose columns lie side by side; packed tensors have batch stride 0."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


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


def tma_ready(tensor: Tensor) -> Tensor:
    """The tokens themselves if TMA can address them, else a copy in rows of a length that it can."""
    is_ready = _can_be_addressed(tensor.shape, tensor.stride(), tensor.dtype)
    if is_ready and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    unit = ALIGNMENT_BYTES // tensor.element_size()
    *outer, width = tensor.shape
    copy = tensor.new_empty((*outer, -(-width // unit) * unit))[..., :width]
    return copy.copy_(tensor)


def descriptor(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Of tiles [1, 1, rows, cols] of [batch, heads, tokens, columns], for tensors that are ``tma_ready``."""
    return _described(tensor, _tiled(tensor.shape, tensor.stride(), tensor.dtype, rows, cols))


def numbers_descriptor(numbers: Tensor, rows: int) -> TensorDescriptor:
    """Of ``rows`` numbers in a row of a contiguous [batch, heads, rows], packed [heads, rows], as a matrix."""
    return _described(numbers, _numbers(numbers.shape, rows))


def heads_as_rows(tensor: Tensor, heads_per_kv: int) -> Tensor:
    """[batch, 1, heads, columns] as [batch, heads_per_kv, heads_kv, columns], in the same memory."""
    return tensor.squeeze(1).unflatten(1, (-1, heads_per_kv)).transpose(1, 2)


@lru_cache(maxsize=1024)
def _can_be_addressed(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    unit = ALIGNMENT_BYTES // dtype.itemsize
    of_axes = [stride for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    return strides[-1] == 1 and all(stride and stride % unit == 0 for stride in of_axes)


@lru_cache(maxsize=1024)
def _tiled(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, rows: int, cols: int
) -> dict[str, Any]:
    if len(shape) == 3:
        shape, strides = (1, *shape), (0, *strides)
    batch, tokens, heads, width = shape
    unit = ALIGNMENT_BYTES // dtype.itemsize
    # An axis of one entry may have any stride in torch; TMA wants a multiple of 16 bytes there too.
    by_batch, by_token, by_head = (
        unit if size == 1 else stride for size, stride in zip(shape[:3], strides[:3], strict=True)
    )
    block = [1, 1, rows, cols]
    layout: Any = NVMMASharedLayout.get_default_for(block, _ELEMENTS[dtype])
    return _fields([batch, heads, tokens, width], [by_batch, by_head, by_token, 1], block, layout)


@lru_cache(maxsize=1024)
def _numbers(shape: tuple[int, ...], rows: int) -> dict[str, Any]:
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return _fields([math.prod(shape[:-1]), shape[-1]], [shape[-1], 1], [1, rows], layout)


def _fields(shape: list[int], strides: list[int], block: list[int], layout: NVMMASharedLayout) -> dict[str, Any]:
    """All of a descriptor but its tensor, which changes from call to call."""
    return {"shape": shape, "strides": strides, "block_shape": block, "layout": layout, "padding": "zero"}


def _described(tensor: Tensor, fields: dict[str, Any]) -> TensorDescriptor:
    """A descriptor without the checks of its constructor, which take 10 us; the kernels' tests hold what they check."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.__dict__.update(fields, base=tensor)
    return made


def matrix(tensor: Tensor) -> Matrix:
    """The tokens as a matrix whose columns lie side by side."""
    shape, strides = (
        (tensor.shape, tensor.stride()) if tensor.dim() == 4 else ((1, *tensor.shape), (0, *tensor.stride()))
    )
    batch, row, head = (0 if size == 1 else stride for size, stride in zip(shape[:3], strides[:3], strict=True))
    return Matrix(tensor, batch, head, row)


def score_rules(problem: AttentionProblem, operands: Operands) -> ScoreRules:
    """The problem's options, with the tensors that they come with."""
    return ScoreRules(
        scale_log2=problem.scale * LOG2_E,
        window=window(problem),
        softcap=softcap(problem),
        alibi=slopes(operands),
    )

"""The short way for a call that comes again: the checks and the plan of the first one hold for all that are like it.

Only eager calls take it: short ones, the steps of a generation above all, whose kernels need less time than the checks
and torch's dispatcher. Whatever looks at calls or changes them (compiler, profiler, modes, transforms, subclasses of
tensors) gets to see the registered op.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from flashtile import dispatch, ops
from flashtile.backends.base import Gradients, Saved
from flashtile.ops import Prepared
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

_MAX_KNOWN = 4096
_TENSORS = ("bias", "mask", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_kv")
_dense_options = itemgetter("bias", "mask", "alibi_slopes", "sinks")
_dense_operands = attrgetter("q", "k", "v", "bias", "mask", "alibi_slopes", "sinks")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((type(None), bool, int, float, str, tuple, list))


class Known:
    """A call that came before; ``again`` is its backend's shortest way, if it has one for calls like this.

    ``backward_again`` is that of its gradients.
    """

    __slots__ = ("again", "backward_again", "has_come_again", "prepared", "records")

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.records = bool(prepared.problem.gradients)
        self.has_come_again = False
        self.again: Callable[..., tuple[Tensor, Tensor]] | None = None
        self.backward_again: Callable[..., Gradients] | None = None

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """(out, lse) from the kernels, below autograd."""
        if self.again is not None:
            return self.again(*_dense_operands(operands))
        if self.has_come_again:
            return ops.run_forward(self.prepared, operands)
        self.has_come_again = True
        results, self.again = ops.run_forward_again(self.prepared, operands)
        return results

    def backward(self, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None) -> Gradients:
        """The gradients from the kernels."""
        if self.backward_again is not None:
            return self.backward_again(operands, saved, d_out, d_lse)
        gradients, self.backward_again = ops.run_backward_again(self.prepared, operands, saved, d_out, d_lse)
        return gradients


_known: dict[tuple[Any, ...], Known] = {}


def key(q: Tensor, k: Tensor, v: Tensor, backend: str, call: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that checks, plan and launch depend on but values and addresses; None if the call has to go the long way."""
    if torch.compiler.is_compiling() or ops.is_watched() or type(call["dropout_p"]) is not float or call["dropout_p"]:
        return None
    options = tuple(call.values())
    kinds = tuple(map(type, options))  # or 1 would pass for True
    tensors = (q, k, v)
    if not _NO_TENSORS.issuperset(kinds):
        if any(isinstance(call[name], Tensor) for name in call.keys() - _TENSORS):
            return None
        tensors = (q, k, v, *(option for option in options if isinstance(option, Tensor)))
        options = tuple(None if isinstance(option, Tensor) else option for option in options)
    records = torch.is_grad_enabled()
    forms: list[Any] = []
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_neg():
            return None
        forms += (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, records and tensor.requires_grad)
    # Kernels are compiled for the products of float32 that torch's setting asks for.
    precision = torch.backends.cuda.matmul.fp32_precision if q.dtype is torch.float32 else None
    return (dispatch.resolved(backend), precision, kinds, options, *forms)


def find(key: tuple[Any, ...]) -> Known | None:
    """What was remembered of a call like this one."""
    try:
        return _known.get(key)
    except TypeError:  # what cannot be hashed was not remembered
        return None


def remember(key: tuple[Any, ...], problem: AttentionProblem, operands: Operands, backend: str) -> None:
    """Of a call that went the long way, and passed."""
    try:
        hash(key)
    except TypeError:
        return
    if len(_known) >= _MAX_KNOWN:
        _known.clear()
    _known[key] = Known(ops.prepared(problem, operands, backend))


def run(known: Known, q: Tensor, k: Tensor, v: Tensor, backend: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse), straight from the kernels."""
    if known.again is not None and not known.records:
        return known.again(q, k, v, *_dense_options(call))
    dispatch.check_fallback(known.prepared.plan, backend)
    operands = Operands(q=q, k=k, v=v, **{name: call[name] for name in _TENSORS if name in call})
    return ops.record(known, operands) if known.records else known.forward(operands)

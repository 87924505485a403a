"""The short way for a call that comes again: the checks and the plan of the first one hold for all that are like it.

Only eager calls without gradients take it, the steps of a generation above all, whose kernels need less time than the
checks and torch's dispatcher. Whatever looks at calls or changes them (compiler, profiler, modes, transforms,
subclasses of tensors) gets to see the registered op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler

from flashtile import dispatch, ops, settings
from flashtile.ops import Prepared
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

_MAX_KNOWN = 4096
_TENSORS = ("bias", "mask", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_kv")
_PLAIN = (Tensor, torch.nn.Parameter)

_known: dict[tuple[Any, ...], Prepared] = {}


def key(q: Tensor, k: Tensor, v: Tensor, backend: str, call: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that the checks and the plan of a call depend on; None if the call has to go the long way."""
    if torch.compiler.is_compiling() or _is_watched() or type(call["dropout_p"]) is not float or call["dropout_p"]:
        return None
    parts: list[Any] = [backend, settings.default_backend()]
    for name, value in (("q", q), ("k", k), ("v", v), *call.items()):
        kind = type(value)
        if kind in _PLAIN:
            if value.is_nested or (name in call and name not in _TENSORS):
                return None
            if value.requires_grad and torch.is_grad_enabled():
                return None
            parts += (value.shape, value.dtype, value.device, value.layout)
        elif isinstance(value, Tensor):
            return None
        else:
            parts += (kind, value)  # or 1 would pass for True
    return tuple(parts)


def find(key: tuple[Any, ...]) -> Prepared | None:
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
    _known[key] = ops.prepared(problem, operands, backend)


def run(known: Prepared, q: Tensor, k: Tensor, v: Tensor, backend: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(out, lse), straight from the kernels."""
    dispatch.check_fallback(known.plan, dispatch.resolved(backend))
    operands = Operands(q=q, k=k, v=v, **{name: call[name] for name in _TENSORS if name in call})
    return ops.run_forward(known, operands)


def _is_watched() -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )

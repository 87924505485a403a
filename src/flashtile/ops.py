"""The registered torch ops: what ``torch.compile``, export, autograd and activation checkpointing see of flashtile.

There are two, and each hides everything from planning to the kernels, so a graph holds one node per attention call:

* ``flashtile::attention_forward`` -> (out, lse)
* ``flashtile::attention_backward`` -> the gradients named in ``gradients``, ordered as ``spec.problem.DIFFERENTIABLE``
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler
from torch.utils._device import DeviceContext

from flashtile import dispatch, settings
from flashtile.backends import gpu
from flashtile.backends.base import Gradients, Launcher, Plan, Saved
from flashtile.errors import UnsupportedProblem
from flashtile.spec import devices, validation
from flashtile.spec.operands import FIELDS, Operands, tensors_of
from flashtile.spec.problem import DIFFERENTIABLE, AttentionProblem, MaskSpec

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? dropout_seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv"
)
_OPTIONS = (
    "SymInt? max_seqlen_q, SymInt? max_seqlen_kv, SymInt? window_left, SymInt? window_right, float scale, "
    "float softcap, float dropout_p, bool deterministic, str gradients, str backend"
)
_NUM_INPUTS = _OPERANDS.count(",") + _OPTIONS.count(",") + 2
_NUM_TENSORS = len(FIELDS)  # in the order of _OPERANDS
_MAX_PREPARED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What follows from the shapes, dtypes and options of a call alone; looked up when they come again."""

    problem: AttentionProblem
    plan: Plan
    launcher: Launcher


_prepared: dict[tuple[Any, ...], Prepared] = {}


def attention(problem: AttentionProblem, operands: Operands, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call, differentiable; the only caller of the registered op. See also ``repeats``."""
    _refuse_forward_mode(operands)
    return torch.ops.flashtile.attention_forward.default(*_flat(problem, operands, backend))


def gradients(
    problem: AttentionProblem, operands: Operands, out: Tensor, lse: Tensor, d_out: Tensor, backend: str
) -> list[Tensor]:
    """The gradients that ``problem.gradients`` names, ordered as ``DIFFERENTIABLE``; not recorded by autograd."""
    return torch.ops.flashtile.attention_backward.default(d_out, None, out, lse, *_flat(problem, operands, backend))


def _flat(problem: AttentionProblem, operands: Operands, backend: str) -> tuple[Any, ...]:
    """A checked call as the registered ops take it."""
    is_packed = problem.layout == "varlen"
    return (
        operands.q,
        operands.k,
        operands.v,
        operands.bias,
        operands.mask,
        operands.alibi_slopes,
        operands.sinks,
        operands.dropout_seed,
        operands.cu_seqlens_q,
        operands.cu_seqlens_kv,
        problem.seqlen_q if is_packed else None,
        problem.seqlen_kv if is_packed else None,
        problem.mask.left,
        problem.mask.right,
        problem.scale,
        problem.softcap,
        problem.dropout_p,
        problem.deterministic,
        ",".join(sorted(problem.gradients)),
        backend,
    )


def prepared(problem: AttentionProblem, operands: Operands, backend: str) -> Prepared:
    """What follows from a checked call."""
    return _stated(_flat(problem, operands, backend))[1]


def run_forward(call: Prepared, operands: Operands) -> tuple[Tensor, Tensor]:
    """(out, lse) from the kernels."""
    device = operands.q.device.type
    if operands.cu_seqlens_q is not None and (device == "cpu" or settings.checks_values_on_gpu()):
        validation.check_values(call.problem, operands)
    with _without_autocast(device):
        return call.launcher.forward(call.problem, operands, call.plan)


def run_forward_again(
    call: Prepared, operands: Operands
) -> tuple[tuple[Tensor, Tensor], Callable[..., tuple[Tensor, Tensor]] | None]:
    """``run_forward``, and the backend's shortest way to it for calls like this, if there is one."""
    find = getattr(call.launcher, "forward_again", None)
    if find is None or operands.cu_seqlens_q is not None:
        return run_forward(call, operands), None
    with _without_autocast(operands.q.device.type):
        return find(call.problem, operands, call.plan)


def run_backward_again(
    call: Prepared, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None
) -> tuple[Gradients, Callable[..., Gradients] | None]:
    """The gradients, and the backend's shortest way to those of calls like this, if there is one."""
    find = getattr(call.launcher, "backward_again", None)
    if find is None:
        return _run_backward(call, operands, saved, d_out, d_lse), None
    with _without_autocast(operands.q.device.type):
        return find(call.problem, operands, saved, d_out, d_lse, call.plan)


class Recorded(Protocol):
    """A call that ``record`` makes differentiable."""

    prepared: Prepared

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]: ...

    def backward(self, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None) -> Gradients: ...


def record(call: Recorded, operands: Operands) -> tuple[Tensor, Tensor]:
    """Its forward, differentiable; not while ``is_watched`` says that someone has to see the registered op."""
    return _RecordedFunction.apply((call, operands), *tensors_of(operands))


def is_watched() -> bool:
    """Whether someone looks at calls or changes them: modes, transforms, tangents, tracers, profilers."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or any(map(_changes_calls, range(torch._C._len_torch_function_stack())))
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


def _changes_calls(mode_idx: int) -> bool:
    """A default device is a mode of torch that does not: no backend makes a tensor without naming its device."""
    return type(torch._C._get_function_stack_at(mode_idx)) is not DeviceContext


def _attention_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    operands, call = _stated(inputs)
    return run_forward(call, operands)


def _attention_backward(
    d_out: Tensor | None, d_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> list[Tensor]:
    operands, call = _stated(inputs)
    grads = _run_backward(call, operands, Saved(out=out, lse=lse), d_out, d_lse)
    return [cast(Tensor, getattr(grads, name)) for name in _wanted(call.problem.gradients)]


def _run_backward(
    call: Prepared, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None
) -> Gradients:
    with _without_autocast(operands.q.device.type):
        return call.launcher.backward(call.problem, operands, saved, d_out, d_lse, call.plan)


def _refuse_forward_mode(operands: Operands) -> None:
    """Raises if an operand carries a tangent: torch would drop it without a word, and return zero tangents."""
    if forward_ad._current_level < 0:
        return
    for name in (*DIFFERENTIABLE, "alibi_slopes"):
        tensor = getattr(operands, name)
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            remedy = "take reverse-mode ones, with torch.autograd.grad"
            raise UnsupportedProblem(f"No kernel has forward-mode derivatives, and {name} has a tangent; {remedy}.", {})


def _stated(inputs: tuple[Any, ...]) -> tuple[Operands, Prepared]:
    """The op's flat inputs as the objects they stand for."""
    tensors, options = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:]
    operands = Operands.of(tensors)
    backend = dispatch.resolved(options[-1])
    shapes = [None if tensor is None else tensor.shape for tensor in tensors]
    key = (operands.q.device, operands.q.dtype, *shapes, *options[:-1], backend)
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepare(operands, options[:-1], backend)
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = prepared
    dispatch.check_fallback(prepared.plan, backend)
    return operands, prepared


def _prepare(operands: Operands, options: tuple[Any, ...], backend: str) -> Prepared:
    max_seqlen_q, max_seqlen_kv, left, right, scale, softcap, dropout_p, deterministic, gradients = options
    problem = AttentionProblem.of(
        operands,
        mask=MaskSpec(left=left, right=right),
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        gradients=frozenset(gradients.split(",")) - {""},
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
    )
    plan = dispatch.choose(problem, devices.detect(operands.q.device), backend)
    return Prepared(problem=problem, plan=plan, launcher=_launcher(plan.backend))


@lru_cache
def _launcher(backend: str) -> Launcher:
    with gpu.garbage_kept():
        return cast(Launcher, import_module(f"flashtile.backends.{backend}.launch"))


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A caller's autocast must not reach our own products; entering a context that changes nothing is slow."""
    is_on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_on else nullcontext()


def _wanted(gradients: frozenset[str] | list[str]) -> list[str]:
    return [name for name in DIFFERENTIABLE if name in gradients]


# --- what the compiler and autograd need to know ----------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *rows, heads_q, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*rows, heads_q, v.shape[-1]), q.new_empty(*rows[:-1], heads_q, rows[-1], dtype=lse_dtype)


def _fake_backward(d_out: Tensor | None, d_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    tensors: dict[str, Tensor] = dict(zip(FIELDS, inputs, strict=False))
    gradients = inputs[_NUM_INPUTS - 2].split(",")
    return [torch.empty_like(tensors[name], memory_format=torch.contiguous_format) for name in _wanted(gradients)]


def _forward_and_save(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    out, lse = _below_autograd(torch.ops.flashtile.attention_forward.default, keys, inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *inputs[:_NUM_TENSORS])
    ctx.options = inputs[_NUM_TENSORS:]
    return out, lse


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    # The gradients wanted when the op was called may not be those wanted now: export and vmap trace before they know.
    needed = dict(zip(FIELDS, ctx.needs_input_grad[1:], strict=False))
    wanted = [name for name in DIFFERENTIABLE if needed[name]]
    gradients = ",".join(sorted(wanted if d_lse is None else [*wanted, "lse"]))
    *saved_and_options, _, backend = *ctx.saved_tensors, *ctx.options
    found = torch.ops.flashtile.attention_backward.default(d_out, d_lse, *saved_and_options, gradients, backend)
    grads = dict(zip(wanted, found, strict=True))
    return (None, *(grads.get(name) for name in FIELDS), *(None,) * len(ctx.options))


def _backward_alone(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_below_autograd(torch.ops.flashtile.attention_backward.default, keys, inputs))


def _refuse_second_derivative(*_: Any) -> None:
    raise UnsupportedProblem(
        "flashtile::attention_backward has no derivative: take gradients of gradients elsewhere.", {}
    )


def _record(ctx: Any, recorded: tuple[Recorded, Operands], *tensors: Any) -> tuple[Tensor, Tensor]:
    call, operands = recorded
    out, lse = call.forward(operands)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *tensors)
    ctx.call = call
    return out, lse


def _differentiate_record(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    recorded, (out, lse, *tensors) = ctx.call, ctx.saved_tensors
    call, operands = recorded.prepared, Operands.of(tensors)
    is_as_planned = (d_lse is not None) == ("lse" in call.problem.gradients)
    if torch.is_grad_enabled() or is_watched() or not is_as_planned:
        ctx.options = _flat(call.problem, operands, call.plan.backend)[_NUM_TENSORS:]
        return _differentiate(ctx, d_out, d_lse)[: 1 + _NUM_TENSORS]
    found = recorded.backward(operands, Saved(out=out, lse=lse), d_out, d_lse)
    return (None, *(getattr(found, name, None) for name in FIELDS))


def _autograd_node(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """An autograd function of (the dispatcher's keys, the op's flat inputs)."""
    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


_AttentionForward = _autograd_node("FlashtileAttention", _forward_and_save, _differentiate)
_RecordedFunction = _autograd_node("FlashtileAttentionAgain", _record, _differentiate_record)
_AttentionBackward = _autograd_node("FlashtileAttentionBackward", _backward_alone, _refuse_second_derivative)


def _autograd_forward(keys: Any, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _AttentionForward.apply(keys, *inputs)
    return _below_autograd(torch.ops.flashtile.attention_forward.default, keys, inputs)


def _autograd_backward(keys: Any, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return list(_AttentionBackward.apply(keys, *inputs))
    return _below_autograd(torch.ops.flashtile.attention_backward.default, keys, inputs)


def _below_autograd(op: Any, keys: Any, inputs: tuple[Any, ...]) -> Any:
    """Hands the op to the dispatcher's next layer."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


# torch.library.custom_op would do the same, but loads the compiler, seconds of imports, at the first call; and
# torch.library.register_autograd asks the schema for each argument's default, 0.1 ms in every call.
_library = torch.library.Library("flashtile", "DEF")
_library.define(f"attention_forward({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"attention_backward(Tensor? d_out, Tensor? d_lse, Tensor out, Tensor lse, {_OPERANDS}, {_OPTIONS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _kernel, _fake, _autograd in (
    ("attention_forward", _attention_forward, _fake_forward, _autograd_forward),
    ("attention_backward", _attention_backward, _fake_backward, _autograd_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"flashtile::{_name}", _fake, lib=_library)

"""The registered torch ops: what ``torch.compile``, export, autograd and activation checkpointing see of flashtile.

There are two, and each hides everything from planning to the kernels, so a graph holds one node per attention call:

* ``flashtile::attention_forward`` -> (out, lse)
* ``flashtile::attention_backward`` -> the gradients named in ``gradients``, ordered as ``spec.problem.DIFFERENTIABLE``
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import dispatch, settings
from flashtile.backends.base import Launcher, Plan, Saved
from flashtile.errors import UnsupportedProblem
from flashtile.spec import devices, validation
from flashtile.spec.operands import Operands
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
_TENSOR_FIELDS = (
    "q",
    "k",
    "v",
    "bias",
    "mask",
    "alibi_slopes",
    "sinks",
    "dropout_seed",
    "cu_seqlens_q",
    "cu_seqlens_kv",
)


def attention(problem: AttentionProblem, operands: Operands, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call, differentiable; the only caller of the registered op."""
    _refuse_forward_mode(operands)
    is_packed = problem.layout == "varlen"
    return torch.ops.flashtile.attention_forward.default(
        *(getattr(operands, name) for name in _TENSOR_FIELDS),
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


def _attention_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    problem, operands, plan = _stated(inputs)
    if operands.q.device.type == "cpu" or settings.checks_values_on_gpu():
        validation.check_values(problem, operands)
    with torch.autocast(operands.q.device.type, enabled=False):  # a caller's autocast must not reach our own products
        return _launcher(plan).forward(problem, operands, plan)


def _attention_backward(
    d_out: Tensor | None, d_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any
) -> list[Tensor]:
    problem, operands, plan = _stated(inputs)
    with torch.autocast(operands.q.device.type, enabled=False):
        grads = _launcher(plan).backward(problem, operands, Saved(out=out, lse=lse), d_out, d_lse, plan)
    return [cast(Tensor, getattr(grads, name)) for name in _wanted(problem.gradients)]


def _refuse_forward_mode(operands: Operands) -> None:
    """Raises if an operand carries a tangent: torch would drop it without a word, and return zero tangents."""
    if forward_ad._current_level < 0:
        return
    for name in (*DIFFERENTIABLE, "alibi_slopes"):
        tensor = getattr(operands, name)
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            remedy = "take reverse-mode ones, for example with torch.autograd.grad or torch.func.vjp"
            raise UnsupportedProblem(f"No kernel has forward-mode derivatives, and {name} has a tangent; {remedy}.", {})


def _stated(inputs: tuple[Any, ...]) -> tuple[AttentionProblem, Operands, Plan]:
    """The op's flat inputs as the three objects they stand for."""
    operands, options = Operands(**dict(zip(_TENSOR_FIELDS, inputs, strict=False))), inputs[len(_TENSOR_FIELDS) :]
    max_seqlen_q, max_seqlen_kv, left, right, scale, softcap, dropout_p, deterministic, gradients, backend = options
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
    return problem, operands, dispatch.choose(problem, devices.detect(operands.q.device), backend)


def _launcher(plan: Plan) -> Launcher:
    return cast(Launcher, import_module(f"flashtile.backends.{plan.backend}.launch"))


def _wanted(gradients: frozenset[str] | list[str]) -> list[str]:
    return [name for name in DIFFERENTIABLE if name in gradients]


# --- what the compiler and autograd need to know ----------------------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *rows, heads_q, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*rows, heads_q, v.shape[-1]), q.new_empty(*rows[:-1], heads_q, rows[-1], dtype=lse_dtype)


def _fake_backward(d_out: Tensor | None, d_lse: Tensor | None, out: Tensor, lse: Tensor, *inputs: Any) -> list[Tensor]:
    tensors: dict[str, Tensor] = dict(zip(_TENSOR_FIELDS, inputs, strict=False))
    gradients = inputs[_NUM_INPUTS - 2].split(",")
    return [torch.empty_like(tensors[name], memory_format=torch.contiguous_format) for name in _wanted(gradients)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[: len(_TENSOR_FIELDS)])
    ctx.options = inputs[len(_TENSOR_FIELDS) :]


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    # The gradients wanted when the op was called may not be those wanted now: export and vmap trace before they know.
    wanted = [name for name in DIFFERENTIABLE if ctx.needs_input_grad[_TENSOR_FIELDS.index(name)]]
    gradients = ",".join(sorted(wanted if d_lse is None else [*wanted, "lse"]))
    *saved_and_options, _, backend = *ctx.saved_tensors, *ctx.options
    found = torch.ops.flashtile.attention_backward.default(d_out, d_lse, *saved_and_options, gradients, backend)
    grads = dict(zip(wanted, found, strict=True))
    q, k, v, bias, sinks = (grads.get(name) for name in DIFFERENTIABLE)
    return (q, k, v, bias, None, None, sinks, *(None,) * (_NUM_INPUTS - 7))


def _refuse_second_derivative(*_: Any) -> None:
    raise UnsupportedProblem(
        "flashtile::attention_backward has no derivative: take gradients of gradients elsewhere.", {}
    )


# torch.library.custom_op would do the same, but loads the compiler, seconds of imports, at the first call.
_library = torch.library.Library("flashtile", "DEF")
_library.define(f"attention_forward({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"attention_backward(Tensor? d_out, Tensor? d_lse, Tensor out, Tensor lse, {_OPERANDS}, {_OPTIONS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name, _kernel, _fake, _derivative, _save in (
    ("attention_forward", _attention_forward, _fake_forward, _differentiate, _save_for_backward),
    ("attention_backward", _attention_backward, _fake_backward, _refuse_second_derivative, None),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashtile::{_name}", _fake, lib=_library)
    torch.library.register_autograd(f"flashtile::{_name}", _derivative, setup_context=_save, lib=_library)

"""Calls of flash_attn's functions made from the library's random ``CallSpec``s, and the table of their signatures."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

import flashtile.integrations.flash_attn as flash_attn
from flashtile.spec.dropout import draw_seed
from flashtile.testing import Call, CallSpec, Results, draw_spec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Form = Literal["q, k, v", "q, kv", "qkv"]
FORMS: tuple[Form, ...] = get_args(Form)
FUNCTIONS = {
    ("q, k, v", False): flash_attn.flash_attn_func,
    ("q, kv", False): flash_attn.flash_attn_kvpacked_func,
    ("qkv", False): flash_attn.flash_attn_qkvpacked_func,
    ("q, k, v", True): flash_attn.flash_attn_varlen_func,
    ("q, kv", True): flash_attn.flash_attn_varlen_kvpacked_func,
    ("qkv", True): flash_attn.flash_attn_varlen_qkvpacked_func,
}
"""By form and whether sequences are packed."""


def draw_call(rng: Random, form: Form, *, dtypes: tuple[torch.dtype, ...]) -> CallSpec:
    """A random call without the options that flash_attn has not."""
    spec = draw_spec(rng, dtypes=dtypes)
    spec = replace(spec, bias_axes=None, mask_axes=None, has_sinks=False, head_dim_v=spec.head_dim, spread=1.0)
    if form == "qkv":
        spec = replace(spec, lengths_kv=spec.lengths_q, heads_kv=spec.heads_q, heads_per_kv=1)
    return spec


def theirs(call: Call) -> dict[str, Any]:
    """The call's options under flash_attn's names."""
    options = call.options
    left, right = options["window"] or (None, None)
    return {
        "dropout_p": options["dropout_p"],
        "softmax_scale": options["scale"],
        "causal": options["causal"],
        "window_size": (-1 if left is None else left, -1 if right is None else right),
        "softcap": options["softcap"],
        "alibi_slopes": options.get("alibi_slopes"),
    }


def packing_of(call: Call, form: Form) -> tuple[Any, ...]:
    """The positional arguments of the varlen functions that follow the tensors."""
    if not call.is_packed:
        return ()
    names = ("cu_seqlens_q", "max_seqlen_q") if form == "qkv" else ("cu_seqlens_q", "cu_seqlens_kv")
    names += () if form == "qkv" else ("max_seqlen_q", "max_seqlen_kv")
    return tuple(call.options[name] for name in names)


def seeded(call: Call, seed: int) -> Call:
    """The call with the seed of dropout that a flash_attn function draws after ``torch.manual_seed(seed)``."""
    if call.options["dropout_p"] == 0:
        return call
    torch.manual_seed(seed)
    return replace(call, options=call.options | {"dropout_seed": draw_seed(call.q.device)})


def run(
    call: Call, form: Form, d_out: Tensor, d_lse: Tensor | None, *, seed: int, **more: Any
) -> tuple[Results, Tensor | None]:
    """(results and gradients of q, k and v, S_dmask) of the flash_attn function, asked for out alone without d_lse."""
    leaves = _leaves(call, form)
    arguments = (*leaves, *packing_of(call, form))
    function, options = FUNCTIONS[form, call.is_packed], theirs(call) | more
    torch.manual_seed(seed)
    out = function(*arguments, **options, return_attn_probs=d_lse is not None)
    if d_lse is None:
        torch.manual_seed(seed)
        with torch.no_grad():
            _, lse, s_dmask = function(*arguments, **options, return_attn_probs=True)
        gradients = torch.autograd.grad(out, leaves, d_out)
    else:
        out, lse, s_dmask = out
        gradients = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
    parts = [part for gradient in gradients for part in _parts(gradient, call.q.dim())]
    results = Results(out=out.detach(), lse=lse.detach(), gradients=dict(zip(("q", "k", "v"), parts, strict=True)))
    return results, s_dmask


def _leaves(call: Call, form: Form) -> tuple[Tensor, ...]:
    q, k, v = call.q, call.k, call.v
    tensors = {"q, k, v": (q, k, v), "q, kv": (q, (k, v)), "qkv": ((q, k, v),)}[form]
    stacked = [torch.stack(tensor, dim=-3) if isinstance(tensor, tuple) else tensor for tensor in tensors]
    return tuple(tensor.detach().requires_grad_() for tensor in stacked)


def _parts(gradient: Tensor, dim: int) -> tuple[Tensor, ...]:
    return (gradient,) if gradient.dim() == dim else gradient.unbind(-3)

"""Analytic gradients against finite differences, in float64: no oracle, no shared formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from runners import BACKENDS, Backend, with_leaves
from torch import Tensor

from flashtile.testing import Call, CallSpec

BASE = CallSpec(
    lengths_q=(3,) * 2,
    lengths_kv=(5,) * 2,
    heads_per_kv=2,
    head_dim=3,
    head_dim_v=2,
    dtype=torch.float64,
    bias_dtype=torch.float64,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 1.5},
    "full bias": {"bias_axes": "bhqk"},
    "bias over keys": {"bias_axes": "bk"},
    "bias over heads": {"bias_axes": "h"},
    "one number as bias": {"bias_axes": ""},
    "mask": {"mask_axes": "bhqk", "mask_shows": 0.5},
    "alibi": {"alibi": "per sequence"},
    "sinks": {"has_sinks": True},
    "dropout": {"dropout_p": 0.4},
    "packed": {"is_packed": True, "lengths_q": (3, 0, 2), "lengths_kv": (4, 2, 3)},
    "everything": {
        "is_packed": True,
        "lengths_q": (3, 1, 4),
        "lengths_kv": (4, 2, 2),
        "window": (3, 1),
        "softcap": 2.0,
        "bias_axes": "hk",
        "mask_axes": "bqk",
        "mask_shows": 0.8,
        "alibi": "per head",
        "has_sinks": True,
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend: Backend, options: dict[str, Any]) -> None:
    if BASE.dtype in backend.declines:
        pytest.skip(f"finite differences need float64, which the {backend.name} backend declines")
    call = with_leaves(replace(BASE, **options).build())
    names = list(call.differentiable)

    def results(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        q, k, v = (given.pop(name) for name in ("q", "k", "v"))
        out, lse = backend.forward_with_lse(Call(q=q, k=k, v=v, options=call.options | given))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # finite differences of -inf are NaN

    torch.autograd.gradcheck(results, tuple(call.differentiable.values()), fast_mode=False)

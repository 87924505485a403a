"""Merging partial results: attention over parts of the keys, put together, is attention over all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runners import BACKENDS, CPU, Backend, finest_dtype
from torch import Tensor

from flashtile import merge_attention
from flashtile.testing import Call, CallSpec, assert_within_budget, make_tensor, oracle

Part = tuple[Tensor, Tensor]


def merged(parts: list[Part]) -> Part:
    return reduce(lambda a, b: merge_attention(*a, *b), parts)


def over_keys(backend: Backend, call: Call, begin: int, end: int) -> Part:
    """Attention over keys [begin, end) of a call whose options do not look at key positions."""
    return backend.forward_with_lse(replace(call, k=call.k[:, begin:end], v=call.v[:, begin:end]))


@pytest.mark.parametrize("num_parts", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_make_the_whole_within_the_budget(backend: Backend, dtype: torch.dtype, num_parts: int) -> None:
    """The error grew with the number of ranks, 4 and 8; a length of 2999 does not divide among 4."""
    if dtype in backend.declines:
        pytest.skip(f"the {backend.name} backend declines {dtype}")
    call = CallSpec(lengths_q=(21,), lengths_kv=(2999,), heads_kv=2, head_dim=16, head_dim_v=16, dtype=dtype).build()
    step = -(-2999 // num_parts)
    out, lse = merged([over_keys(backend, call, begin, min(begin + step, 2999)) for begin in range(0, 2999, step)])
    exact, naive = oracle(call.q, call.k, call.v), oracle(call.q, call.k, call.v, dtype=torch.float32)
    for found, exactly, naively, name in zip((out, lse), exact, naive, ("out", "lse"), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(found, exactly, rtol=1e-12, atol=1e-13)
        else:
            assert_within_budget(found, exact=exactly, naive=naively, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_16_bit_parts_merge_to_their_dtype(backend: Backend) -> None:
    call = CallSpec(lengths_q=(21,), lengths_kv=(300,), heads_kv=2, dtype=torch.bfloat16).build()
    out, lse = merged([over_keys(backend, call, begin, begin + 100) for begin in (0, 100, 200)])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    whole_out, whole_lse = backend.forward_with_lse(call)
    torch.testing.assert_close(out, whole_out, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, whole_lse)


@pytest.mark.parametrize("options", [{}, {"has_sinks": True, "softcap": 3.0}, {"mask_axes": "bq", "mask_shows": 0.5}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_through_the_merge(backend: Backend, options: dict[str, Any]) -> None:
    spec = CallSpec(
        lengths_q=(7, 7), lengths_kv=(20, 20), heads_kv=2, heads_per_kv=2, dtype=finest_dtype(backend), **options
    )
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    q, k, v = (tensor.clone().requires_grad_() for tensor in (call.q, call.k, call.v))
    with_sinks, without = replace(call, q=q, k=k, v=v), replace(call, q=q, k=k, v=v)
    without = replace(without, options={name: value for name, value in call.options.items() if name != "sinks"})
    whole = backend.forward_with_lse(with_sinks)
    parts = [over_keys(backend, with_sinks, 0, 13), over_keys(backend, without, 13, 20)]  # the sink counts once
    together = merged(parts)
    expected = torch.autograd.grad(whole, [q, k, v], [d_out, d_lse])
    found = torch.autograd.grad(together, [q, k, v], [d_out, d_lse])
    for part, result in zip(together, whole, strict=True):
        torch.testing.assert_close(part, result)
    for gradient, should_be in zip(found, expected, strict=True):
        assert not gradient.isnan().any()
        torch.testing.assert_close(gradient, should_be)


def parts_of(lse_a: float, lse_b: float) -> tuple[Part, Part]:
    """Two float32 parts of one row each, outs 1 and 3, zero where a part saw nothing."""

    def part(value: float, lse: float) -> Part:
        out = torch.full((1, 1, 1, 2), 0.0 if lse == -math.inf else value, requires_grad=True)
        return out, torch.full((1, 1, 1), lse, requires_grad=True)

    return part(1.0, lse_a), part(3.0, lse_b)


@pytest.mark.parametrize(
    ("lse_a", "lse_b", "out", "lse"),
    [
        (-math.inf, 2.0, 3.0, 2.0),
        (2.0, -math.inf, 1.0, 2.0),
        (-math.inf, -math.inf, 0.0, -math.inf),
        (1e4, 1e4, 2.0, 1e4 + math.log(2)),
        (-1e4, -1e4, 2.0, -1e4 + math.log(2)),
        (3e38, 3e38, 2.0, 3e38),
        (-3e38, -3e38, 2.0, -3e38),
        (3e38, -3e38, 1.0, 3e38),
        (-3e38, -math.inf, 1.0, -3e38),
        (88.0, 90.0, 3 - 2 / (1 + math.e**2), 88 + math.log(1 + math.e**2)),
    ],
)
def test_extreme_parts(lse_a: float, lse_b: float, out: float, lse: float) -> None:
    """exp of an lse above 88 overflows float32; a part that saw nothing has lse -inf."""
    part_a, part_b = parts_of(lse_a, lse_b)
    merged_out, merged_lse = merge_attention(*part_a, *part_b)
    torch.testing.assert_close(merged_out, torch.full((1, 1, 1, 2), out))
    torch.testing.assert_close(merged_lse, torch.full((1, 1, 1), lse))
    inputs = [*part_a, *part_b]
    gradients = torch.autograd.grad(merged_out.sum() + merged_lse.masked_fill(merged_lse == -math.inf, 0).sum(), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    if -math.inf < lse_a == lse_b:
        torch.testing.assert_close(gradients[0], torch.full((1, 1, 1, 2), 0.5))
        torch.testing.assert_close(gradients[1], torch.full((1, 1, 1), 0.5 * (1 - 2) * 2 + 0.5))
    if lse_a == -math.inf:
        assert bool((gradients[0] == 0).all()) and bool((gradients[1] == 0).all())


def test_gradients_of_the_merge_equal_finite_differences() -> None:
    outs = [make_tensor((2, 3, 2, 4), dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1)]
    lses = [make_tensor((2, 2, 3), dtype=torch.float64, seed=seed).requires_grad_() for seed in (2, 3)]
    torch.autograd.gradcheck(merge_attention, (outs[0], lses[0], outs[1], lses[1]))


finite_lse = st.floats(-1e30, 1e30) | st.floats(-100, 100)


@given(lse_a=finite_lse | st.just(-math.inf), lse_b=finite_lse | st.just(-math.inf))
def test_merge_is_a_weighted_mean_for_any_lse(lse_a: float, lse_b: float) -> None:
    part_a, part_b = parts_of(lse_a, lse_b)
    out, lse = merge_attention(*part_a, *part_b)
    swapped_out, swapped_lse = merge_attention(*part_b, *part_a)
    assert not bool(out.isnan().any()) and not bool(lse.isnan().any())
    assert torch.equal(lse, swapped_lse)
    torch.testing.assert_close(out, swapped_out)
    exact = torch.logaddexp(part_a[1].double(), part_b[1].double())
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


def test_merge_of_packed_parts() -> None:
    spec = CallSpec(lengths_q=(5, 3), lengths_kv=(6, 8), is_packed=True, heads_kv=2, dtype=torch.float64)
    call = spec.build()
    whole_out, whole_lse = CPU.forward_with_lse(call)
    parts = [
        CPU.forward_with_lse(replace(call, options=call.options | {"mask": mask}))
        for mask in (torch.arange(8) < 3, torch.arange(8) >= 3)
    ]
    out, lse = merged(parts)
    torch.testing.assert_close(out, whole_out)
    torch.testing.assert_close(lse, whole_lse)

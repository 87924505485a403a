"""Bugs that other attention kernels shipped with, and that a test here keeps out: empty and packed sequences.

Docstrings cite the report where it has a number: FA flash-attention, PT PyTorch, XF xformers, HF transformers,
TR Triton.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from runners import BACKENDS, CPU, RUNNERS, Backend, Runner, check, finest_dtype

from flashtile.testing import Call, CallSpec, assert_results_within_budget, poisoned_allocations


def test_empty_first_and_last_sequences_with_many_keys() -> None:
    """FA#2562: cu_q [0, 0, 1208, 2048, 2048], cu_k [0, 2538, 4280, 5120, 8192], 4 heads over 1, head_dim 256."""
    lengths_q, lengths_kv = (0, 1208, 840, 0), (2538, 1742, 840, 3072)
    spec = CallSpec(lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, heads_per_kv=4, causal=True)
    check(CPU, spec, is_small=False)

    call = replace(spec, head_dim=256, head_dim_v=256).build()
    with torch.no_grad():
        out, lse = CPU.forward_with_lse(call)
        for rows_q, rows_kv in ((slice(0, 1208), slice(2538, 4280)), (slice(1208, 2048), slice(4280, 5120))):
            q, k, v = call.q[None, rows_q], call.k[None, rows_kv], call.v[None, rows_kv]
            out_alone, lse_alone = CPU.forward_with_lse(Call(q=q, k=k, v=v, options={"causal": True}))
            torch.testing.assert_close(out[rows_q], out_alone[0])
            torch.testing.assert_close(lse[:, rows_q], lse_alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_sequences_before_a_long_one(backend: Backend, causal: bool) -> None:
    """FA#1254: lengths [0, 0, 1023] over [0, 1, 2045] hung."""
    spec = CallSpec(lengths_q=(0, 0, 1023), lengths_kv=(0, 1, 2045), is_packed=True, causal=causal)
    check(backend, spec, is_small=False)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_kv"), [((), ()), ((0, 0), (5, 5)), ((5, 5), (0, 0)), ((0,), (0,))], ids=str
)
def test_zero_sizes(runner: Runner, lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], is_packed: bool) -> None:
    """FA#2776, FA#2421: batch, seqlen_q or seqlen_kv 0: empty results, out 0, lse -inf, gradients 0."""
    spec = CallSpec(lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=is_packed, bias_axes="hk", mask_axes="bqk")
    results = check(runner, spec)
    assert bool((results.out == 0).all())
    assert bool((results.lse == -math.inf).all())
    assert all(bool((gradient == 0).all()) for gradient in results.gradients.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
def test_sequences_of_one_token(runner: Runner, causal: bool) -> None:
    """A sequence of one token attends to itself alone, and its out is its value."""
    spec = CallSpec(lengths_q=(1, 1, 1), lengths_kv=(1, 1, 1), is_packed=True, heads_kv=2, causal=causal)
    results = check(runner, spec)
    assert torch.equal(results.out, replace(spec, dtype=results.out.dtype).build().v)
    check(runner, replace(spec, is_packed=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unused_rows", [1, 300])
@pytest.mark.parametrize("runner", RUNNERS)
def test_buffer_longer_than_its_sequences(runner: Runner, unused_rows: int, dtype: torch.dtype) -> None:
    """FA#2324: rows after cu_seqlens[-1] hold NaN, also in the upstream gradient, and come back 0."""
    spec = CallSpec(lengths_q=(17, 5), lengths_kv=(9, 30), is_packed=True, unused_rows=unused_rows, dtype=dtype)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    assert bool(call.k[-unused_rows:].isnan().all()) and bool(d_out[-unused_rows:].isnan().all())
    with poisoned_allocations():
        results = runner.run(call, d_out, d_lse)
    for name in ("q", "k", "v"):
        assert bool((results.gradients[name][-unused_rows:] == 0).all()), name
    assert bool((results.out[-unused_rows:] == 0).all())
    assert bool((results.lse[:, -unused_rows:] == -math.inf).all())
    assert_results_within_budget(results, call, d_out=d_out, d_lse=d_lse, is_small=True)


@pytest.mark.parametrize("runner", RUNNERS)
def test_neighbours_do_not_leak(runner: Runner) -> None:
    """NaN in one packed sequence stays in it, although its rows share tiles with its neighbours'."""
    spec = CallSpec(lengths_q=(5, 6, 7), lengths_kv=(5, 6, 7), is_packed=True, dtype=finest_dtype(runner))
    clean, dirty = spec.build(), spec.build()
    for tensor in (dirty.q, dirty.k, dirty.v):
        tensor[5:11] = math.nan
    d_out, d_lse = spec.build_upstream()
    expected, found = (runner.run(call, d_out, d_lse) for call in (clean, dirty))
    for name in ("out", "d_q", "d_k", "d_v"):
        for rows in (slice(0, 5), slice(11, 18)):
            torch.testing.assert_close(found.named()[name][rows], expected.named()[name][rows])

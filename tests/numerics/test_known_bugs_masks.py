"""Bugs that other attention kernels shipped with, and that a test here keeps out: masks, -inf and NaN.

Docstrings cite the report where it has a number: FA flash-attention, PT PyTorch, XF xformers, HF transformers,
TR Triton.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from runners import BACKENDS, CPU, RUNNERS, Backend, Runner, assert_dtypes, assert_same, check

from flashtile.spec import masks
from flashtile.testing import Call, CallSpec, assert_results_within_budget, cu_seqlens_of, make_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hidden_rows_call(how: str, dtype: torch.dtype, *, causal: bool = False) -> tuple[Call, slice]:
    """A call whose first 9 queries see nothing, hidden by a mask or by an additive bias, and those rows."""
    spec = CallSpec(lengths_q=(40,), lengths_kv=(40,), heads_kv=2, head_dim=16, head_dim_v=16, dtype=dtype)
    call, rows = spec.build(), slice(0, 9)
    options: dict[str, Any] = {"causal": causal}
    if how == "mask":
        options["mask"] = torch.ones(1, 1, 40, 40, dtype=torch.bool)
        options["mask"][:, :, rows] = False
    else:
        options["bias"] = torch.zeros(1, 1, 40, 40, dtype=dtype)
        options["bias"][:, :, rows] = -math.inf if how == "-inf" else torch.finfo(dtype).min
    return Call(q=call.q, k=call.k, v=call.v, options=options), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("how", ["mask", "-inf"])
@pytest.mark.parametrize("runner", RUNNERS)
def test_fully_masked_rows(runner: Runner, how: str, causal: bool, dtype: torch.dtype) -> None:
    """PT#103749, PT#109517: rows that see nothing, by mask or additive -inf, alone and together with causal."""
    call, rows = hidden_rows_call(how, dtype, causal=causal)
    d_out = make_tensor(call.out_shape, dtype=dtype, seed=1)
    d_lse = make_tensor(call.lse_shape, seed=2)
    results = runner.run(call, d_out, d_lse)
    assert_results_within_budget(results, call, d_out=d_out, d_lse=d_lse)
    assert bool((results.out[:, rows] == 0).all())
    assert bool((results.lse[:, :, rows] == -math.inf).all())
    assert bool((results.gradients["q"][:, rows] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
def test_rows_masked_by_the_smallest_number(runner: Runner, causal: bool, dtype: torch.dtype) -> None:
    """PT#103749: rows whose bias is finfo.min throughout see nothing, also where a loss reaches them."""
    call, rows = hidden_rows_call("finfo.min", dtype, causal=causal)
    d_out = make_tensor(call.out_shape, dtype=dtype, seed=1)
    d_lse = make_tensor(call.lse_shape, seed=2)
    results = runner.run(call, d_out, d_lse)
    assert bool((results.out[:, rows] == 0).all())
    assert bool((results.lse[:, :, rows] == -math.inf).all())
    assert bool((results.gradients["q"][:, rows] == 0).all())
    assert bool((results.gradients["bias"][:, :, rows] == 0).all())
    assert_results_within_budget(results, call, d_out=d_out, d_lse=d_lse)


@pytest.mark.parametrize("runner", RUNNERS)
def test_float16_has_no_number_that_hides(runner: Runner) -> None:
    """float16's finfo.min, -65504, is an ordinary score: such a row averages its values, and a loss reaches them."""
    call, rows = hidden_rows_call("finfo.min", torch.float16)
    d_out = make_tensor(call.out_shape, dtype=torch.float16, seed=1)
    results = runner.run(call, d_out, None)
    assert bool((results.lse[:, :, rows] < -65000).all() & (results.lse[:, :, rows] > -66000).all())
    assert bool((results.out[:, rows] != 0).any(dim=-1).all())
    assert all(bool(gradient.isfinite().all()) for gradient in results.gradients.values())
    d_out[:, rows] = 0  # float32 knows lse beside -65504 only to 0.004
    assert_results_within_budget(runner.run(call, d_out, None), call, d_out=d_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_keys_masked_by_the_smallest_number(runner: Runner, dtype: torch.dtype) -> None:
    """finfo.min on some keys of a row gives, bit for bit, what a boolean mask gives; so does HIDDEN_BELOW itself."""
    call = CallSpec(lengths_q=(40,), lengths_kv=(40,), heads_kv=2, head_dim=16, head_dim_v=16, dtype=dtype).build()
    mask = make_tensor((1, 1, 40, 40), seed=5) > 0
    d_out = make_tensor(call.out_shape, dtype=dtype, seed=1)
    expected = runner.run(replace(call, options={"mask": mask, "bias": torch.zeros(1, 1, 40, 40)}), d_out, None)
    for lowest in (torch.finfo(dtype).min, masks.HIDDEN_BELOW):
        bias = torch.zeros(1, 1, 40, 40).masked_fill(~mask, lowest)
        results = runner.run(replace(call, options={"bias": bias}), d_out, None)
        for name, found in results.named().items():
            assert_same(found, expected.named()[name], runner, name)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_number_above_the_threshold_hides_nothing(runner: Runner) -> None:
    """Next to HIDDEN_BELOW on its finite side a row averages its values, as softmax of equal scores does."""
    call, rows = hidden_rows_call("mask", torch.float32)
    bias = torch.zeros(1, 1, 40, 40)
    bias[:, :, rows] = masks.HIDDEN_BELOW * (1 - 2**-20)
    results = runner.run(replace(call, options={"bias": bias}), torch.ones(call.out_shape), None)
    mean = call.v.mean(dim=1, keepdim=True).expand(-1, 9, -1, -1)
    torch.testing.assert_close(results.out[:, rows], mean)
    assert all(bool(gradient.isfinite().all()) for gradient in results.gradients.values())


@pytest.mark.parametrize("bias_like", ["all-true mask", "bias"])
@pytest.mark.parametrize("seqlen", [64, 192, 704, 832])
@pytest.mark.parametrize("backend", BACKENDS)
def test_very_negative_lse(backend: Backend, seqlen: int, bias_like: str) -> None:
    """PT#196678: logits near -120 make exp(-lse) overflow in float32; dQ came out NaN with an explicit mask."""
    q = torch.full((1, seqlen, 1, 16), 4.0) + 0.1 * make_tensor((1, seqlen, 1, 16), seed=1)
    k = torch.full((1, seqlen, 1, 16), -7.5) + 0.1 * make_tensor((1, seqlen, 1, 16), seed=2)
    if bias_like == "bias":
        options: dict[str, Any] = {"bias": torch.full((1, 1, 1, seqlen), -10.0)}
    else:
        options = {"mask": torch.ones(1, 1, seqlen, seqlen, dtype=torch.bool)}
    call = Call(q=q, k=k, v=make_tensor((1, seqlen, 1, 16), seed=3), options=options)
    d_out = make_tensor(call.out_shape, seed=4)
    results = backend.run(call, d_out, None)
    assert bool((results.lse < -88.8).all()), "the case is about lse below the logarithm of float32's smallest number"
    assert_results_within_budget(results, call, d_out=d_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_one_query_with_very_negative_lse(runner: Runner, dtype: torch.dtype) -> None:
    """PT#196678: seqlen_q 1, seqlen_kv 128, lse about -122 gave NaN in dK and dV."""
    q, k = torch.full((1, 1, 2, 16), 4.0, dtype=dtype), torch.full((1, 128, 2, 16), -8.0, dtype=dtype)
    call = Call(q=q, k=k, v=make_tensor((1, 128, 2, 16), dtype=dtype, seed=3), options={"mask": torch.ones(1, 128) > 0})
    d_out = make_tensor(call.out_shape, dtype=dtype, seed=4)
    results = runner.run(call, d_out, None)
    assert bool(((results.lse > -125) & (results.lse < -121)).all())
    assert_results_within_budget(results, call, d_out=d_out, is_small=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_inputs_times_three_on_one_token(runner: Runner, dtype: torch.dtype) -> None:
    """FA#334: inputs three times the usual size on [1, 1, 1, 16]."""
    q, k, v = (make_tensor((1, 1, 1, 16), dtype=dtype, seed=seed, spread=3.0) for seed in range(3))
    call, d_out = Call(q=q, k=k, v=v), make_tensor((1, 1, 1, 16), dtype=dtype, seed=4)
    results = runner.run(call, d_out, None)
    assert_results_within_budget(results, call, d_out=d_out, is_small=True)
    assert torch.equal(results.out, v)


@pytest.mark.parametrize("runner", RUNNERS[:1])
def test_causal_1024_in_float16(runner: Runner) -> None:
    """FA#1052: NaN at seqlen 1024, head_dim 128, causal, float16."""
    spec = CallSpec(lengths_q=(1024,), lengths_kv=(1024,), head_dim=128, head_dim_v=128, causal=True)
    check(runner, replace(spec, dtype=torch.float16), is_small=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_many_queries_for_one_key_each(runner: Runner, dtype: torch.dtype) -> None:
    """FA#443: packed cu_q [0, 76, 110, 256] over cu_k [0, 1, 2, 3], head_dim 32, causal: only last rows see a key."""
    spec = CallSpec(lengths_q=(76, 34, 146), lengths_kv=(1, 1, 1), is_packed=True, head_dim=32, head_dim_v=32)
    results = check(runner, replace(spec, causal=True, dtype=dtype))
    sees_its_key = results.lse[0] > -math.inf
    assert sees_its_key.nonzero().flatten().tolist() == [75, 109, 255]


@pytest.mark.parametrize("runner", RUNNERS)
def test_hidden_pairs_have_no_weight_in_the_packed_backward(runner: Runner) -> None:
    """FA#1947: p = exp(s - lse) has to be 0 where the mask hides, also where s - lse is huge.

    The scores that causality hides are 1e4 above those it shows, so a forgotten mask overflows.
    """
    q = torch.ones(24, 1, 8)
    k = torch.ones(24, 1, 8)
    k[4:12], k[17:24] = 3e3, 3e3
    options = {"causal": True, "cu_seqlens_q": cu_seqlens_of((12, 12)), "cu_seqlens_kv": cu_seqlens_of((12, 12))}
    call = Call(q=q, k=k, v=make_tensor((24, 1, 8)), options=options | {"max_seqlen_q": 12, "max_seqlen_kv": 12})
    d_out, d_lse = make_tensor(call.out_shape, seed=1), make_tensor(call.lse_shape, seed=2)
    results = runner.run(call, d_out, d_lse)
    assert_results_within_budget(results, call, d_out=d_out, d_lse=d_lse, is_small=True)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_sink_of_minus_infinity_is_no_sink(runner: Runner) -> None:
    """A row that sees neither a key nor a sink stays empty if its head's sink is -inf, and no gradient is NaN."""
    spec = CallSpec(lengths_q=(9,), lengths_kv=(4,), heads_kv=2, causal=True)
    call = spec.build()
    call = replace(call, options=call.options | {"sinks": torch.tensor([-math.inf, 0.5])})
    d_out, d_lse = spec.build_upstream()
    results = runner.run(call, d_out, d_lse)
    assert_results_within_budget(results, call, d_out=d_out, d_lse=d_lse, is_small=True)
    assert_dtypes(results, call)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_sink_alone_takes_all_the_weight(runner: Runner) -> None:
    """A row that sees a sink and no key: out 0, lse the sink, and the sink's gradient is that of the lse."""
    spec = CallSpec(lengths_q=(3,), lengths_kv=(0,), heads_kv=2, has_sinks=True)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    results = runner.run(call, d_out, d_lse)
    assert bool((results.out == 0).all())
    assert torch.equal(results.lse, call.options["sinks"][None, :, None].expand(1, 2, 3))
    torch.testing.assert_close(results.gradients["sinks"], d_lse.sum(dim=(0, 2)))


def test_mask_and_bias_that_hide_whole_tiles() -> None:
    """Whole tiles of the score matrix hidden by a mask, by -inf, and by both, next to visible ones."""
    seqlen = 1100  # three kv tiles and five query tiles of the CPU planner
    call = CallSpec(lengths_q=(seqlen,), lengths_kv=(seqlen,)).build()
    mask, bias = torch.ones(seqlen, seqlen, dtype=torch.bool), torch.zeros(seqlen, seqlen)
    mask[:512, :520], mask[600:700] = False, False
    bias[300:800, 512:1024] = -math.inf
    call = replace(call, options={"mask": mask, "bias": bias})
    d_out, d_lse = make_tensor(call.out_shape, seed=1), make_tensor(call.lse_shape, seed=2)
    results = CPU.run(call, d_out, d_lse)
    assert_results_within_budget(results, call, d_out=d_out, d_lse=d_lse)

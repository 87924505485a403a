"""The tools that judge the kernels are judged here: the oracle by hand and by torch, assertions by wrong results."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtile.testing import (
    Call,
    CallSpec,
    Results,
    assert_results_within_budget,
    assert_within_budget,
    cu_seqlens_of,
    draw_spec,
    make_tensor,
    oracle,
    poisoned_allocations,
    reference,
    rounding_errors,
)
from flashtile.testing.inputs import Strides

# --- the oracle -------------------------------------------------------------------------------------------------------


def by_hand(call: Call, i: int, j: int, h: int) -> float:
    """The final score of a pair of a dense call of one sequence, in plain Python."""
    o = call.options
    q, k = call.q[0, i, h].tolist(), call.k[0, j, h // (call.q.shape[2] // call.k.shape[2])].tolist()
    s = sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q))
    s = o["softcap"] * math.tanh(s / o["softcap"])
    aligned = i + call.k.shape[1] - call.q.shape[1]
    s += o["bias"][0, h, i, j].item() - o["alibi_slopes"][h].item() * abs(aligned - j)
    left, right = o["window"]
    return s if aligned - left <= j <= aligned + right and o["mask"][i, j] else -math.inf


def test_oracle_equals_a_loop_in_plain_python() -> None:
    spec = CallSpec(lengths_q=(5,), lengths_kv=(7,), heads_kv=2, heads_per_kv=2, head_dim=3, head_dim_v=2)
    spec = replace(spec, dtype=torch.float64, bias_dtype=torch.float64, window=(2, 1), softcap=1.5, bias_axes="bhqk")
    call = replace(spec, mask_axes="qk", mask_shows=0.6, alibi="per head", has_sinks=True, seed=5).build()
    out, lse = oracle(call.q, call.k, call.v, **call.options)
    for h in range(4):
        for i in range(5):
            weights = [math.exp(by_hand(call, i, j, h)) for j in range(7)]
            total = sum(weights) + math.exp(call.options["sinks"][h].item())
            assert lse[0, h, i].item() == pytest.approx(math.log(total), rel=1e-12)
            for d in range(2):
                value = sum(w * call.v[0, j, h // 2, d].item() for j, w in enumerate(weights)) / total
                assert out[0, i, h, d].item() == pytest.approx(value, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_equals_torch_and_its_autograd(causal: bool) -> None:
    call = CallSpec(lengths_q=(9, 9), lengths_kv=(9, 9), heads_kv=2, causal=causal, dtype=torch.float64).build()
    d_out = make_tensor(call.out_shape, dtype=torch.float64, seed=7)
    q, k, v = (x.transpose(1, 2).clone().requires_grad_() for x in (call.q, call.k, call.v))
    torchs = scaled_dot_product_attention(q, k, v, is_causal=causal)
    results = reference(call, d_out=d_out)
    torch.testing.assert_close(results.out, torchs.transpose(1, 2))
    gradients = torch.autograd.grad(torchs, [q, k, v], d_out.transpose(1, 2))
    for name, gradient in zip(("q", "k", "v"), gradients, strict=True):
        torch.testing.assert_close(results.gradients[name], gradient.transpose(1, 2))


def test_packed_oracle_is_the_dense_one_sequence_by_sequence() -> None:
    spec = CallSpec(lengths_q=(4, 0, 6), lengths_kv=(5, 3, 2), is_packed=True, unused_rows=2, causal=True)
    call = spec.build()
    out, lse = oracle(call.q, call.k, call.v, **call.options)
    for rows_q, rows_kv in ((slice(0, 4), slice(0, 5)), (slice(4, 10), slice(8, 10))):
        alone, lse_alone = oracle(call.q[None, rows_q], call.k[None, rows_kv], call.v[None, rows_kv], causal=True)
        torch.testing.assert_close(out[rows_q], alone[0])
        torch.testing.assert_close(lse[:, rows_q], lse_alone[0])
    assert bool((out[-2:] == 0).all()) and bool((lse[:, -2:] == -math.inf).all())


def test_the_naive_formula_rounds_every_step_to_its_dtype() -> None:
    call = CallSpec(lengths_q=(30,), lengths_kv=(30,), dtype=torch.bfloat16).build()
    exact, naive = reference(call), reference(call, dtype=torch.bfloat16)
    assert naive.out.dtype == naive.lse.dtype == torch.bfloat16
    error = (naive.out.double() - exact.out).abs().max().item()
    assert 1e-3 < error < 5e-2


def test_an_unknown_option_is_refused() -> None:
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(TypeError, match="casual"):
        oracle(q, q, q, casual=True)


# --- the assertions ---------------------------------------------------------------------------------------------------

EXACT = torch.tensor([1.0, -2.0, 0.5, -math.inf], dtype=torch.float64)
NAIVE = EXACT.float() + torch.tensor([1e-3, 0.0, 0.0, 0.0])


def test_twice_the_naive_error_is_allowed_and_no_more() -> None:
    rounding = torch.finfo(torch.float32).eps * 2.0
    error = (NAIVE[0].double() - EXACT[0]).item()
    assert_within_budget(EXACT + 2 * error + 0.9 * rounding, exact=EXACT, naive=NAIVE)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(EXACT + 2 * error + 1.1 * rounding, exact=EXACT, naive=NAIVE)
    assert_within_budget(EXACT + 2 * error + 1.1 * rounding, exact=EXACT, naive=NAIVE, floor=1e-6)


def test_the_error_text_says_what_where_and_how_much() -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    actual = exact.float()
    actual[1, 2], actual[0, 1] = 0.25, 0.125
    with pytest.raises(AssertionError) as failure:
        assert_within_budget(actual, exact=exact, naive=exact.float(), name="d_q")
    text = str(failure.value)
    for part in (
        "d_q",
        "torch.float32",
        "error 2.500e-01 at [1, 2]",
        "should be 0",
        "2 of 6 entries",
        "first at [0, 1]",
    ):
        assert part in text


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([math.nan, -2.0, 0.5, -math.inf]),
        torch.tensor([math.inf, -2.0, 0.5, -math.inf]),
        torch.tensor([1.0, -2.0, -math.inf, -math.inf]),
        torch.tensor([1.0, -2.0, 0.5, -1e30]),
        torch.tensor([1.0, -2.0, 0.5, math.inf]),
        torch.tensor([1.0, -2.0, 0.5, math.nan]),
    ],
    ids=str,
)
def test_nan_and_misplaced_infinities_are_refused(wrong: Tensor) -> None:
    huge = torch.tensor([1e6, 0.0, 0.0, 0.0]) + NAIVE  # a budget that no error could exceed
    with pytest.raises(AssertionError, match="NaN or wrongly infinite or finite"):
        assert_within_budget(wrong, exact=EXACT, naive=huge)


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(EXACT[:3], exact=EXACT, naive=NAIVE)


def test_entries_where_the_naive_formula_overflows_are_not_its_error() -> None:
    naive = torch.tensor([math.inf, -2.0, math.nan, -math.inf], dtype=torch.float16)
    assert_within_budget(EXACT.half(), exact=EXACT, naive=naive)
    with pytest.raises(AssertionError):
        assert_within_budget(EXACT.half() + 0.1, exact=EXACT, naive=naive)


MISTAKES: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.4},
    "window off by one": {"window": (6, 2)},
    "alignment": {"mask": torch.ones(40, 50, dtype=torch.bool).tril()},
    "forgotten sink": {"sinks": None},
    "forgotten bias": {"bias": None},
    "other seed": {"dropout_seed": 1},
}


@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_in_an_option_breaks_the_budget(mistake: str, dtype: torch.dtype, is_small: bool) -> None:
    spec = CallSpec(lengths_q=(40,), lengths_kv=(50,), heads_kv=2, dtype=dtype, window=(7, 2), has_sinks=True)
    spec = replace(spec, bias_axes="hk", dropout_p=0.1)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    right = reference(call, dtype=dtype, d_out=d_out, d_lse=d_lse)
    assert_results_within_budget(right, call, d_out=d_out, d_lse=d_lse, is_small=is_small)
    mistaken = replace(call, options=call.options | MISTAKES[mistake])
    wrong = reference(mistaken, dtype=dtype, d_out=d_out, d_lse=d_lse)
    with pytest.raises(AssertionError):
        assert_results_within_budget(wrong, call, d_out=d_out, d_lse=d_lse, is_small=is_small)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_a_gradient_of_slightly_wrong_size_breaks_the_budget(name: str) -> None:
    spec = CallSpec(lengths_q=(40,), lengths_kv=(50,), heads_kv=2, bias_axes="hk", has_sinks=True)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    right = reference(call, d_out=d_out, d_lse=d_lse)
    wrong = replace(right, gradients=right.gradients | {name: right.gradients[name] * 1.001})
    with pytest.raises(AssertionError, match=f"d_{name}"):
        assert_results_within_budget(wrong, call, d_out=d_out, d_lse=d_lse, is_small=True)


def test_a_loss_of_precision_everywhere_breaks_the_budget_of_large_problems() -> None:
    """An error that one unlucky entry may have is not allowed to all of them."""
    call = CallSpec(lengths_q=(64,), lengths_kv=(64,), heads_kv=2).build()
    exact = reference(call)
    floor = rounding_errors(call)["out"]
    signs = torch.where(torch.arange(exact.out.numel()).reshape(exact.out.shape) % 2 == 0, 1.0, -1.0)
    blurred = Results(out=exact.out + 0.9 * floor * signs, lse=exact.lse)
    assert_results_within_budget(blurred, call, is_small=True)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_results_within_budget(blurred, call)


def test_one_rounding_of_the_summands_is_small() -> None:
    spec = CallSpec(lengths_q=(64,), lengths_kv=(64,), heads_kv=2, bias_axes="hk", has_sinks=True)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    floors = rounding_errors(call, d_out=d_out, d_lse=d_lse)
    results = reference(call, d_out=d_out, d_lse=d_lse).named()
    assert floors.keys() == results.keys()
    for name, floor in floors.items():
        assert 0 < floor < 2e-4 * results[name].abs().max().item(), name


# --- inputs and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", get_args(Strides))
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (5, 3, 4)])
def test_strides_are_what_their_name_says(shape: tuple[int, ...], strides: Strides) -> None:
    x = make_tensor(shape, seed=3, strides=strides)
    assert x.shape == shape and not bool(x.isnan().any())
    assert torch.equal(x, make_tensor(shape, seed=3, strides=strides))
    assert x.is_contiguous() == (strides == "contiguous")
    assert (x.stride(-2) == 0) == (strides == "shared_heads")
    assert (x.stride(-1) == 2) == (strides == "every_other")
    assert (x.stride(-2) > x.stride(-3)) == (strides == "heads_first")
    if strides in ("sliced", "every_other"):
        around = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0)
        assert int(around.isnan().sum()) == around.numel() - x.numel()


def test_the_same_numbers_in_every_dtype() -> None:
    fine = make_tensor((7, 2, 3), dtype=torch.float64, seed=4)
    assert torch.equal(make_tensor((7, 2, 3), dtype=torch.bfloat16, seed=4), fine.bfloat16())


def test_packed_batches() -> None:
    assert cu_seqlens_of([]).tolist() == [0]
    spec = CallSpec(lengths_q=(3, 0, 4), lengths_kv=(1, 2, 3), is_packed=True, unused_rows=2, unused_length=5)
    call = replace(spec, bias_axes="qk").build()
    assert call.q.shape[0] == 9 and call.k.shape[0] == 8
    assert bool(call.q[-2:].isnan().all()) and not bool(call.q[:-2].isnan().any())
    assert call.options["cu_seqlens_q"].dtype == torch.int32
    assert call.options["max_seqlen_q"] == 9 and call.scores_shape == (3, 1, 9, 8)
    assert int(call.options["bias"].isnan().sum()) == 9 * 8 - 4 * 3


def test_a_spec_prints_as_the_expression_that_makes_it() -> None:
    for seed in range(50):
        spec = draw_spec(Random(seed))
        again = eval(repr(spec), {"CallSpec": CallSpec, "torch": torch})
        assert again == spec
        for tensor, same in zip((spec.build().q, spec.build().v), (again.build().q, again.build().v), strict=True):
            assert torch.equal(tensor.nan_to_num(), same.nan_to_num())


def test_drawn_specs_reach_every_option_and_their_mixes() -> None:
    specs = [draw_spec(Random(seed)) for seed in range(400)]
    options = [
        [s.causal, s.window, s.softcap, s.bias_axes, s.mask_axes, s.alibi, s.has_sinks, s.dropout_p] for s in specs
    ]
    for column in zip(*options, strict=True):
        assert 40 < sum(bool(value) for value in column) < 360
    assert max(sum(bool(value) for value in row) for row in options) >= 6
    assert {s.dtype for s in specs} == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    assert {s.strides_d_out for s in specs} == set(get_args(Strides))
    assert {0, 1} <= {length for s in specs for length in s.lengths_q + s.lengths_kv}
    assert any(s.is_packed for s in specs) and not all(s.is_packed for s in specs)


def test_plain_draws_have_no_option() -> None:
    for seed in range(30):
        spec = draw_spec(Random(seed), option_rate=0.0, layouts=("dense",))
        has_option = (spec.window, spec.bias_axes, spec.mask_axes, spec.alibi, spec.softcap, spec.dropout_p)
        assert not any(has_option) and not spec.has_sinks and not spec.is_packed


def test_poison_fills_what_nobody_wrote_and_ends_with_its_context() -> None:
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    with poisoned_allocations():
        x = torch.zeros(3)
        made = [torch.empty(3), x.new_empty(3), torch.empty_like(x), torch.empty_strided((2, 2), (1, 2))]
        assert all(bool(tensor.isnan().all()) for tensor in made)
        assert not bool((x + 1).isnan().any())
    assert torch.are_deterministic_algorithms_enabled() == was_deterministic
    with pytest.raises(RuntimeError, match="stops"), poisoned_allocations():
        raise RuntimeError("stops")
    assert torch.are_deterministic_algorithms_enabled() == was_deterministic

"""torch.compile: no graph break, the same numbers, one node per call, and no new compilation for a new length."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compile_cases import CASES, Case, assert_same, boundaries, dense_case, packed_case
from torch import Tensor
from torch.fx import GraphModule

import flashtile

HAS_CPP_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
LENGTHS = (11, 6, 9, 33, 300)
"""The first equals no other size of the cases: the compiler takes equal sizes of a first call for one size."""
DYNAMIC = (
    "dense, plain",
    "dense, window",
    "dense, softcap",
    "dense, bias",
    "dense, dropout",
    "dense, everything",
    "dense, without lse",
    "packed, plain",
    "packed, everything",
    "merge",
)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], *, backend: str | Callable[..., Any] = "aot_eager", dynamic: bool | None = None
) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize("name", CASES)
def test_aot_eager_gives_the_numbers_of_eager(name: str) -> None:
    case = CASES[name]
    assert_same(case.run(compiled(case.call, dynamic=False)), case.run())


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes_give_the_numbers_of_eager(name: str) -> None:
    case = CASES[name]
    assert_same(case.run(compiled(case.call, dynamic=True)), case.run())


@pytest.mark.skipif(not HAS_CPP_COMPILER, reason="inductor needs a C++ compiler: set CXX or install g++")
@pytest.mark.parametrize("name", ["dense, plain", "dense, everything", "packed, everything", "merge"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_gives_the_numbers_of_eager(name: str, dynamic: bool) -> None:
    case = CASES[name]
    assert_same(case.run(compiled(case.call, backend="inductor", dynamic=dynamic)), case.run())


@pytest.mark.parametrize("name", ["dense, everything", "packed, everything"])
def test_a_call_is_one_node_of_the_graph(name: str) -> None:
    graphs: list[GraphModule] = []

    def keep_graph(graph: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        assert example_inputs
        graphs.append(graph)
        return graph.forward

    case = CASES[name]
    compiled(case.call, backend=keep_graph)(case.leaves(), case.options)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert [target for target in targets if "flashtile" in target] == ["flashtile.attention_forward.default"]
    assert not any("matmul" in target or "softmax" in target or "bmm" in target for target in targets)


# --- new sizes --------------------------------------------------------------------------------------------------------


def check_each(call: Callable[..., Any], cases: list[Case]) -> None:
    """Runs the cases one after the other; the first may compile, any other may not."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in cases:
            assert_same(case.run(call), case.run())


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (5, None)}, {"softcap": 3.0, "scale": 0.2}])
def test_new_dense_lengths_do_not_recompile(options: dict[str, Any]) -> None:
    cases = [dense_case(seqlen_q=length, seqlen_kv=length + 3, **options) for length in LENGTHS]
    check_each(compiled(cases[0].call, dynamic=True), cases)


def test_new_lengths_of_bias_and_mask_do_not_recompile() -> None:
    cases = [
        dense_case(seqlen_q=length, seqlen_kv=length + 3, bias=torch.randn(length, length + 3), mask=mask)
        for length in LENGTHS
        for mask in [torch.rand(2, 1, length, length + 3) > 0.3]
    ]
    check_each(compiled(cases[0].call, dynamic=True), cases)


def test_new_packings_do_not_recompile() -> None:
    """Neither other lengths, nor other token counts, nor another number of sequences."""
    lengths = [(4, 3, 9, 3, 1), (5, 9), (2, 2, 2, 2, 2, 30), (300, 2, 7)]
    cases = [packed_case(lengths_q=some, lengths_kv=tuple(n + 2 for n in some), causal=True) for some in lengths]
    check_each(compiled(cases[0].call, dynamic=True), cases)


def test_marking_the_sequence_axis_is_enough() -> None:
    call = compiled(flashtile.attention)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in LENGTHS:
            q, k, v = torch.randn(3, 2, length, 4, 8).unbind()
            for tensor in (q, k, v):
                torch._dynamo.mark_dynamic(tensor, 1)
            torch.testing.assert_close(call(q, k, v, causal=True), flashtile.attention(q, k, v, causal=True))


def test_the_second_length_makes_the_code_dynamic() -> None:
    call = compiled(flashtile.attention)
    inputs = [torch.randn(2, length, 4, 8) for length in LENGTHS]
    for q in inputs[:2]:
        call(q, q, q, causal=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for q in inputs[2:]:
            torch.testing.assert_close(call(q, q, q, causal=True), flashtile.attention(q, q, q, causal=True))


def test_a_window_computed_from_a_dynamic_length() -> None:
    def half_window(q: Tensor) -> Tensor:
        return flashtile.attention(q, q, q, window=(q.shape[1] // 2, 0))

    call = compiled(half_window, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in LENGTHS:
            q = torch.randn(2, length, 4, 8)
            torch.testing.assert_close(call(q), half_window(q))


def test_new_seeds_do_not_recompile() -> None:
    def dropped(q: Tensor, seed: Tensor) -> Tensor:
        return flashtile.attention(q, q, q, dropout_p=0.5, dropout_seed=seed)

    call, q = compiled(dropped), torch.randn(1, 9, 2, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (torch.tensor(seed) for seed in (0, 1, -1, 2**62)):
            torch.testing.assert_close(call(q, seed), dropped(q, seed))


# --- what changes between calls of the same compiled code -------------------------------------------------------------


def test_gradients_appear_when_an_input_starts_to_require_one() -> None:
    call = compiled(flashtile.attention)
    case = dense_case(flashtile.attention)
    without = call(**case.tensors)
    assert not without.requires_grad
    assert_same(case.run(lambda tensors, options: (call(**tensors, **options),)), case.run())
    with torch.no_grad():
        assert not call(**case.leaves()).requires_grad
    torch.testing.assert_close(call(**case.tensors), without)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("bias",), ("sinks",), ("k", "bias"), ("q", "sinks")])
def test_any_subset_of_inputs_may_require_a_gradient(wanted: tuple[str, ...]) -> None:
    case = CASES["dense, everything"]
    gradients: list[dict[str, Tensor]] = []
    for call in (compiled(case.call), case.call):
        tensors = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in case.tensors.items()}
        out, lse = call(tensors, case.options)
        (out.sum() + lse.nan_to_num(neginf=0.0).sum()).backward()
        assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(wanted)
        gradients.append({name: tensors[name].grad for name in wanted})  # pyright: ignore[reportArgumentType] -- just asserted
    assert_same(*gradients)


def test_only_the_lse_may_be_used() -> None:
    case = CASES["dense, everything"]

    def lse_alone(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
        return (flashtile.attention_with_lse(**tensors, **options)[1],)

    assert_same(case.run(compiled(lse_alone)), case.run(lse_alone))


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_compiled_code_runs_in_other_modes(context: Callable[[], Any]) -> None:
    case = dense_case(flashtile.attention, softcap=3.0)
    (expected,) = case.call(case.tensors, case.options)
    with context():
        (found,) = compiled(case.call)(case.tensors, case.options)
    torch.testing.assert_close(found, expected)


def test_a_drawn_seed_follows_torchs_generator() -> None:
    call = compiled(flashtile.attention)
    q = torch.randn(1, 16, 2, 8)

    def draw(function: Callable[..., Any], seed: int) -> Tensor:
        torch.manual_seed(seed)
        return function(q, q, q, dropout_p=0.5)

    assert torch.equal(draw(call, 1), draw(call, 1))
    assert not torch.equal(draw(call, 1), draw(call, 2))
    torch.testing.assert_close(draw(call, 1), draw(flashtile.attention, 1))
    assert not torch.equal(call(q, q, q, dropout_p=0.5), call(q, q, q, dropout_p=0.5))


def test_packed_boundaries_are_checked_when_compiled_code_runs() -> None:
    case = CASES["packed, plain"]
    call = compiled(case.call)
    call(case.tensors, case.options)
    too_far = boundaries((4, 0, 60))
    with pytest.raises(flashtile.InvalidArgument) as caught:
        call(case.tensors, case.options | {"cu_seqlens_q": too_far})
    assert caught.value.argument == "cu_seqlens_q"

"""Autograd beyond a plain backward: recomputation, autocast, inference, in-place use, second derivatives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compile_cases import CASES, Case, assert_same, dense_case, packed_case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flashtile

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
DIFFERENTIATED = (
    "dense, plain",
    "dense, all a fused kernel takes",
    "dense, everything",
    "dense, naive",
    "packed, plain",
)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- activation checkpointing -----------------------------------------------------------------------------------------


def checkpointed(case: Case, use_reentrant: bool) -> Callable[..., tuple[Tensor, ...]]:
    """A twin of ``case.call`` that forgets what it computed and computes it again for the backward."""

    def call(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
        def positional(*values: Tensor) -> tuple[Tensor, ...]:
            return case.call(dict(zip(tensors, values, strict=True)), options)

        outputs = checkpoint(positional, *tensors.values(), use_reentrant=use_reentrant)
        assert isinstance(outputs, tuple)
        return outputs

    return call


@REENTRANT
@pytest.mark.parametrize(
    "name", ["dense, plain", "dense, everything", "packed, everything", "dense, everything, naive"]
)
def test_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    case = CASES[name]
    assert_same(case.run(checkpointed(case, use_reentrant)), case.run())


@REENTRANT
def test_a_drawn_seed_is_drawn_again_for_the_recomputation(use_reentrant: bool) -> None:
    case = dense_case(dropout_p=0.5)
    torch.manual_seed(17)
    expected = case.run()
    torch.manual_seed(17)
    assert_same(case.run(checkpointed(case, use_reentrant)), expected)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
        ),
    ],
)
def test_a_compiled_recomputation_drops_the_same_weights(backend: str) -> None:
    """With v = identity the output shows the dropped probabilities, and d_v = out.T @ d_out only if the backward's mask
    is the forward's. This needs no second run, so it holds for compilers that have a random stream of their own."""
    q, k = torch.randn(2, 1, 16, 1, 8).unbind()
    v = torch.eye(16).reshape(1, 16, 1, 16).clone().requires_grad_()

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q * 1.0, k, v, dropout_p=0.5)

    def forgetful(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, q, k, v, use_reentrant=False)  # pyright: ignore[reportReturnType] -- typed as Any | None

    out = torch.compile(forgetful, backend=backend, fullgraph=True)(q.requires_grad_(), k, v)
    d_out = torch.randn_like(out)
    out.backward(d_out)
    assert v.grad is not None
    dropped_p = out.detach()[0, :, 0]
    assert 0.3 < float((dropped_p == 0).float().mean()) < 0.7
    torch.testing.assert_close(v.grad[0, :, 0], dropped_p.T @ d_out[0, :, 0])


# --- autocast, no_grad, inference -------------------------------------------------------------------------------------


def test_projections_under_autocast_feed_attention_in_bfloat16() -> None:
    projection = nn.Linear(32, 3 * 32)
    x = torch.randn(2, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = projection(x).unflatten(-1, (3, 2, 16)).unbind(2)
        out = flashtile.attention(q, k, v, causal=True)
    assert q.dtype == out.dtype == torch.bfloat16
    torch.testing.assert_close(out, flashtile.attention(q, k, v, causal=True))
    out.float().square().sum().backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.dtype == torch.float32 and bool(projection.weight.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "naive"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_autocast_does_not_reach_into_the_accumulation(
    dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> None:
    """Attention computes in the dtype it is given: float32 products stay float32, bit for bit, forward and backward."""
    case = dense_case(dtype=dtype, backend=backend, **options)
    expected = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.run()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_autocast_does_not_mend_mixed_dtypes() -> None:
    case = dense_case()
    mixed = case.tensors | {"q": case.tensors["q"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(flashtile.InvalidArgument, match="one dtype"):
        case.call(mixed, {})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["dense, all a fused kernel takes", "dense, everything", "packed, everything"])
def test_no_graph_is_recorded_where_none_is_wanted(context: Callable[[], Any], name: str) -> None:
    case = CASES[name]
    expected = case.call(case.leaves(), case.options)
    with context():
        found = case.call(case.leaves(), case.options)
        found[0].add_(1)  # the result is the caller's own
    assert not any(output.requires_grad or output.grad_fn for output in found)
    torch.testing.assert_close(found, (expected[0] + 1, *expected[1:]))


def test_constants_made_in_inference_mode_can_be_keys_and_values() -> None:
    case = dense_case()
    with torch.inference_mode():
        cached = {name: case.tensors[name] * 1 for name in ("k", "v")}
    with torch.no_grad():
        out, _ = case.call({"q": case.tensors["q"], **cached}, {})
    torch.testing.assert_close(out, case.call(case.tensors, {})[0])


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_graph_can_be_walked_twice(name: str) -> None:
    case = CASES[name]
    leaves = case.leaves()
    outputs = case.call(leaves, case.options)
    total = sum((output.nan_to_num(neginf=0.0).sum() for output in outputs), torch.zeros(()))
    once = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    twice = torch.autograd.grad(total, list(leaves.values()))
    assert all(torch.equal(first, second) for first, second in zip(once, twice, strict=True))


def test_one_tensor_may_be_query_key_and_value() -> None:
    x = torch.randn(2, 9, 4, 8, dtype=torch.float64)
    shared = x.clone().requires_grad_()
    flashtile.attention(shared, shared, shared, causal=True).square().sum().backward()
    separate = [x.clone().requires_grad_() for _ in range(3)]
    flashtile.attention(*separate, causal=True).square().sum().backward()
    gradients = [tensor.grad for tensor in separate if tensor.grad is not None]
    assert len(gradients) == 3
    torch.testing.assert_close(shared.grad, torch.stack(gradients).sum(0))


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_overwriting_what_the_backward_needs_is_an_error(name: str) -> None:
    case = CASES[name]
    for victim in ("q", "k", "v", "out"):
        leaves = case.leaves()
        copies = {key: tensor * 1 for key, tensor in leaves.items()}
        out = case.call(copies, case.options)[0]
        with pytest.raises(RuntimeError, match=r"in-?place"):
            overwrite_and_differentiate(out if victim == "out" else copies[victim], out)


def overwrite_and_differentiate(victim: Tensor, out: Tensor) -> None:
    victim.mul_(2)
    out.sum().backward()


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_double_backward_is_an_error_that_names_the_op(name: str) -> None:
    case = CASES[name]
    leaves = case.leaves()
    out = case.call(leaves, case.options)[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    assert gradient.requires_grad, "a gradient that looks constant would make a penalty on it silently vanish"
    with pytest.raises(RuntimeError, match="attention_backward"):
        gradient.square().sum().backward()


def test_a_gradient_penalty_is_an_error() -> None:
    case = dense_case(flashtile.attention)
    leaves = case.leaves()
    (out,) = case.call(leaves, case.options)
    gradients = torch.autograd.grad(out.sum(), list(leaves.values()), create_graph=True)
    penalty = sum((gradient.norm() for gradient in gradients), torch.zeros(()))
    with pytest.raises(RuntimeError, match="attention_backward"):
        (out.sum() + penalty).backward()


def test_hooks_on_saved_tensors_see_memory_linear_in_the_sequence() -> None:
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    seqlen = 200
    case = dense_case(seqlen_q=seqlen, seqlen_kv=seqlen, softcap=3.0, causal=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.call(case.leaves(), case.options)
    assert sizes and max(sizes) <= max(tensor.numel() for tensor in case.tensors.values())


def test_packed_rows_of_no_sequence_get_a_gradient_of_zero() -> None:
    case = packed_case(spare_tokens=3)
    found = case.run()
    for name in ("d_q", "d_k", "d_v"):
        assert not bool(found[name][-3:].any())
        assert bool(found[name][:-3].any())

"""Calls on a GPU that come again are launched straight through the driver; their results are those of the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pytest
import torch
from runners import HOPPER_MARKS
from torch import Tensor
from triton import knobs

import flashtile
from flashtile import repeats
from flashtile.backends.hopper import launch as hopper
from flashtile.backends.launcher import KernelLauncher
from flashtile.backends.triton import launch as triton

pytestmark = HOPPER_MARKS

NUM_CALLS = 5
"""The first is checked and compiled, the second launched by the driver, the others take the shortest way to it."""


Attend = Callable[..., Tensor]
every_option = pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (100, 3), "softcap": 20.0},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
        {"sinks": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    ],
    ids=lambda options: " ".join(options) or "plain",
)


@pytest.fixture(params=["hopper", "triton"])
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attend:
    """Attention by one backend, of which nothing is remembered yet."""
    monkeypatch.setattr(repeats, "_known", {})
    for value in (*vars(hopper).values(), *vars(triton).values()):
        if isinstance(value, KernelLauncher):
            monkeypatch.setattr(value, "_compiled", {})
            monkeypatch.setattr(value, "_ready", {})
    return partial(flashtile.attention, backend=request.param)


def naive(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return flashtile.attention(q, k, v, backend="naive", **options).float()


def qkv(seqlen: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = torch.randn(3, 2, seqlen, 4, 64, generator=generator, device="cuda", dtype=torch.bfloat16).unbind()
    return q, k, v


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: each.cuda() if isinstance(each, Tensor) else each for name, each in options.items()}


def shortest() -> list[Any]:
    return [
        known.again
        for known in repeats._known.values()
        if known.again is not None and known.prepared.plan.backend != "naive"
    ]


@pytest.mark.parametrize("seqlen", [1, 300, 5000])
@every_option
def test_other_tensors_and_the_same_ones(options: dict[str, Any], seqlen: int, attend: Attend) -> None:
    given = on_gpu(options)
    first = attend(*qkv(seqlen), **given)
    for seed in range(NUM_CALLS):
        tensors = tuple(tensor.clone() for tensor in qkv(seqlen, seed))
        expected = naive(*tensors, **given)
        torch.testing.assert_close(attend(*tensors, **given).float(), expected, atol=0.02, rtol=0.02)
    assert len(shortest()) >= 1 and torch.equal(attend(*qkv(seqlen), **given), first)


@pytest.mark.parametrize("num_queries", [1, 100])
@pytest.mark.parametrize("options", [{}, {"causal": True, "sinks": torch.tensor([0.5, 0.25, 0.1, 0.0])}], ids=str)
def test_few_queries_of_many_keys(options: dict[str, Any], num_queries: int, attend: Attend) -> None:
    """Hopper splits the keys, and launches a second kernel."""
    given = on_gpu(options)
    q, k, v = qkv(9000)
    first = attend(q[:, :num_queries].contiguous(), k, v, **given)
    for seed in range(NUM_CALLS):
        q, k, v = qkv(9000, seed)
        q = q[:, :num_queries].contiguous()
        torch.testing.assert_close(attend(q, k, v, **given).float(), naive(q, k, v, **given), atol=0.02, rtol=0.02)
    q, k, v = qkv(9000)
    assert len(shortest()) == 1 and torch.equal(attend(q[:, :num_queries].contiguous(), k, v, **given), first)


def test_one_tensor_for_three_and_then_three(attend: Attend) -> None:
    q, k, v = qkv()
    for _ in range(NUM_CALLS):
        attend(q, q, q)
    expected = naive(q, k, v)
    torch.testing.assert_close(attend(q, k, v).float(), expected, atol=0.02, rtol=0.02)


def test_an_address_that_is_no_multiple_of_16_is_copied(attend: Attend) -> None:
    q, k, v = qkv()
    first = attend(q, k, v)
    for _ in range(NUM_CALLS):
        attend(q, k, v)
    moved = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view(q.shape).copy_(q)
    assert moved.data_ptr() % 16 and torch.equal(attend(moved, k, v), first)


def shortest_backwards() -> list[Any]:
    return [
        known.backward_again
        for known in repeats._known.values()
        if known.backward_again is not None and known.prepared.plan.backend != "naive"
    ]


def assert_gradients(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.float().abs().max().clamp(min=1e-6)  # a gradient may be 0 everywhere, as d_v of an lse is
        torch.testing.assert_close(one.float() / scale, other.float() / scale, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@every_option
def test_gradients_of_other_tensors(options: dict[str, Any], head_dim: int, attend: Attend) -> None:
    given = on_gpu(options)
    if head_dim > 128:
        given.pop("softcap", None)  # which Hopper's backward has no kernel for
    for seed in range(NUM_CALLS):
        generator = torch.Generator("cuda").manual_seed(seed)
        leaves = [
            torch.randn(2, 300, heads, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
            for heads in (4, 2, 2)
        ]
        if "sinks" in given:
            given["sinks"] = given["sinks"].detach() + seed
            leaves.append(given["sinks"])
        for leaf in leaves:
            leaf.requires_grad_()
        out = attend(*leaves[:3], **given)
        d_out = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
        expected = torch.autograd.grad(flashtile.attention(*leaves[:3], backend="naive", **given), leaves, d_out)
        assert_gradients(torch.autograd.grad(out, leaves, d_out), expected)
    assert len(shortest_backwards()) == 1


def test_upstream_gradients_in_another_form(attend: Attend) -> None:
    """Broadcast, or with the heads first: what was remembered holds for neither of them."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv()]
    plain = torch.randn(2, 300, 4, 64, device="cuda").bfloat16()
    moved = plain.transpose(1, 2).contiguous().transpose(1, 2)
    for d_out in (*(plain,) * NUM_CALLS, plain[:1, :1, :1, :1].expand(plain.shape), moved, plain):
        expected = torch.autograd.grad(flashtile.attention(*leaves, backend="naive"), leaves, d_out)
        assert_gradients(torch.autograd.grad(attend(*leaves), leaves, d_out), expected)
    assert len(shortest_backwards()) == 1


def test_upstream_gradients_of_the_lse(attend: Attend) -> None:
    """With one of the output, and without; in other strides too."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv()]
    with_lse = partial(flashtile.attention_with_lse, *leaves)
    d_out, d_lse = torch.randn(2, 300, 4, 64, device="cuda").bfloat16(), torch.randn(2, 4, 300, device="cuda")
    moved = d_lse.transpose(1, 2).contiguous().transpose(1, 2)
    for upstream in (*((d_out, d_lse),) * NUM_CALLS, (None, d_lse), (d_out, moved), (d_out, None), (d_out, d_lse)):
        used = [index for index in (0, 1) if upstream[index] is not None]
        found, expected = (
            torch.autograd.grad([results[index] for index in used], leaves, [upstream[index] for index in used])
            for results in (with_lse(**cast(Any, attend).keywords), with_lse(backend="naive"))
        )
        assert_gradients(found, expected)
    assert len(shortest_backwards()) == 1


def test_gradients_in_a_graph(attend: Attend) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in qkv()]
    d_out = torch.randn(2, 300, 4, 64, device="cuda").bfloat16()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves, causal=True), leaves, d_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_CALLS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, new in zip(leaves, qkv(seed=1), strict=True):
            leaf.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_gradients(captured, step())


def test_streams_and_graphs(attend: Attend) -> None:
    q, k, v = qkv()
    expected = attend(q, k, v)
    for _ in range(NUM_CALLS):
        attend(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_the_side = attend(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(on_the_side, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v)
    other = qkv(seed=1)
    for tensor, new in zip((q, k, v), other, strict=True):
        tensor.copy_(new)
    graph.replay()
    assert torch.equal(captured, attend(*other))


@pytest.mark.parametrize("attend", ["hopper"], indirect=True)
def test_streams_and_graphs_side_by_side(attend: Attend) -> None:
    """Calls on the default stream share a counter, which no other may touch; in all but the shortest it is needed."""
    hopper._counter_of_default_stream.cache_clear()
    calls: list[Callable[[], Tensor]] = [
        partial(attend, *qkv(seqlen, seed=seqlen), **options)
        for seqlen, options in ((300, {}), (3400, {}), (5000, {"causal": True}), (9000, {"window": (700, 0)}))
    ]
    expected = [call() for call in calls]
    for _ in range(NUM_CALLS):
        assert all(torch.equal(call(), first) for call, first in zip(calls, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls]
    torch.cuda.synchronize()
    *streams, replaying = (torch.cuda.Stream() for _ in range(3))
    found: list[Tensor] = []
    for _ in range(20):
        with torch.cuda.stream(replaying):
            graph.replay()
        for call in calls:
            found.append(call())
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(call())
    torch.cuda.synchronize()
    for index, result in enumerate(found):
        assert torch.equal(result, expected[index // 3 % len(calls)])
    assert all(map(torch.equal, captured, expected))
    assert hopper._counter_of_default_stream.cache_info().currsize == 1
    assert hopper._counter_of_default_stream(expected[0].device).item() == 0


def test_threads(attend: Attend) -> None:
    tensors = [qkv(seed=seed) for seed in range(8)]
    expected = [attend(*each) for each in tensors]
    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda each: attend(*each), tensors))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_hooks_of_triton_are_told(attend: Attend) -> None:
    names: list[str] = []

    def told(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    for _ in range(NUM_CALLS):
        attend(*qkv())
    knobs.runtime.launch_enter_hook.add(told)
    try:
        attend(*qkv())
    finally:
        knobs.runtime.launch_enter_hook.remove(told)
    assert names == ["attention_forward"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(attend: Attend) -> None:
    expected = attend(*qkv()).cpu()
    for _ in range(NUM_CALLS):
        assert torch.equal(attend(*(tensor.to("cuda:1") for tensor in qkv())).cpu(), expected)

"""What only a GPU shows of the Triton kernels: memory, repeats, graphs, compile keys, sizes beyond 32 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from runners import TRITON, check
from torch import Tensor

import flashtile
from flashtile.testing import CallSpec, make_tensor, peak_extra_bytes

pytestmark = pytest.mark.gpu

MIB = 2**20
KERNELS = {
    "forward": "attention_forward",
    "backward": "attention_backward_kv attention_backward_q attention_row_statistics",
    "bias_gradient": "attention_bias_gradient",
}


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def inputs(
    seqlen: int,
    *,
    batch: int = 1,
    heads: int = 4,
    heads_kv: int = 4,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Leaves q, k, v."""
    shapes = [(batch, seqlen, number, head_dim) for number in (heads, heads_kv, heads_kv)]
    return [make_tensor(shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return flashtile.attention(q, k, v, backend="triton", **options)


def num_compiled() -> int:
    """Variants of our kernels that this process has compiled or loaded."""
    total = 0
    for module, names in KERNELS.items():
        for name in names.split():
            kernel = getattr(import_module(f"flashtile.backends.triton.{module}"), name)
            total += sum(len(cache[0]) for cache in kernel.device_caches.values())
    return total


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_new_length_or_batch_compiles_nothing(is_causal: bool) -> None:
    def run(seqlen: int, batch: int) -> None:
        q, k, v = inputs(seqlen, batch=batch)
        attend(q, k, v, causal=is_causal).sum().backward()

    run(64, 2)
    before = num_compiled()
    for seqlen, batch in ((2, 1), (63, 3), (65, 1), (128, 5), (1000, 2), (1024, 1)):  # one query has no causality
        run(seqlen, batch)
    assert num_compiled() == before


def test_packed_lengths_compile_nothing() -> None:
    def run(*lengths: int) -> None:
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths, device="cpu").cumsum(0).tolist()], dtype=torch.int32)
        q, k, v = (make_tensor((sum(lengths), 4, 64), dtype=torch.bfloat16, seed=seed) for seed in range(3))
        packing: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
        packing |= {"max_seqlen_q": max(lengths), "max_seqlen_kv": max(lengths)}
        flashtile.attention_varlen(q, k, v, **packing, causal=True, backend="triton")

    run(3, 64)
    before = num_compiled()
    run(2)
    run(100, 0, 17)
    run(64, 64, 64, 64)
    assert num_compiled() == before


@pytest.mark.parametrize("seqlen", [4096, 16384])
def test_memory_is_linear_and_small(seqlen: int) -> None:
    """Forward: the lse beyond the output. Backward: two numbers per query row beyond the gradients."""
    q, k, v = inputs(seqlen, heads=8, heads_kv=8, head_dim=128)
    d_out = torch.randn_like(q)
    attend(q, k, v, causal=True).backward(d_out)  # compiles, and fills torch's own caches
    rows = 8 * seqlen * 4
    with torch.no_grad():
        assert peak_extra_bytes(lambda: attend(q, k, v, causal=True), "cuda") <= q.nbytes + 1.1 * rows + MIB
    out = attend(q, k, v, causal=True)
    gradients = q.nbytes + k.nbytes + v.nbytes

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    assert peak_extra_bytes(backward, "cuda") <= gradients + 2 * 1.1 * rows + MIB


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.1, "dropout_seed": 3}], ids=str)
def test_a_thousand_runs_are_bitwise_the_same(options: dict[str, Any]) -> None:
    """FA#1893, FA#2244: grouped heads, a busy GPU."""
    q, k, v = inputs(520, batch=2, heads=8, heads_kv=2)
    bias = make_tensor((1, 8, 1, 520), dtype=torch.float32, seed=7).requires_grad_()
    d_out = make_tensor(tuple(q.shape), dtype=torch.bfloat16, seed=8)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048)

    def run() -> list[Tensor]:
        out = attend(q, k, v, bias=bias, deterministic=True, **options)
        return [out, *torch.autograd.grad(out, (q, k, v, bias), d_out)]

    expected = run()
    differs = torch.zeros((), dtype=torch.bool)
    for _ in range(1000):
        with torch.cuda.stream(other):
            noise = noise @ noise * 1e-3
        for result, first in zip(run(), expected, strict=True):
            differs |= (result.view(torch.int16) != first.view(torch.int16)).any()
    assert not bool(differs)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    q, k, v = inputs(333, batch=3)
    together = attend(q, k, v, causal=True)
    for index in range(3):
        alone = attend(*(tensor[index : index + 1] for tensor in (q, k, v)), causal=True)
        assert torch.equal(alone[0], together[index])


def test_cuda_graph_of_forward_and_backward() -> None:
    q, k, v = inputs(200)
    d_out = torch.randn_like(q)

    def run() -> tuple[Tensor, ...]:
        out = attend(q, k, v, causal=True)
        return (out, *torch.autograd.grad(out, (q, k, v), d_out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for replayed, expected in zip(captured, run(), strict=True):
        assert torch.equal(replayed, expected)


def test_cuda_graph_replays_with_other_boundaries() -> None:
    """HF#45323: lengths that change between replays."""
    q, k, v = (make_tensor((300, 4, 64), dtype=torch.bfloat16, seed=seed) for seed in range(3))
    cu_seqlens = torch.tensor([0, 100, 300], dtype=torch.int32)

    def run() -> Tensor:
        return flashtile.attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=300, max_seqlen_kv=300, causal=True
        )

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for boundaries in ([0, 7, 300], [0, 300, 300], [0, 0, 255]):
        cu_seqlens.copy_(torch.tensor(boundaries, dtype=torch.int32))
        graph.replay()
        assert torch.equal(captured, run())


def test_more_batches_times_heads_than_a_grid_axis_holds() -> None:
    """PT#142228, PT#146704, FA#1500: 65,536 programs on one axis."""
    spec = CallSpec(lengths_q=(3,) * 22000, lengths_kv=(5,) * 22000, heads_kv=3, head_dim=16, head_dim_v=16)
    check(TRITON, replace(spec, dtype=torch.float16, causal=True), is_small=False)


@pytest.mark.parametrize("which", ["q", "k", "v", "d_out"])
def test_offsets_beyond_two_to_the_31(which: str) -> None:
    """PT#187227: a row stride of 2**24 elements, so the 200th row starts beyond 3 * 10**9."""
    tensors: dict[str, Tensor] = dict(zip(("q", "k", "v"), inputs(200, heads=1, heads_kv=1), strict=True))
    tensors["d_out"] = make_tensor((1, 200, 1, 64), dtype=torch.bfloat16, seed=9)

    def run(d_out: Tensor, **leaves: Tensor) -> list[Tensor]:
        out = attend(leaves["q"], leaves["k"], leaves["v"], causal=True)
        return [out, *torch.autograd.grad(out, list(leaves.values()), d_out)]

    expected = run(**tensors)
    far = torch.empty(200 * 2**24, dtype=torch.bfloat16).as_strided((1, 200, 1, 64), (200 * 2**24, 2**24, 64, 1))
    far.copy_(tensors[which].detach())
    tensors[which] = far.requires_grad_(which != "d_out")
    for result, wanted in zip(run(**tensors), expected, strict=True):
        assert torch.equal(result, wanted)


def test_a_bias_beyond_two_to_the_31_elements() -> None:
    seqlen = 46400
    q, k, v = inputs(seqlen, heads=1, heads_kv=1, head_dim=16)
    bias = torch.zeros(1, 1, seqlen, seqlen, dtype=torch.bfloat16)
    bias[..., -1, :] = -torch.inf
    bias[..., -1, -1] = 0.0  # the last row sees the last key alone
    out = attend(q, k, v, bias=bias)
    assert torch.equal(out[0, -1], v[0, -1])
    assert torch.equal(out[0, :-1], attend(q, k, v, bias=bias[:, :, :1])[0, :-1])


def test_tf32_is_opt_in() -> None:
    q, k, v = (tensor.detach() for tensor in inputs(256, dtype=torch.float32))
    exact = flashtile.attention(q.double(), k.double(), v.double(), backend="naive")
    before = torch.backends.cuda.matmul.fp32_precision
    errors: dict[str, list[float]] = {"ieee": [], "tf32": []}
    try:
        for precision in ("ieee", "tf32") * 4:  # the last times the shortest way
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision].append((attend(q, k, v) - exact).abs().max().item())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert max(errors["ieee"]) < 2e-6
    assert min(errors["tf32"]) > 1e-5 and max(errors["tf32"]) < 1e-2


def test_compiled_models_run_the_kernels() -> None:
    q, k, v = inputs(300, heads=4, heads_kv=2)
    compiled = torch.compile(attend, fullgraph=True)
    results = [function(q, k, v, causal=True, window=(64, 0)) for function in (attend, compiled)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(result.float().square().sum(), (q, k, v)) for result in results]
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_gpu_that_is_not_the_current_one() -> None:
    """PT#141010."""
    q, k, v = inputs(100)
    expected = attend(q, k, v)
    leaves = [tensor.detach().to("cuda:1").requires_grad_() for tensor in (q, k, v)]
    assert torch.cuda.current_device() == 0
    out = attend(*leaves)
    out.sum().backward()
    assert torch.equal(out.to("cuda:0"), expected)
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)

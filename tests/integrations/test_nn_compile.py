"""``flashtile.nn`` in compiled models, whole graphs, and on a GPU without making the host wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_cases import (
    D_MODEL,
    MASKS,
    N_HEAD,
    OPTIONS,
    SEQLEN,
    assert_same,
    inputs_of,
    mask_of,
    multihead_of,
    with_gradients,
)
from torch import Tensor, nn

from flashtile import InvalidArgument
from flashtile.nn import FlashAttention, MultiheadAttention, NaiveAttention, Packing, Rotary


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


class Encoder(nn.Module):
    """Two layers that share one packing of their batch, and one that looks back at the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = FlashAttention(D_MODEL, N_HEAD, causal=True)
        self.second = MultiheadAttention(D_MODEL, N_HEAD, n_head_kv=2, rotary=Rotary())
        self.third = MultiheadAttention(D_MODEL, N_HEAD)

    def forward(self, x: Tensor, pad_mask: Tensor | Packing | None) -> Tensor:
        y = x + self.first(x, pad_mask)
        y = y + self.second(y, pad_mask=pad_mask)
        return self.third(y, x, pad_mask=pad_mask, pad_mask_kv=pad_mask)


@pytest.mark.parametrize("padding", [None, "mask", "packing"])
def test_a_model_compiles_whole(padding: str | None) -> None:
    model, mask = Encoder(), mask_of(MASKS["left"])
    x = inputs_of(mask, dtype=torch.float32) if padding else torch.randn(4, SEQLEN, D_MODEL, requires_grad=True)
    pad_mask = {None: None, "mask": mask, "packing": Packing.of(mask)}[padding]
    found, expected = (with_gradients(model, lambda run=run: run(x, pad_mask), x) for run in (compiled(model), model))
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_compiles_whole(options: dict[str, Any]) -> None:
    module, mask = multihead_of({**options, "dropout_p": 0.3}), mask_of(MASKS["holes"])
    x, run = inputs_of(mask), compiled(module)

    def seeded(function: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(6)
        return function(x, pad_mask=mask)

    found, expected = (with_gradients(module, lambda f=f: seeded(f), x) for f in (run, module))
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("is_padded", [False, True])
def test_cross_attention_to_a_memory_compiles_whole(is_padded: bool) -> None:
    module, mask = multihead_of({"n_head_kv": 2}), mask_of(MASKS["holes"])
    x = torch.randn(4, 2, D_MODEL, dtype=torch.float64)
    source = inputs_of(mask) if is_padded else torch.randn(4, SEQLEN, D_MODEL, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return module(x, module.new_memory(source, pad_mask_kv=mask if is_padded else None))

    found, expected = (with_gradients(module, lambda f=f: f(x), source) for f in (compiled(run), run))
    assert_same(found, expected, 1e-6)


def test_the_naive_module_compiles_whole() -> None:
    module, mask = NaiveAttention(D_MODEL, N_HEAD, causal=True), mask_of(MASKS["left"])
    x = inputs_of(mask, dtype=torch.float32)
    torch.testing.assert_close(compiled(module)(x, mask), module(x, mask))


@pytest.mark.parametrize("as_packing", [False, True])
def test_other_lengths_and_masks_compile_twice_more_at_most(as_packing: bool) -> None:
    module = FlashAttention(D_MODEL, N_HEAD, causal=True)
    torch._dynamo.utils.counters.clear()
    run = compiled(module)
    for seqlen in (5, 6, 7, 11, 16, 3):
        x, mask = torch.randn(2, seqlen, D_MODEL), torch.rand(2, seqlen) < 0.6
        pad_mask = Packing.of(mask) if as_packing else mask
        torch.testing.assert_close(run(x, pad_mask), module(x, mask), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_generation_compiles_whole() -> None:
    module, mask = multihead_of({"causal": True, "rotary": Rotary(), "n_head_kv": 2}), mask_of(MASKS["left"])
    x, run = inputs_of(torch.cat([mask, mask[:, :1] | True], dim=1)).detach(), compiled(module)
    x = torch.cat([x, torch.randn(4, 3, D_MODEL, dtype=torch.float64)], dim=1)
    results = []
    torch._dynamo.utils.counters.clear()
    for function in (run, module):
        cache = module.new_cache(4, SEQLEN + 4)
        with torch.no_grad():
            outs = [function(x[:, :SEQLEN], pad_mask=mask, cache=cache)]
            outs += [function(x[:, [idx]], cache=cache) for idx in range(SEQLEN, SEQLEN + 4)]
        results.append((torch.cat(outs, dim=1), cache.lengths))
    torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_export_for_any_batch_and_length() -> None:
    module = FlashAttention(D_MODEL, N_HEAD, causal=True)
    axes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("seqlen", min=2, max=4096)}
    example = (torch.randn(4, SEQLEN, D_MODEL), mask_of(MASKS["left"]))
    program = torch.export.export(module, example, dynamic_shapes=(axes, axes))
    x, mask = torch.randn(3, 12, D_MODEL), torch.rand(3, 12) < 0.6
    torch.testing.assert_close(program.module()(x, mask), module(x, mask))


def test_errors_in_compiled_code_name_the_argument() -> None:
    module = FlashAttention(D_MODEL, N_HEAD)
    with pytest.raises(Exception, match="pad_mask") as raised:
        compiled(module)(torch.randn(2, 5, D_MODEL), torch.ones(2, 5))
    assert "True = a token" in str(raised.value) or isinstance(raised.value.__cause__, InvalidArgument)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["none", "packing", "without reading"])
def test_the_host_does_not_wait(padding: str, dtype: torch.dtype) -> None:
    """The second time; the first compiles kernels."""
    model, mask = Encoder().to("cuda", dtype), mask_of(MASKS["left"], "cuda")
    pad_mask = {"none": None, "packing": Packing.of(mask), "without reading": Packing.without_reading(mask)}[padding]
    x = torch.randn(4, SEQLEN, D_MODEL, device="cuda", dtype=dtype)
    model(x, pad_mask).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, pad_mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_host_does_not_wait_for_generation() -> None:
    module = multihead_of({"causal": True, "rotary": Rotary()}, device="cuda", dtype=torch.bfloat16)
    x, cache = torch.randn(2, 6, D_MODEL, device="cuda", dtype=torch.bfloat16), module.new_cache(2, 12)
    with torch.inference_mode():
        for chunk in x.split((3, 1, 1, 1), dim=1):
            module(chunk, cache=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for chunk in x.split((3, 1, 1, 1), dim=1):
                module(chunk, cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths.tolist() == [12, 12]


@pytest.mark.gpu
def test_a_cuda_graph_with_a_padding_mask() -> None:
    module, mask = multihead_of({"causal": True}, device="cuda", dtype=torch.bfloat16), mask_of(MASKS["left"], "cuda")
    x, graph = torch.randn(4, SEQLEN, D_MODEL, device="cuda", dtype=torch.bfloat16), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        expected = module(x, pad_mask=mask)
        module(x, pad_mask=Packing.without_reading(mask))
        with torch.cuda.graph(graph):
            out = module(x, pad_mask=mask)
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    model, mask = Encoder().to("cuda", torch.bfloat16), mask_of(MASKS["left"], "cuda")
    x = inputs_of(mask, dtype=torch.bfloat16)
    found, expected = (
        with_gradients(model, lambda run=run: run(x, mask), x) for run in (compiled(model, "inductor"), model)
    )
    assert_same(found, expected, 0.05)

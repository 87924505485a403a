"""flash_attn's interface in compiled models, whole graphs, and on a GPU without making the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from flash_attn_routes import BATCH, HEAD_DIM, HEADS, MODULES, ROUTES, SEQLEN, STEPS, Block, Tensors
from torch import Tensor
from torch._inductor import config as inductor_config

from flashtile.integrations.flash_attn.bert_padding import pad_input, unpad_input

EMBED = HEADS * HEAD_DIM


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("route", ROUTES)
def test_routes_compile_whole(route: str) -> None:
    t, results = Tensors.on("cpu"), []
    for function in (ROUTES[route], compiled(ROUTES[route])):
        leaf = t.qkv.clone().requires_grad_()
        torch.manual_seed(6)
        out = function(t, leaf)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("step", STEPS)
def test_steps_with_a_cache_compile_whole(step: str) -> None:
    t = Tensors.on("cpu")
    torch.testing.assert_close(compiled(STEPS[step])(t, t.qkv), STEPS[step](t, t.qkv))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("options", MODULES)
def test_modules_compile_whole(options: str, is_packed: bool) -> None:
    block, t = Block(**MODULES[options]), Tensors.on("cpu")
    x = torch.randn(6, EMBED) if is_packed else torch.randn(BATCH, SEQLEN, EMBED)
    arguments = {"cu_seqlens": t.cu_seqlens, "max_seqlen": 4} if is_packed else {}
    results = []
    for function in (block, compiled(block)):
        out = function(x, **arguments)
        results.append((out, *torch.autograd.grad(out.square().sum(), tuple(block.parameters()))))
    torch.testing.assert_close(*results)


def test_unpadding_compiles_whole_if_torch_may_trace_what_it_reads() -> None:
    """The host has to know how many tokens there are, as there."""
    x, mask = torch.randn(2, 5, 3), torch.arange(5) < torch.tensor([[5], [2]])

    def there_and_back(x: Tensor, mask: Tensor) -> Tensor:
        tokens, indices, *_ = unpad_input(x, mask)
        return pad_input(2 * tokens, indices, 2, 5)

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        found = compiled(there_and_back, backend="eager")(x, mask)
    torch.testing.assert_close(found, there_and_back(x, mask))


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*ROUTES, *STEPS])
def test_the_host_does_not_wait(name: str, dtype: torch.dtype) -> None:
    """The second time; the first compiles kernels."""
    t = Tensors.on("cuda", dtype)

    def run() -> Tensor:
        leaf = t.qkv.clone().requires_grad_()
        if name in STEPS:
            return STEPS[name](t, leaf)[0]
        out = ROUTES[name](t, leaf)
        return torch.autograd.grad(out, leaf, torch.ones_like(out))[0]

    run()
    with waiting_is_an_error():
        result = run()
    assert bool(result.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("options", MODULES)
def test_the_host_does_not_wait_for_modules(options: str) -> None:
    block = Block(**MODULES[options]).to("cuda", torch.bfloat16)
    x = torch.randn(BATCH, SEQLEN, EMBED, device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        block(x).sum().backward()

    run()
    with waiting_is_an_error():
        run()


@pytest.mark.gpu
def test_unpadding_makes_the_host_wait_as_there() -> None:
    x, mask = torch.randn(2, 5, 3, device="cuda"), torch.ones(2, 5, dtype=torch.bool, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        unpad_input(x, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "packed", "rotated"])
def test_compiled_on_a_gpu(name: str) -> None:
    t = Tensors.on("cuda", torch.bfloat16)
    results = []
    with inductor_config.patch(fallback_random=True):  # else dropout's seed is another than eager's
        for function in (ROUTES[name], compiled(ROUTES[name], "inductor")):
            torch.manual_seed(6)
            results.append(function(t, t.qkv))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)

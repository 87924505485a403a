"""flashtile in torch's registry of flash attention: the ops' own results on the CPU, and the whole way on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn import functional as F  # noqa: N812

import flashtile
from flashtile import UnsupportedProblem
from flashtile.integrations import sdpa
from flashtile.integrations.sdpa import aten_ops

attend: Any = F.scaled_dot_product_attention
OPS = [name for name in aten_ops.KERNELS if hasattr(torch.ops.aten, name)]


@pytest.fixture(autouse=True)
def leaves_torch_as_it_was() -> Iterator[None]:
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    sdpa.restore()
    assert torch_attention.current_flash_attention_impl() is None
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def heads_last(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


# --- the ops, called as torch calls them -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("layout", ["heads first", "sequence first"])
@pytest.mark.parametrize("heads_kv", [2, 4])
def test_forward_and_backward(heads_kv: int, layout: str, scale: float | None, is_causal: bool) -> None:
    q, k, v, d_out = draw((2, 4, 9, 8), (2, heads_kv, 9, 8), (2, heads_kv, 9, 8), (2, 4, 9, 8))
    if layout == "sequence first":
        q, k, v = (heads_last(heads_last(tensor).contiguous()).detach().requires_grad_() for tensor in (q, k, v))
    expected, expected_lse = flashtile.attention_with_lse(
        *(heads_last(tensor) for tensor in (q, k, v)), causal=is_causal, scale=scale
    )
    with torch.no_grad():
        out, lse, cum_q, cum_k, max_q, max_k, state, unused, debug_mask = aten_ops.sdpa_forward(
            q, k, v, 0.0, is_causal, False, scale=scale
        )
        found = aten_ops.sdpa_backward(
            d_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, is_causal, state, unused, scale=scale
        )
    assert (max_q, max_k, cum_q, cum_k, debug_mask.numel()) == (9, 9, None, None, 0)
    torch.testing.assert_close((out, lse), (heads_last(expected), expected_lse))
    torch.testing.assert_close(found, torch.autograd.grad(heads_last(expected), (q, k, v), d_out))
    for result, like in zip((out, *found), (q, q, k, v), strict=True):
        assert result.stride() == torch.empty_like(like).stride(), "what torch.compile was told by the meta kernel"


def test_results_are_those_of_the_meta_kernels() -> None:
    q, k, v = draw((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8), dtype=torch.bfloat16)
    with torch.no_grad():
        found = aten_ops.sdpa_forward(q, k, v, 0.1, True)
    meta = (tensor.to("meta") for tensor in (q, k, v))
    expected = torch.ops.aten._scaled_dot_product_flash_attention(*meta, 0.1, True)
    for have, want in zip(found, expected, strict=True):
        if isinstance(want, Tensor):
            assert (have.shape, have.dtype, have.stride()) == (want.shape, want.dtype, want.stride())
        else:
            assert have == want


def test_dropout_is_the_same_in_the_backward() -> None:
    q, k, v, d_out = draw((1, 2, 16, 8), (1, 2, 16, 8), (1, 2, 16, 8), (1, 2, 16, 8))
    with torch.no_grad():
        out, lse, _, _, max_q, max_k, state, unused, _ = aten_ops.sdpa_forward(q, k, v, 0.5)
        found = aten_ops.sdpa_backward(d_out, q, k, v, out, lse, None, None, max_q, max_k, 0.5, False, state, unused)
    again = flashtile.attention(
        *(heads_last(tensor) for tensor in (q, k, v)), dropout_p=0.5, dropout_seed=state.view(torch.int64)[0]
    )
    torch.testing.assert_close(out, heads_last(again))
    torch.testing.assert_close(found, torch.autograd.grad(heads_last(again), (q, k, v), d_out))


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (3, 0), (2, -1), (None, 1)])
def test_packed_sequences_and_windows(left: int | None, right: int | None) -> None:
    """As ``torch.nn.attention.varlen`` calls them."""
    q, k, v, d_out = draw((11, 4, 8), (13, 2, 8), (13, 2, 8), (11, 4, 8))
    cu_q, cu_kv = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 4, 11], [0, 5, 6, 13]))
    inputs: list[Any] = [cu_q, cu_kv, 7, 7, 0.0, False]
    forward: Any = aten_ops.flash_attention_forward
    backward: Any = aten_ops.flash_attention_backward
    windows = {"window_size_left": left, "window_size_right": right}
    packing = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, "max_seqlen_q": 7, "max_seqlen_kv": 7}
    window = (None if left in (None, -1) else left, None if right in (None, -1) else right)
    expected, expected_lse = flashtile.attention_varlen_with_lse(q, k, v, **packing, window=window)
    with torch.no_grad():
        out, lse, state, unused, _ = forward(q, k, v, *inputs, False, **windows, num_splits=1)
        into = torch.empty_like(out)
        lse_into = aten_ops.flash_attention_forward_into(into, q, k, v, *inputs, False, **windows)
        found = backward(d_out, q, k, v, out, lse, *inputs, state, unused, **windows)
    torch.testing.assert_close((out, lse, into, lse_into), (expected, expected_lse) * 2)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), d_out))


@pytest.mark.parametrize("option", ["alibi_slopes", "seqused_k", "block_table"])
def test_what_the_ops_lack_is_an_error(option: str) -> None:
    q, k, v = (tensor.detach() for tensor in draw((1, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)))
    with pytest.raises(UnsupportedProblem, match=f"lacks {option}"):
        aten_ops.flash_attention_forward(q, k, v, None, None, 5, 5, 0.0, False, False, **{option: torch.ones(2)})
    with pytest.raises(UnsupportedProblem, match="lacks return_debug_mask"):
        aten_ops.sdpa_forward(q, k, v, 0.1, False, True)


# --- the ops under torch's own autograd and compiler, on the CPU -----------------------------------------------------


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """torch has no CPU kernel for these ops, so ours can stand in for those that CUDA would get."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in OPS:
            library.impl(name, aten_ops.KERNELS[name], "CPU")
        yield


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_torch_differentiates_and_compiles_them(dropout_p: float, is_compiled: bool) -> None:
    q, k, v, d_out = draw((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 4, 9, 8))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True)
        return found[0], found[6]

    out, state = (torch.compile(call, fullgraph=True, backend="aot_eager") if is_compiled else call)(q, k, v)
    seed = state.view(torch.int64)[0] if dropout_p else None
    transposed = (heads_last(tensor) for tensor in (q, k, v))
    expected = heads_last(flashtile.attention(*transposed, causal=True, dropout_p=dropout_p, dropout_seed=seed))
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out, (q, k, v), d_out)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), d_out))


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0)])
def test_torch_s_own_varlen_attention(window: tuple[int, int]) -> None:
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen", reason="newer torch has it").varlen_attn
    q, k, v, d_out = draw((11, 4, 8), (13, 4, 8), (13, 4, 8), (11, 4, 8))
    cu_q, cu_kv = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 4, 4, 11], [0, 5, 6, 13]))
    out = varlen_attn(q, k, v, cu_q, cu_kv, 7, 7, window_size=window)
    packing: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, "max_seqlen_q": 7, "max_seqlen_kv": 7}
    reach = (None if window[0] < 0 else window[0], None if window[1] < 0 else window[1])
    expected = flashtile.attention_varlen(q, k, v, **packing, window=reach)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), d_out), torch.autograd.grad(expected, (q, k, v), d_out)
    )


# --- the registry ----------------------------------------------------------------------------------------------------


def has_kernels() -> set[bool]:
    return {torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA") for name in OPS}


def test_it_is_listed_once_registered_and_torch_can_activate_it() -> None:
    before = has_kernels()
    sdpa.register()
    assert sdpa.NAME in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() is None and has_kernels() == before
    torch_attention.activate_flash_attention_impl(sdpa.NAME)
    assert torch_attention.current_flash_attention_impl() == sdpa.NAME and has_kernels() == {True}
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    sdpa.restore()
    assert torch_attention.current_flash_attention_impl() is None and has_kernels() == before


def test_activating_twice_and_restoring_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = has_kernels()
    sdpa.activate()
    sdpa.activate()
    assert torch_attention.current_flash_attention_impl() == sdpa.NAME
    sdpa.restore()
    sdpa.restore()
    assert has_kernels() == before


def test_restoring_leaves_another_implementation_alone() -> None:
    class Other:
        removed = 0

        def remove(self) -> None:
            self.removed += 1

    other = Other()
    torch_attention.register_flash_attention_impl("another", register_fn=lambda: other)
    torch_attention.activate_flash_attention_impl("another")
    sdpa.restore()
    assert torch_attention.current_flash_attention_impl() == "another" and other.removed == 0
    torch_attention.restore_flash_attention_impl()


def test_without_a_gpu_activate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedProblem, match=r"override\(\)"):
        sdpa.activate()


def test_a_torch_without_a_registry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_attention, "register_flash_attention_impl")
    with pytest.raises(UnsupportedProblem, match="no registry"):
        sdpa.register()


# --- the whole way, on a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads_kv", "head_dim"), [(4, 64), (2, 40), (1, 128)])
def test_scaled_dot_product_attention_runs_flashtile(
    dtype: torch.dtype, is_causal: bool, heads_kv: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(2, heads, 130, head_dim) for heads in (4, heads_kv, heads_kv, 4)]
    q, k, v, d_out = draw(*shapes, dtype=dtype, device="cuda")
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": heads_kv != 4}
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    with torch_attention.sdpa_kernel(torch_attention.SDPBackend.MATH):
        expected = attend(*exact, **options)
        expected_grads = torch.autograd.grad(expected, exact, d_out.double())
    calls: list[str] = []
    for name in ("attention", "gradients"):
        original = getattr(aten_ops.ops, name)
        monkeypatch.setattr(aten_ops.ops, name, lambda *a, f=original, n=name: (calls.append(n), f(*a))[1])
    sdpa.activate()
    found = attend(q, k, v, **options)
    grads = torch.autograd.grad(found, (q, k, v), d_out)
    assert calls == ["attention", "gradients"]
    torch.testing.assert_close(
        [tensor.double() for tensor in (found, *grads)], [expected, *expected_grads], atol=3e-2, rtol=3e-2
    )
    sdpa.restore()
    attend(q, k, v, **options)
    assert len(calls) == 2


@pytest.mark.gpu
def test_dropout_varlen_and_compiled_models_on_a_gpu() -> None:
    q = draw((1, 4, 256, 64), dtype=torch.bfloat16, device="cuda")[0]
    sdpa.activate()
    v = torch.eye(256, 64, device="cuda", dtype=torch.bfloat16).expand(1, 4, 256, 64)
    weights = attend(torch.zeros_like(q), torch.zeros_like(q), v, dropout_p=0.5) * 256
    assert math.isclose(weights.bool().double().mean().item(), 0.5, abs_tol=0.05)
    compiled = torch.compile(lambda q: attend(q, q, q, is_causal=True), fullgraph=True)
    expected = attend(q, q, q, is_causal=True)
    torch.testing.assert_close(compiled(q), expected, atol=2e-2, rtol=2e-2)
    compiled(q).sum().backward()


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    q, k, v = draw((1, 4, 256, 64), (1, 4, 256, 64), (1, 4, 256, 64), dtype=torch.bfloat16, device="cuda")
    sdpa.activate()
    for mode in ("default", "error"):  # the first round compiles the kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for options in ({}, {"is_causal": True}, {"dropout_p": 0.1}):
                attend(q, k, v, **options).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

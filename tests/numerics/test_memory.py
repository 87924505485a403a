"""Memory: no CPU kernel ever holds the scores, so what it needs beyond its inputs grows linearly with the length."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from runners import Kernel, with_leaves

import flashtile
from flashtile.backends.cpu.plan import TILES, TILES_16BIT
from flashtile.testing import Call, CallSpec, make_tensor, peak_extra_bytes

HEAD_DIM = 64
LENGTHS = (2048, 4096, 8192)
KERNELS = [
    pytest.param(Kernel(backend="cpu", kernel="tiled", tiles=TILES), torch.float32, id="tiled-float32"),
    pytest.param(Kernel(backend="cpu", kernel="tiled_16bit", tiles=TILES_16BIT), torch.bfloat16, id="tiled_16bit"),
    pytest.param(Kernel(backend="cpu", kernel="torch_fused", tiles=TILES), torch.float32, id="fused-float32"),
    pytest.param(Kernel(backend="cpu", kernel="torch_fused", tiles=TILES), torch.bfloat16, id="fused-bfloat16"),
]
MIX: dict[str, Any] = {"window": (3000, 5), "softcap": 9.0, "bias_axes": "hk", "mask_axes": "k", "alibi": "per head"}


def call_of(seqlen: int, dtype: torch.dtype, **options: Any) -> Call:
    spec = CallSpec(
        lengths_q=(seqlen,), lengths_kv=(seqlen,), head_dim=HEAD_DIM, head_dim_v=HEAD_DIM, dtype=dtype, **options
    )
    return spec.build()


@lru_cache
def naive_bytes(seqlen: int, dtype: torch.dtype) -> int:
    """What the formula needs as people write it."""
    q, k, v = (make_tensor((1, 1, seqlen, HEAD_DIM), dtype=dtype, seed=seed) for seed in range(3))
    return peak_extra_bytes(lambda: torch.softmax(q @ k.mT * HEAD_DIM**-0.5, dim=-1) @ v)


def assert_grows_linearly(peaks: list[int]) -> None:
    """Each length is twice the one before, so what is linear at most doubles; quadratic memory would quadruple."""
    assert peaks[1] <= 2.1 * peaks[0], peaks
    assert peaks[2] <= 2.1 * peaks[1], peaks
    assert peaks[2] - peaks[1] <= 2.2 * (peaks[1] - peaks[0]), peaks


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_forward_needs_a_twentieth_of_the_naive_formula(kernel: Kernel, dtype: torch.dtype) -> None:
    calls = [call_of(seqlen, dtype) for seqlen in LENGTHS]
    peaks = [peak_extra_bytes(lambda call=call: kernel.forward_with_lse(call)) for call in calls]
    assert naive_bytes(8192, dtype) >= 2 * 8192 * 8192 * dtype.itemsize, "the naive formula holds the scores twice"
    assert peaks[-1] * 20 < naive_bytes(8192, dtype)
    assert_grows_linearly(peaks)


def test_forward_with_a_mix_of_options_needs_a_twentieth_too() -> None:
    kernel = Kernel(backend="cpu", kernel="tiled", tiles=TILES)
    calls = [call_of(seqlen, torch.float32, has_sinks=True, dropout_p=0.1, **MIX) for seqlen in LENGTHS]
    peaks = [peak_extra_bytes(lambda call=call: kernel.forward_with_lse(call)) for call in calls]
    assert peaks[-1] * 20 < naive_bytes(8192, torch.float32)
    assert_grows_linearly(peaks)


@pytest.mark.parametrize("options", [{}, {"causal": True}, MIX], ids=["plain", "causal", "mix"])
def test_training_step_grows_linearly(options: dict[str, Any]) -> None:
    """Forward and backward through autograd, with what the graph keeps in between."""

    def step(call: Call) -> None:
        out = flashtile.attention(call.q, call.k, call.v, **call.options)
        torch.autograd.grad(out, [call.q, call.k, call.v], torch.ones_like(out))

    calls = [with_leaves(call_of(seqlen, torch.float32, **options)) for seqlen in LENGTHS]
    peaks = [peak_extra_bytes(lambda call=call: step(call)) for call in calls]
    assert peaks[-1] * 20 < naive_bytes(8192, torch.float32)
    assert_grows_linearly(peaks)


def test_packed_sequences_need_what_their_longest_needs() -> None:
    """The scores of a packed batch are never padded to [batch, longest, longest]."""

    def peak(lengths: tuple[int, ...]) -> int:
        call = CallSpec(lengths_q=lengths, lengths_kv=lengths, is_packed=True, head_dim=8).build()
        return peak_extra_bytes(lambda: flashtile.attention_varlen(call.q, call.k, call.v, **call.options))

    one, many = peak((2000,)), peak((2000,) + (1,) * 50)
    assert many <= one + 51 * 8 * 4 * 20

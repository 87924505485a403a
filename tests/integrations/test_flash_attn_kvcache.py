"""flash_attn_with_kvcache against a reference that moves one key at a time, on dense and paged caches.

Caches hold NaN wherever no sequence has a key, so that reading too far shows.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from flash_attn_calls import DEVICES
from hypothesis import given, note, settings
from hypothesis import strategies as st
from kvcache_cases import draw_step, expected

import flashtile.integrations.flash_attn as flash_attn
from flashtile.testing import assert_within_budget, poisoned_allocations

DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16, torch.float32)}


@pytest.mark.parametrize("device", DEVICES)
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=250)
def test_any_step(device: str, rng: Random) -> None:
    step = draw_step(rng, DTYPES[device])
    note(str(step))
    dtype = step.arguments["q"].dtype
    exact, naive = expected(step, torch.float64), expected(step, dtype)
    arguments = step.on(device)
    with poisoned_allocations():
        out, lse = flash_attn.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    # A turned query or key may be rounded to its neighbour, which moves scores of up to about 10 by one rounding.
    floor = 20 * torch.finfo(dtype).eps if "rotary_cos" in arguments else 4 * torch.finfo(torch.float32).eps
    for name, found in (("out", out), ("lse", lse)):
        assert_within_budget(found, exact=exact[name], naive=naive[name], floor=floor, name=name)
    for name in ("k_cache", "v_cache"):
        rounding = 2 * torch.finfo(dtype).eps if name == "k_cache" else 0.0
        torch.testing.assert_close(
            arguments[name].cpu(), exact[name], rtol=rounding, atol=8 * rounding, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("device", DEVICES)
def test_generation_token_by_token_is_causal_attention(device: str) -> None:
    """A prompt of 4 tokens, then 6 more one by one, in a cache longer than needed."""
    q, k, v = torch.randn(3, 2, 10, 4, 16, device=device).unbind()
    k, v = k[:, :, :2], v[:, :, :2]
    k_cache, v_cache = torch.full((2, 2, 12, 2, 16), torch.nan, device=device).unbind()
    outs, length = [], 0
    for size in (4, 1, 1, 1, 1, 1, 1):
        now = slice(length, length + size)
        outs.append(
            flash_attn.flash_attn_with_kvcache(
                q[:, now], k_cache, v_cache, k[:, now], v[:, now], cache_seqlens=length, causal=True
            )
        )
        length += size
    torch.testing.assert_close(torch.cat(outs, dim=1), flash_attn.flash_attn_func(q, k, v, causal=True))
    assert torch.equal(k_cache[:, :10], k) and bool(k_cache[:, 10:].isnan().all())


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "one tensor for k and v"])
def test_caches_of_any_strides(layout: str) -> None:
    q, k, v = torch.randn(3, 2, 1, 2, 8).unbind()
    k_cache, v_cache = torch.randn(2, 2, 9, 2, 8).unbind()
    expected_out = flash_attn.flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=5)
    if layout == "heads first":
        k_cache, v_cache = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_cache, v_cache))
    elif layout == "one tensor for k and v":
        k_cache, v_cache = torch.stack((k_cache, v_cache), dim=2).unbind(2)
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5)
    torch.testing.assert_close(out, expected_out)
    assert torch.equal(k_cache[:, 5:6], k) and torch.equal(v_cache[:, 5:6], v)


def test_nothing_has_a_gradient() -> None:
    """As there: a module's output needs a gradient although nobody will ask for it."""
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    cache = torch.randn(1, 4, 2, 8)
    assert not flash_attn.flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=2).requires_grad


@pytest.mark.parametrize(
    "wrong", [{"causal": 1}, {"softmax_scale": "x"}, {"softcap": -1.0}, {"window_size": (-2, 0)}, {"num_splits": -1}]
)
def test_a_refused_call_leaves_the_cache_alone(wrong: dict[str, object]) -> None:
    q, cache = torch.randn(1, 1, 2, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        flash_attn.flash_attn_with_kvcache(q, cache, cache.clone(), q, q, cache_seqlens=2, **wrong)  # pyright: ignore[reportArgumentType]
    assert bool((cache == 0).all())

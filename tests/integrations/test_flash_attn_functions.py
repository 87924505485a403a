"""flash_attn's functions against the float64 oracle: results, gradients, lse and S_dmask, with every mix of options."""

from __future__ import annotations

from random import Random

import pytest
import torch
from flash_attn_calls import DEVICES, FORMS, Form, draw_call, packing_of, run, seeded, theirs
from hypothesis import given, note, settings
from hypothesis import strategies as st

import flashtile.integrations.flash_attn as flash_attn
from flashtile.testing import Call, CallSpec, assert_results_within_budget, cu_seqlens_of, oracle
from flashtile.testing.oracle import weights_of_sequences

DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_any_mix_of_options(form: Form, device: str, rng: Random) -> None:
    spec = draw_call(rng, form, dtypes=DTYPES[device])
    has_d_lse, deterministic = rng.random() < 0.5, rng.random() < 0.3
    note(f"{spec}, {has_d_lse=}, {deterministic=}")
    call = seeded(spec.build(device), seed=spec.seed)
    d_out, d_lse = spec.build_upstream(device)
    used_d_lse = d_lse if has_d_lse else None
    results, s_dmask = run(call, form, d_out, used_d_lse, seed=spec.seed, deterministic=deterministic)
    assert_results_within_budget(results, call, d_out=d_out, d_lse=used_d_lse, is_small=True)
    assert results.out.dtype == call.q.dtype
    assert results.lse.dtype == (torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    if spec.dropout_p == 0:
        assert s_dmask is None
    else:
        assert s_dmask is not None
        check_s_dmask(s_dmask, call)


def check_s_dmask(s_dmask: torch.Tensor, call: Call) -> None:
    """Weights of every sequence, signs of dropout's pattern, zeros in the padding."""
    assert s_dmask.shape == call.scores_shape and s_dmask.dtype == call.q.dtype
    padding = torch.ones_like(s_dmask, dtype=torch.bool)
    for weights in weights_of_sequences(call, torch.float64):
        sequence = weights.sequence
        at = (sequence.batch_idx, slice(None), slice(sequence.seqlen_q), slice(sequence.seqlen_kv))
        padding[at] = False
        expected = torch.where(torch.as_tensor(weights.dropout_factor > 0), weights.p, -weights.p)
        torch.testing.assert_close(s_dmask[at].double(), expected, rtol=0.05, atol=0.01)
        clear = weights.p > 0.01
        assert torch.equal((s_dmask[at] < 0)[clear], (expected < 0)[clear])
    assert bool((s_dmask[padding] == 0).all())


@pytest.mark.parametrize("device", DEVICES)
def test_s_dmask_explains_the_output(device: str) -> None:
    """What is kept, scaled by 1 / (1 - p), times v."""
    call = CallSpec(lengths_q=(9, 9), lengths_kv=(12, 12), heads_kv=2, heads_per_kv=2, dropout_p=0.4).build(device)
    out, _, s_dmask = flash_attn.flash_attn_func(call.q, call.k, call.v, **theirs(call), return_attn_probs=True)
    assert 0.25 < (s_dmask < 0).float().mean() < 0.55
    values = call.v.repeat_interleave(2, dim=2).transpose(1, 2)
    torch.testing.assert_close(out, (s_dmask.clamp(min=0) / 0.6 @ values).transpose(1, 2))


def test_dropout_follows_torchs_generator() -> None:
    q = torch.randn(1, 20, 2, 8)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return flash_attn.flash_attn_func(q, q, q, 0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(flash_attn.flash_attn_func(q, q, q, 0.5), flash_attn.flash_attn_func(q, q, q, 0.5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [(0.0,), (0.3, 0.2, True, False, True), (0.0, None, True, True)], ids=str)
def test_names_of_1x(form: Form, options: tuple[object, ...]) -> None:
    """dropout_p, softmax_scale, causal, return_attn_probs, deterministic, in this order."""
    call = CallSpec(lengths_q=(5, 3), lengths_kv=(5, 3), heads_kv=2, is_packed=True).build()
    tensors = {"q, k, v": (call.q, call.k, call.v), "q, kv": (call.q, torch.stack((call.k, call.v), 1))}
    tensors["qkv"] = (torch.stack((call.q, call.k, call.v), 1),)
    functions = {
        "q, k, v": (flash_attn.flash_attn_unpadded_func, flash_attn.flash_attn_varlen_func),
        "q, kv": (flash_attn.flash_attn_unpadded_kvpacked_func, flash_attn.flash_attn_varlen_kvpacked_func),
        "qkv": (flash_attn.flash_attn_unpadded_qkvpacked_func, flash_attn.flash_attn_varlen_qkvpacked_func),
    }
    names = ("dropout_p", "softmax_scale", "causal", "return_attn_probs", "deterministic")
    old, new = functions[form]
    arguments = (*tensors[form], *packing_of(call, form))
    torch.manual_seed(3)
    found = old(*arguments, *options)
    torch.manual_seed(3)
    expected = new(*arguments, **dict(zip(names, options, strict=False)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (3, 1)}, {"alibi": True}], ids=str)
@pytest.mark.parametrize("page", [1, 3, 16])
def test_pages(page: int, options: dict[str, object], device: str) -> None:
    """Keys in pages, in any order, of which some are unused or NaN, are the same as keys in a row."""
    lengths_q, lengths_k = (4, 0, 7, 2), (9, 5, 16, 0)
    spec = CallSpec(lengths_q=lengths_q, lengths_kv=lengths_k, heads_kv=2, heads_per_kv=2, is_packed=True)
    call = spec.build(device)
    generator = torch.Generator().manual_seed(page)
    per_sequence = -(-max(lengths_k) // page)
    places = torch.randperm(4 * per_sequence + 3, generator=generator)[: 4 * per_sequence].view(4, per_sequence)
    k_pages, v_pages = torch.full((2, 4 * per_sequence + 3, page, 2, 8), torch.nan, device=device).unbind()
    block_table = torch.full((4, per_sequence), 10**6, dtype=torch.int32)
    begin = 0
    for sequence, length in enumerate(lengths_k):
        for position in range(length):
            block = int(places[sequence, position // page])
            block_table[sequence, position // page] = block
            k_pages[block, position % page] = call.k[begin + position]
            v_pages[block, position % page] = call.v[begin + position]
        begin += length
    more = dict(options)
    if more.pop("alibi", False):
        more["alibi_slopes"] = torch.rand(4, 4, generator=generator).to(device)
    packing = packing_of(call, "q, k, v")
    expected = flash_attn.flash_attn_varlen_func(call.q, call.k, call.v, *packing, **more, return_attn_probs=True)
    arguments = (call.q, k_pages, v_pages, *packing)
    block_table = block_table.to(device)
    found = flash_attn.flash_attn_varlen_func(*arguments, **more, block_table=block_table, return_attn_probs=True)
    torch.testing.assert_close(found, expected)
    alone = flash_attn.flash_attn_varlen_func(*arguments, **more, block_table=block_table)
    torch.testing.assert_close(alone, expected[0])


def test_windows_of_minus_one_are_unlimited() -> None:
    q, k, v = torch.randn(3, 2, 11, 3, 8).unbind()
    for window_size, window in (((-1, 2), (None, 2)), ((2, -1), (2, None)), ((-1, -1), None), ([1, 0], (1, 0))):
        found = flash_attn.flash_attn_func(q, k, v, window_size=window_size)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(found, oracle(q, k, v, window=window)[0].float())


def test_causality_is_aligned_bottom_right() -> None:
    """Two queries of five keys: the first sees four of them."""
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 5, 1, 8)
    v = torch.eye(5, 8)[None, :, None]
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out[0, :, 0, :5], torch.tensor([[0.25] * 4 + [0.0], [0.2] * 5]))


def test_rows_without_keys_are_zero() -> None:
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 2, 2, 8)
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert bool((out[:, :2] == 0).all()) and bool((out[:, 2:] != 0).any())
    assert bool((lse[:, :, :2] == -torch.inf).all()) and bool(lse[:, :, 2:].isfinite().all())
    assert s_dmask is None


def test_lengths_of_the_packed_buffer() -> None:
    """What the interface says of shapes: lse is [heads, total]."""
    q, cu_seqlens = torch.randn(7, 3, 8), cu_seqlens_of((3, 4))
    out, lse, s_dmask = flash_attn.flash_attn_varlen_func(
        q, q, q, cu_seqlens, cu_seqlens, 4, 4, 0.1, return_attn_probs=True
    )
    assert (out.shape, lse.shape, s_dmask.shape) == ((7, 3, 8), (3, 7), (2, 3, 4, 4))

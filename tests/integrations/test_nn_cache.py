"""Generation with a KVCache: chunk by chunk it gives what one pass gives, whatever the padding, beams and lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn_cases import D_MODEL, DEVICES, MASKS, OPTIONS, SEQLEN, inputs_of, mask_of, multihead_of, one_by_one
from torch import Tensor

from flashtile import InvalidArgument
from flashtile.nn import KVCache, MultiheadAttention, Packing, Rotary
from flashtile.testing import oracle

CAUSAL = [{**options, "causal": True} for options in OPTIONS]


@torch.inference_mode()
def generated(
    module: MultiheadAttention, x: Tensor, sizes: tuple[int, ...], *, pad_mask: Tensor | None = None, cache: KVCache
) -> Tensor:
    """The outputs for x, of which the module sees so many tokens at a time."""
    chunks, masks = x.split(sizes, dim=1), [None] * len(sizes) if pad_mask is None else pad_mask.split(sizes, dim=1)
    return torch.cat([module(chunk, pad_mask=mask, cache=cache) for chunk, mask in zip(chunks, masks, strict=True)], 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(1,) * SEQLEN, (4, 1, 3, 1), (SEQLEN,)], ids=str)
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("options", CAUSAL, ids=str)
def test_chunk_by_chunk(options: dict[str, Any], padding: str, sizes: tuple[int, ...], device: str) -> None:
    """Padding is NaN and is not stored: every sequence fills its row of the cache from the start."""
    module, mask = multihead_of(options, device=device), mask_of(MASKS[padding], device)
    x = inputs_of(mask).detach()
    cache = module.new_cache(len(mask), SEQLEN)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    out = generated(module, x, sizes, pad_mask=None if padding == "none" else mask, cache=cache)
    torch.testing.assert_close(out, one_by_one(module, mask, x), rtol=2e-6, atol=2e-6)
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_prompts_and_then_one_token_for_each(padding: str) -> None:
    module = multihead_of({"causal": True, "rotary": Rotary(), "n_head_kv": 2})
    prompts = mask_of(MASKS[padding])
    mask = torch.cat([prompts, torch.ones(len(prompts), 2, dtype=torch.bool)], dim=1)
    x = inputs_of(mask).detach()
    cache = module.new_cache(len(mask), SEQLEN + 2)
    with torch.inference_mode():
        outs = [module(x[:, :SEQLEN], pad_mask=prompts, cache=cache)]
        outs += [module(x[:, [idx]], cache=cache) for idx in (SEQLEN, SEQLEN + 1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), one_by_one(module, mask, x), rtol=2e-6, atol=2e-6)


def test_sequences_that_have_ended_are_left_alone() -> None:
    module, x = multihead_of({"causal": True}), torch.randn(2, 3, D_MODEL, dtype=torch.float64)
    cache, goes_on = module.new_cache(2, 3), torch.tensor([[True], [False]])
    with torch.inference_mode():
        module(x[:, :2], cache=cache)
        step = module(x[:, 2:], pad_mask=goes_on, cache=cache)
    assert cache.lengths.tolist() == [3, 2]
    torch.testing.assert_close(step[0, 0], module(x)[0, 2])
    assert not step[1].any()


def test_values_of_their_own() -> None:
    module = multihead_of({"causal": True, "d_value": 12})
    x, value = (torch.randn(2, 5, width, dtype=torch.float64) for width in (D_MODEL, 12))
    cache = module.new_cache(2, 5)
    with torch.inference_mode():
        out = torch.cat([module(x[:, rows], None, value[:, rows], cache=cache) for rows in (slice(3), slice(3, 5))], 1)
    torch.testing.assert_close(out, module(x, x, value))


def test_without_causality_a_prompt_sees_itself_whole() -> None:
    module, x = multihead_of({}), torch.randn(2, 5, D_MODEL, dtype=torch.float64)
    out = generated(module, x, (4, 1), cache=module.new_cache(2, 5))
    torch.testing.assert_close(out, torch.cat([module(x[:, :4]), module(x)[:, 4:]], dim=1))


@pytest.mark.parametrize("device", DEVICES)
def test_beam_search(device: str) -> None:
    """Beams that survive twice, or not at all, go on from their own past."""
    module = multihead_of({"causal": True, "rotary": Rotary(), "n_head_kv": 1}, device=device)
    x = torch.randn(2, 6, D_MODEL, dtype=torch.float64, device=device)
    first, then = (
        torch.tensor([0, 0, 1, 1, 1], device=device),
        torch.tensor([4, 2, 2], dtype=torch.int32, device=device),
    )
    cache = module.new_cache(2, 6)
    generated(module, x[:, :3], (3,), cache=cache)
    cache.reorder(first)
    grown = torch.cat([x[first, :3], torch.randn(5, 1, D_MODEL, dtype=torch.float64, device=device)], dim=1)
    generated(module, grown[:, 3:], (1,), cache=cache)
    cache.reorder(then)
    assert (cache.batch, cache.lengths.tolist()) == (3, [4, 4, 4])
    grown = torch.cat([grown[then], torch.randn(3, 2, D_MODEL, dtype=torch.float64, device=device)], dim=1)
    out = generated(module, grown[:, 4:], (1, 1), cache=cache)
    torch.testing.assert_close(out, module(grown)[:, 4:], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool, device: str) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    module = multihead_of({"causal": True}, device=device, dtype=dtype)
    x = torch.randn(2, 6, D_MODEL, dtype=dtype, device=device)
    cache = module.new_cache(2, 6, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out, expected = generated(module, x, (4, 1, 1), cache=cache), module(x)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert cache.k.dtype == out.dtype == torch.bfloat16


# --- the cache alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_append_and_attend(device: str) -> None:
    cache = KVCache(2, 7, heads_kv=2, head_dim=4, head_dim_v=6, device=device)
    q, k = torch.randn(2, 3, 4, 4, device=device), torch.randn(2, 7, 2, 4, device=device)
    v = torch.randn(2, 7, 2, 6, device=device)
    cache.append(k[:, :2], v[:, :2])
    cache.append(k[:, 2:], v[:, 2:])
    expected, _ = oracle(q, k, v, causal=True, softcap=3.0)
    torch.testing.assert_close(cache.attend(q, causal=True, softcap=3.0), expected.float(), rtol=1e-5, atol=1e-5)
    assert repr(cache) == "KVCache(2, 7, heads_kv=2, head_dim=4, dtype=torch.float32)"


def test_a_packing_appends_as_many_keys_as_each_sequence_has() -> None:
    cache, k, v = KVCache(2, 4, heads_kv=1, head_dim=2), *torch.randn(2, 4, 1, 2).unbind()
    cache.append(k, v, packing=Packing.of(torch.tensor([[True, False, False], [True, True, True]])))
    assert cache.lengths.tolist() == [1, 3]
    assert torch.equal(cache.k[0, :1], k[:1]) and torch.equal(cache.k[1, :3], k[1:])


def test_a_full_cache_refuses_and_keeps_what_it_has() -> None:
    module = multihead_of({"causal": True})
    x = torch.randn(2, 6, D_MODEL, dtype=torch.float64)
    cache = module.new_cache(2, 5)
    generated(module, x[:, :4], (4,), cache=cache)
    before = copy.deepcopy(cache)
    with pytest.raises(InvalidArgument, match=r"^cache: got 6 keys .* up to 2 of them new; wanted at most .* 5"):
        generated(module, x[:, 4:], (2,), cache=cache)
    assert torch.equal(cache.lengths, before.lengths) and torch.equal(cache.k[:, :4], before.k[:, :4])
    torch.testing.assert_close(generated(module, x[:, 4:5], (1,), cache=cache), module(x[:, :5])[:, 4:])
    with pytest.raises(InvalidArgument, match="reset"):
        generated(module, x[:, 5:], (1,), cache=cache)
    cache.reset()
    torch.testing.assert_close(generated(module, x[:, :5], (5,), cache=cache), module(x[:, :5]))


def test_padding_takes_no_room() -> None:
    """Chunks of 9 into room for 9, again and again, as long as the tokens fit."""
    module, mask = multihead_of({"causal": True}), mask_of(MASKS["right"])[1:3]  # 5 tokens and 1
    x, cache = inputs_of(mask).detach(), module.new_cache(2, 10)
    for _ in range(2):
        generated(module, x, (SEQLEN,), pad_mask=mask, cache=cache)
    assert cache.lengths.tolist() == [10, 2]
    with pytest.raises(InvalidArgument, match=r"^cache: got 15 keys"):
        generated(module, x, (SEQLEN,), pad_mask=mask, cache=cache)


def test_nothing_is_recorded_for_a_backward() -> None:
    module = multihead_of({"causal": True}).requires_grad_(False)
    x = torch.randn(1, 2, D_MODEL, dtype=torch.float64)
    module(x, cache=module.new_cache(1, 2))  # frozen, so there is nothing to record
    with pytest.raises(InvalidArgument, match=r"^cache: got a call that records gradients"):
        module(x.requires_grad_(), cache=module.new_cache(1, 2))


NEW = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"k": NEW[:1]}, r"^k: got .*\[1, 3, 4, 8\]; wanted \[2, 3, 4, 8\] in torch.float32 on cpu"),
        ({"k": NEW[:, :, :2]}, r"^k: got .*wanted \[2, 3, 4, 8\]"),
        ({"k": NEW[0]}, r"^k: got .*wanted \[2, new, 4, 8\]"),
        ({"k": None}, "^k: got None"),
        ({"v": NEW[:, :2]}, r"^v: got .*wanted \[2, 3, 4, 8\]"),
        ({"v": NEW.half()}, "^v: got a torch.float16 tensor"),
        ({"v": NEW.to("meta")}, "^v: got"),
        ({"packing": Packing.full(2, 3)}, r"^k: got .*wanted \[6, 4, 8\]"),
        ({"packing": Packing.full(3, 2)}, "^packing: got 3 sequences; wanted 2"),
    ],
)
def test_keys_that_do_not_fit(arguments: dict[str, Any], words: str) -> None:
    cache = KVCache(2, 8, heads_kv=4, head_dim=8)
    with pytest.raises(InvalidArgument, match=words):
        cache.append(**{"k": NEW, "v": NEW, **arguments})
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("size", ["batch", "capacity", "heads_kv", "head_dim", "head_dim_v"])
def test_sizes_that_are_no_counts(size: str) -> None:
    sizes: dict[str, Any] = {"batch": 1, "capacity": 2, "heads_kv": 3, "head_dim": 4, "head_dim_v": 5}
    with pytest.raises(InvalidArgument, match=f"^{size}: got -1"):
        KVCache(**{**sizes, size: -1})


@pytest.mark.parametrize(
    "rows", [[0, 1], torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([2]), torch.tensor([-1])]
)
def test_beams_that_are_not_there(rows: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^rows: got"):
        KVCache(2, 3, heads_kv=1, head_dim=2).reorder(rows)

"""flash_attn's helpers from their documented behaviour: unpad_input and its like, rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_calls import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import flashtile.integrations.flash_attn as flash_attn
from flashtile.integrations.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flashtile.integrations.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flashtile.testing import cu_seqlens_of

# --- bert_padding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data())
@settings(max_examples=60)
def test_unpad_input_and_pad_input(device: str, data: st.DataObject) -> None:
    batch, seqlen = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    bits = st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen)
    dtype = data.draw(st.sampled_from((torch.bool, torch.int64, torch.int32, torch.uint8)))
    mask = torch.tensor(data.draw(bits), device=device).view(batch, seqlen)
    unused = torch.tensor(data.draw(bits), device=device).view(batch, seqlen) if data.draw(st.booleans()) else None
    x = torch.randn(batch, seqlen, 3, device=device, requires_grad=True)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
        x, mask.to(dtype), None if unused is None else unused.to(dtype)
    )
    present = mask if unused is None else mask | unused
    lengths = present.sum(1).tolist()
    assert torch.equal(tokens, x[present])
    assert torch.equal(indices, present.flatten().nonzero()[:, 0])
    assert torch.equal(cu_seqlens.cpu(), cu_seqlens_of(lengths)) and cu_seqlens.dtype == torch.int32
    assert type(max_seqlen) is int and max_seqlen == max(lengths)
    assert seqused.tolist() == mask.sum(1).tolist() and seqused.dtype == torch.int32
    assert torch.equal(index_first_axis(x.flatten(0, 1), indices), tokens)

    padded = pad_input(tokens, indices, batch, seqlen)
    assert torch.equal(padded, x.masked_fill(~present[..., None], 0.0))
    weights = torch.randn_like(padded)
    assert torch.equal(torch.autograd.grad(padded, x, weights)[0], weights.masked_fill(~present[..., None], 0.0))


def test_unpadded_attention_is_padded_attention_without_its_padding() -> None:
    qkv = torch.randn(3, 7, 3, 2, 8)
    mask = torch.arange(7) < torch.tensor([[7], [2], [4]])
    tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, mask)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(tokens, cu_seqlens, max_seqlen, causal=True)
    out = pad_input(out, indices, 3, 7)
    for row, length in enumerate((7, 2, 4)):
        alone = flash_attn.flash_attn_qkvpacked_func(qkv[row : row + 1, :length], causal=True)
        torch.testing.assert_close(out[row, :length], alone[0])
        assert bool((out[row, length:] == 0).all())


# --- rotary -----------------------------------------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [tokens, heads, head_dim], whose pairs of coordinates are multiplied as complex numbers."""
    factor = torch.complex(cos.double(), sin.double())[positions][:, None]
    half = factor.shape[-1]
    head = x[..., : 2 * half].double()
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).mT
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    head = (product if interleaved else product.mT).flatten(-2)
    return torch.cat([head, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, (2, 0, 5)], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_apply_rotary_emb(
    is_packed: bool, offsets: Any, interleaved: bool, inplace: bool, dtype: torch.dtype, device: str
) -> None:
    lengths = (4, 0, 6) if is_packed else (6, 6, 6)
    cu_seqlens = cu_seqlens_of(lengths)
    starts = (offsets,) * 3 if isinstance(offsets, int) else offsets
    positions = torch.cat([start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)])
    cos, sin = (6 * torch.rand(2, 12, 3)).cos().to(dtype).unbind()
    x = torch.randn(sum(lengths), 2, 8, dtype=dtype)
    expected = turned(x, cos, sin, positions, interleaved)
    d_out = torch.randn_like(x)
    expected_d_x = turned(d_out, cos, -sin, positions, interleaved)  # a rotation's transpose turns back

    leaf = (x if is_packed else x.view(3, 6, 2, 8)).to(device).requires_grad_()
    used = leaf.clone() if inplace else leaf
    out = apply_rotary_emb(
        used,
        cos.to(device),
        sin.to(device),
        interleaved,
        inplace,
        offsets if isinstance(offsets, int) else torch.tensor(offsets, dtype=torch.int32, device=device),
        cu_seqlens.to(device) if is_packed else None,
        6 if is_packed else None,
    )
    assert (out is used) == inplace and out.shape == leaf.shape and out.dtype == dtype
    (d_x,) = torch.autograd.grad(out, leaf, d_out.view_as(leaf).to(device))
    tolerance: dict[str, Any] = {"rtol": torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out.cpu().double().view_as(expected), expected, **tolerance)
    torch.testing.assert_close(d_x.cpu().double().view_as(expected), expected_d_x, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["qkv", "heads side by side", "q, kv"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 4, "one per sequence"])
def test_rotary_embedding(offset: Any, interleaved: bool, form: str, device: str) -> None:
    """Queries and keys turn, in place; values, and what else lies in the tensors, do not."""
    heads_k = 3 if form == "qkv" else 1
    q, k, v = (torch.randn(2, 5, heads, 8, device=device) for heads in (3, heads_k, heads_k))
    starts = torch.tensor([1, 7], device=device) if isinstance(offset, str) else offset
    positions = torch.arange(5, device=device) + (starts[:, None] if isinstance(starts, Tensor) else starts)
    angles = positions[..., None] / 100.0 ** (torch.arange(0, 6, 2, device=device) / 6)
    cos, sin = (f(angles).expand(2, 5, 3).flatten(0, 1) for f in (torch.cos, torch.sin))
    expected_q, expected_k = (
        turned(x.flatten(0, 1), cos, sin, torch.arange(10, device=device), interleaved).view_as(x).float()
        for x in (q, k)
    )
    module = RotaryEmbedding(6, base=100.0, interleaved=interleaved)
    assert not module.state_dict()
    if form == "q, kv":
        kv = torch.stack((k, v), dim=2)
        found = module(q, kv, seqlen_offset=starts)
        assert found[0] is q and found[1] is kv
        parts = (q, *kv.unbind(2))
    elif form == "qkv":
        qkv = torch.stack((q, k, v), dim=2)
        assert module(qkv, seqlen_offset=starts) is qkv
        parts = qkv.unbind(2)
    else:
        qkv = torch.cat((q, k, v), dim=2)
        assert module(qkv, seqlen_offset=starts, num_heads_q=3) is qkv
        parts = qkv.split((3, 1, 1), dim=2)
    for part, expected in zip(parts, (expected_q, expected_k, v), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


def test_rotary_embedding_has_gradients() -> None:
    leaf = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    module = RotaryEmbedding(8)
    out = module(leaf.clone())
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, weights)
    # Turning a vector changes a product with it as turning the other back does.
    torch.testing.assert_close((gradient * leaf).sum(), (out * weights).sum())
    assert torch.equal(gradient[:, :, 2], weights[:, :, 2])


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=str)
def test_casting_the_module_does_not_round_its_angles(cast: torch.dtype) -> None:
    qkv = torch.randn(1, 3000, 3, 1, 8)
    expected = RotaryEmbedding(8)(qkv.clone())
    assert torch.equal(RotaryEmbedding(8).to(cast)(qkv.clone()), expected)


@pytest.mark.parametrize("seqlen", [40, 3000])
def test_xpos_scores_depend_on_distances_and_decay(seqlen: int) -> None:
    """In float16 too, and not at all on where in the sequence the pair is."""
    qkv = torch.ones(1, seqlen, 3, 1, 8, dtype=torch.float16)
    q, k, v = RotaryEmbedding(8, scale_base=256.0)(qkv)[0, :, :, 0].float().unbind(1)
    assert bool(q.isfinite().all()) and bool(k.isfinite().all()) and bool((v == 1).all())
    plain_q, plain_k, _ = RotaryEmbedding(8)(torch.ones(1, seqlen, 3, 1, 8))[0, :, :, 0].unbind(1)
    fractions = (torch.arange(0, 8, 2) / 8 + 0.4) / 1.4
    for i, j in ((seqlen - 1, seqlen - 1), (seqlen - 1, seqlen - 30), (25, 3)):
        weights = (fractions ** ((i - j) / 256)).repeat(2)
        expected = (plain_q[i] * plain_k[j] * weights).sum()
        torch.testing.assert_close((q[i] * k[j]).sum(), expected, rtol=0.01, atol=0.02)


def test_xpos_with_a_cache_needs_the_length_of_the_cache() -> None:
    """Steps with the same max_seqlen turn as one call does."""
    module = RotaryEmbedding(8, scale_base=16.0)
    qkv = torch.randn(2, 12, 3, 2, 8)
    whole = module(qkv.clone(), max_seqlen=12)
    steps = [module(qkv[:, i : i + 1].clone(), seqlen_offset=torch.full((2,), i), max_seqlen=12) for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    with pytest.raises(ValueError, match="max_seqlen: got None"):
        module(qkv, seqlen_offset=torch.tensor([1, 2]))

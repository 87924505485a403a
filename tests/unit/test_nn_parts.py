"""The building blocks in ``flashtile.nn``: rotary embedding, packing, slopes of ALiBi; and the examples they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashtile.nn
from flashtile import InvalidArgument
from flashtile.nn.alibi import alibi_slopes
from flashtile.nn.padding import Packing, packed_positions
from flashtile.nn.rotary import apply_rotary, rotary_cos_sin, xpos_decay
from flashtile.testing import cu_seqlens_of

MODULES = [f"flashtile.nn.{module.name}" for module in pkgutil.iter_modules(flashtile.nn.__path__)]
MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run(module: str) -> None:
    failures, _ = doctest.testmod(importlib.import_module(module))
    assert failures == 0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_turned_scores_depend_on_distances_alone(rotary_dim: int, interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64).expand(2, 9, 3, 8).unbind()
    cos, sin = rotary_cos_sin(torch.arange(9), rotary_dim)
    q, k = (apply_rotary(x, cos.double(), sin.double(), interleaved=interleaved)[:, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert scores[0].unique().numel() == 9


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_lengths_and_the_rest_of_the_head(interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 8)
    cos, sin = rotary_cos_sin(torch.arange(5), 6)
    turned = apply_rotary(x, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_rotation_in_16_bits_rounds_once() -> None:
    x = torch.randn(1, 300, 2, 64)
    cos, sin = rotary_cos_sin(torch.arange(300), 64)
    low = apply_rotary(x.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, apply_rotary(x.bfloat16().float(), cos, sin).bfloat16())


def test_decay_of_a_pair_depends_on_its_distance_alone() -> None:
    positions = torch.arange(20)
    decay = xpos_decay(positions, 8, scale_base=4.0)
    far, near = decay[15] / decay[5], decay[8] / decay[7]
    torch.testing.assert_close(decay[12] / decay[2], far)
    assert bool((far < near).all()) and bool((near < 1).all())


@pytest.mark.parametrize("rotary_dim", [0, -2, 3, 2.0])
def test_wrong_rotary_dims(rotary_dim: int) -> None:
    with pytest.raises(InvalidArgument, match="rotary_dim"):
        rotary_cos_sin(torch.arange(3), rotary_dim)


def test_rotation_refuses_tables_that_do_not_fit() -> None:
    x = torch.randn(1, 3, 2, 8)
    with pytest.raises(InvalidArgument, match=r"^cos: got 8 angles per token"):
        apply_rotary(x, torch.ones(3, 8), torch.ones(3, 8))
    with pytest.raises(InvalidArgument, match=r"^sin: got shape"):
        apply_rotary(x, torch.ones(3, 4), torch.ones(3, 2))


@given(rows=MASKS)
def test_packing_and_unpacking(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 2, 3, requires_grad=True)
    packing = Packing.of(mask)
    packed = packing.pack(x)
    assert torch.equal(packed, x[mask])
    assert packing.cu_seqlens.dtype == torch.int32 and packing.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
    assert packing.max_seqlen == int(mask.sum(1).max())
    restored = packing.unpack(packed)
    assert torch.equal(restored, x.masked_fill(~mask[..., None, None], 0.0))
    weights = torch.randn_like(restored)
    (gradient,) = torch.autograd.grad(restored, x, weights)
    assert torch.equal(gradient, weights.masked_fill(~mask[..., None, None], 0.0))


@given(rows=MASKS)
def test_packing_without_reading(rows: list[list[bool]]) -> None:
    """The same tokens first, zeros behind them, whatever lies there."""
    mask = torch.tensor(rows)
    x = torch.randn(*mask.shape, 2).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    packing, exact = Packing.without_reading(mask), Packing.of(mask)
    packed, num_tokens = packing.pack(x), len(exact.indices)
    assert torch.equal(packed[:num_tokens], exact.pack(x)) and not packed[num_tokens:].any()
    assert torch.equal(packing.cu_seqlens, exact.cu_seqlens) and packing.max_seqlen >= exact.max_seqlen
    garbage = torch.where(torch.arange(len(packed))[:, None] < num_tokens, packed, torch.nan)
    assert torch.equal(packing.unpack(garbage), x.masked_fill(~mask[..., None], 0.0))
    (gradient,) = torch.autograd.grad(packed, x, torch.full_like(packed, 2.0))
    assert torch.equal(gradient, mask[..., None] * torch.full_like(x, 2.0))


@given(rows=MASKS)
def test_a_packing_knows_its_mask(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    for packing in (Packing.of(mask), Packing.without_reading(mask)):
        assert torch.equal(packing.mask, mask)


@pytest.mark.parametrize(("batch", "seqlen"), [(3, 4), (0, 4), (2, 0)])
def test_packing_of_a_full_batch(batch: int, seqlen: int) -> None:
    full, same = Packing.full(batch, seqlen), Packing.of(torch.ones(batch, seqlen, dtype=torch.bool))
    assert torch.equal(full.indices, same.indices) and torch.equal(full.cu_seqlens, same.cu_seqlens)
    assert (full.batch, full.seqlen) == (batch, seqlen) and full.cu_seqlens.dtype == torch.int32


def test_packing_of_no_sequences() -> None:
    packing = Packing.of(torch.ones(0, 4, dtype=torch.bool))
    assert packing.unpack(packing.pack(torch.randn(0, 4, 3))).shape == (0, 4, 3)
    assert (packing.max_seqlen, packing.cu_seqlens.tolist()) == (0, [0])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.ones(3, dtype=torch.bool)])
def test_packing_refuses_other_masks(mask: torch.Tensor) -> None:
    for packed in (Packing.of, Packing.without_reading):
        with pytest.raises(InvalidArgument, match=r"^mask: "):
            packed(mask)


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5), spare=st.integers(0, 3))
def test_positions_in_a_packed_buffer(lengths: list[int], spare: int) -> None:
    cu_seqlens = cu_seqlens_of(lengths)
    sequence_idx, positions = packed_positions(cu_seqlens, num_tokens=sum(lengths) + spare)
    for sequence, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        assert sequence_idx[begin:end].tolist() == [sequence] * (end - begin)
        assert positions[begin:end].tolist() == list(range(end - begin))
    assert sequence_idx[sum(lengths) :].tolist() == [len(lengths) - 1] * spare
    assert positions[sum(lengths) :].tolist() == [0] * spare


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
        (3, [4, 8, 2]),
    ],
)
def test_slopes(heads: int, exponents: list[float]) -> None:
    torch.testing.assert_close(alibi_slopes(heads), 2.0 ** -torch.tensor(exponents))

"""The tensors of a case: the same every time, and the dense mask that stands for all options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashtile.bench.cases import OPTIONS, BenchCase, Option
from flashtile.bench.tensors import CaseTensors

CPU = torch.device("cpu")
CASE = BenchCase(
    direction="backward",
    dtype="bfloat16",
    head_dim=8,
    seqlen=4,
    is_causal=True,
    batch=2,
    heads_q=2,
    heads_kv=1,
)
INF = torch.inf


@pytest.mark.parametrize("option", OPTIONS)
def test_a_case_has_what_its_option_names_and_no_more(option: Option) -> None:
    tensors = CaseTensors.random(replace(CASE, option=option), CPU)
    assert tensors.q.shape == tensors.d_out.shape == (2, 4, 2, 8) and tensors.k.shape == tensors.v.shape == (2, 4, 1, 8)
    carried = {"bias": tensors.bias, "mask": tensors.mask, "alibi": tensors.alibi_slopes}
    assert {name for name, tensor in carried.items() if tensor is not None} == {option} & set(carried)
    given = {name for name, value in tensors.call_options.items() if value is not None}
    assert given == {"causal", *({"alibi": ["alibi_slopes"], "plain": []}.get(option, [option]))}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_case_is_drawn_alike_every_time(option: Option) -> None:
    first, second = (CaseTensors.random(replace(CASE, option=option), CPU) for _ in range(2))
    for name in ("q", "k", "v", "d_out", "bias", "mask", "alibi_slopes", "dense_mask"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)


def test_gradients_are_those_of_q_k_and_v_if_there_is_a_backward() -> None:
    tensors = CaseTensors.random(replace(CASE, option="bias"), CPU)
    assert tensors.q.requires_grad and tensors.k.requires_grad and tensors.v.requires_grad
    assert tensors.bias is not None and not tensors.bias.requires_grad and tensors.bias.dtype == torch.bfloat16
    assert not CaseTensors.random(replace(CASE, direction="forward"), CPU).q.requires_grad


def test_the_mask_shows_half_and_every_row_something() -> None:
    mask = CaseTensors.random(replace(CASE, seqlen=200, option="mask"), CPU).mask
    assert mask is not None and mask.shape == (1, 1, 200, 200)
    assert 0.48 < mask.float().mean() < 0.52
    assert mask.diagonal(dim1=-2, dim2=-1).all(), "causality leaves the first row nothing else"


def dense(option: Option, *, is_causal: bool = True, seqlen: int = 4) -> torch.Tensor | None:
    case = replace(CASE, option=option, is_causal=is_causal, seqlen=seqlen)
    return CaseTensors.random(case, CPU).dense_mask


def test_dense_mask_of_positions() -> None:
    assert dense("plain", is_causal=False) is None
    causal = dense("plain")
    assert causal is not None and causal.dtype == torch.bool and causal.shape == (1, 1, 4, 4)
    assert causal[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    window = dense("window", seqlen=5)
    assert window is not None and window[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    both_sides = dense("window", is_causal=False)
    assert both_sides is not None
    assert both_sides[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_dense_mask_of_alibi_is_rounded_once() -> None:
    added = dense("alibi")
    assert added is not None and added.dtype == torch.bfloat16
    assert added[0, 0].tolist() == [  # the first slope of two heads is 2 ** -4
        [0, -INF, -INF, -INF],
        [-1 / 16, 0, -INF, -INF],
        [-2 / 16, -1 / 16, 0, -INF],
        [-3 / 16, -2 / 16, -1 / 16, 0],
    ]
    full = dense("alibi", is_causal=False)
    assert full is not None and full[0, 1, 3].tolist() == [-3 / 256, -2 / 256, -1 / 256, 0]


def test_dense_mask_holds_the_drawn_bias_or_mask() -> None:
    tensors = CaseTensors.random(replace(CASE, option="bias"), CPU)
    assert tensors.bias is not None and tensors.dense_mask is not None
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(tensors.dense_mask[..., lower], tensors.bias[..., lower])
    assert (tensors.dense_mask[..., ~lower] == -INF).all()
    full = CaseTensors.random(replace(CASE, option="bias", is_causal=False), CPU)
    assert full.dense_mask is full.bias
    masked = CaseTensors.random(replace(CASE, option="mask"), CPU)
    assert masked.mask is not None and masked.dense_mask is not None
    assert torch.equal(masked.dense_mask, masked.mask & lower)


def test_dense_mask_is_made_once() -> None:
    tensors = CaseTensors.random(replace(CASE, option="alibi"), CPU)
    assert tensors.dense_mask is tensors.dense_mask

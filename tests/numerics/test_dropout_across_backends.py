"""Dropout is a function of seed and position: the same weights fall on every backend, forward, backward and again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from runners import BACKENDS, RUNNERS, Backend, Runner, finest_dtype
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashtile.spec import dropout
from flashtile.testing import Call, CallSpec, make_tensor

SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63)]
SEQLEN_Q, SEQLEN_KV, HEADS = 19, 37, 3


def one_hot_call(seed: int | Tensor | None, dropout_p: float, batch: int = 2) -> Call:
    """Equal weights and one-hot values: out shows which weights survive, d_v the same from the backward."""
    q, k = torch.zeros(batch, SEQLEN_Q, HEADS, 4), torch.zeros(batch, SEQLEN_KV, HEADS, 4)
    v = torch.eye(SEQLEN_KV)[None, :, None, :].expand(batch, -1, HEADS, -1)
    return Call(q=q, k=k, v=v, options={"dropout_p": dropout_p, "dropout_seed": seed})


def contract(seed: int, dropout_p: float, batch: int = 2) -> Tensor:
    """[batch, seqlen_q, heads, seqlen_kv], True where the contract keeps the weight."""
    return dropout.keep_mask(
        torch.tensor(seed),
        dropout_p=dropout_p,
        batch_idx=torch.arange(batch)[:, None, None, None],
        head_idx=torch.arange(HEADS)[:, None, None],
        q_pos=torch.arange(SEQLEN_Q)[:, None],
        kv_begin=0,
        kv_end=SEQLEN_KV,
    ).transpose(1, 2)


@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_forward_and_backward_drop_what_the_contract_says(runner: Runner, seed: int, dropout_p: float) -> None:
    """FA#612: the backward drew another mask than the forward."""
    call, kept = one_hot_call(seed, dropout_p), contract(seed, dropout_p)
    survivor = 1 / SEQLEN_KV / (1 - dropout_p)
    for row in (0, 7, SEQLEN_Q - 1):
        d_out = torch.zeros(call.out_shape)
        d_out[:, row] = 1.0  # d_v[j] then counts the weight that key j has for this query
        results = runner.run(call, d_out, None)
        torch.testing.assert_close(results.out, kept * survivor)
        d_v = results.gradients["v"][..., 0].transpose(1, 2)  # [batch, heads, seqlen_kv]
        torch.testing.assert_close(d_v, kept[:, row] * survivor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_drop_like_dense_ones(backend: Backend) -> None:
    spec = CallSpec(
        lengths_q=(9, 9), lengths_kv=(14, 14), heads_kv=2, dropout_p=0.5, seed=3, dtype=finest_dtype(backend)
    )
    dense = backend.forward(spec.build())
    packed = backend.forward(replace(spec, is_packed=True).build())
    torch.testing.assert_close(packed, dense.flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_may_be_a_number_or_a_tensor(backend: Backend) -> None:
    by_number, by_tensor, other = (
        backend.forward(one_hot_call(seed, 0.5)) for seed in (12, torch.tensor(12), torch.tensor(13))
    )
    assert torch.equal(by_number, by_tensor)
    assert not torch.equal(by_number, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_torchs_generator_decides(backend: Backend) -> None:
    def draw(manual_seed: int) -> Tensor:
        torch.manual_seed(manual_seed)
        return backend.forward(one_hot_call(None, 0.5))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    torch.manual_seed(5)
    assert not torch.equal(backend.forward(one_hot_call(None, 0.5)), backend.forward(one_hot_call(None, 0.5)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_recomputes_the_same_mask(
    backend: Backend, options: dict[str, Any], use_reentrant: bool
) -> None:
    """FA#612: with a seed from torch's generator, recomputing in the backward must not draw a new one."""
    x = make_tensor((2, 24, 2, 8), dtype=finest_dtype(backend)).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return backend.forward(Call(q=x, k=x * 0.5, v=x.sin(), options=options | {"dropout_p": 0.3}))

    torch.manual_seed(11)
    expected_out = layer(x)
    (expected,) = torch.autograd.grad(expected_out.square().sum(), [x])
    torch.manual_seed(11)
    out = checkpoint(layer, x, use_reentrant=use_reentrant)
    assert isinstance(out, Tensor)
    x.grad = None
    out.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(out, expected_out)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_ignores_dropout(backend: Backend) -> None:
    spec = CallSpec(lengths_q=(9,), lengths_kv=(14,), seed=3)
    _, lse = backend.forward_with_lse(spec.build())
    _, lse_dropped = backend.forward_with_lse(replace(spec, dropout_p=0.6).build())
    torch.testing.assert_close(lse_dropped, lse)

"""Bugs that other attention kernels shipped with, and that a test here keeps out: sizes at which indices overflow.

A window keeps these calls cheap. It also makes the last rows of a call a small call of their own: both end at the same
token, so the bottom-right alignment is the same, and queries further back see none of the last keys.

Docstrings cite the report where it has a number: FA flash-attention, PT PyTorch, XF xformers, HF transformers,
TR Triton.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runners import BACKENDS, CPU, NAIVE, Backend, check
from torch import Tensor

import flashtile
from flashtile.spec import dropout
from flashtile.testing import (
    Call,
    CallSpec,
    Results,
    assert_results_within_budget,
    make_tensor,
)

LEFT = 40
"""Reach of the window in these tests, in keys."""
ROWS = 64
"""How many of the last rows are compared with the oracle."""


def assert_last_rows_within_budget(results: Results, call: Call, d_out: Tensor, d_lse: Tensor) -> None:
    """Checks out, lse and gradients of the last rows of a dense call with ``window=(LEFT, 0)`` and no other option."""
    assert call.options["window"] == (LEFT, 0)
    q, k, v = call.q[:, -ROWS:], call.k[:, -ROWS - LEFT :], call.v[:, -ROWS - LEFT :]
    tail = Call(q=q, k=k, v=v, options={"window": (LEFT, 0)})
    d_out, d_lse = d_out[:, -ROWS:], d_lse[:, :, -ROWS:]
    gradients = {"q": results.gradients["q"][:, -ROWS:]}
    assert_results_within_budget(
        Results(out=results.out[:, -ROWS:], lse=results.lse[:, :, -ROWS:], gradients=gradients),
        tail,
        d_out=d_out,
        d_lse=d_lse,
        is_small=True,
    )
    expected = CPU.run(tail, d_out, d_lse)  # within the budget as other tests show, and with the gradients of k and v
    for name in ("k", "v"):  # the first LEFT keys of the tail are seen by earlier queries too
        found, wanted = (part.gradients[name][:, -ROWS:] for part in (results, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seqlen", [65537, 73728, 98304])
def test_lengths_beyond_two_to_the_16(seqlen: int) -> None:
    """PT#187227: seqlen 65537, 73728, 98304, where an offset into the score matrix passes 2**32, was silently wrong."""
    spec = CallSpec(lengths_q=(seqlen,), lengths_kv=(seqlen,), window=(LEFT, 0), head_dim=4, head_dim_v=4)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    results = CPU.run(call, d_out, d_lse)
    assert_last_rows_within_budget(results, call, d_out, d_lse)


def test_dropout_beyond_two_to_the_16() -> None:
    """PT#187227: the dropout counter overflowed with the offset; the last rows drop what the contract says."""
    seqlen, dropout_p, seed = 98304, 0.5, 77
    q, k = torch.zeros(1, seqlen, 1, 1), torch.zeros(1, seqlen, 1, 1)  # every weight is 1 / (LEFT + 1)
    powers = 2.0 ** (torch.arange(seqlen) % (LEFT + 1))  # so the sum of the kept values names the kept keys
    v = powers[None, :, None, None].double()
    q, k = q.double(), k.double()
    out = flashtile.attention(q, k, v, window=(LEFT, 0), dropout_p=dropout_p, dropout_seed=seed)
    for row in (seqlen - 1, seqlen - 37, 65536, 65535):
        keep = dropout.keep_mask(
            torch.tensor(seed),
            dropout_p=dropout_p,
            batch_idx=torch.tensor(0),
            head_idx=torch.tensor(0),
            q_pos=torch.tensor([[row]]),
            kv_begin=row - LEFT,
            kv_end=row + 1,
        )
        kept_values = (powers[row - LEFT : row + 1].double() * keep[0]).sum()
        assert out[0, row, 0, 0].item() == pytest.approx(kept_values.item() * 2 / (LEFT + 1), rel=1e-13)


def test_mask_of_more_than_two_to_the_31_elements() -> None:
    """A mask above 2**31 elements, here expanded so that it costs nothing."""
    seqlen = 65537
    shows = torch.arange(seqlen) % 3 != 0
    spec = CallSpec(lengths_q=(seqlen,), lengths_kv=(seqlen,), window=(LEFT, 0), head_dim=4, head_dim_v=4)
    call = spec.build()
    mask = shows.expand(1, 1, seqlen, seqlen)
    assert mask.numel() > 2**31
    call = replace(call, options=call.options | {"mask": mask})
    with torch.no_grad():
        out, lse = CPU.forward_with_lse(call)
    tail = Call(
        q=call.q[:, -ROWS:],
        k=call.k[:, -ROWS - LEFT :],
        v=call.v[:, -ROWS - LEFT :],
        options={"window": (LEFT, 0), "mask": shows[-ROWS - LEFT :]},
    )
    results = Results(out=out[:, -ROWS:], lse=lse[:, :, -ROWS:])
    assert_results_within_budget(results, tail, is_small=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_beyond_two_to_the_16(backend: Backend, dtype: torch.dtype) -> None:
    """PT#142228, PT#146704: batch 65537 exceeded a grid's limit."""
    q, k, v, d_out = (make_tensor((65537, 2, 1, 4), dtype=dtype, seed=seed) for seed in range(4))
    results = backend.run(Call(q=q, k=k, v=v), d_out, None)
    for some in (slice(0, 9), slice(65530, 65537)):
        part = Results(
            out=results.out[some],
            lse=results.lse[some],
            gradients={name: gradient[some] for name, gradient in results.gradients.items()},
        )
        call = Call(q=q[some], k=k[some], v=v[some])
        assert_results_within_budget(part, call, d_out=d_out[some], is_small=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_beyond_two_to_the_16(backend: Backend) -> None:
    """PT#142228, PT#146704: 65537 heads exceeded a grid's limit."""
    spec = CallSpec(lengths_q=(2,), lengths_kv=(3,), heads_kv=65537, head_dim=4, head_dim_v=4, causal=True)
    check(backend, spec, is_small=False)


def test_backward_of_a_batch_of_12000() -> None:
    """FA#1500: batch 10-15k in the backward."""
    spec = CallSpec(lengths_q=(3,) * 12_000, lengths_kv=(3,) * 12_000, head_dim=4, head_dim_v=4)
    call, (d_out, _) = spec.build(), spec.build_upstream()
    found, expected = (backend.run(call, d_out, None).named() for backend in (CPU, NAIVE))
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_backward_of_1500_packed_sequences() -> None:
    """FA#1500: many packed sequences in the backward, lengths 0 to 4."""
    lengths = tuple(idx % 5 for idx in range(1500))
    spec = CallSpec(lengths_q=lengths, lengths_kv=lengths[::-1], is_packed=True, head_dim=4, head_dim_v=4)
    check(CPU, spec)


def test_190485_packed_tokens() -> None:
    """190,485 packed tokens in sequences of very different lengths."""
    lengths = (100_000, 1, 60_000, 484, 30_000)
    assert sum(lengths) == 190_485
    spec = CallSpec(lengths_q=lengths, lengths_kv=lengths, is_packed=True, window=(LEFT, 0), head_dim=4, head_dim_v=4)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    results = CPU.run(call, d_out, d_lse)
    for end in (100_000, 160_001, 160_485, 190_485):
        rows = slice(end - ROWS - LEFT, end)
        alone = Call(q=call.q[None, rows], k=call.k[None, rows], v=call.v[None, rows], options={"window": (LEFT, 0)})
        gradients = {name: gradient[None, rows] for name, gradient in results.gradients.items()}
        part = Results(out=results.out[None, rows], lse=results.lse[None, :, rows], gradients=gradients)
        assert_last_rows_within_budget(part, alone, d_out[None, rows], d_lse[None, :, rows])

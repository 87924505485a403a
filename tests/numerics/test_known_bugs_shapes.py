"""Bugs that other attention kernels shipped with, and that a test here keeps out: tails and unusual dimensions.

Docstrings cite the report where it has a number: FA flash-attention, PT PyTorch, XF xformers, HF transformers,
TR Triton.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runners import BACKENDS, CPU, RUNNERS, Backend, Runner, assert_same, check

from flashtile.testing import CallSpec

SIXTEEN_BIT_TOO = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_TOO, ids=str)
@pytest.mark.parametrize("seqlen_kv", [1, 33, 65, 97, 513])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_beyond_a_multiple_of_32(backend: Backend, seqlen_kv: int, dtype: torch.dtype) -> None:
    """PT#191937: seqlen_kv % 32 == 1 with stride-0 k and v, head_dim 512 and a mask."""
    spec = CallSpec(lengths_q=(5,), lengths_kv=(seqlen_kv,), heads_kv=2, head_dim=512, head_dim_v=512, dtype=dtype)
    shared = replace(spec, strides_k="shared_heads", strides_v="shared_heads")
    check(backend, replace(shared, mask_axes="bhqk"))
    check(backend, shared)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_TOO, ids=str)
@pytest.mark.parametrize("seqlen", [38, 39, 70])
@pytest.mark.parametrize("runner", RUNNERS)
def test_lengths_that_fill_no_tile(runner: Runner, seqlen: int, dtype: torch.dtype) -> None:
    """PT#169222: lengths 38, 39 and 70."""
    spec = CallSpec(lengths_q=(seqlen,), lengths_kv=(seqlen,), heads_kv=2, head_dim=64, head_dim_v=64, dtype=dtype)
    check(runner, spec, is_small=False)
    check(runner, replace(spec, causal=True), is_small=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dim_100_packed(backend: Backend) -> None:
    """head_dim 100 over cu [0, 15, 100, 300, 1200, 2000]; dQ was 82% off."""
    lengths = (15, 85, 200, 900, 800)
    spec = CallSpec(lengths_q=lengths, lengths_kv=lengths, is_packed=True, head_dim=100, head_dim_v=100, causal=True)
    check(backend, spec, is_small=False)


@pytest.mark.parametrize("head_dim", [72, 100])
@pytest.mark.parametrize("runner", RUNNERS)
def test_head_dim_72_repeats(runner: Runner, head_dim: int) -> None:
    """At head_dim 72 repeated runs differed."""
    spec = CallSpec(lengths_q=(50,), lengths_kv=(50,), heads_kv=2, head_dim=head_dim, head_dim_v=head_dim, causal=True)
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    first = runner.run(call, d_out, d_lse).named()
    for _ in range(5):
        again = runner.run(call, d_out, d_lse).named()
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(16, 64), (64, 16), (1, 40), (40, 1), (192, 128), (3, 5)])
@pytest.mark.parametrize("runner", RUNNERS)
def test_different_head_dims_of_keys_and_values(runner: Runner, head_dim: int, head_dim_v: int) -> None:
    """head_dim < head_dim_v and the reverse."""
    spec = CallSpec(lengths_q=(20,), lengths_kv=(30,), heads_kv=2, head_dim=head_dim, head_dim_v=head_dim_v)
    check(runner, spec)
    check(runner, replace(spec, causal=True, has_sinks=True))


@pytest.mark.parametrize(("heads_kv", "heads_per_kv"), [(2, 4), (4, 2), (3, 5)])
@pytest.mark.parametrize("runner", RUNNERS)
def test_more_or_fewer_kv_heads_than_a_group(runner: Runner, heads_kv: int, heads_per_kv: int) -> None:
    """heads_kv mistaken for the group size shows only where the two differ."""
    spec = CallSpec(lengths_q=(20,), lengths_kv=(30,), heads_kv=heads_kv, heads_per_kv=heads_per_kv)
    check(runner, replace(spec, alibi="per head", has_sinks=True, bias_axes="h", dropout_p=0.2))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_TOO, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_one_query_over_1024_keys(backend: Backend, dtype: torch.dtype) -> None:
    """Decoding, q [1, 1, 32, 128] over k and v [1, 1024, 2, 128]; causal hides nothing from the last query."""
    spec = CallSpec(lengths_q=(1,), lengths_kv=(1024,), heads_kv=2, heads_per_kv=16, head_dim=128, head_dim_v=128)
    plain = check(backend, replace(spec, dtype=dtype), is_small=False)
    causal = check(backend, replace(spec, dtype=dtype, causal=True), is_small=False)
    assert_same(plain.out, causal.out, backend, "out")


@pytest.mark.parametrize("dtype", SIXTEEN_BIT_TOO, ids=str)
@pytest.mark.parametrize("runner", RUNNERS)
def test_backward_without_causality(runner: Runner, dtype: torch.dtype) -> None:
    """TR#5660, TR#4174: the non-causal backward of a tutorial kernel was wrong, and only the causal one was tested."""
    spec = CallSpec(lengths_q=(130,), lengths_kv=(130,), heads_kv=2, head_dim=64, head_dim_v=64, dtype=dtype)
    check(runner, spec, is_small=False, has_d_lse=False)


def test_backward_without_causality_over_many_tiles() -> None:
    """TR#5660, TR#4174: the same across several tiles of the CPU planner, both without and with an lse gradient."""
    spec = CallSpec(lengths_q=(600,), lengths_kv=(1100,), head_dim=32, head_dim_v=32)
    check(CPU, spec, is_small=False, has_d_lse=False)
    check(CPU, spec, is_small=False)

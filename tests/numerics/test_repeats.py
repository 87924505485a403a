"""Bitwise repeats, and independence of a sequence's result from what else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from runners import BACKENDS, CPU, FUSED, TILED, TILED_16BIT, Backend, Runner

from flashtile.testing import Call, CallSpec

REPEATS = 25
MIXED: dict[str, Any] = {
    "causal": True,
    "softcap": 5.0,
    "bias_axes": "hk",
    "alibi": "per head",
    "has_sinks": True,
    "dropout_p": 0.2,
}


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_repeats(runner: Runner, spec: CallSpec, *, has_d_lse: bool, num_threads: int) -> None:
    call, (d_out, d_lse) = spec.build(), spec.build_upstream()
    with threads(num_threads):
        first = runner.run(call, d_out, d_lse if has_d_lse else None).named()
        for _ in range(REPEATS):
            again = runner.run(call, d_out, d_lse if has_d_lse else None).named()
            assert all(torch.equal(again[name], first[name]) for name in first)


SPEC = CallSpec(lengths_q=(70, 70), lengths_kv=(70, 70), heads_kv=2, heads_per_kv=3, head_dim=40, head_dim_v=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_repeat_bitwise(backend: Backend, dtype: torch.dtype) -> None:
    """FA#1893, FA#2244: grouped heads, repeated many times on several threads: the same bits, backward included."""
    assert_repeats(backend, replace(SPEC, dtype=dtype, **MIXED), has_d_lse=True, num_threads=2)


@pytest.mark.parametrize("runner", [pytest.param(TILED, id="tiled"), pytest.param(TILED_16BIT, id="tiled_16bit")])
def test_many_tiles_repeat_bitwise(runner: Runner) -> None:
    """FA#1893: the same where every row is gathered from several tiles."""
    spec = replace(SPEC, lengths_q=(30, 30), lengths_kv=(30, 30), dtype=torch.bfloat16, **MIXED)
    assert_repeats(runner, spec, has_d_lse=True, num_threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_fused_op_repeats_bitwise(dtype: torch.dtype) -> None:
    """FA#1893: the same for the plain calls that torch's op serves."""
    spec = replace(SPEC, lengths_q=(300,), lengths_kv=(300,), causal=True, dtype=dtype)
    assert_repeats(FUSED, spec, has_d_lse=False, num_threads=2)


def alone(call: Call, batch_idx: int) -> Call:
    """One sequence of a dense call."""
    one = slice(batch_idx, batch_idx + 1)
    return replace(call, q=call.q[one], k=call.k[one], v=call.v[one])


@pytest.mark.parametrize("seqlen", [1, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0, "window": (20, 0)}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_sequence_does_not_depend_on_its_neighbours(
    backend: Backend, options: dict[str, Any], dtype: torch.dtype, seqlen: int
) -> None:
    spec = CallSpec(lengths_q=(seqlen,) * 5, lengths_kv=(seqlen,) * 5, heads_kv=2, heads_per_kv=2, head_dim=64)
    call = replace(spec, head_dim_v=64, dtype=dtype, **options).build()
    out, lse = backend.forward_with_lse(call)
    for batch_idx in (0, 4):
        out_alone, lse_alone = backend.forward_with_lse(alone(call, batch_idx))
        assert torch.equal(out[batch_idx], out_alone[0])
        assert torch.equal(lse[batch_idx], lse_alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"alibi": "per head", "has_sinks": True}], ids=str)
def test_a_packed_sequence_does_not_depend_on_its_neighbours(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Not for the naive formula: it pads to the longest sequence, so the neighbours decide the order of its sums."""
    lengths_q, lengths_kv = (40, 300, 7), (50, 290, 600)
    spec = CallSpec(lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, heads_kv=2, heads_per_kv=2, dtype=dtype)
    call = replace(spec, **options).build()
    out, lse = CPU.forward_with_lse(call)
    shared = {name: value for name, value in call.options.items() if not name.startswith(("cu_seqlens", "max_seqlen"))}
    q_begin = kv_begin = 0
    for seqlen_q, seqlen_kv in zip(lengths_q, lengths_kv, strict=True):
        q_rows, kv_rows = slice(q_begin, q_begin + seqlen_q), slice(kv_begin, kv_begin + seqlen_kv)
        one = Call(q=call.q[None, q_rows], k=call.k[None, kv_rows], v=call.v[None, kv_rows], options=shared)
        # A mask that hides nothing keeps the dense call on the tiles, where torch's fused op could serve it.
        one = replace(one, options=shared | {"mask": torch.ones((), dtype=torch.bool)})
        out_alone, lse_alone = CPU.forward_with_lse(one)
        assert torch.equal(out[q_rows], out_alone[0])
        assert torch.equal(lse[:, q_rows], lse_alone[0])
        q_begin, kv_begin = q_begin + seqlen_q, kv_begin + seqlen_kv

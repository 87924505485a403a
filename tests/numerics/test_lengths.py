"""Sequence lengths at the edges of tiles: 0, 1, and one less, exactly, one more than a tile, of both axes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runners import CPU, NAIVE, RUNNERS, TILED_16BIT, Runner, check

from flashtile.backends.cpu.plan import FEW_HEADS, LONG, TILES, WIDE
from flashtile.testing import CallSpec

SMALL_Q, SMALL_KV = (0, 1, 7, 8, 9), (0, 1, 15, 16, 17, 33)
CPU_Q, CPU_KV = ([block - 1, block, block + 1] for block in (TILES.block_q, TILES.block_kv))


@pytest.mark.parametrize("seqlen_kv", SMALL_KV)
@pytest.mark.parametrize("seqlen_q", SMALL_Q)
@pytest.mark.parametrize("runner", RUNNERS)
def test_edges_of_small_tiles(runner: Runner, seqlen_q: int, seqlen_kv: int) -> None:
    spec = CallSpec(lengths_q=(seqlen_q,) * 2, lengths_kv=(seqlen_kv,) * 2, heads_per_kv=2, dtype=torch.float64)
    check(runner, spec)
    check(runner, replace(spec, causal=True, has_sinks=True))
    check(runner, replace(spec, window=(5, 2), bias_axes="hqk", mask_axes="bk"))


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("runner", RUNNERS)
def test_scale_that_is_not_positive(runner: Runner, causal: bool, scale: float) -> None:
    """-inf times a scale of 0 is NaN, and times a negative one +inf: masks come after the scale."""
    spec = CallSpec(lengths_q=(20,), lengths_kv=(20,), causal=causal, scale=scale)
    check(runner, spec, has_d_lse=False)
    check(runner, replace(spec, window=(3, 2)))


@pytest.mark.parametrize("seqlen_kv", CPU_KV)
@pytest.mark.parametrize("seqlen_q", CPU_Q)
@pytest.mark.parametrize("causal", [False, True])
def test_edges_of_the_cpu_planners_tiles(causal: bool, seqlen_q: int, seqlen_kv: int) -> None:
    check(CPU, CallSpec(lengths_q=(seqlen_q,), lengths_kv=(seqlen_kv,), causal=causal))


@pytest.mark.parametrize("runner", RUNNERS)
def test_packed_lengths_at_the_edges_of_tiles(runner: Runner) -> None:
    lengths_q = (7, 0, 8, 9, 1, 16, 0, 17, 15)
    lengths_kv = (15, 16, 0, 17, 1, 8, 0, 33, 7)
    spec = CallSpec(lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, heads_kv=2, heads_per_kv=2)
    check(runner, spec)
    check(runner, replace(spec, causal=True))
    check(runner, replace(spec, window=(4, 4), unused_rows=5, unused_length=3, bias_axes="bhqk"))


@pytest.mark.parametrize("runner", RUNNERS)
def test_all_sequences_empty(runner: Runner) -> None:
    results = check(runner, CallSpec(lengths_q=(0, 0), lengths_kv=(0, 0), is_packed=True, unused_rows=4))
    assert results.lse.tolist() == [[-torch.inf] * 4]


@pytest.mark.parametrize("runner", RUNNERS)
def test_no_sequence_at_all(runner: Runner) -> None:
    check(runner, CallSpec(lengths_q=(), lengths_kv=()))
    check(runner, CallSpec(lengths_q=(), lengths_kv=(), is_packed=True, unused_rows=2, bias_axes="k"))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(3, 20), (20, 3), (1, 40), (40, 1)])
@pytest.mark.parametrize("window", [(None, 0), (0, 0), (2, 0), (0, None), (None, 5), (30, 30)], ids=str)
def test_different_lengths_are_aligned_at_the_bottom_right(
    runner: Runner, window: tuple[int | None, int | None], seqlen_q: int, seqlen_kv: int
) -> None:
    check(runner, CallSpec(lengths_q=(seqlen_q,), lengths_kv=(seqlen_kv,), window=window, dtype=torch.float64))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [100.0, 1000.0])
def test_huge_logits(runner: Runner, spread: float, dtype: torch.dtype) -> None:
    check(runner, CallSpec(lengths_q=(20,), lengths_kv=(35,), spread=spread, dtype=dtype))


def test_16_bit_products_cross_the_edges_of_tiles() -> None:
    for seqlen_q in SMALL_Q:
        for seqlen_kv in SMALL_KV:
            spec = CallSpec(lengths_q=(seqlen_q,), lengths_kv=(seqlen_kv,), dtype=torch.bfloat16, causal=True)
            check(TILED_16BIT, spec)


@pytest.mark.parametrize("heads", [FEW_HEADS, FEW_HEADS + 1])
def test_more_keys_than_the_planner_calls_short(heads: int) -> None:
    spec = CallSpec(lengths_q=(530,), lengths_kv=(LONG + 5,), heads_kv=heads, head_dim=WIDE, head_dim_v=WIDE)
    check(CPU, replace(spec, dtype=torch.bfloat16, causal=True), is_small=False)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (1, 3), (2, 4), (5, 2)], ids=str)
def test_head_groups(heads: tuple[int, int]) -> None:
    heads_kv, heads_per_kv = heads
    spec = CallSpec(lengths_q=(10,), lengths_kv=(20,), heads_kv=heads_kv, heads_per_kv=heads_per_kv)
    for runner in (CPU, NAIVE):
        check(runner, spec)
        check(runner, replace(spec, alibi="per sequence", has_sinks=True, mask_axes="hqk"))

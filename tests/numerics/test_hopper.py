"""The Hopper kernels against the float64 oracle, on the GPU; Gluon has no interpreter. ``test_hopper_emulated.py`` runs
their Python without one.

Calls that the backend declines are skipped for the reason that it gives; other numerics tests run it as one of the
``BACKENDS``, and ``tests/compile/test_hopper_compiles.py`` compiles its kernels anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from options import OPTIONS
from runners import HOPPER, HOPPER_MARKS, check, nearest
from torch import Tensor

import flashtile
from flashtile.backends.hopper import plan
from flashtile.testing import CallSpec, cu_seqlens_of, draw_spec, make_tensor

pytestmark = HOPPER_MARKS

DTYPES = [torch.float16, torch.bfloat16]
WIDTHS = [64, 128, 256]
PLAIN = CallSpec(
    lengths_q=(300, 300), lengths_kv=(390, 390), heads_kv=2, head_dim=128, head_dim_v=128, dtype=torch.bfloat16
)
FORWARD_TILES = [tiles for steps in plan._FORWARD.values() for _, tiles in steps]
BACKWARD_TILES = [tiles for steps in plan._BACKWARD.values() for _, tiles in steps]
EDGES = sorted(
    {0, 1, 2, 40, 300, 700}
    | {
        block + offset
        for tiles in (*FORWARD_TILES, *BACKWARD_TILES)
        for block in (tiles.block_q, tiles.block_kv)
        for offset in (-1, 0, 1)
    }
)
"""Sequence lengths around every tile."""
MIXES_IN_A_CHUNK = 15


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


def wide(head_dim: int, /, **changes: Any) -> CallSpec:
    return replace(PLAIN, **({"head_dim": head_dim, "head_dim_v": head_dim} | changes))


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_alone(name: str, head_dim: int, dtype: torch.dtype) -> None:
    check(HOPPER, replace(wide(head_dim, **OPTIONS[name]), dtype=dtype), is_small=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(16, 16), (64, 64), (72, 72), (128, 128), (192, 128), (192, 192), (256, 256), (33, 250)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_real_sizes(causal: bool, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    spec = replace(PLAIN, lengths_q=(1100,), lengths_kv=(1700,), heads_per_kv=2, causal=causal, dtype=dtype)
    check(HOPPER, replace(spec, head_dim=head_dim, head_dim_v=head_dim_v), is_small=False)


@pytest.mark.parametrize("chunk", range(12))
def test_random_mixes(chunk: int) -> None:
    """A fixed number of calls that the backend takes, always the same: what it declines is drawn again."""
    rng = Random(chunk)
    done = 0
    while done < MIXES_IN_A_CHUNK:
        spec = nearest(HOPPER, draw_spec(rng, dtypes=DTYPES, lengths=EDGES, max_head_dim=plan.LARGEST_HEAD_DIM))
        has_d_out, has_d_lse = rng.choice(((True, True), (True, True), (True, False), (False, True)))
        if not HOPPER.reasons(spec):  # of an empty call nothing can be left out
            check(HOPPER, spec, has_d_out=has_d_out, has_d_lse=has_d_lse)
            done += 1


@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("name", ["causal", "window", "ALiBi per sequence", "softcap", "sinks"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_options_of_long_calls(is_packed: bool, name: str, head_dim: int) -> None:
    """They have other tiles, another order of heads, and loops of their own for what a mask hides nothing of."""
    lengths_q, lengths_kv = ((1300, 1100, 0, 70), (1000, 1800, 9, 1200)) if is_packed else ((1300,), (1900,))
    spec = wide(head_dim, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=is_packed, heads_per_kv=2)
    check(HOPPER, replace(spec, **OPTIONS[name]), is_small=False)
    if name == "window":
        check(HOPPER, replace(spec, window=(700, 300)), is_small=False)


@pytest.mark.parametrize(("width", "is_causal"), plan._FORWARD, ids=str)
def test_edges_of_every_tile(width: int, is_causal: bool) -> None:
    forward = [tiles for _, tiles in plan._FORWARD[width, is_causal]]
    for block_q, block_kv in {(tiles.block_q, tiles.block_kv) for tiles in (*forward, *BACKWARD_TILES)}:
        for seqlen_q in (1, block_q - 1, block_q, block_q + 1, 2 * block_q + 1):
            for seqlen_kv in (1, block_kv - 1, block_kv, block_kv + 1, 3 * block_kv + 1):
                check(HOPPER, wide(width, lengths_q=(seqlen_q,), lengths_kv=(seqlen_kv,), causal=is_causal))


@pytest.mark.parametrize("head_dim", [40, *WIDTHS])
@pytest.mark.parametrize("heads_per_kv", [2, 7, 64, 130])
def test_one_query_of_heads_that_share_keys(heads_per_kv: int, head_dim: int) -> None:
    """They are rows of one tile, as long as nothing tells them apart."""
    spec = wide(head_dim, lengths_q=(1, 1), lengths_kv=(1000, 1000), heads_per_kv=heads_per_kv)
    check(HOPPER, spec)
    check(HOPPER, replace(spec, causal=True, strides_q="heads_first", dtype=torch.float16))
    check(HOPPER, replace(spec, heads_kv=1, strides_q="every_other", strides_k="heads_first", lengths_kv=(77, 77)))
    check(HOPPER, replace(spec, has_sinks=True, alibi="per head"))


@pytest.mark.parametrize("head_dim", [40, *WIDTHS])
@pytest.mark.parametrize("seqlen_kv", [2100, 5000, 16384])
def test_few_queries_of_many_keys(seqlen_kv: int, head_dim: int) -> None:
    """Keys are split, and the results of the parts combined."""
    spec = wide(head_dim, lengths_q=(1, 1), lengths_kv=(seqlen_kv,) * 2)
    check(HOPPER, replace(spec, heads_per_kv=4, causal=True))
    check(HOPPER, replace(spec, heads_kv=8, dtype=torch.float16, strides_k="heads_first"))
    check(HOPPER, replace(spec, has_sinks=True, alibi="per head", strides_q="every_other"))
    spec = replace(spec, lengths_q=(30, 30), heads_per_kv=2)
    check(HOPPER, replace(spec, causal=True, has_sinks=True, spread=100.0))
    check(HOPPER, replace(spec, window=(900, None)))  # some parts have nothing
    check(HOPPER, replace(spec, window=(4000, 10), has_sinks=True))


@pytest.mark.parametrize("head_dim", WIDTHS)
def test_many_queries_of_many_more_keys(head_dim: int) -> None:
    """Tiles full of rows, and rows that see nothing."""
    check(HOPPER, wide(head_dim, lengths_q=(300,), lengths_kv=(16384,), causal=True), is_small=False)
    check(HOPPER, wide(head_dim, lengths_q=(1300,), lengths_kv=(13000,), heads_kv=1, causal=True), is_small=False)
    length = 12600 if head_dim == 64 else 8400  # 66 blocks, of 192 rows and of 128
    results = check(HOPPER, wide(head_dim, lengths_q=(length,), lengths_kv=(length - 100,), heads_kv=1, causal=True))
    assert bool((results.out[:, :100] == 0).all()) and bool((results.lse[..., :100] == -torch.inf).all())


@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_lengths_around_tiles(causal: bool, head_dim: int) -> None:
    lengths_q = (65, 0, 64, 1, 193, 0, 300, 127, 5)
    lengths_kv = (128, 64, 0, 129, 200, 0, 63, 300, 700)
    spec = wide(head_dim, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, causal=causal, heads_per_kv=2)
    check(HOPPER, spec)
    check(HOPPER, replace(spec, unused_rows=70, unused_length=90))
    check(HOPPER, replace(spec, has_sinks=True, window=(70, 10), strides_k="sliced"))


@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (5, 3)}, {"window": (None, 0), "has_sinks": True}])
def test_rows_that_see_no_key(options: dict[str, Any], head_dim: int) -> None:
    """Whole tiles of them, and parts of tiles: the first queries end before the first key."""
    results = check(HOPPER, wide(head_dim, lengths_q=(400, 400), lengths_kv=(90, 90), **options))
    first_rows = slice(0, 300)
    assert bool((results.out[:, first_rows] == 0).all())
    assert bool((results.gradients["q"][:, first_rows] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("spread", [100.0, 1000.0])
def test_huge_logits(spread: float, head_dim: int, dtype: torch.dtype) -> None:
    check(HOPPER, wide(head_dim, spread=spread, dtype=dtype))
    check(HOPPER, wide(head_dim, spread=spread, dtype=dtype, causal=True, has_sinks=True))


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize(("has_d_out", "has_d_lse"), [(True, False), (False, True), (True, True)])
def test_gradients_of_out_and_of_the_lse(has_d_out: bool, has_d_lse: bool, head_dim: int, is_packed: bool) -> None:
    spec = wide(head_dim, is_packed=is_packed, causal=True, has_sinks=True)
    check(HOPPER, spec, has_d_out=has_d_out, has_d_lse=has_d_lse)


# --- repeats, graphs, neighbours --------------------------------------------------------------------------------------


def inputs(seqlen: int, *, batch: int = 2, heads_kv: int = 2, head_dim: int = 128) -> list[Tensor]:
    """q with eight heads, k and v."""
    shapes = [(batch, seqlen, heads, head_dim) for heads in (8, heads_kv, heads_kv)]
    return [make_tensor(shape, dtype=torch.bfloat16, seed=seed) for seed, shape in enumerate(shapes)]


def attend(*qkv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return flashtile.attention_with_lse(*qkv, backend="hopper", **options)


@pytest.mark.parametrize("head_dim", WIDTHS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (200, 0), "softcap": 20.0}], ids=str)
def test_a_thousand_forwards_are_bitwise_the_same(options: dict[str, Any], head_dim: int) -> None:
    """FA#1893, FA#2244: grouped heads, a busy GPU."""
    qkv = inputs(1020, head_dim=head_dim)
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048)
    expected_out, expected_lse = attend(*qkv, **options)
    differs = torch.zeros((), dtype=torch.bool)
    for _ in range(1000):
        with torch.cuda.stream(other):
            noise = noise @ noise * 1e-3
        out, lse = attend(*qkv, **options)
        differs |= (out.view(torch.int16) != expected_out.view(torch.int16)).any()
        differs |= (lse.view(torch.int32) != expected_lse.view(torch.int32)).any()
    assert not bool(differs)


@pytest.mark.parametrize("num_queries", [1, 50])
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_a_thousand_forwards_of_split_keys_are_bitwise_the_same(head_dim: int, num_queries: int) -> None:
    q, k, v = inputs(6000, head_dim=head_dim)
    q = q[:, :num_queries]
    expected_out, expected_lse = attend(q, k, v, causal=True)
    differs = torch.zeros((), dtype=torch.bool)
    for _ in range(1000):
        out, lse = attend(q, k, v, causal=True)
        differs |= (out.view(torch.int16) != expected_out.view(torch.int16)).any()
        differs |= (lse.view(torch.int32) != expected_lse.view(torch.int32)).any()
    assert not bool(differs)


@pytest.mark.parametrize(("num_queries", "seqlen"), [(777, 777), (1, 3000), (30, 3000)])
@pytest.mark.parametrize("head_dim", WIDTHS)
def test_a_sequence_does_not_depend_on_its_neighbours(head_dim: int, num_queries: int, seqlen: int) -> None:
    q, *kv = inputs(seqlen, batch=40, head_dim=head_dim)
    qkv = [q[:, :num_queries], *kv]
    out, lse = attend(*qkv, causal=True)
    for index in (0, 21, 39):
        out_alone, lse_alone = attend(*(tensor[index : index + 1] for tensor in qkv), causal=True)
        assert torch.equal(out_alone[0], out[index])
        assert torch.equal(lse_alone[0], lse[index])


@pytest.mark.parametrize("head_dim", WIDTHS)
def test_cuda_graph_of_forward_and_backward(head_dim: int) -> None:
    """The sums of d_q come in any order, so they are close and not the same."""
    q, k, v = (tensor.requires_grad_() for tensor in inputs(500, head_dim=head_dim))
    d_out = torch.randn_like(q)

    def run() -> tuple[Tensor, ...]:
        out, lse = attend(q, k, v, causal=True)
        return (out, lse, *torch.autograd.grad(out, (q, k, v), d_out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (q, k, v):
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        for name, replayed, expected in zip(("out", "lse", "q", "k", "v"), captured, run(), strict=True):
            if name == "q":
                torch.testing.assert_close(replayed, expected)
            else:
                assert torch.equal(replayed, expected), name


@pytest.mark.parametrize("head_dim", WIDTHS)
def test_cuda_graph_of_split_keys(head_dim: int) -> None:
    q, k, v = inputs(6000, head_dim=head_dim)
    q = q[:, :3].contiguous()
    attend(q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v)
    for _ in range(3):
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        for replayed, expected in zip(captured, attend(q, k, v), strict=True):
            assert torch.equal(replayed, expected)


def test_cuda_graph_replays_with_other_boundaries() -> None:
    """HF#45323: lengths that change between replays."""
    q, k, v = (make_tensor((900, 8, 128), dtype=torch.bfloat16, seed=seed) for seed in range(3))
    cu_seqlens = cu_seqlens_of((300, 600))
    packing: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
    packing |= {"max_seqlen_q": 900, "max_seqlen_kv": 900, "causal": True, "backend": "hopper"}

    def run() -> Tensor:
        return flashtile.attention_varlen(q, k, v, **packing)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for lengths in ((7, 893), (900, 0), (0, 255)):
        cu_seqlens.copy_(cu_seqlens_of(lengths))
        graph.replay()
        assert torch.equal(captured, run())

"""The Triton kernels against the float64 oracle: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from options import OPTIONS
from runners import HAS_GPU, TRITON, TRITON_SMALL, check, interpreted_without_gpu

from flashtile.backends.triton import constants
from flashtile.backends.triton.arguments import Dropout, Window
from flashtile.spec import dropout, masks
from flashtile.spec.problem import MaskSpec
from flashtile.testing import CallSpec, draw_spec

with interpreted_without_gpu():
    import triton
    import triton.language as tl

    from flashtile.backends.triton.primitives.dropout import survivors
    from flashtile.backends.triton.primitives.masking import kv_tiles, q_tiles
    from flashtile.backends.triton.primitives.scores import near_float


def interpretable(function: Callable[..., None]) -> Any:
    """``triton.jit``, for kernels of this file."""
    with interpreted_without_gpu():
        return triton.jit(function)


DTYPES = [torch.float16, torch.float32]
PLAIN = CallSpec(lengths_q=(40, 40), lengths_kv=(55, 55), heads_kv=2, head_dim=16, head_dim_v=16)
RANDOM_MIXES = 120


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_alone(options: dict[str, Any], dtype: torch.dtype) -> None:
    with torch.device(TRITON_SMALL.device):
        check(TRITON_SMALL, replace(PLAIN, dtype=dtype, **options))


@pytest.mark.parametrize("chunk", range(12))
def test_random_mixes(chunk: int) -> None:
    """Not hypothesis: a case takes a second in the interpreter, so a fixed number of them runs, always the same."""
    rng = Random(chunk)
    with torch.device(TRITON_SMALL.device):
        for _ in range(RANDOM_MIXES // 12):
            spec = draw_spec(rng, dtypes=tuple(DTYPES))
            has_d_out, has_d_lse = rng.choice(((True, True), (True, True), (True, False), (False, True)))
            check(TRITON_SMALL, spec, has_d_out=has_d_out, has_d_lse=has_d_lse)


@pytest.mark.parametrize("seqlen_kv", [1, 31, 32, 33])
@pytest.mark.parametrize("seqlen_q", [0, 1, 15, 16, 17])
def test_edges_of_tiles(seqlen_q: int, seqlen_kv: int) -> None:
    spec = CallSpec(lengths_q=(seqlen_q,), lengths_kv=(seqlen_kv,), head_dim=16, head_dim_v=16)
    with torch.device(TRITON_SMALL.device):
        check(TRITON_SMALL, spec)
        check(TRITON_SMALL, replace(spec, causal=True, has_sinks=True, bias_axes="q"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 128, 192, 256, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_real_tiles_at_real_sizes(causal: bool, head_dim: int, dtype: torch.dtype) -> None:
    spec = CallSpec(
        lengths_q=(700,),
        lengths_kv=(1100,),
        heads_kv=2,
        heads_per_kv=2,
        head_dim=head_dim,
        head_dim_v=head_dim,
        dtype=dtype,
        causal=causal,
    )
    with torch.device("cuda"):
        check(TRITON, spec, is_small=False)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_real_tiles_with_every_option(name: str, head_dim: int) -> None:
    options = {"head_dim": head_dim, "head_dim_v": head_dim} | OPTIONS[name]
    spec = replace(PLAIN, lengths_q=(300, 300), lengths_kv=(390, 390), dtype=torch.bfloat16)
    with torch.device("cuda"):
        check(TRITON, replace(spec, **options), is_small=False)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("name", ["strides_q", "strides_k", "strides_v", "strides_d_out"])
def test_columns_that_are_apart(name: str, head_dim: int) -> None:
    """With those of k apart, and head_dim 17 to 32, ptxas once compiled a forward that read what is not there."""
    spec = replace(PLAIN, lengths_q=(70,), lengths_kv=(90,), dtype=torch.bfloat16, scale=0.3)
    with torch.device("cuda"):
        check(TRITON, replace(spec, head_dim=head_dim, head_dim_v=head_dim, **{name: "every_other"}))


@pytest.mark.skipif(HAS_GPU, reason="on a GPU test_real_tiles_at_real_sizes runs them")
def test_the_interpreter_ran() -> None:
    """That the kernels under test are those that ship, interpreted, and not a skip in disguise."""
    from triton.runtime.interpreter import InterpretedFunction

    from flashtile.backends.triton.forward import attention_forward

    assert isinstance(attention_forward, InterpretedFunction)


def test_the_threshold_of_hidden_scores_is_that_of_the_contract() -> None:
    """The kernels' threshold for hidden scores is that of the specification, less the rounding of one product."""
    exact = masks.HIDDEN_BELOW * constants.LOG2_E
    assert exact < constants.HIDDEN_BELOW_LOG2 < exact * (1 - 2**-21)


@interpretable
def write_near_distances(distances_ptr, shift, SIZE: tl.constexpr):
    idx = tl.arange(0, SIZE)
    tl.store(distances_ptr + idx, near_float(idx) - near_float(idx * 0 - shift))


@pytest.mark.parametrize("shift", [0, 1, -63, 4095, constants.FARTHEST_NEAR - 64, 1 - constants.FARTHEST_NEAR])
def test_near_distances_are_exact(shift: int) -> None:
    with torch.device(TRITON_SMALL.device):
        distances = torch.empty(64, dtype=torch.float32)
        write_near_distances[1,](distances, shift, SIZE=64)
        assert distances.tolist() == [float(shift + idx) for idx in range(64)]


@interpretable
def write_tile_ranges(ranges_ptr, window, seqlen_q, seqlen_kv, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Row 0: the kv tiles of the first query tile and so on; then the q tiles of each kv tile."""
    tile_idx = tl.program_id(0)
    q_end = tl.minimum(tile_idx * BLOCK_Q + BLOCK_Q, seqlen_q)
    found = kv_tiles(window, seqlen_q, seqlen_kv, tile_idx * BLOCK_Q, q_end, BLOCK_KV)
    kv_end = tl.minimum(tile_idx * BLOCK_KV + BLOCK_KV, seqlen_kv)
    turned = q_tiles(window, seqlen_q, seqlen_kv, tile_idx * BLOCK_KV, kv_end, BLOCK_Q)
    for place in tl.static_range(4):
        tl.store(ranges_ptr + tile_idx * 8 + place, found[place])
        tl.store(ranges_ptr + tile_idx * 8 + 4 + place, turned[place])


@pytest.mark.parametrize("window", [(None, None), (None, 0), (5, None), (0, 0), (3, 7), (40, 2)], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(40, 40), (17, 50), (50, 17), (1, 33), (33, 1)])
def test_tile_ranges_are_those_of_the_specification(
    window: tuple[int | None, int | None], seqlen_q: int, seqlen_kv: int
) -> None:
    block_q, block_kv = 8, 16
    num_tiles = 8
    ranges = torch.zeros(num_tiles, 8, dtype=torch.int32, device=TRITON_SMALL.device)
    write_tile_ranges[(num_tiles,)](ranges, Window(*window), seqlen_q, seqlen_kv, BLOCK_Q=block_q, BLOCK_KV=block_kv)
    spec = MaskSpec(left=window[0], right=window[1])
    lengths = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    for tile_idx, found in enumerate(ranges.tolist()):
        q_begin, kv_begin = tile_idx * block_q, tile_idx * block_kv
        if q_begin < seqlen_q:
            q_end = min(q_begin + block_q, seqlen_q)
            wanted = masks.kv_tiles(spec, **lengths, q_begin=q_begin, q_end=q_end, block_kv=block_kv)
            assert found[:4] == [wanted.begin, wanted.full_begin, wanted.full_end, wanted.end]
        if kv_begin < seqlen_kv:
            kv_end = min(kv_begin + block_kv, seqlen_kv)
            wanted = masks.q_tiles(spec, **lengths, kv_begin=kv_begin, kv_end=kv_end, block_q=block_q)
            assert found[4:] == [wanted.begin, wanted.full_begin, wanted.full_end, wanted.end]


@interpretable
def write_survivors(factors_ptr, dropout, batch_idx, head_idx, q_begin, kv_begin):
    factors = survivors(dropout, batch_idx, head_idx, q_begin, kv_begin, 16, 32)
    tl.store(factors_ptr + tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :], factors)


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40 + 7])
def test_dropout_is_that_of_the_specification(seed: int) -> None:
    device = TRITON_SMALL.device
    seed_tensor = torch.tensor(seed, device=device)
    factors = torch.zeros(16, 32, device=device)
    arguments = Dropout(seed_tensor, dropout.drop_threshold(0.25), 1 / 0.75)
    write_survivors[(1,)](factors, arguments, 3, 5, 48, 64)
    position = {"batch_idx": torch.tensor(3, device=device), "head_idx": torch.tensor(5, device=device)}
    q_pos = torch.arange(48, 64, device=device)[:, None]
    keep = dropout.keep_mask(seed_tensor, dropout_p=0.25, **position, q_pos=q_pos, kv_begin=64, kv_end=96)
    assert torch.equal(factors, keep / 0.75)

"""FLOPs, device-memory bytes and extra memory: counted by other means, and measured on the CPU."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashtile
from flashtile.spec import accounting, devices, masks, sizes
from flashtile.spec.accounting import Direction
from flashtile.spec.problem import AttentionProblem
from flashtile.spec.tiling import SplitBackward, Tiling
from flashtile.testing import peak_extra_bytes

SHAPE: dict[str, Any] = {"batch": 2, "seqlen_q": 37, "seqlen_kv": 53, "heads_q": 4, "heads_kv": 2, "head_dim": 16}
MASKS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (9, 4)}, {"window": (None, 3)}, {"window": (5, 0)}]
NO_CACHE = Tiling(block_q=8, block_kv=16, num_programs=4, cache_bytes=0)
BIG_CACHE = replace(NO_CACHE, cache_bytes=2**40)
SPLIT = SplitBackward(q_tiles=(16, 8), rows_block=128)
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def visible(problem: AttentionProblem) -> Tensor:
    """Boolean [seqlen_q, seqlen_kv] of one sequence."""
    q_pos, kv_pos = torch.arange(problem.seqlen_q)[:, None], torch.arange(problem.seqlen_kv)
    return masks.is_visible(problem.mask, q_pos, kv_pos, problem.seqlen_kv - problem.seqlen_q)


def traffic(cost: accounting.Cost, beginning: str) -> int:
    found = [term.num_bytes for term in cost.traffic if term.what.startswith(beginning)]
    assert found, f"no term begins with {beginning!r} among {[term.what for term in cost.traffic]}"
    return sum(found)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_useful_flops_are_those_of_the_visible_pairs(options: dict[str, Any]) -> None:
    problem = sizes.pose(**SHAPE, head_dim_v=24, **options)
    pairs = int(visible(problem).sum()) * 2  # two sequences
    assert accounting.visible_pairs(problem) == pairs
    assert accounting.useful_flops(problem, "forward") == 2 * (16 + 24) * pairs * 4
    # q @ k.T again, d_p = d_out @ v.T, d_v = p.T @ d_out, d_q = d_s @ k, d_k = d_s.T @ q
    assert accounting.useful_flops(problem, "backward") == 2 * (16 + 24 + 24 + 16 + 16) * pairs * 4


def test_the_backward_is_two_and_a_half_forwards() -> None:
    problem = sizes.pose(**SHAPE)
    assert accounting.flops_per_pair(problem, "backward") == 2.5 * accounting.flops_per_pair(problem, "forward")


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_the_naive_formula_multiplies_every_pair_and_tiles_those_of_visited_tiles(options: dict[str, Any]) -> None:
    problem = sizes.pose(**{**SHAPE, "seqlen_q": 40, "seqlen_kv": 64}, **options)
    blocks = visible(problem).reshape(5, 8, 4, 16).any(dim=3).any(dim=1)
    per_pair = accounting.flops_per_pair(problem, "forward") * 4 * 2
    assert accounting.naive_cost(problem, "forward").flops == per_pair * 40 * 64
    assert accounting.tiled_cost(problem, "forward", NO_CACHE).flops == per_pair * int(blocks.sum()) * 8 * 16


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_method_does_less_than_the_useful_work(options: dict[str, Any], direction: Direction) -> None:
    problem = sizes.pose(**SHAPE, **options)
    useful = accounting.useful_flops(problem, direction)
    tiled, naive = accounting.tiled_cost(problem, direction, NO_CACHE), accounting.naive_cost(problem, direction)
    assert useful <= tiled.flops <= naive.flops


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_a_split_backward_multiplies_seven_times_and_each_kernel_in_its_own_tiles(options: dict[str, Any]) -> None:
    problem = sizes.pose(**{**SHAPE, "seqlen_q": 48, "seqlen_kv": 64}, head_dim_v=24, **options)
    of_kv = int(visible(problem).reshape(6, 8, 4, 16).any(dim=3).any(dim=1).sum()) * 8 * 16
    of_q = int(visible(problem).reshape(3, 16, 8, 8).any(dim=3).any(dim=1).sum()) * 16 * 8
    tiling = replace(NO_CACHE, split=SPLIT)
    # q @ k.T and d_out @ v.T in both; d_v = p.T @ d_out and d_k = d_s.T @ q in the first, d_q = d_s @ k in the second
    expected = 2 * 2 * 4 * ((16 + 24 + 24 + 16) * of_kv + (16 + 24 + 16) * of_q)
    assert accounting.tiled_cost(problem, "backward", tiling).flops == expected
    forward = accounting.tiled_cost(problem, "forward", NO_CACHE)
    assert accounting.tiled_cost(problem, "forward", tiling) == forward
    with_bias = replace(tiling, split=replace(SPLIT, bias_tiles=(8, 16)))
    added = accounting.tiled_cost(problem, "backward", with_bias).flops - expected
    assert added == 2 * 2 * 4 * (16 + 24) * of_kv


# --- bytes moved ------------------------------------------------------------------------------------------------------


class BytesMoved(TorchDispatchMode):
    """Sums the bytes of the tensors that each op reads and writes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(tensor.nbytes for tensor in (*args, result) if isinstance(tensor, Tensor))
        return result


def test_naive_forward_traffic_is_that_of_a_program_with_one_op_per_step() -> None:
    problem = sizes.pose(batch=1, seqlen_q=24, seqlen_kv=40, heads_q=3, head_dim=8, head_dim_v=6, dtype=torch.float32)
    q, k, v = torch.randn(3, 24, 8), torch.randn(3, 40, 8), torch.randn(3, 40, 6)
    with BytesMoved() as moved:
        torch.bmm(torch.softmax(torch.bmm(q, k.mT), dim=-1), v)
    lse_bytes = 3 * 24 * 4
    assert accounting.naive_cost(problem, "forward").traffic_bytes == moved.total + lse_bytes


def test_naive_backward_traffic_is_that_of_a_program_with_one_op_per_step() -> None:
    problem = sizes.pose(batch=1, seqlen_q=24, seqlen_kv=40, heads_q=3, head_dim=8, head_dim_v=6, dtype=torch.float32)
    q, k, v = torch.randn(3, 24, 8), torch.randn(3, 40, 8), torch.randn(3, 40, 6)
    out, d_out, lse = torch.randn(3, 24, 6), torch.randn(3, 24, 6), torch.randn(3, 24, 1)
    with BytesMoved() as moved:
        p = torch.sub(torch.bmm(q, k.mT), lse)  # stands for exp(s - lse), which moves the same
        d_s = torch.mul(p, torch.bmm(d_out, v.mT))
        torch.bmm(p.mT, d_out)
        torch.bmm(d_s, k)
        torch.bmm(d_s.mT, q)
    for_delta = out.nbytes + d_out.nbytes
    assert accounting.naive_cost(problem, "backward").traffic_bytes == moved.total + for_delta


def test_tiles_in_a_big_cache_move_each_operand_once() -> None:
    problem = sizes.pose(**SHAPE, head_dim_v=24, dtype=torch.bfloat16)
    q_bytes, k_bytes, v_bytes = 2 * 37 * 4 * 16 * 2, 2 * 53 * 2 * 16 * 2, 2 * 53 * 2 * 24 * 2
    out_bytes, lse_bytes = 2 * 37 * 4 * 24 * 2, 2 * 37 * 4 * 4
    forward = accounting.tiled_cost(problem, "forward", BIG_CACHE).traffic_bytes
    assert forward == q_bytes + k_bytes + v_bytes + out_bytes + lse_bytes
    backward = accounting.tiled_cost(problem, "backward", BIG_CACHE).traffic_bytes
    for_delta = 2 * out_bytes + lse_bytes
    assert backward == 2 * (q_bytes + k_bytes + v_bytes) + out_bytes + for_delta


def test_a_split_backward_in_a_big_cache_reads_every_operand_once_per_kernel() -> None:
    problem = sizes.pose(**SHAPE, head_dim_v=24, dtype=torch.bfloat16, bias_shape=(37, 53), gradients=("q", "bias"))
    inputs = (2 * 37 * 4 * 16 + 2 * 53 * 2 * 16 + 2 * 53 * 2 * 24) * 2
    out_bytes, lse_bytes, statistics = 2 * 37 * 4 * 24 * 2, 2 * 37 * 4 * 4, 2 * (2 * 4 * 128) * 4
    for bias_tiles, num_kernels in ((None, 2), ((8, 16), 3)):
        tiling = replace(BIG_CACHE, split=replace(SPLIT, bias_tiles=bias_tiles))
        moved = accounting.tiled_cost(problem, "backward", tiling).traffic_bytes
        for_delta = 2 * out_bytes + lse_bytes
        each_kernel = inputs + out_bytes + statistics
        assert moved == for_delta + statistics + num_kernels * each_kernel + inputs + 2 * (37 * 53 * 2)


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_without_a_cache_each_visit_of_a_tile_reads_k_and_v(options: dict[str, Any]) -> None:
    problem = sizes.pose(**{**SHAPE, "seqlen_q": 40, "seqlen_kv": 64}, **options)
    blocks = visible(problem).reshape(5, 8, 4, 16).any(dim=3).any(dim=1)
    rows = 2 * 2 * int(blocks.sum()) * 16  # sequences, kv heads, visits, rows of a tile
    assert traffic(accounting.tiled_cost(problem, "forward", NO_CACHE), "read k, v") == rows * (16 + 16) * 2
    rows_of_q = 2 * 4 * int(blocks.sum()) * 8  # sequences, query heads, visits, rows of a tile
    backward = accounting.tiled_cost(problem, "backward", NO_CACHE)
    assert traffic(backward, "read q, d_out") == rows_of_q * (16 + 16) * 2
    assert traffic(backward, "add to d_q") == 2 * rows_of_q * 16 * 4  # float32 sums, read and written
    split = accounting.tiled_cost(problem, "backward", replace(NO_CACHE, split=replace(SPLIT, q_tiles=(8, 16))))
    assert traffic(split, "d_k, d_v: read q, d_out") == rows_of_q * (16 + 16) * 2
    assert traffic(split, "d_q: read k, v") == rows * (16 + 16) * 2
    assert not [term for term in split.traffic if term.what.startswith("add to")]


def test_the_cache_of_a_backward_has_to_hold_the_queries_that_pass_by_and_their_sums() -> None:
    problem = sizes.pose(batch=8, seqlen_q=4096, heads_q=8, heads_kv=4, head_dim=64, dtype=torch.bfloat16)
    group_bytes, group_sums = 2 * 4096 * 2 * 64 * 2, 2 * 4096 * 64 * 4  # two query heads share a kv head

    def is_read_once(cache_bytes: int, split: SplitBackward | None) -> bool:
        tiling = Tiling(block_q=128, block_kv=128, num_programs=64, cache_bytes=cache_bytes, split=split)
        terms = accounting.tiled_cost(problem, "backward", tiling).traffic
        (what,) = [term.what for term in terms if term.what.startswith(("read q, d_out", "d_k, d_v: read q, d_out"))]
        return "once (the cache" in what

    # 4096 / 128 = 32 programs share a kv head: 64 of them work on two at a time.
    assert is_read_once(2 * group_bytes, SPLIT) and not is_read_once(2 * group_bytes - 1, SPLIT)
    with_sums = 2 * (group_bytes + group_sums)
    assert is_read_once(with_sums, None) and not is_read_once(with_sums - 1, None)


def test_the_cache_has_to_hold_what_the_running_programs_share() -> None:
    problem = sizes.pose(batch=8, seqlen_q=4096, heads_q=8, head_dim=64, dtype=torch.bfloat16)
    kv_head_bytes = 4096 * 2 * 64 * 2

    def is_read_once(num_heads_in_cache: int, num_programs: int) -> bool:
        tiling = Tiling(
            block_q=128, block_kv=128, num_programs=num_programs, cache_bytes=num_heads_in_cache * kv_head_bytes
        )
        cost = accounting.tiled_cost(problem, "forward", tiling)
        return traffic(cost, "read k, v") == 8 * 8 * kv_head_bytes

    # 4096 / 128 = 32 programs share a head: 132 of them work on five heads at a time.
    assert is_read_once(5, num_programs=132) and not is_read_once(4, num_programs=132)
    assert is_read_once(1, num_programs=32) and not is_read_once(1, num_programs=33)


def test_a_window_shrinks_what_the_cache_has_to_hold() -> None:
    tiling = Tiling(block_q=128, block_kv=128, num_programs=16, cache_bytes=8 * 2**20)
    plain: dict[str, Any] = {"seqlen_q": 2**17, "heads_q": 1, "head_dim": 64}
    full = accounting.tiled_cost(sizes.pose(**plain, causal=True), "forward", tiling)
    windowed = accounting.tiled_cost(sizes.pose(**plain, window=(512, 0)), "forward", tiling)
    assert traffic(full, "read k, v") > 100 * traffic(windowed, "read k, v")


def test_bias_and_mask_are_moved_once_by_either_method() -> None:
    plain = sizes.pose(**SHAPE)
    biased = sizes.pose(**SHAPE, bias_shape=(4, 37, 53), mask_shape=(37, 53), gradients=("q", "bias"))
    num_transfers: dict[Direction, int] = {"forward": 1, "backward": 2}
    for direction, num_biases in num_transfers.items():
        for cost in (accounting.naive_cost, lambda problem, way: accounting.tiled_cost(problem, way, NO_CACHE)):
            added = cost(biased, direction).traffic_bytes - cost(plain, direction).traffic_bytes
            assert added == num_biases * 4 * 37 * 53 * 2 + 37 * 53


# --- packed sequences -------------------------------------------------------------------------------------------------


def packed(lengths: list[tuple[int, int]], **options: Any) -> AttentionProblem:
    longest_q, longest_kv = (max(side) for side in zip(*lengths, strict=True))
    dense = sizes.pose(batch=len(lengths), seqlen_q=longest_q, seqlen_kv=longest_kv, heads_q=4, head_dim=16, **options)
    tokens_q, tokens_kv = (sum(side) for side in zip(*lengths, strict=True))
    return replace(dense, layout="varlen", tokens_q=tokens_q, tokens_kv=tokens_kv)


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_packed_sequences_cost_what_they_would_one_by_one(options: dict[str, Any]) -> None:
    lengths = [(5, 9), (0, 7), (31, 31), (12, 40), (31, 31)]
    problem = packed(lengths, **options)
    alone = [
        sizes.pose(batch=1, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, heads_q=4, head_dim=16, **options)
        for seqlen_q, seqlen_kv in lengths
    ]
    for direction in DIRECTIONS:
        useful = [accounting.useful_flops(one, direction) for one in alone]
        assert accounting.useful_flops(problem, direction, lengths) == sum(useful)
        tiled = accounting.tiled_cost(problem, direction, BIG_CACHE, lengths)
        assert tiled.flops == sum(accounting.tiled_cost(one, direction, BIG_CACHE).flops for one in alone)
        assert tiled.traffic_bytes == sum(
            accounting.tiled_cost(one, direction, BIG_CACHE).traffic_bytes for one in alone
        )


def test_without_lengths_the_cost_is_an_upper_bound() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [(draw.randint(0, 40), draw.randint(0, 60)) for _ in range(draw.randint(1, 5))]
        problem = packed(lengths, **draw.choice(MASKS))
        for direction in DIRECTIONS:
            bound = accounting.tiled_cost(problem, direction, NO_CACHE)
            known = accounting.tiled_cost(problem, direction, NO_CACHE, lengths)
            assert known.flops <= bound.flops and known.traffic_bytes <= bound.traffic_bytes
            known_useful = accounting.useful_flops(problem, direction, lengths)
            assert known_useful <= accounting.useful_flops(problem, direction)


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_kv"])
def test_empty_problems_cost_no_flops(empty: str) -> None:
    problem = sizes.pose(**{**SHAPE, empty: 0})
    for direction in DIRECTIONS:
        assert accounting.useful_flops(problem, direction) == 0
        assert accounting.naive_cost(problem, direction).flops == 0
        assert accounting.tiled_cost(problem, direction, NO_CACHE).flops == 0


# --- extra memory, against what a run really holds --------------------------------------------------------------------

SEQLEN, HEADS = 256, 2
MEASURED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "two sequences": {"batch": 2},
    "GQA": {"heads_kv": 1},
    "softcap": {"softcap": 20.0},
    "dropout": {"dropout_p": 0.1},
    "softcap and dropout": {"softcap": 20.0, "dropout_p": 0.1},
    "ALiBi and sinks": {"has_alibi": True, "has_sinks": True},
}


def measured(problem: AttentionProblem, backend: str) -> dict[Direction, int]:
    """Extra bytes of a real call: what it allocates at its peak."""
    kv_shape = (problem.batch, problem.seqlen_kv, problem.heads_kv)
    q = torch.randn(problem.batch, problem.seqlen_q, problem.heads_q, problem.head_dim, dtype=problem.dtype)
    k = torch.randn(*kv_shape, problem.head_dim, dtype=problem.dtype)
    v = torch.randn(*kv_shape, problem.head_dim_v, dtype=problem.dtype)
    options: dict[str, Any] = {"softcap": problem.softcap, "dropout_p": problem.dropout_p, "dropout_seed": 0}
    options |= {"causal": problem.mask.is_causal, "backend": backend}
    if problem.has_alibi:
        options["alibi_slopes"] = torch.rand(problem.heads_q)
    if problem.has_sinks:
        options["sinks"] = torch.rand(problem.heads_q)

    def call() -> Tensor:
        return flashtile.attention(q, k, v, **options)

    call()  # whatever the first call caches is not the problem's
    forward = peak_extra_bytes(call)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = call()
    d_out = torch.randn_like(out)

    def differentiate() -> object:
        return torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    return {"forward": forward, "backward": peak_extra_bytes(differentiate)}


@pytest.mark.parametrize("options", MEASURED.values(), ids=MEASURED.keys())
def test_naive_extra_memory_is_what_the_naive_backend_holds(options: dict[str, Any]) -> None:
    shape = {"seqlen_q": SEQLEN, "heads_q": HEADS, "head_dim": 32, "dtype": torch.float32}
    problem = sizes.pose(**{**shape, **options})
    for direction, held in measured(problem, "naive").items():
        assert accounting.naive_cost(problem, direction).extra_bytes == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("seqlen", [768, 2048])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"has_sinks": True},
        {"has_sinks": True, "batch": 3},
        {"softcap": 20.0, "dtype": torch.bfloat16},
        {"dropout_p": 0.1, "softcap": 20.0},
    ],
    ids=str,
)
def test_tiled_extra_memory_is_near_what_the_cpu_tiles_hold(
    seqlen: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"seqlen_q": seqlen, "heads_q": HEADS, "head_dim": 64, "dtype": torch.float32, **options}
    problem, explanation = sizes.pose(**shape), flashtile.explain(**shape, device="cpu")
    assert explanation.plan is not None and explanation.plan.backend == "cpu"
    table = devices.by_name("cpu")
    monkeypatch.setattr(devices, "detect", lambda _device: table)  # its tiles, whatever this CPU is
    was_threads = torch.get_num_threads()
    torch.set_num_threads(table.num_sms)
    try:
        held = measured(problem, "cpu")
    finally:
        torch.set_num_threads(was_threads)
    result_bytes = problem.tokens_q * HEADS * 64 * problem.dtype.itemsize
    num_results: dict[Direction, int] = {"forward": 1, "backward": 3}  # allocated from the start, and no extra
    for cost in explanation.costs:
        extra = held[cost.direction] - num_results[cost.direction] * result_bytes
        assert cost.tiled.extra_bytes == pytest.approx(extra, rel=0.35)
        assert held[cost.direction] < cost.naive.extra_bytes


def test_cpu_tiles_sum_d_q_up_in_memory_a_sequence_at_a_time_and_nothing_else() -> None:
    shape: dict[str, Any] = {"seqlen_q": 2048, "heads_q": 4, "heads_kv": 2, "head_dim": 64, "has_sinks": True}
    for batch, dtype in ((1, torch.float32), (5, torch.float32), (5, torch.bfloat16)):
        explanation = flashtile.explain(**shape, batch=batch, dtype=dtype, device="cpu")
        extra = {term.what: term.num_bytes for term in explanation.costs[1].tiled.extra}
        assert set(extra) == {"delta", "float32 sums of d_q", "score tiles"}
        assert extra["delta"] == 4 * 2048 * 4 and extra["float32 sums of d_q"] == 4 * 2048 * 64 * 4


def test_split_tiles_of_keys_have_float32_sums_in_memory() -> None:
    shape: dict[str, Any] = {"seqlen_q": 2048, "heads_q": 32, "heads_kv": 8, "head_dim": 128, "device": "h200"}
    one, three = (flashtile.explain(**shape, batch=batch, causal=True) for batch in (1, 3))
    split, whole = ({term.what: term.num_bytes for term in each.costs[1].tiled.extra} for each in (one, three))
    assert split.keys() - whole.keys() == {"float32 sums of d_k, d_v"}
    assert split["float32 sums of d_k, d_v"] == 2048 * 8 * (128 + 128) * 4


def test_the_gradient_of_a_16bit_bias_is_summed_up_in_float32() -> None:
    biased: dict[str, Any] = {**SHAPE, "bias_shape": (4, 37, 53), "gradients": ("q", "bias")}
    for dtype, expected in ((torch.bfloat16, 4 * 37 * 53 * 4), (torch.float32, 0)):
        extra = accounting.tiled_cost(sizes.pose(**biased, dtype=dtype), "backward", NO_CACHE).extra
        assert sum(term.num_bytes for term in extra if term.what.endswith("d_bias")) == expected


ON_CHIP: list[tuple[dict[str, Any], int]] = [
    ({}, 2 * 2 * 4 * 4 * 128 * 4),  # numbers of a row, batch, heads, blocks of rows, rows of a block, float32
    ({"dtype": torch.float32}, 3 * 2 * 4 * 4 * 128 * 4),
    ({"seqlen_q": 512}, 2 * 2 * 4 * 4 * 128 * 4),
    ({"seqlen_q": 513}, 2 * 2 * 4 * 5 * 128 * 4),
    ({"has_sinks": True, "gradients": ("q", "sinks")}, 3 * 2 * 4 * 4 * 128 * 4),
    ({"bias_shape": (4, 500, 500), "gradients": ("q", "k", "v")}, 2 * 2 * 4 * 4 * 128 * 4),
]


@pytest.mark.parametrize(("options", "expected"), ON_CHIP, ids=[str(options) for options, _ in ON_CHIP])
def test_triton_keeps_a_few_numbers_per_query_row(options: dict[str, Any], expected: int) -> None:
    shape: dict[str, Any] = {"batch": 2, "seqlen_q": 500, "seqlen_kv": 500, "heads_q": 4, "head_dim": 64, **options}
    explanation = flashtile.explain(**shape, device="h200", backend="triton")
    assert explanation.plan is not None and explanation.plan.backend == "triton"
    forward, backward = (cost.tiled.extra_bytes for cost in explanation.costs)
    assert forward == 2 * 4 * shape["seqlen_q"] * 4  # the lse, without padding
    assert backward == expected


def test_a_packed_batch_needs_up_to_a_block_of_rows_more_for_each_sequence() -> None:
    problem = packed([(5, 9), (300, 300), (0, 7)], gradients=("q", "k", "v"))
    extra = accounting.tiled_cost(problem, "backward", replace(NO_CACHE, split=SPLIT)).extra_bytes
    assert extra == 2 * 4 * (3 + 3) * 128 * 4  # 305 rows fill three blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_shares_of_a_bias_gradient_are_counted(dtype: torch.dtype) -> None:
    shape: dict[str, Any] = {"batch": 2, "seqlen_q": 512, "heads_q": 4, "head_dim": 64, "dtype": dtype}
    explanation = flashtile.explain(**shape, bias_shape=(512,), gradients=("q", "bias"), device="h200")
    assert explanation.plan is not None
    num_shares = explanation.plan.backward.companions[-1].grid[-1]
    assert num_shares > 1
    extra = {term.what: term.num_bytes for term in explanation.costs[1].tiled.extra}
    assert extra["shares of d_bias"] == (num_shares + (dtype == torch.bfloat16)) * 512 * 4  # and their float32 sum


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="interprets Triton kernels")
def test_triton_holds_what_is_said_to_the_byte() -> None:
    script = """
import torch, flashtile
from flashtile.spec.tiling import SplitBackward, Tiling
from flashtile.testing import peak_extra_bytes

for dtype in (torch.float16, torch.float32):
    leaves = [torch.randn(2, 150, 2, 32, dtype=dtype, requires_grad=True) for _ in range(3)]
    run = lambda: flashtile.attention(*leaves, causal=True, backend="triton")
    out = run()
    d_out = torch.randn_like(out)
    backward = lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    said = [cost.tiled.extra_bytes for cost in flashtile.explain(*leaves, causal=True, backend="triton").costs]
    held_backward = peak_extra_bytes(backward) - 3 * out.nbytes
    print(said == [peak_extra_bytes(run) - out.nbytes, held_backward])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["True", "True"]


def test_tiled_extra_memory_grows_linearly_and_the_naive_quadratically() -> None:
    short, long = (sizes.pose(seqlen_q=seqlen, heads_q=4, head_dim=64) for seqlen in (4096, 16384))
    tiling = Tiling(block_q=128, block_kv=128, num_programs=132, cache_bytes=0, heap_tiles=8)
    for direction in DIRECTIONS:
        tiled = [accounting.tiled_cost(problem, direction, tiling).extra_bytes for problem in (short, long)]
        naive = [accounting.naive_cost(problem, direction).extra_bytes for problem in (short, long)]
        assert tiled[1] <= 4 * tiled[0]
        assert naive[1] == pytest.approx(16 * naive[0], rel=0.05)


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_the_roofline_is_the_longer_side() -> None:
    h200 = devices.by_name("h200")
    long = sizes.pose(seqlen_q=16384, heads_q=16, head_dim=128, causal=True)
    tiling = Tiling(block_q=128, block_kv=128, num_programs=h200.num_sms, cache_bytes=h200.l2_bytes)
    compared = accounting.compare(long, "forward", tiling, h200)
    naive, tiled = compared.naive_time, compared.tiled_time
    assert (naive.binds, tiled.binds) == ("memory", "compute")
    assert naive.seconds == naive.memory_s == compared.naive.traffic_bytes / 4.8e12
    assert tiled.seconds == tiled.compute_s == compared.tiled.flops / 989e12
    decode = sizes.pose(seqlen_q=1, seqlen_kv=16384, heads_q=16, head_dim=128)
    assert accounting.compare(decode, "forward", tiling, h200).tiled_time.binds == "memory"

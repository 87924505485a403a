"""Cases, grids and the filter of the benchmarks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashtile import InvalidArgument
from flashtile.bench.cases import (
    CPU_GRID,
    CUDA_GRID,
    BenchCase,
    Grid,
    default_grid,
    filtered,
)

CASE = BenchCase(
    direction="forward",
    dtype="bfloat16",
    head_dim=64,
    seqlen=8,
    is_causal=True,
    batch=2,
    heads_q=4,
    heads_kv=2,
)


def test_label_names_every_field() -> None:
    assert CASE.label == "forward bfloat16 head_dim=64 seqlen=8 causal batch=2 heads_q=4 heads_kv=2"
    assert "full" in replace(CASE, is_causal=False).label.split()


def test_labels_tell_the_cases_of_a_grid_apart() -> None:
    for grid in (CPU_GRID, CUDA_GRID):
        labels = [case.label for case in grid.cases()]
        assert len(labels) == len(set(labels))


def test_flops_are_those_of_the_visible_pairs() -> None:
    visible_pairs = 8 * 9 // 2
    forward = 2 * 4 * visible_pairs * 4 * 64  # batch, heads_q, pairs; 2 products of 2 * head_dim
    assert CASE.flops == forward
    assert replace(CASE, direction="backward").flops == 2.5 * forward
    assert replace(CASE, direction="forward+backward").flops == 3.5 * forward
    assert replace(CASE, is_causal=False).flops == 2 * 4 * 64 * 4 * 64


def test_problem_is_that_of_the_call() -> None:
    problem = CASE.problem
    assert (problem.batch, problem.seqlen_q, problem.seqlen_kv, problem.heads_q, problem.heads_kv) == (2, 8, 8, 4, 2)
    assert problem.mask.is_causal and problem.scale == 64**-0.5 and not problem.gradients
    assert replace(CASE, direction="backward").problem.gradients == {"q", "k", "v"}


def test_cpu_grid_is_the_promised_one() -> None:
    cases = CPU_GRID.cases()
    assert len(cases) == 32
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert {case.seqlen for case in cases} == {1024, 4096}
    assert {case.direction for case in cases} == {"forward", "backward"}
    assert {(case.head_dim, case.heads_q, case.batch) for case in cases} == {(64, 8, 1), (128, 4, 1)}


def test_cuda_grid_has_the_same_tokens_and_width_everywhere() -> None:
    cases = CUDA_GRID.cases()
    assert {case.batch * case.seqlen for case in cases} == {16384}
    assert {case.heads_q * case.head_dim for case in cases} == {2048}
    assert {case.seqlen for case in cases} == {512, 1024, 2048, 4096, 8192, 16384}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_quick_grid_is_part_of_the_default_one(device_type: str) -> None:
    quick = set(default_grid(device_type, is_quick=True).cases())
    whole = set(default_grid(device_type, is_quick=False).cases())
    assert quick < whole


def test_grouped_heads_divide() -> None:
    grid = Grid(
        directions=("forward",),
        dtypes=("float32",),
        head_dims=(48,),
        seqlens=(16,),
        heads_per_kv=(1, 4),
        hidden_size=512,
        tokens=64,
    )
    heads = [(case.heads_q, case.heads_kv, case.batch) for case in grid.cases() if case.is_causal]
    assert heads == [(10, 10, 4), (8, 2, 4)]


@pytest.mark.parametrize(
    ("expression", "num_selected"),
    [
        ("causal", 16),
        ("causal and head_dim=64", 8),
        ("not causal and head_dim=64", 8),
        ("backward and float32 and seqlen=4096 and full and head_dim=128", 1),
        ("  forward   and  not float32 ", 8),
    ],
)
def test_filter_selects(expression: str, num_selected: int) -> None:
    assert len(filtered(CPU_GRID.cases(), expression)) == num_selected


def test_filter_matches_whole_words() -> None:
    cases = [CASE, replace(CASE, direction="forward+backward"), replace(CASE, seqlen=80)]
    assert filtered(cases, "forward and seqlen=8") == (CASE,)


@pytest.mark.parametrize("expression", ["", "causal and", "and", "not", "head_dim=6", "causal head_dim=64", "a or b"])
def test_filter_rejects_what_no_case_has(expression: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--filter.*head_dim=128, head_dim=64"):
        filtered(CPU_GRID.cases(), expression)


def test_filter_rejects_what_selects_nothing() -> None:
    with pytest.raises(InvalidArgument, match="at least one case"):
        filtered(CPU_GRID.cases(), "causal and full")

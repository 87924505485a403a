"""Cases, grids and the filter of the benchmarks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashtile import InvalidArgument
from flashtile.bench.cases import (
    CPU_GRID,
    CUDA_GRID,
    OPTIONS,
    BenchCase,
    Grid,
    Option,
    default_grids,
)
from flashtile.bench.labels import filtered

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


def cases_of(device_type: str, *, is_quick: bool = False, options: tuple[Option, ...] | None = None) -> list[BenchCase]:
    grids = default_grids(device_type, is_quick=is_quick, options=options)
    return [case for grid in grids for case in grid.cases()]


def test_label_names_every_field() -> None:
    assert CASE.label == "forward bfloat16 head_dim=64 seqlen=8 causal plain batch=2 heads_q=4 heads_kv=2"
    assert "full" in replace(CASE, is_causal=False).label.split()
    assert "alibi" in replace(CASE, option="alibi").label.split()


def test_labels_tell_the_cases_of_a_grid_apart() -> None:
    for device_type in ("cpu", "cuda"):
        labels = [case.label for case in cases_of(device_type, options=tuple(OPTIONS))]
        assert len(labels) == len(set(labels))


def test_flops_are_those_of_the_visible_pairs() -> None:
    visible_pairs = 8 * 9 // 2
    forward = 2 * 4 * visible_pairs * 4 * 64  # batch, heads_q, pairs; 2 products of 2 * head_dim
    assert CASE.flops == forward
    assert replace(CASE, direction="backward").flops == 2.5 * forward
    assert replace(CASE, direction="forward+backward").flops == 3.5 * forward
    assert replace(CASE, is_causal=False).flops == 2 * 4 * 64 * 4 * 64
    one_pair = 2 * 4 * 4 * 64
    assert replace(CASE, option="window").flops == (1 + 2 + 6 * 3) * one_pair, "2 to the left"
    assert replace(CASE, option="window", is_causal=False).flops == (3 + 4 + 4 * 5 + 4 + 3) * one_pair, "and right"
    assert replace(CASE, option="mask").flops == forward, "a random mask leaves no tile to skip"


def test_problem_is_that_of_the_call() -> None:
    problem = CASE.problem
    assert (problem.batch, problem.seqlen_q, problem.seqlen_kv, problem.heads_q, problem.heads_kv) == (2, 8, 8, 4, 2)
    assert problem.mask.is_causal and problem.scale == 64**-0.5 and not problem.gradients
    assert replace(CASE, direction="backward").problem.gradients == {"q", "k", "v"}


def test_problem_has_the_option() -> None:
    plain = CASE.problem
    assert (plain.bias_shape, plain.mask_shape, plain.has_alibi, plain.mask.left) == (None, None, False, None)
    problems = {option: replace(CASE, direction="backward", option=option).problem for option in OPTIONS}
    assert problems["bias"].bias_shape == (1, 4, 8, 8) and "bias" not in problems["bias"].gradients
    assert problems["mask"].mask_shape == (1, 1, 8, 8)
    assert problems["alibi"].has_alibi
    assert (problems["window"].mask.left, problems["window"].mask.right) == (2, 0)
    assert len(set(problems.values())) == len(OPTIONS)


def test_cpu_grid_is_the_promised_one() -> None:
    cases = CPU_GRID.cases()
    assert len(cases) == 32
    assert {case.dtype for case in cases} == {"float32", "bfloat16"}
    assert {case.seqlen for case in cases} == {1024, 4096}
    assert {case.direction for case in cases} == {"forward", "backward"}
    assert {(case.head_dim, case.heads_q, case.batch) for case in cases} == {(64, 8, 1), (128, 4, 1)}


def test_cuda_grid_is_the_promised_one() -> None:
    cases = cases_of("cuda")
    assert {(case.batch * case.seqlen, case.heads_q * case.head_dim, case.dtype) for case in cases} == {
        (16384, 2048, "bfloat16")
    }
    plain = [case for case in cases if case.option == "plain"]
    assert plain == list(CUDA_GRID.cases())
    assert len(plain) == 2 * 3 * 3 * 2
    assert {(case.head_dim, case.seqlen) for case in plain} == {
        (head_dim, seqlen) for head_dim in (64, 128, 256) for seqlen in (1024, 4096, 16384)
    }
    others = [case for case in cases if case.option != "plain"]
    assert len(others) == 4 * 2 * 2
    assert {(case.head_dim, case.seqlen) for case in others} == {(128, 4096)}
    assert {(case.direction, case.is_causal, case.option) for case in others} == {
        (direction, is_causal, option)
        for direction in ("forward", "backward")
        for is_causal in (False, True)
        for option in ("bias", "mask", "alibi", "window")
    }


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_quick_grid_is_part_of_the_default_one(device_type: str) -> None:
    assert set(cases_of(device_type, is_quick=True)) < set(cases_of(device_type))


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("is_quick", [False, True])
def test_options_that_are_asked_for_are_the_only_ones(device_type: str, is_quick: bool) -> None:
    choices: tuple[tuple[Option, ...], ...] = (("plain",), ("bias",), ("window", "plain"))
    for options in choices:
        assert {case.option for case in cases_of(device_type, is_quick=is_quick, options=options)} == set(options)


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

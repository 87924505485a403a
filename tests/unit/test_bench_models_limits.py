"""The search for the largest that fits, the curve that guesses it, and the rows that come of both."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashtile.bench import environment, timing
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.models import limits
from flashtile.bench.models.cases import Axis, LimitCase
from flashtile.bench.models.peers import PEERS, ModelPeer
from flashtile.bench.models.workloads import Training
from flashtile.bench.results import LimitRow
from flashtile.bench.transformer import ModelShape
from flashtile.testing import peak_extra_bytes

CPU = torch.device("cpu")
SHAPE = ModelShape(layers=2, d_model=32, heads=2, vocabulary=61)


def case_of(axis: Axis) -> LimitCase:
    return LimitCase(size="tiny", shape=SHAPE, axis=axis, other={"batch": 64, "seqlen": 1}[axis], dtype="float32")


GRANULARITIES = st.sampled_from([1, 7, 128])


@given(truth=st.integers(0, 2**24 - 200), granularity=GRANULARITIES)
def test_the_largest_that_fits(truth: int, granularity: int) -> None:
    assert limits.largest(lambda value: value <= truth, granularity) == truth // granularity * granularity


@given(
    truth=st.integers(4, 5000),
    promises=st.lists(st.integers(0, 20000), min_size=1),
    granularity=GRANULARITIES,
    closeness=st.sampled_from([0.0, 0.03, 0.5]),
)
def test_the_search_brackets_the_truth_whatever_is_promised(
    truth: int, promises: list[int], granularity: int, closeness: float
) -> None:
    tried: list[int] = []
    promise = cycle(promises)

    def fits(value: int) -> bool:
        tried.append(value)
        return value <= truth

    least = truth // granularity // 2 * granularity
    low, high = limits.bracket(fits, lambda: next(promise), least, granularity=granularity, closeness=closeness)
    assert high is not None and low <= truth < high
    assert low % granularity == high % granularity == 0
    assert high - low <= max(granularity, closeness * low)
    assert len(set(tried)) == len(tried), "nothing is tried twice"


@given(truth=st.integers(1000, 10**6), off_by=st.floats(-0.05, 0.05))
def test_a_curve_that_gets_better_takes_few_tries(truth: int, off_by: float) -> None:
    """Each success tells the truth; before the first one the promise is off by so much."""
    tried: list[int] = []

    def fits(value: int) -> bool:
        tried.append(value)
        return value <= truth

    def promised() -> int:
        return truth if any(value <= truth for value in tried) else round(truth * (1 + off_by))

    low, high = limits.bracket(fits, promised, 10, granularity=1, closeness=0.03)
    assert high is not None and low <= truth < high <= 1.03 * low + 1
    assert len(tried) <= 7


def test_a_search_that_is_over_keeps_what_it_knows() -> None:
    search = partial(limits.bracket, low=4, granularity=4, closeness=0.0)
    assert search(lambda _: True, lambda: 8, is_over=lambda: True) == (8, None)
    assert search(lambda value: value < 8, lambda: 64, is_over=lambda: True) == (4, 64)
    low, high = search(lambda _: True, lambda: 2**30)
    assert low >= limits._LARGEST and high is None, "what has no end is not searched forever"


@given(coefficients=st.tuples(*[st.integers(0, 1000)] * 3), at=st.integers(0, 10_000))
def test_the_curve_goes_through_its_points_and_on(coefficients: tuple[int, int, int], at: int) -> None:
    def curve(n: int, degree: int) -> int:
        return sum(coefficient * n**power for power, coefficient in enumerate(coefficients[: degree + 1]))

    for points in ([2, 4], [256, 512, 1024], [1, 2, 7]):
        degree = len(points) - 1
        values = [curve(point, degree) for point in points]
        assert limits.extrapolated(points, values, at) == pytest.approx(curve(at, degree), rel=1e-6, abs=1e-3)


def test_a_parabola_that_bends_down_is_a_line() -> None:
    assert limits.extrapolated([1, 2, 4], [10, 30, 40], 7) == pytest.approx(70)


def find(case: LimitCase, peers: tuple[ModelPeer, ...] = PEERS) -> dict[str, LimitRow]:
    rows = limits.find(case, peers, CPU, budget_s=1.0, on_share=lambda _: None)
    return {row.peer: row for row in rows}


@pytest.mark.parametrize("axis", ["batch", "seqlen"])
def test_on_a_cpu_the_limit_is_extrapolated_and_right(axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes = 64 * 2**20
    monkeypatch.setattr(environment, "available_host_bytes", lambda: free_bytes)
    case = case_of(axis)
    rows = find(case)
    assert {row.status for row in rows.values()} == {"extrapolated"}
    naive, tiled = (rows[peer].largest or 0 for peer in (NAIVE, FLASHTILE))
    assert 0 < naive < tiled
    attention = next(peer for peer in PEERS if peer.name == NAIVE).make()
    training = Training(case.at(1), CPU)
    fits, too_large = (
        peak_extra_bytes(partial(training.resized(case.at(value)).run, attention))
        for value in (naive, naive + limits._GRANULARITY[axis])
    )
    assert fits <= free_bytes < 1.03 * too_large, "at most a granule from the truth, but for the mask that is kept"


def test_a_gpu_s_limit_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU with room for 1,500 tokens of the naive formula and 5,000 of the others."""
    room = {NAIVE: 1500, FLASHTILE: 5000, SDPA: 5000}

    class Pretended(Training):
        def run(self, attention: object) -> None:
            pass

        def step_bytes(self, attention: Any) -> int:
            if self._tokens.shape[1] - 1 > room[attention()]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self._tokens.shape[1] * 10_000

        def activation_bytes(self, _attention: object) -> int:  # type: ignore[override]
            return self._tokens.shape[1] * 10_000

    monkeypatch.setattr(limits, "Training", lambda case, _device: Pretended(case, CPU))
    monkeypatch.setattr(environment, "available_bytes", lambda _: 40_000_000)
    monkeypatch.setattr(timing, "release_memory", lambda: None)
    peers = tuple(ModelPeer(name=name, make=lambda name=name: lambda: name) for name in room)  # type: ignore[misc]
    rows = limits.find(case_of("seqlen"), peers, torch.device("cuda"), budget_s=60.0, on_share=lambda _: None)
    for row in rows:
        assert row.reason is None
        assert row.status == "tried" and row.largest is not None and row.too_large is not None
        assert row.largest <= room[row.peer] < row.too_large <= row.largest + max(128, 0.03 * row.largest)


def test_a_peer_that_fails_is_a_row_and_the_others_go_on() -> None:
    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    rows = find(case_of("batch"), (ModelPeer(name="broken", make=lambda: broken), PEERS[0]))  # type: ignore[arg-type]
    assert rows["broken"].status == "failed" and rows["broken"].reason == "CUDA out of memory."
    assert rows[FLASHTILE].status == "extrapolated"


def test_what_cannot_fit_or_is_unknown_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "available_host_bytes", lambda: 1000)
    assert all(row.reason and "not tried" in row.reason for row in find(case_of("batch")).values())
    monkeypatch.setattr(environment, "available_host_bytes", lambda: None)
    assert {row.reason for row in find(case_of("batch")).values()} == {"nobody says how much memory is free"}


def test_a_row_contradicts_itself_nowhere() -> None:
    row = LimitRow(case=case_of("batch"), peer=NAIVE, status="failed", reason="why")
    with pytest.raises(ValueError, match="exactly if failed"):
        replace(row, largest=3)

"""Interleaved measuring, with a clock that counts instead of waiting; no assertion depends on real time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch

from flashtile.bench import timing
from flashtile.bench.timing import Candidate, CpuClock, Failure, Timing


class CountingClock:
    """Reads 1, 2, 3 ... milliseconds for the first, second, third run, and records rounds."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.is_open = False
        self._num_runs = 0

    def begin_round(self) -> None:
        assert not self.is_open
        self.is_open = True
        self.rounds.append(0)

    def time_ms(self, run: Callable[[], object]) -> Callable[[], float]:
        run()
        self.rounds[-1] += 1
        self._num_runs += 1
        num_runs = self._num_runs

        def read() -> float:
            assert not self.is_open, "a GPU's events can be read only after the round was synchronised"
            return float(num_runs)

        return read

    def end_round(self) -> None:
        self.is_open = False


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the time is one second later."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


def test_each_block_of_rounds_puts_everyone_everywhere_once() -> None:
    rounds = list(islice(timing.orders(4), 40))
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    for begin in range(0, 40, 4):
        block = rounds[begin : begin + 4]
        assert all(len({order[place] for order in block}) == 4 for place in range(4))
    followers = Counter((a, b) for order in rounds for a, b in pairwise(order))
    assert len(followers) == 12, "over time everyone runs right after everyone else"


@pytest.mark.usefixtures("seconds")
def test_candidates_are_interleaved_not_measured_in_turn() -> None:
    order: list[str] = []
    candidates = {name: Candidate(run=lambda name=name: order.append(name)) for name in "abc"}
    clock = CountingClock()
    timings = timing.measure(candidates, clock, budget_s=5.0, min_rounds=2)
    num_played = len(clock.rounds)
    assert clock.rounds == [3] * num_played
    assert [sorted(order[idx : idx + 3]) for idx in range(0, len(order), 3)] == [["a", "b", "c"]] * num_played
    assert all(isinstance(timed, Timing) and timed.rounds == num_played - 1 for timed in timings.values())


@pytest.mark.usefixtures("seconds")
def test_budget_decides_how_many_rounds() -> None:
    def rounds(budget_s: float, min_rounds: int) -> int:
        timed = timing.measure(
            {"a": Candidate(run=lambda: None)}, CountingClock(), budget_s=budget_s, min_rounds=min_rounds
        )["a"]
        assert isinstance(timed, Timing)
        return timed.rounds

    assert rounds(budget_s=1e-3, min_rounds=7) == 7
    assert rounds(budget_s=10.0, min_rounds=1) < rounds(budget_s=100.0, min_rounds=1)
    assert rounds(budget_s=1e9, min_rounds=1) == timing.MAX_ROUNDS


@pytest.mark.usefixtures("seconds")
def test_warm_up_rounds_are_not_counted() -> None:
    clock = CountingClock()
    timed = timing.measure({"a": Candidate(run=lambda: None)}, clock, budget_s=1e-3, min_rounds=3)["a"]
    assert len(clock.rounds) == 4
    assert timed == Timing(median_ms=3.0, q25_ms=2.5, q75_ms=3.5, rounds=3)


@pytest.mark.usefixtures("seconds")
def test_progress_rises_to_one() -> None:
    shares: list[float] = []
    timing.measure(
        {"a": Candidate(run=lambda: None)}, CountingClock(), budget_s=6.0, min_rounds=3, on_round=shares.append
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0 and shares[0] < 0.5


@pytest.mark.usefixtures("seconds")
def test_scope_is_entered_around_each_run_and_not_around_others() -> None:
    inside: list[str] = []
    seen: list[tuple[str, ...]] = []

    @contextmanager
    def scope() -> Iterator[None]:
        inside.append("a")
        yield
        inside.remove("a")

    candidates = {
        "a": Candidate(run=lambda: seen.append(tuple(inside)), scope=scope),
        "b": Candidate(run=lambda: seen.append((*inside, "b"))),
    }
    timing.measure(candidates, CountingClock(), budget_s=1e-3, min_rounds=2)
    assert set(seen) == {("a",), ("b",)}


@pytest.mark.usefixtures("seconds")
def test_a_failing_candidate_drops_out_and_its_memory_is_freed() -> None:
    def leaky() -> tuple[Callable[[], None], weakref.ref[torch.Tensor]]:
        held, runs = torch.ones(8), list[None]()

        def fail_in_the_third_round() -> None:
            runs.append(None)
            if len(runs) == 3:
                raise torch.OutOfMemoryError(f"no room beside {held.numel()} elements")

        return fail_in_the_third_round, weakref.ref(held)

    run, held = leaky()
    candidates = {"good": Candidate(run=lambda: None), "bad": Candidate(run=run)}
    del run
    still_held: list[bool] = []
    timings = timing.measure(
        candidates,
        CountingClock(),
        budget_s=1e-3,
        min_rounds=5,
        on_round=lambda _: still_held.append(held() is not None),
    )
    assert timings["bad"] == Failure(status="out_of_memory", reason="no room beside 8 elements")
    assert isinstance(timings["good"], Timing) and timings["good"].rounds == 5
    assert list(candidates) == ["good"]
    assert still_held[:3] == [True] * 3 and not any(still_held[3:])


@pytest.mark.usefixtures("seconds")
def test_all_failing_ends_the_measurement() -> None:
    def fail() -> None:
        raise ValueError("never")

    timings = timing.measure({"a": Candidate(run=fail)}, CountingClock(), budget_s=1e9, min_rounds=5)
    assert timings == {"a": Failure(status="refused", reason="ValueError: never")}


def test_nobody_to_measure_is_no_measurement() -> None:
    assert timing.measure({}, CountingClock(), budget_s=1.0, min_rounds=5) == {}


@pytest.mark.usefixtures("seconds")
def test_ctrl_c_is_not_a_failure_of_the_candidate() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure({"a": Candidate(run=interrupt)}, CountingClock(), budget_s=1.0, min_rounds=1)


def test_torch_running_out_of_memory_on_a_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert timing.is_out_of_memory(caught.value)
    assert not timing.is_out_of_memory(RuntimeError("No available kernel"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 256.00 GiB. GPU 0 has a total capacity of 8 B."
            ),
            Failure(status="out_of_memory", reason="CUDA out of memory. Tried to allocate 256.00 GiB"),
        ),
        (
            RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: you tried to allocate 9 bytes. Error code 12"),
            Failure(status="out_of_memory", reason="DefaultCPUAllocator: you tried to allocate 9 bytes. Error code 12"),
        ),
        (MemoryError(), Failure(status="out_of_memory", reason="MemoryError")),
        (ValueError("two\n  lines"), Failure(status="refused", reason="ValueError: two lines")),
        (NotImplementedError(), Failure(status="refused", reason="NotImplementedError")),
    ],
)
def test_a_failure_is_told_in_one_line(error: Exception, expected: Failure) -> None:
    assert Failure.of(error) == expected


@pytest.mark.parametrize(
    ("times_ms", "expected"),
    [
        ([4.0], Timing(median_ms=4.0, q25_ms=4.0, q75_ms=4.0, rounds=1)),
        ([5.0, 1.0, 3.0, 2.0, 4.0], Timing(median_ms=3.0, q25_ms=2.0, q75_ms=4.0, rounds=5)),
    ],
)
def test_timing_is_median_and_quartiles(times_ms: list[float], expected: Timing) -> None:
    assert Timing.of(times_ms) == expected


def test_the_cpu_clock_reads_a_positive_time_and_frees_the_result() -> None:
    results: list[weakref.ref[torch.Tensor]] = []

    def run() -> torch.Tensor:
        tensor = torch.ones(4)
        results.append(weakref.ref(tensor))
        return tensor

    reading = CpuClock().time_ms(run)
    assert reading() > 0
    assert results[0]() is None


def test_ceilings_are_rates() -> None:
    cpu = torch.device("cpu")
    assert timing.matmul_ceiling_tflops(torch.float32, cpu, CountingClock(), budget_s=1e-9) == pytest.approx(
        2 * 2048**3 / 1e-3 / 1e12
    )
    assert timing.copy_ceiling_gb_per_s(cpu, CountingClock(), budget_s=1e-9) == pytest.approx(2 * 2**28 / 1e-3 / 1e9)


@pytest.mark.gpu
def test_the_cuda_clock_times_what_the_gpu_did() -> None:
    device = torch.device("cuda")
    clock = timing.CudaClock(device)
    x = torch.randn(4096, 4096, device=device)
    clock.begin_round()
    readings = [clock.time_ms(lambda: x @ x), clock.time_ms(lambda: x + x)]
    clock.end_round()
    product_ms, sum_ms = (reading() for reading in readings)
    assert product_ms > sum_ms > 0

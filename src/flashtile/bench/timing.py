"""Interleaved measuring: in every round each candidate runs once, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Literal, Protocol

import torch

from flashtile.spec import devices

MAX_ROUNDS = 1000
_WARMUP_SHARE, _MAX_WARMUP_S = 0.1, 1.0
"""Of the time budget; at least one round."""


_SHORTEST_MS, _LONGEST_MS = 1e-9, 1e9
"""What lies outside was not measured but written by hand or damaged, and ratios of it mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something to measure: ``run()`` is timed, inside ``scope()``, which is not."""

    run: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The distribution of one candidate's times, in milliseconds."""

    median_ms: float
    q25_ms: float
    q75_ms: float
    rounds: int

    def __post_init__(self) -> None:
        if not all(_SHORTEST_MS <= time <= _LONGEST_MS for time in (self.median_ms, self.q25_ms, self.q75_ms)):
            raise ValueError(f"has times of {self.q25_ms}, {self.median_ms} and {self.q75_ms} ms, which no clock gave")

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        q25, median, q75 = quantiles(times_ms, n=4, method="inclusive") if len(times_ms) > 1 else [*times_ms] * 3
        return cls(median_ms=median, q25_ms=q25, q75_ms=q75, rounds=len(times_ms))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a candidate has no timing. Holds text only: an exception would keep the tensors of its frames alive."""

    status: Literal["refused", "out_of_memory"]
    reason: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        text = " ".join(str(error).split())
        if is_out_of_memory(error):  # torch goes on with statistics and advice
            told = text[max(text.find("DefaultCPUAllocator"), 0) :]
            return cls(status="out_of_memory", reason=". ".join(told.split(". ")[:2]) or type(error).__name__)
        return cls(status="refused", reason=f"{type(error).__name__}: {text}" if text else type(error).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out; torch has no type of its own for that on a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


# --- clocks -----------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Times single runs; a reading may be taken only after ``end_round``."""

    def begin_round(self) -> None: ...

    def time_ms(self, run: Callable[[], object]) -> Callable[[], float]:
        """Runs ``run`` once and returns where its milliseconds can be read."""
        ...

    def end_round(self) -> None: ...


class CpuClock:
    """Wall-clock time of the host."""

    def begin_round(self) -> None:
        pass

    def time_ms(self, run: Callable[[], object]) -> Callable[[], float]:
        begin = time.perf_counter_ns()
        result = run()
        elapsed_ms = (time.perf_counter_ns() - begin) / 1e6
        del result  # freed outside the timed part, as a caller who uses the result would
        return lambda: elapsed_ms

    def end_round(self) -> None:
        pass


class CudaClock:
    """Time on the GPU between two events, each run after the L2 cache was overwritten.

    A round is queued whole and synchronised once: while the GPU overwrites its cache for one candidate, the host
    launches the next one's kernels, so that launch latency is hidden as it is in a model.
    """

    def __init__(self, device: torch.device) -> None:
        num_bytes = max(4 * devices.detect(device).l2_bytes, 256 * 2**20)
        self._device = device
        self._flush = torch.empty(num_bytes // 4, dtype=torch.int32, device=device)

    def begin_round(self) -> None:
        for _ in range(4):  # a head start for the host
            self._flush.zero_()

    def time_ms(self, run: Callable[[], object]) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        return lambda: begin.elapsed_time(end)

    def end_round(self) -> None:
        torch.cuda.synchronize(self._device)


def clock_for(device: torch.device) -> Clock:
    """The clock that suits a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


# --- measuring --------------------------------------------------------------------------------------------------------


def orders(num_candidates: int) -> Iterator[list[int]]:
    """The order of each round, endlessly: rotations of a random permutation, a new one when all are played.

    So every candidate takes every place equally often, and the neighbours change: who runs after the naive formula
    finds cold caches.
    """
    generator = random.Random(0)
    while True:
        permutation = generator.sample(range(num_candidates), num_candidates)
        for shift in range(num_candidates):
            yield permutation[shift:] + permutation[:shift]


def measure(
    candidates: dict[str, Candidate],
    clock: Clock,
    *,
    budget_s: float,
    min_rounds: int,
    on_round: Callable[[float], None] = lambda _: None,
) -> dict[str, Timing | Failure]:
    """Times the candidates against each other; one that fails drops out and the others go on.

    Args:
        candidates: by name. One that fails is removed from the dictionary, so that what it holds is freed.
        clock: what reads the time.
        budget_s: seconds for the whole measurement, warm-up included; rounds end once it is spent.
        min_rounds: rounds to measure even if the budget is spent, at least 1.
        on_round: called before each round and at the end with the share of the work that is done, 0 to 1.
    """
    if not candidates:
        return {}
    names = list(candidates)
    failures: dict[str, Failure] = {}
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    warmup_s = min(_WARMUP_SHARE * budget_s, _MAX_WARMUP_S)
    is_warm = False
    num_measured = 0
    for num_played, order in enumerate(orders(len(names))):
        elapsed_s = time.perf_counter() - begin
        is_done = num_measured >= MAX_ROUNDS or (elapsed_s >= budget_s and num_measured >= min_rounds)
        on_round(1.0 if is_done or not candidates else min(elapsed_s / budget_s, num_measured / min_rounds, 1.0))
        if is_done or not candidates:
            break
        is_warm = is_warm or (num_played > 0 and elapsed_s >= warmup_s)
        readings = _play_round([names[idx] for idx in order], candidates, failures, clock)
        if is_warm:
            num_measured += 1
            for name, reading in readings.items():
                times_ms[name].append(reading())
    return {name: failures[name] if name in failures else Timing.of(times_ms[name]) for name in names}


def _play_round(
    order: Sequence[str], candidates: dict[str, Candidate], failures: dict[str, Failure], clock: Clock
) -> dict[str, Callable[[], float]]:
    """One run of each that is left; moves whoever fails from ``candidates`` to ``failures``."""
    readings: dict[str, Callable[[], float]] = {}
    clock.begin_round()
    for name in order:
        if name in failures:
            continue
        try:
            with candidates[name].scope():
                readings[name] = clock.time_ms(candidates[name].run)
        except Exception as error:
            failures[name] = Failure.of(error)
        if name in failures:  # outside the except block, which keeps the exception and so its frames' tensors alive
            del candidates[name]
            release_memory()
    clock.end_round()
    return readings


def speedup(timed: Timing, other: Timing | Failure | None) -> float | None:
    """The other's median over this one's: above 1 this one is faster. None if the other has no timing."""
    return other.median_ms / timed.median_ms if isinstance(other, Timing) else None


def release_memory() -> None:
    """Gives back what a failed candidate held, so that the next one does not fail for its sake."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- ceilings ---------------------------------------------------------------------------------------------------------


def matmul_ceiling_tflops(dtype: torch.dtype, device: torch.device, clock: Clock, *, budget_s: float = 1.0) -> float:
    """The best rate of a large square matrix product in ``dtype``, in 10**12 FLOP/s."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (_fastest_ms(lambda: a @ b, clock, budget_s) * 1e-3) / 1e12


def copy_ceiling_gb_per_s(device: torch.device, clock: Clock, *, budget_s: float = 1.0) -> float:
    """The best rate of a large copy, in 10**9 bytes/s read plus written."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_fastest_ms(lambda: target.copy_(source), clock, budget_s) * 1e-3) / 1e9


def _fastest_ms(run: Callable[[], object], clock: Clock, budget_s: float) -> float:
    """The shortest of several runs: a ceiling is what the machine can do, not what it does on average."""
    run()
    fastest_ms = float("inf")
    begin = time.perf_counter()
    for num_runs in range(MAX_ROUNDS):
        if num_runs >= 3 and time.perf_counter() - begin >= budget_s:
            break
        clock.begin_round()
        reading = clock.time_ms(run)
        clock.end_round()
        fastest_ms = min(fastest_ms, reading())
    return fastest_ms

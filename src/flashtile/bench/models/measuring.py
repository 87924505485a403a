"""``bench models``: whole models, every attention function, case by case."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from statistics import median

import torch

from flashtile.bench import environment, timing
from flashtile.bench.attention_clock import AttentionClock
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.checking import Checker
from flashtile.bench.formula import AttentionFn
from flashtile.bench.labels import Labelled
from flashtile.bench.models import limits, workloads
from flashtile.bench.models.cases import LimitCase, ModelCase
from flashtile.bench.models.peers import ModelPeer
from flashtile.bench.models.workloads import Workload
from flashtile.bench.results import ModelResults, ModelRow
from flashtile.bench.timing import Candidate, Clock, Failure, Timing
from flashtile.testing.memory import peak_extra_bytes

_TOLERATED_DIFFERENCE = {"float16": 0.1, "bfloat16": 0.1, "float32": 0.005, "float64": 1e-6}
"""As for single calls; roundings of 16 bits add up over the layers."""
_MAX_SPLIT_RUNS, _SPLIT_SHARE = 20, 0.1
"""Runs that find the share of attention end when this share of the budget is spent; there is at least one."""


def start(device: torch.device, *, budget_s: float, commit: str | None = None) -> ModelResults:
    """The results before the first case; ``commit`` is recorded where the package lies outside of its checkout."""
    return ModelResults(
        environment=environment.describe(device, commit=commit),
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        budget_s=budget_s,
        is_complete=False,
        rows=(),
        limits=(),
    )


def run(
    results: ModelResults,
    cases: Sequence[ModelCase | LimitCase],
    peers: Sequence[ModelPeer],
    device: torch.device,
    clock: Clock,
    *,
    min_rounds: int,
    on_progress: Callable[[Labelled, float], None] = lambda _case, _share: None,
) -> Iterator[ModelResults]:
    """Measures case after case and yields the results with each finished case's rows added.

    Args:
        results: from ``start``.
        cases: in the order in which they are measured.
        peers, device, clock: what with, where, and by which clock.
        min_rounds: for each case, even if that takes longer than ``results.budget_s``.
        on_progress: called now and then with the running case and the share of it that is done.
    """
    for case_idx, case in enumerate(cases):
        report = partial(on_progress, case)
        report(0.0)
        if isinstance(case, LimitCase):
            found = limits.find(case, peers, device, budget_s=results.budget_s, on_share=report)
            results = replace(results, limits=results.limits + found)
        else:
            rows = _rows_of_case(
                case, peers, device, clock, budget_s=results.budget_s, min_rounds=min_rounds, on_round=report
            )
            results = replace(results, rows=results.rows + rows)
        timing.release_memory()
        results = replace(results, is_complete=case_idx == len(cases) - 1)
        yield results


# --- one case ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _FirstRuns:
    """What a peer's first, untimed runs showed."""

    peak_bytes: int
    state_bytes: int
    difference: float | None
    attention_share: float


def _rows_of_case(
    case: ModelCase,
    peers: Sequence[ModelPeer],
    device: torch.device,
    clock: Clock,
    *,
    budget_s: float,
    min_rounds: int,
    on_round: Callable[[float], None],
) -> tuple[ModelRow, ...]:
    workload = _workload(case, device)
    if isinstance(workload, str):
        return tuple(ModelRow(case=case, peer=peer.name, status="out_of_memory", reason=workload) for peer in peers)
    rows: dict[str, ModelRow] = {}
    candidates: dict[str, Candidate] = {}
    first_runs: dict[str, _FirstRuns] = {}
    trial = _Trial(case=case, workload=workload, device=device, clock=clock, split_s=_SPLIT_SHARE * budget_s)
    # flashtile first, because the others are checked against it; then those that leave most memory to the next
    for peer in sorted(peers, key=lambda peer: (peer.name != FLASHTILE, peer.scratch_bytes(case))):
        outcome = trial.of(peer)
        if isinstance(outcome, ModelRow):
            rows[peer.name] = outcome
            timing.release_memory()
        else:
            candidates[peer.name], first_runs[peer.name] = outcome
    timings = timing.measure(candidates, clock, budget_s=budget_s, min_rounds=min_rounds, on_round=on_round)
    for name, timed in timings.items():
        if isinstance(timed, Failure):
            rows[name] = ModelRow(case=case, peer=name, status=timed.status, reason=timed.reason)
        else:
            rows[name] = _measured_row(case, name, timings, first_runs)
    return tuple(rows[peer.name] for peer in peers)


def _workload(case: ModelCase, device: torch.device) -> Workload | str:
    """The case, ready to run; the reason if its model alone does not fit."""
    if (reason := environment.lack_of_memory(case.least_bytes, device)) is not None:
        return reason
    try:
        return workloads.build(case, device)
    except Exception as error:
        if not timing.is_out_of_memory(error):
            raise
        return "the model alone does not fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """First runs of one case with one peer after the other: what memory they take, and whether they are right."""

    case: ModelCase
    workload: Workload
    device: torch.device
    clock: Clock
    split_s: float
    checker: Checker = field(default_factory=Checker)

    def of(self, peer: ModelPeer) -> ModelRow | tuple[Candidate, _FirstRuns]:
        row = partial(ModelRow, case=self.case, peer=peer.name)
        if (reason := environment.lack_of_memory(peer.scratch_bytes(self.case), self.device)) is not None:
            return row(status="out_of_memory", reason=reason)
        try:
            attention = peer.make()
            difference = self.checker.difference(peer.name, self.workload.probe(attention))
            run = partial(self.workload.run, attention)
            peak_extra = peak_extra_bytes(run, self.device)
            attention_share = self._share_of(attention)
        except Exception as error:
            failure = Failure.of(error)
            return row(status=failure.status, reason=failure.reason)
        if (fault := self.checker.fault(difference, _TOLERATED_DIFFERENCE[self.case.dtype])) is not None:
            return row(status="wrong_result", reason=fault, difference=difference)
        state_bytes = self.workload.state_bytes
        return Candidate(run=run), _FirstRuns(
            peak_bytes=state_bytes + peak_extra,
            state_bytes=state_bytes,
            difference=difference,
            attention_share=attention_share,
        )

    def _share_of(self, attention: AttentionFn) -> float:
        """The share of the attention calls in the time, the median of a few runs."""
        watch = AttentionClock(self.device)
        watched = watch.around(attention)
        shares: list[float] = []
        begin = time.perf_counter()
        while not shares or (len(shares) < _MAX_SPLIT_RUNS and time.perf_counter() - begin < self.split_s):
            self.clock.begin_round()
            total_ms = self.clock.time_ms(partial(self.workload.run, watched))
            self.clock.end_round()
            seconds = watch.take()
            shares.append(1e3 * (seconds.forward + seconds.backward) / total_ms())
        return median(shares)


def _measured_row(
    case: ModelCase, name: str, timings: Mapping[str, Timing | Failure], first_runs: Mapping[str, _FirstRuns]
) -> ModelRow:
    timed, first = timings[name], first_runs[name]
    assert isinstance(timed, Timing), "the caller sorted the failures out"
    return ModelRow(
        case=case,
        peer=name,
        status="ok",
        timing=timed,
        peak_bytes=first.peak_bytes,
        state_bytes=first.state_bytes,
        attention_share=first.attention_share,
        attention_ms=first.attention_share * timed.median_ms,
        difference=first.difference,
        speedup_over_naive=timing.speedup(timed, timings.get(NAIVE)),
        speedup_over_sdpa=timing.speedup(timed, timings.get(SDPA)),
        memory_ratio_to_naive=_memory_ratio(first, first_runs.get(NAIVE)),
    )


def _memory_ratio(first: _FirstRuns, naive: _FirstRuns | None) -> float | None:
    return None if naive is None else naive.peak_bytes / first.peak_bytes

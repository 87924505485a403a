"""``bench io``: kernels are timed as ``bench kernels`` does, and their traffic is predicted, counted and bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from flashtile.bench import kernels
from flashtile.bench.baselines import Peer
from flashtile.bench.cases import BenchCase
from flashtile.bench.labels import Labelled
from flashtile.bench.results import IoResults, IoRow, KernelResults, KernelRow
from flashtile.bench.timing import Clock
from flashtile.bench.traffic import counter
from flashtile.bench.traffic.counter import CounterUnavailable, Job
from flashtile.bench.traffic.peers import predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What the device's own counters said."""

    name: str | None
    reason: str | None
    """Why there are none; None if there are."""
    counted_bytes: dict[Job, int]

    @classmethod
    def read(cls, jobs: Sequence[Job], device: torch.device) -> Counters:
        """Counts each job's bytes, where somebody can."""
        try:
            name, counted_bytes = counter.count(jobs, device)
        except CounterUnavailable as error:
            return cls(name=None, reason=str(error), counted_bytes={})
        return cls(name=name, reason=None, counted_bytes=counted_bytes)


def run(
    empty: KernelResults,
    cases: Sequence[BenchCase],
    peers: Sequence[Peer],
    device: torch.device,
    clock: Clock,
    *,
    min_rounds: int,
    on_progress: Callable[[Labelled, float], None] = lambda _case, _share: None,
) -> Iterator[IoResults]:
    """As ``kernels.run``, from what ``kernels.start`` returned, with traffic instead of operations."""
    counters = Counters.read([(case, peer.name) for case in cases for peer in peers], device)
    for timed in kernels.run(empty, cases, peers, device, clock, min_rounds=min_rounds, on_progress=on_progress):
        yield IoResults(
            environment=timed.environment,
            created_utc=timed.created_utc,
            budget_s=timed.budget_s,
            is_complete=timed.is_complete,
            copy_gb_per_s=timed.ceilings.copy_gb_per_s,
            counter=counters.name,
            no_counter_reason=counters.reason,
            rows=tuple(_row(row, counters, timed.ceilings.copy_gb_per_s, device) for row in timed.rows),
        )


def _row(row: KernelRow, counters: Counters, copy_gb_per_s: float, device: torch.device) -> IoRow:
    cost = predicted(row.case, row.peer, device)
    return IoRow(
        case=row.case,
        peer=row.peer,
        status=row.status,
        reason=row.reason,
        timing=row.timing,
        predicted={term.what: term.num_bytes for term in cost.traffic},
        counted_bytes=None if row.timing is None else counters.counted_bytes.get((row.case, row.peer)),
        bound_bytes=None if row.timing is None else round(row.timing.median_ms * 1e-3 * copy_gb_per_s * 1e9),
    )

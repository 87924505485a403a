"""A run of whole models, and what several parts of its section need of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flashtile.bench.baselines import FLASHTILE, SDPA
from flashtile.bench.models import claims
from flashtile.bench.models.cases import Mode, ModelCase
from flashtile.bench.models.claims import Pair
from flashtile.bench.results import ModelResults, ModelRow

IN_WORDS: dict[Mode, str] = {"train": "training step", "prefill": "prefill", "decode": "one more token"}


@dataclass(frozen=True)
class Run:
    """A file, and what several parts of its section need."""

    source: str
    results: ModelResults

    @cached_property
    def cases(self) -> list[ModelCase]:
        return list(dict.fromkeys(row.case for row in self.results.rows))

    @cached_property
    def rows(self) -> dict[tuple[ModelCase, str], ModelRow]:
        return {(row.case, row.peer): row for row in self.results.rows}

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The cases that the naive formula and flashtile both finished."""
        return claims.pairs(self.results)

    @cached_property
    def speedups_over_sdpa(self) -> list[float]:
        """flashtile's speed as a multiple of torch's, for each case that both finished."""
        timings = {place: row.timing for place, row in self.rows.items() if row.timing is not None}
        return [
            timings[case, SDPA].median_ms / timings[case, FLASHTILE].median_ms
            for case in self.cases
            if (case, SDPA) in timings and (case, FLASHTILE) in timings
        ]

    @cached_property
    def modes(self) -> list[Mode]:
        return list(dict.fromkeys(case.mode for case in self.cases))

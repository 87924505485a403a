"""A run of whole models, and what several parts of its section need of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.models import claims
from flashtile.bench.models.cases import LimitCase, Mode, ModelCase
from flashtile.bench.models.claims import Pair
from flashtile.bench.results import LimitRow, ModelResults, ModelRow

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

    @cached_property
    def growths(self) -> dict[LimitCase, float]:
        """How many times as much fits with flashtile as with the naive formula, for each question answered for both."""
        known = {(row.case, row.peer): row.largest for row in self.results.limits if row.largest and _is_known(row)}
        return {
            case: largest / known[case, NAIVE]
            for (case, peer), largest in known.items()
            if peer == FLASHTILE and (case, NAIVE) in known
        }


def _is_known(row: LimitRow) -> bool:
    """Whether the search did not end before a failure."""
    return row.status == "extrapolated" or row.too_large is not None

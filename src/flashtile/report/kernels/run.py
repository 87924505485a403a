"""A kernel run, and what several parts of its section need of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import geometric_mean

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.bench.summary import Speedups


@dataclass(frozen=True)
class Run:
    """A file, and what several parts of its section need."""

    source: str
    results: KernelResults

    @cached_property
    def cases(self) -> list[BenchCase]:
        return list(dict.fromkeys(row.case for row in self.results.rows))

    @cached_property
    def peers(self) -> list[str]:
        """Everybody with a timing, flashtile first."""
        return [FLASHTILE, *summary.rivals(self.results)]

    @cached_property
    def known(self) -> dict[str, Speedups]:
        """flashtile's speed as a multiple of each peer's, for those that it can be compared with."""
        return {peer: of for peer in self.peers[1:] if (of := summary.speedups(self.results, peer))}

    @cached_property
    def rows(self) -> dict[tuple[BenchCase, str], KernelRow]:
        return {(row.case, row.peer): row for row in self.results.rows}

    def means(self, peer: str) -> dict[str, float]:
        """Geometric means of flashtile's speed over the peer's by direction: of plain calls, if there are any."""
        return {
            direction: geometric_mean(of.values()) for direction, of in by_direction(plain(self.known[peer])).items()
        }


def plain(ratios: Speedups) -> Speedups:
    return {case: ratio for case, ratio in ratios.items() if case.option == "plain"} or ratios


def by_direction(ratios: Speedups) -> dict[str, Speedups]:
    directions = dict.fromkeys(case.direction for case in ratios)
    return {name: {case: of for case, of in ratios.items() if case.direction == name} for name in directions}

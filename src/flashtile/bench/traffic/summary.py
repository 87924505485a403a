"""What results of ``bench io`` say, in sentences."""

from __future__ import annotations

from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import IoResults
from flashtile.bench.summary import machine, three_digits

WHAT_A_GPU_ADDS = (
    "With a GPU and Nsight Compute: bytes counted by the device's own counters. A CPU's are not open to ordinary "
    "programs, and its arithmetic takes so much of the time that the bound is loose."
)


def conditions(results: IoResults) -> list[str]:
    """Where and how it was measured, and what the figures are."""
    counted = f"Counted by {results.counter}." if results.counter else f"Not counted: {results.no_counter_reason}."
    return [
        machine(results.environment),
        f"Copy {three_digits(results.copy_gb_per_s)} GB/s; about {results.budget_s:g} s for each case. MB are 10**6 "
        "bytes, read plus written.",
        "Predicted: the naive formula at its best, each step reading its operands and writing its results once, scores "
        "in float32; tiles as flashtile plans them.",
        f"{counted} At most: what a copy moves in the same time, an upper bound. At copy speed: the part of the time "
        "that the predicted bytes take there; where it is small, something else than memory sets the time.",
    ]


def findings(results: IoResults) -> list[str]:
    """How the two methods compare, and what this run leaves open."""
    lines = comparisons(results)
    if results.environment.device == "cpu":
        lines.append(WHAT_A_GPU_ADDS)
    if not results.is_complete:
        lines.append("The run was interrupted: only the finished cases are here.")
    return lines


def comparisons(results: IoResults) -> list[str]:
    """How bytes and times compare where the sequence is longest: a sentence for each direction."""
    lines = []
    rows = {(row.case, row.peer): row for row in results.rows}
    for direction in dict.fromkeys(row.case.direction for row in results.rows):
        case = max((row.case for row in results.rows if row.case.direction == direction), key=_length)
        naive, tiled = rows.get((case, NAIVE)), rows.get((case, FLASHTILE))
        if naive is None or tiled is None or tiled.predicted_bytes <= 0:
            continue
        line = f"{direction.capitalize()}, {case.seqlen} tokens, {case.mask_name}: the naive formula moves at least "
        line += f"{naive.predicted_bytes / tiled.predicted_bytes:.1f}x the bytes of tiles by prediction"
        if naive.counted_bytes and tiled.counted_bytes:
            line += f", {naive.counted_bytes / tiled.counted_bytes:.1f}x by count"
        if naive.timing and tiled.timing:
            line += f", and takes {naive.timing.median_ms / tiled.timing.median_ms:.1f}x the time"
        lines.append(line + ".")
    return lines


def _length(case: BenchCase) -> tuple[int, bool]:
    return case.seqlen, case.is_causal

"""What results say, in sentences and numbers: shared by the terminal's tables, the Markdown page and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flashtile.bench.baselines import FLASHTILE, FLEX, NAIVE, PEERS, SDPA, SDPA_CUDNN, SDPA_FLASH
from flashtile.bench.cases import OPTIONS, BenchCase
from flashtile.bench.environment import Environment
from flashtile.bench.results import AnyRow, KernelResults
from flashtile.bench.timing import Timing

RIVALS = (SDPA, NAIVE, FLEX)
"""What users of every installation would call instead of flashtile."""
WORDS = {
    "unavailable": "-",
    "refused": "refused",
    "out_of_memory": "out of memory",
    "wrong_result": "WRONG RESULT",
}
"""What stands in a table where there is no timing."""
_TITLES = {
    FLEX: "FlexAttention",
    SDPA_FLASH: "FA2 in torch",
    SDPA_CUDNN: "cuDNN in torch",
    SDPA: "torch's default",
    f"{SDPA}-efficient": "memory-efficient in torch",
    f"{SDPA}-math": "math in torch",
    NAIVE: "naive formula",
}
"""Those whose name does not say what they are, in the order of their columns."""
TOLERANCE = 0.05
"""How much slower than torch the project lets flashtile be."""

Speedups = Mapping[BenchCase, float]


def speedups(results: KernelResults, peer: str) -> dict[BenchCase, float]:
    """flashtile's speed as a multiple of the peer's, by the medians, for each case that both have timings of."""
    ours, theirs = _timings(results, FLASHTILE), _timings(results, peer)
    return {case: theirs[case].median_ms / timed.median_ms for case, timed in ours.items() if case in theirs}


def _timings(results: KernelResults, peer: str) -> dict[BenchCase, Timing]:
    return {row.case: row.timing for row in results.rows if row.peer == peer and row.timing is not None}


def rivals(results: KernelResults) -> list[str]:
    """The peers that some case has a timing of, flashtile apart, in the order of a table's columns."""
    timed = {row.peer: None for row in results.rows if row.timing is not None and row.peer != FLASHTILE}
    order = dict.fromkeys([*_TITLES, *(peer.name for peer in PEERS), *timed])
    return [peer for peer in order if peer in timed]


def peer_title(peer: str) -> str:
    """The peer's name as a stranger understands it."""
    return _TITLES.get(peer, peer)


def where_slower(ratios: Speedups) -> str:
    """For example ``slower in 2 of 36 cases, by more than 5% in 1; at worst 0.93x its speed (...).``"""
    num_slower, num_far = (sum(ratio < limit for ratio in ratios.values()) for limit in (1, 1 - TOLERANCE))
    worst = min(ratios, key=lambda case: ratios[case])
    where = f"{ratios[worst]:.2f}x its speed ({in_words(worst)})"
    if num_slower == 0:
        return f"in none of {len(ratios)} cases; the closest is {where}."
    counts = f"slower in {num_slower} of {len(ratios)} cases, by more than {TOLERANCE:.0%} in {num_far}"
    return f"{counts}; at worst {where}."


def in_words(case: BenchCase) -> str:
    """For example ``forward, bfloat16, head_dim 128, 4096 tokens, causal, bias``."""
    option = "" if case.option == "plain" else f", {case.option}"
    return f"{case.direction}, {case.dtype}, head_dim {case.head_dim}, {case.seqlen} tokens, {case.mask_name}{option}"


# --- findings ---------------------------------------------------------------------------------------------------------


def findings(results: KernelResults) -> list[str]:
    """The worst ratios, and where flashtile is slower than its users' alternatives."""
    ratios = {peer: known for peer in RIVALS if (known := speedups(results, peer))}
    lines = []
    for peer, known in ratios.items():
        if peer != NAIVE:
            lines.append(_worst(peer, "", known))
        elif causal := {case: ratio for case, ratio in known.items() if case.is_causal}:
            lines.append(_worst_over_naive(causal))
    if ratios:
        lines += _slower(results, ratios)
    if not results.is_complete:
        lines.append("The run was interrupted: only the finished cases are here.")
    return lines


def _slower(results: KernelResults, ratios: Mapping[str, Speedups]) -> list[str]:
    """One line for each case and peer that flashtile is behind, the furthest first."""
    ours = {row.case: row for row in results.rows if row.peer == FLASHTILE}
    behind: list[tuple[float, str]] = []
    for peer, known in ratios.items():
        theirs = _timings(results, peer)
        for case, speedup in known.items():
            timed = ours[case].timing
            if speedup < 1 and timed is not None:
                unclear = " (their quartiles overlap)" if timed.q25_ms <= theirs[case].q75_ms else ""
                line = f"  {speedup:.3f}x the speed of {peer}: {case.label}, by {ours[case].kernel}{unclear}"
                behind.append((speedup, line))
    num_compared = sum(len(known) for known in ratios.values())
    num_far = sum(speedup < 1 - TOLERANCE for speedup, _ in behind)
    headline = f"flashtile is slower in {len(behind)} of {num_compared} comparisons with {listed(list(ratios))}"
    detail = f", by more than {TOLERANCE:.0%} in {num_far}:" if behind else "."
    return [headline + detail, *(line for _, line in sorted(behind))]


def _worst_over_naive(known: Speedups) -> str:
    """At 4096 tokens; at the longest length that was measured if that was not."""
    seqlens = {case.seqlen for case in known}
    seqlen = 4096 if 4096 in seqlens else max(seqlens)
    at_seqlen = {case: ratio for case, ratio in known.items() if case.seqlen == seqlen}
    return _worst(NAIVE, f" at {seqlen} tokens, causal", at_seqlen)


def _worst(peer: str, where: str, known: Speedups) -> str:
    case = min(known, key=lambda case: known[case])
    return f"Worst against {peer}{where}: {known[case]:.2f}x its speed ({case.label})."


# --- conditions and gaps ----------------------------------------------------------------------------------------------


def conditions(results: KernelResults) -> list[str]:
    """Where and how it was measured, and what the figures count."""
    environment, ceilings = results.environment, results.ceilings
    products = ", ".join(f"{three_digits(rate)} TFLOP/s {dtype}" for dtype, rate in ceilings.matmul_tflops.items())
    return [
        machine(environment),
        f"Ceilings in this run: matrix product {products}; copy {three_digits(ceilings.copy_gb_per_s)} GB/s. "
        f"About {results.budget_s:g} s for each case.",
        "TFLOP/s count the pairs that causality and window leave visible. Memory is the peak beyond the inputs; a "
        "backward's includes its forward.",
        *options_used(results),
    ]


def machine(environment: Environment) -> str:
    """The device and the software, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"{environment.device_name} ({environment.device}, {environment.num_threads} threads), {versions}"


def options_used(results: KernelResults) -> list[str]:
    """One line for each option that some case carries."""
    used = {row.case.option for row in results.rows}
    return [f"{option}: {what}." for option, what in OPTIONS.items() if option in used and option != "plain"]


def gaps(results: KernelResults) -> list[str]:
    """Who is missing and why: one line for each peer and reason, not for each row."""
    lines = []
    for reason in dict.fromkeys(results.missing_peers.values()):
        names = [name for name, why in results.missing_peers.items() if why == reason]
        lines.append(f"Not here: {', '.join(names)}: {reason}")
    return [*lines, *row_gaps(results.rows)]


def row_gaps(rows: Sequence[AnyRow]) -> list[str]:
    """Which rows have no timing and why: one line for each peer and reason."""
    firsts: dict[tuple[str, str, str | None], AnyRow] = {}
    gaps = [row for row in rows if row.status != "ok"]
    for row in gaps:
        firsts.setdefault(_gap(row), row)
    counts = Counter(map(_gap, gaps))
    lines = []
    for gap, first in firsts.items():
        others = f" and {counts[gap] - 1} more" if counts[gap] > 1 else ""
        word = "" if first.status == "unavailable" else f"{WORDS[first.status]}: "
        lines.append(f"{first.peer}: {word}{first.reason} ({first.case.label}{others})")
    return lines


def _gap(row: AnyRow) -> tuple[str, str, str | None]:
    return row.peer, row.status, row.reason


# --- words ------------------------------------------------------------------------------------------------------------


def listed(names: Sequence[str]) -> str:
    """``"a"``, ``"a and b"``, ``"a, b and c"``."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def where_and_by_whom(results: KernelResults) -> str:
    """``NVIDIA H200: hopper and triton``, the device and the backends that ran flashtile's rows."""
    return ": ".join(filter(None, (results.environment.device_name, listed(results.backends))))


def times(ratio: float) -> str:
    """``2.8x``, ``254x``."""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x"


def percent(share: float) -> str:
    """``73%``, ``1.9%``."""
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"


def three_digits(value: float) -> str:
    """Three significant digits, never in exponent notation."""
    decimals = next((n for n, bound in enumerate((100, 10, 1, 0.1, 0.01)) if abs(value) >= bound), 5)
    return f"{value:,.{decimals}f}"

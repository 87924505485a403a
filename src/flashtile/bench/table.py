"""Results as tables for the terminal, and the few sentences that a reader wants at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.spec import units

_TOLERANCE = 0.05
"""How much slower than torch the project lets flashtile be."""
_WORDS = {
    "unavailable": "unavailable",
    "refused": "refused",
    "out_of_memory": "out of memory",
    "wrong_result": "WRONG RESULT",
}


def print_results(results: KernelResults, console: Console | None = None) -> None:
    """Prints the conditions of the run, one table per direction and dtype, what is missing and why, and the summary."""
    console = console or Console()
    for line in _conditions(results):
        console.print(Text(line), soft_wrap=True)
    for (direction, dtype), rows in groupby(results.rows, key=lambda row: (row.case.direction, row.case.dtype)):
        table = _table(f"{direction}, {dtype}", list(rows))
        table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        console.print(table, crop=False)  # a narrow terminal breaks lines, which is ugly; cut figures would be wrong
    for line in (*_missing(results), *summary(results)):
        console.print(Text(line), soft_wrap=True)


def summary(results: KernelResults) -> list[str]:
    """What the run says about flashtile: the worst ratios, and where it is slower than its user's alternatives."""
    ours = [row for row in results.rows if row.peer == FLASHTILE and row.timing is not None]
    lines = [
        *_worst(SDPA, "", [(row.speedup_over_sdpa, row) for row in ours]),
        *_worst_over_naive([row for row in ours if row.case.is_causal and row.speedup_over_naive is not None]),
        *_slower(results, ours),
    ]
    if not results.is_complete:
        lines.append("The run was interrupted: only the finished cases are here.")
    return lines


def _slower(results: KernelResults, ours: Sequence[KernelRow]) -> list[str]:
    """One line for each case and peer that flashtile is behind, the furthest first."""
    timings = {(row.case, row.peer): row.timing for row in results.rows}
    num_compared = 0
    behind: list[tuple[float, str]] = []
    for row in ours:
        for peer, speedup in ((SDPA, row.speedup_over_sdpa), (NAIVE, row.speedup_over_naive)):
            theirs = timings.get((row.case, peer))
            if speedup is None or theirs is None or row.timing is None:
                continue
            num_compared += 1
            if speedup < 1:
                unclear = " (their quartiles overlap)" if row.timing.q25_ms <= theirs.q75_ms else ""
                line = f"  {speedup:.3f}x the speed of {peer}: {row.case.label}, by {row.kernel}{unclear}"
                behind.append((speedup, line))
    if not num_compared:
        return []
    num_far = sum(speedup < 1 - _TOLERANCE for speedup, _ in behind)
    headline = f"flashtile is slower in {len(behind)} of {num_compared} comparisons with {SDPA} and {NAIVE}"
    detail = f", by more than {_TOLERANCE:.0%} in {num_far}:" if behind else "."
    return [headline + detail, *(line for _, line in sorted(behind))]


def _worst_over_naive(rows: Sequence[KernelRow]) -> list[str]:
    """At 4096 tokens, causal; at the longest length that was measured if that was not."""
    seqlens = {row.case.seqlen for row in rows}
    seqlen = 4096 if 4096 in seqlens else max(seqlens, default=0)
    return _worst(
        NAIVE,
        f" at {seqlen} tokens, causal",
        [(row.speedup_over_naive, row) for row in rows if row.case.seqlen == seqlen],
    )


def _worst(peer: str, where: str, speedups: Iterable[tuple[float | None, KernelRow]]) -> list[str]:
    known = [(speedup, row) for speedup, row in speedups if speedup is not None]
    if not known:
        return []
    speedup, row = min(known, key=lambda pair: pair[0])
    return [f"Worst against {peer}{where}: {speedup:.2f}x its speed ({row.case.label})."]


# --- conditions and gaps ----------------------------------------------------------------------------------------------


def _conditions(results: KernelResults) -> list[str]:
    environment, ceilings = results.environment, results.ceilings
    products = ", ".join(f"{three_digits(rate)} TFLOP/s {dtype}" for dtype, rate in ceilings.matmul_tflops.items())
    return [
        f"{environment.device_name} ({environment.device}, {environment.num_threads} threads), "
        + ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        f"Ceilings in this run: matrix product {products}; copy {three_digits(ceilings.copy_gb_per_s)} GB/s. "
        f"About {results.budget_s:g} s for each case.",
        "TFLOP/s count visible pairs only. Memory is the peak beyond the inputs; a backward's includes its forward.",
    ]


def _missing(results: KernelResults) -> list[str]:
    """One line for each peer and reason, not for each row."""
    lines = []
    for reason in dict.fromkeys(results.missing_peers.values()):
        names = [name for name, why in results.missing_peers.items() if why == reason]
        lines.append(f"Not here: {', '.join(names)}: {reason}")
    gaps = [row for row in results.rows if row.status != "ok"]
    counts = Counter((row.peer, row.status, row.reason) for row in gaps)
    for (peer, status, reason), count in counts.items():
        first = next(row for row in gaps if (row.peer, row.status, row.reason) == (peer, status, reason))
        others = f" and {count - 1} more" if count > 1 else ""
        lines.append(f"{peer}: {_WORDS[status]}: {reason} ({first.case.label}{others})")
    return lines


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(title: str, rows: Sequence[KernelRow]) -> Table:
    """One table row for each case; its cells have a line for each peer."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.HORIZONTALS, show_lines=True)
    for heading in ("case", "peer"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "spread", "TFLOP/s", "% ceiling", "memory", f"x {NAIVE}", f"x {SDPA}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for case, of_case in groupby(rows, key=lambda row: row.case):
        lines = [(row.peer, *_cells(row)) for row in of_case]
        table.add_row(_case_cell(case), *(_column(lines, idx) for idx in range(len(lines[0]))))
    return table


def _column(lines: Sequence[Sequence[str]], idx: int) -> Text:
    return Text("\n").join(Text(line[idx], style="bold" if line[0] == FLASHTILE else "") for line in lines)


def _case_cell(case: BenchCase) -> str:
    heads = str(case.heads_q) if case.heads_q == case.heads_kv else f"{case.heads_q}/{case.heads_kv}"
    return f"head_dim {case.head_dim}\n{case.seqlen} {case.mask_name}\nbatch {case.batch}, heads {heads}"


def _cells(row: KernelRow) -> tuple[str, ...]:
    """ms, spread, TFLOP/s, % of ceiling, memory, speed-up over naive and over sdpa."""
    timing = row.timing
    if timing is None:
        return (_WORDS[row.status], *("",) * 6)
    half_spread = (timing.q75_ms - timing.q25_ms) / 2 / timing.median_ms
    return (
        three_digits(timing.median_ms),
        f"±{half_spread:.0%}",
        "" if row.tflops is None else three_digits(row.tflops),
        "" if row.percent_of_ceiling is None else f"{row.percent_of_ceiling:.0f}",
        "" if row.peak_extra_bytes is None else units.in_bytes(row.peak_extra_bytes),
        "" if row.speedup_over_naive is None else f"{row.speedup_over_naive:.2f}",
        "" if row.speedup_over_sdpa is None else f"{row.speedup_over_sdpa:.2f}",
    )


def three_digits(value: float) -> str:
    """Three significant digits, never in exponent notation."""
    decimals = next((n for n, bound in enumerate((100, 10, 1, 0.1, 0.01)) if abs(value) >= bound), 5)
    return f"{value:,.{decimals}f}"

"""What people claim beside what was measured: verdicts, their reasons, and the tables that show them."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.environment import Environment
from flashtile.bench.models import claims, summary, table
from flashtile.bench.models.cases import SIZES, LimitCase, ModelCase
from flashtile.bench.models.claims import Verdict, judged
from flashtile.bench.results import LimitRow, ModelResults, ModelRow
from flashtile.bench.timing import Timing

MB = 10**6
SMALL = ModelCase(mode="train", size="small", shape=SIZES["small"], seqlen=512, batch=32, dtype="bfloat16")


def row(
    case: ModelCase, peer: str, ms: float, mb: float, attention_ms: float, naive_ms: float, naive_mb: float
) -> ModelRow:
    return ModelRow(
        case=case,
        peer=peer,
        status="ok",
        timing=Timing(median_ms=ms, q25_ms=0.98 * ms, q75_ms=1.02 * ms, rounds=5),
        peak_bytes=round(mb * MB),
        state_bytes=1000 * MB,
        attention_ms=attention_ms,
        attention_share=attention_ms / ms,
        difference=0.01,
        speedup_over_naive=naive_ms / ms,
        speedup_over_sdpa=0.9 if peer == FLASHTILE else None,
        memory_ratio_to_naive=naive_mb / mb,
    )


def rows(
    case: ModelCase, *, naive_ms: float, attention_ms: float, ms: float, naive_mb: float, mb: float
) -> tuple[ModelRow, ...]:
    """Naive with a given time in attention, and flashtile, whose other time is the same."""
    tiled_attention_ms = max(attention_ms - (naive_ms - ms), 0.01)
    return (
        row(case, FLASHTILE, ms, mb, tiled_attention_ms, naive_ms, naive_mb),
        row(case, NAIVE, naive_ms, naive_mb, attention_ms, naive_ms, naive_mb),
    )


def results(*found: ModelRow, limits: tuple[LimitRow, ...] = (), device: str = "cuda") -> ModelResults:
    return ModelResults(
        environment=Environment(
            device=device,
            device_name="A GPU [bold]",
            num_threads=2,
            platform="Linux x86_64",
            versions={"torch": "2.13.0"},
            commit=None,
            commit_is_dirty=False,
        ),
        created_utc="2026-01-02T03:04:05+00:00",
        budget_s=1.0,
        is_complete=True,
        rows=found,
        limits=limits,
    )


def verdict(found: ModelResults, claim: str) -> Verdict:
    (chosen,) = [verdict for verdict in judged(found) if claim in verdict.claim]
    return chosen


def test_the_table_has_what_people_quote() -> None:
    said = " ".join(verdict.claim for verdict in judged(results()))
    for part in (
        "small (12 layers) at 512 tokens: 100 ms -> 25 ms (4x faster)",
        "small (12 layers) at 512 tokens: 4000 MB -> 2000 MB (2x less)",
        "medium (24 layers) at 512 tokens: 200 ms -> 50 ms (4x faster)",
        "medium (24 layers) at 512 tokens: 8000 MB -> 4000 MB (2x less)",
        "large (48 layers) at 1024 tokens: 400 ms -> 75 ms (5.3x faster)",
        "large (48 layers) at 1024 tokens: 16000 MB -> 8000 MB (2x less)",
        "1.5x to 6x faster",
        "2x to 4x less memory",
        "up to 5x lower latency",
    ):
        assert part in said
    assert {cell.size: cell.layers for cell in claims.CELLS} == {
        name: SIZES[name].layers for name in ("small", "medium", "large")
    }


def test_what_was_not_measured_is_not_judged() -> None:
    for found in (
        results(),
        results(*rows(replace(SMALL, seqlen=128), naive_ms=9, attention_ms=1, ms=9, naive_mb=9, mb=9)[1:]),
    ):
        assert {verdict.holds for verdict in judged(found)} == {None}
        assert {verdict.measured for verdict in judged(found)} == {None}
    assert "--mode train --size small --seqlen 512" in verdict(results(), "small (12 layers) at 512 tokens: 100").why


def test_a_claim_that_amdahl_forbids_says_so() -> None:
    found = results(*rows(SMALL, naive_ms=100, attention_ms=20, ms=85, naive_mb=9000, mb=6000))
    time, memory = (verdict(found, f"small (12 layers) at 512 tokens: {what}") for what in ("100 ms", "4000 MB"))
    assert time.holds is False and time.measured == "100 ms -> 85.0 ms (1.18x) at batch 32"
    assert time.why == (
        "attention is 20% of the naive time: even attention that takes no time at all would make it 1.25x faster and "
        "no more"
    )
    assert memory.holds is False and memory.measured == "9,000 MB -> 6,000 MB (1.50x) at batch 32"
    assert (
        "1,000 MB, gradients and activations 5,000 MB with either; the score matrices raise the peak by 3,000 MB"
        in memory.why
    )


def test_a_claim_that_holds_says_so() -> None:
    found = results(*rows(SMALL, naive_ms=100, attention_ms=90, ms=20, naive_mb=9000, mb=3000))
    time, memory = (verdict(found, f"small (12 layers) at 512 tokens: {what}") for what in ("100 ms", "4000 MB"))
    assert time.holds is True and memory.holds is True
    assert time.why.startswith("attention is 90% of the naive time, so that 10.00x is the limit")
    assert time.why.endswith("the attention calls alone are 9.0x faster")


def test_ranges_are_judged_over_every_cell() -> None:
    decode = replace(SMALL, mode="decode", batch=1, seqlen=2048)
    cells = (
        *rows(SMALL, naive_ms=100, attention_ms=20, ms=90, naive_mb=3000, mb=2000),
        *rows(replace(SMALL, seqlen=4096), naive_ms=100, attention_ms=80, ms=40, naive_mb=6000, mb=2000),
        *rows(decode, naive_ms=10, attention_ms=8.5, ms=1.9, naive_mb=500, mb=500),
    )
    faster, memory, latency = judged(results(*cells))[-3:]
    assert faster.measured == "1.11x to 5.26x; 2 of 3 cells are at 1.5x or above" and faster.holds is False
    assert faster.why == "below: 1.11x train small at 512 (attention is 20%, limit 1.25x)"
    assert memory.measured == "1.50x to 3.00x; 1 of 2 cells are at 2x or above", "inference stores no scores to save"
    assert latency.holds is True and latency.measured == "up to 5.26x (decode small at 2048)"
    only_long = judged(results(*cells[2:4]))[-3]
    assert only_long.holds is True and only_long.why == ""


def test_a_peer_that_failed_makes_no_pair() -> None:
    tiled, naive = rows(SMALL, naive_ms=100, attention_ms=20, ms=90, naive_mb=3000, mb=2000)
    failed = ModelRow(case=naive.case, peer=NAIVE, status="out_of_memory", reason="too much")
    assert claims.pairs(results(tiled, failed)) == ()
    assert len(claims.pairs(results(tiled, naive))) == 1


def test_findings_name_what_is_slower() -> None:
    found = results(*rows(SMALL, naive_ms=100, attention_ms=20, ms=110, naive_mb=3000, mb=2000), device="cpu")
    said = "\n".join(summary.findings(found))
    assert f"train: slower than the naive formula in 1 of 1 cases; at worst 0.91x its speed ({SMALL.label})." in said
    assert f"Behind {SDPA} in 1 of 1 cases; at worst 0.90x its speed" in said
    assert summary.WHAT_A_GPU_ADDS in said
    assert "interrupted" in "\n".join(summary.findings(replace(found, is_complete=False)))
    assert summary.findings(results()) == []


def printed(found: ModelResults, width: int = 300) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    table.print_results(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_tables_have_every_figure() -> None:
    limit = LimitCase(size="small", shape=SIZES["small"], axis="seqlen", other=1, dtype="bfloat16")
    found = results(
        *rows(SMALL, naive_ms=100, attention_ms=20, ms=85, naive_mb=9000, mb=6000),
        ModelRow(case=SMALL, peer=SDPA, status="out_of_memory", reason="<so> [bold]much"),
        limits=(
            LimitRow(case=limit, peer=FLASHTILE, status="tried", largest=98304, too_large=101376, memory_bytes=10**11),
            LimitRow(case=limit, peer=NAIVE, status="extrapolated", largest=12800, memory_bytes=10**11),
            LimitRow(case=limit, peer=SDPA, status="failed", reason="TypeError: why"),
        ),
    )
    text = printed(found)
    for part in (
        "A GPU [bold] (cuda, 2 threads)",
        "small, train: a training step",
        "85.0",
        "±2%",
        "9,000",
        "out of memory",
        "sdpa: out of memory: <so> [bold]much",
        "98,304",
        "101,376 ran out of memory",
        "extrapolated",
        "TypeError: why",
        "1.25x faster and no more",
        "not in this run",
    ):
        assert part in " ".join(text.split()), part


@pytest.mark.parametrize("width", [60, 120])
def test_a_narrow_terminal_loses_no_figure(width: int) -> None:
    found = results(*rows(SMALL, naive_ms=123.4, attention_ms=20, ms=85, naive_mb=9000, mb=6000))
    assert "123" in printed(found, width) and "9,000" in printed(found, width)

"""The tables and the summary that follow from results."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from flashtile.bench import summary, table
from flashtile.bench.cases import BenchCase
from flashtile.bench.environment import Environment
from flashtile.bench.results import Ceilings, KernelResults, KernelRow
from flashtile.bench.timing import Timing

CASE = BenchCase(
    direction="forward",
    dtype="float32",
    head_dim=64,
    seqlen=4096,
    is_causal=True,
    batch=1,
    heads_q=8,
    heads_kv=8,
)


def row(peer: str, median_ms: float, *, case: BenchCase = CASE, naive_ms: float, sdpa_ms: float) -> KernelRow:
    return KernelRow(
        case=case,
        peer=peer,
        status="ok",
        timing=Timing(median_ms=median_ms, q25_ms=0.99 * median_ms, q75_ms=1.01 * median_ms, rounds=5),
        tflops=0.0123456,
        percent_of_ceiling=45.6,
        peak_extra_bytes=3 * 2**20,
        speedup_over_naive=naive_ms / median_ms,
        speedup_over_sdpa=sdpa_ms / median_ms,
        kernel="cpu/tiled" if peer == "flashtile" else None,
    )


def rows(ours_ms: float, naive_ms: float, sdpa_ms: float, case: BenchCase = CASE) -> tuple[KernelRow, ...]:
    times = {"flashtile": ours_ms, "naive": naive_ms, "sdpa": sdpa_ms}
    return tuple(row(peer, time_ms, case=case, naive_ms=naive_ms, sdpa_ms=sdpa_ms) for peer, time_ms in times.items())


def results(*found: KernelRow, is_complete: bool = True) -> KernelResults:
    return KernelResults(
        environment=Environment(
            device="cpu",
            device_name="A CPU [bold]",
            num_threads=2,
            platform="Linux x86_64",
            versions={"torch": "2.13.0"},
            commit=None,
            commit_is_dirty=False,
        ),
        created_utc="2026-01-02T03:04:05+00:00",
        budget_s=5.0,
        ceilings=Ceilings(matmul_tflops={"float32": 0.0876}, copy_gb_per_s=21.0),
        missing_peers={"flex": "needs a GPU", "xformers": "needs a GPU", "sdpa-math": "is shy"},
        is_complete=is_complete,
        rows=found,
    )


def printed(found: KernelResults, width: int = 80) -> str:
    file = io.StringIO()
    table.print_results(found, Console(file=file, width=width))
    return file.getvalue()


def test_each_peer_has_its_figures_on_its_own_line() -> None:
    lines = printed(results(*rows(10.0, 1234.5, 9.0))).splitlines()
    (ours,) = [line for line in lines if "flashtile" in line and "3.00 MiB" in line]
    assert ours.split()[-8:] == ["10.0", "±1%", "0.0123", "46", "3.00", "MiB", "123.45", "0.90"]
    (naive,) = [line for line in lines if " naive " in line and "MiB" in line]
    assert naive.split()[-8:] == ["1,234", "±1%", "0.0123", "46", "3.00", "MiB", "1.00", "0.01"]


def test_no_figure_is_cut_on_a_narrow_terminal() -> None:
    long = replace(CASE, batch=32, heads_q=128, heads_kv=16)
    failed = KernelRow(case=long, peer="sdpa-efficient", status="out_of_memory", reason="16 GiB")
    found = results(*rows(10.0, 1234.5, 9.0, long), failed)
    assert printed(found, width=40) == printed(found, width=200)
    assert "batch 32, heads 128/16" in printed(found) and "out of memory" in printed(found)


def test_a_case_names_its_axes_and_grouped_heads() -> None:
    text = printed(results(*rows(1.0, 1.0, 1.0, replace(CASE, heads_kv=2, is_causal=False))))
    assert "forward, float32" in text
    assert "head_dim 64" in text and "4096 full" in text and "batch 1, heads 8/2" in text


def test_conditions_are_stated() -> None:
    text = printed(results(*rows(1.0, 1.0, 1.0)))
    assert "A CPU [bold] (cpu, 2 threads), torch 2.13.0" in text, "text from results is not markup"
    assert "0.0876 TFLOP/s float32" in text and "copy 21.0 GB/s" in text


def test_gaps_have_their_reasons_each_once() -> None:
    refused = KernelRow(case=CASE, peer="sdpa-flash", status="refused", reason="needs [half] precision")
    full = KernelRow(case=CASE, peer="naive", status="out_of_memory", reason="16 GiB")
    other = replace(CASE, seqlen=8192)
    found = results(*rows(1.0, 1.0, 1.0), refused, replace(refused, case=other), full)
    text = " ".join(printed(found).split())
    assert "Not here: flex, xformers: needs a GPU" in text
    assert "Not here: sdpa-math: is shy" in text
    assert text.count("sdpa-flash: refused: needs [half] precision") == 1
    assert f"({CASE.label} and 1 more)" in text
    assert "naive: out of memory: 16 GiB" in text


def test_options_have_a_table_of_their_own_and_are_explained() -> None:
    window, bias = replace(CASE, option="window"), replace(CASE, option="bias")
    text = printed(results(*rows(1.0, 1.0, 1.0), *rows(1.0, 1.0, 1.0, window), *rows(1.0, 1.0, 1.0, bias)))
    titles = [line.strip() for line in text.splitlines() if line.startswith("forward, ")]
    assert titles == ["forward, float32", "forward, float32, with options"]
    cells = [line.split()[:3] for line in text.splitlines() if line.strip().startswith("4096 ")]
    assert [cell[2] for cell in cells] == ["naive", "window", "bias"], "a plain call has no third word"
    assert "bias: an additive bias [1, heads_q, seqlen, seqlen]" in text and "window: a sliding window" in text
    assert "ALiBi" not in text


def test_who_does_not_take_an_option_has_a_dash_and_a_reason() -> None:
    bias = replace(CASE, option="bias")
    gap = KernelRow(case=bias, peer="sdpa-flash", status="unavailable", reason="takes no bias")
    text = printed(results(*rows(1.0, 1.0, 1.0, bias), gap))
    (line,) = [line for line in text.splitlines() if "sdpa-flash " in line and "│" not in line and "takes" not in line]
    assert line.split()[-2:] == ["sdpa-flash", "-"]
    assert f"sdpa-flash: takes no bias ({bias.label})" in text


def test_flex_is_compared_with_where_it_is_there() -> None:
    flex = row("flex", 8.0, naive_ms=40.0, sdpa_ms=12.0)
    found = results(*rows(10.0, 40.0, 12.0), flex)
    text = printed(found)
    assert "x flex" in text and "x flex" not in printed(results(*rows(10.0, 40.0, 12.0)))
    (ours,) = [line for line in text.splitlines() if "flashtile" in line and "MiB" in line]
    assert ours.split()[-3:] == ["4.00", "1.20", "0.80"]
    assert summary.findings(found)[-3:] == [
        f"Worst against flex: 0.80x its speed ({CASE.label}).",
        "flashtile is slower in 1 of 3 comparisons with sdpa, naive and flex, by more than 5% in 1:",
        f"  0.800x the speed of flex: {CASE.label}, by cpu/tiled",
    ]


def test_summary_has_the_worst_ratios() -> None:
    short = replace(CASE, seqlen=1024)
    long = replace(CASE, seqlen=16384)
    lines = summary.findings(
        results(*rows(10.0, 40.0, 12.0), *rows(10.0, 15.0, 11.0, short), *rows(10.0, 12.0, 13.0, long))
    )
    assert lines == [
        f"Worst against sdpa: 1.10x its speed ({short.label}).",
        f"Worst against naive at 4096 tokens, causal: 4.00x its speed ({CASE.label}).",
        "flashtile is slower in 0 of 6 comparisons with sdpa and naive.",
    ]


def test_summary_takes_the_longest_causal_length_where_4096_is_missing() -> None:
    cases = [replace(CASE, seqlen=seqlen, is_causal=seqlen < 900) for seqlen in (512, 768, 1024)]
    lines = summary.findings(results(*(one for case in cases for one in rows(1.0, case.seqlen, 1.0, case))))
    assert lines[1] == f"Worst against naive at 768 tokens, causal: 768.00x its speed ({cases[1].label})."


def test_summary_lists_every_case_where_flashtile_is_slower() -> None:
    near, far = replace(CASE, seqlen=1024), replace(CASE, seqlen=512)
    lines = summary.findings(
        results(*rows(10.0, 99.0, 10.0), *rows(10.0, 99.0, 9.9, near), *rows(10.0, 9.0, 8.0, far))
    )[-4:]
    assert lines[0] == "flashtile is slower in 3 of 6 comparisons with sdpa and naive, by more than 5% in 2:"
    assert lines[1] == f"  0.800x the speed of sdpa: {far.label}, by cpu/tiled"
    assert lines[2] == f"  0.900x the speed of naive: {far.label}, by cpu/tiled"
    assert lines[3] == f"  0.990x the speed of sdpa: {near.label}, by cpu/tiled (their quartiles overlap)"


def test_summary_of_nothing_claims_nothing() -> None:
    assert summary.findings(results()) == []
    assert summary.findings(results(is_complete=False)) == [
        "The run was interrupted: only the finished cases are here."
    ]
    only_naive = rows(1.0, 1.0, 1.0)[1]
    assert summary.findings(results(only_naive)) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.456, "123"), (12.345, "12.3"), (1.2345, "1.23"), (0.012345, "0.0123"), (0, "0.00000")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert summary.three_digits(value) == text

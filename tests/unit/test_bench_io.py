"""``bench io``: what is predicted, what counters say where there are any, what time says where there are none."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from flashtile.bench import kernels, timing
from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import IoResults, IoRow
from flashtile.bench.timing import CpuClock
from flashtile.bench.traffic import counter, measuring, summary, table
from flashtile.bench.traffic.counter import CounterUnavailable
from flashtile.bench.traffic.peers import PEERS, predicted

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASE = BenchCase(
    direction="forward",
    dtype="float32",
    head_dim=16,
    seqlen=64,
    is_causal=True,
    batch=1,
    heads_q=2,
    heads_kv=2,
)
CASES = (CASE, replace(CASE, direction="backward"))
JOBS = [(case, peer.name) for case in CASES for peer in PEERS]


@pytest.fixture(autouse=True)
def cheap_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "matmul_ceiling_tflops", lambda *_: 2.0)
    monkeypatch.setattr(timing, "copy_ceiling_gb_per_s", lambda *_: 3.0)


def run(*cases: BenchCase) -> IoResults:
    empty = kernels.start(cases, PEERS, CPU, CpuClock(), budget_s=1e-3)
    return list(measuring.run(empty, cases, PEERS, CPU, CpuClock(), min_rounds=2))[-1]


def test_rows_have_predictions_and_a_bound_from_time() -> None:
    results = run(*CASES)
    assert [(row.case.direction, row.peer) for row in results.rows] == [(case.direction, peer) for case, peer in JOBS]
    for row in results.rows:
        assert row.timing is not None and row.counted_bytes is None
        assert row.bound_bytes == pytest.approx(row.timing.median_ms * 3.0e6, abs=1)
        assert row.predicted_bytes == predicted(row.case, row.peer, CPU).traffic_bytes > 0
    assert results.copy_gb_per_s == 3.0 and results.is_complete


def test_the_prediction_is_that_of_the_accounting_and_quadratic_for_the_naive_formula_alone() -> None:
    for direction in ("forward", "backward"):
        case = replace(CASE, direction=direction, seqlen=1024)
        double = replace(case, seqlen=2048)
        growth = {
            peer.name: predicted(double, peer.name, CPU).traffic_bytes / predicted(case, peer.name, CPU).traffic_bytes
            for peer in PEERS
        }
        assert growth[NAIVE] > 3.5 and growth[FLASHTILE] < 2.2
    scores = 4 * 2 * 64 * 64
    assert dict(run(CASE).rows[1].predicted)["write scores"] == scores


def test_a_row_that_failed_still_has_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(needed: int, _device: torch.device) -> str | None:
        return "too much" if needed else None

    monkeypatch.setattr("flashtile.bench.environment.lack_of_memory", lack)
    tiled, naive = run(CASE).rows
    assert tiled.status == "ok" and naive.status == "out_of_memory" and naive.reason == "too much"
    assert naive.bound_bytes is None and naive.predicted_bytes > 0


# --- counters ---------------------------------------------------------------------------------------------------------

REPORT = """\
==PROF== Connected to process 4711
"ID","Process Name","Kernel Name","thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg",\
"dram__bytes_read.sum","dram__bytes_write.sum"
"","","","","byte","byte"
"0","python3","attention_forward","<default domain>:flashtile-io-0:none:none:none:none:none:none","1,000","24"
"1","python3","gemm","<default domain>:flashtile-io-1:none:none:none:none:none:none","5000","600.0"
"2","python3","softmax","<default domain>:flashtile-io-1:none:none:none:none:none:none","70","8"
"3","python3","a stray kernel","","9","9"
"""


def test_ncu_s_table_is_summed_by_marker() -> None:
    assert counter.bytes_of_markers(REPORT.splitlines()) == {0: 1024, 1: 5678}
    assert counter.bytes_of_markers([]) == {}


class FakeNcu:
    """Stands where ``subprocess.run`` stands."""

    def __init__(self, report: str, stdout: str = "") -> None:
        self.report, self.stdout = report, stdout
        self.commands: list[Sequence[str]] = []
        self.input = ""

    def __call__(self, command: Sequence[str], **options: Any) -> SimpleNamespace:
        self.commands.append(command)
        if "--version" in command:
            return SimpleNamespace(stdout="NVIDIA (R) Nsight Compute\nVersion 2025.3.1.0 (build 1)\n", returncode=0)
        self.input = options["input"]
        if self.report:
            Path(command[command.index("--log-file") + 1]).write_text(self.report)
        return SimpleNamespace(stdout=self.stdout, stderr="", returncode=0)


def use(monkeypatch: pytest.MonkeyPatch, ncu: Any) -> None:
    monkeypatch.setattr(counter.shutil, "which", lambda _: "/usr/bin/ncu")
    monkeypatch.setattr(counter.subprocess, "run", ncu)


def test_ncu_is_given_the_jobs_and_its_counts_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    ncu = FakeNcu(REPORT)
    use(monkeypatch, ncu)
    who, counted = counter.count(JOBS, GPU)
    assert who == "ncu 2025.3.1.0"
    assert counted == {JOBS[0]: 1024, JOBS[1]: 5678}
    assert json.loads(ncu.input) == [[asdict(case), peer] for case, peer in JOBS]
    assert "dram__bytes_read.sum,dram__bytes_write.sum" in ncu.commands[0]
    assert ncu.commands[0][ncu.commands[0].index("--clock-control") + 1] == "none"


def test_a_driver_that_keeps_its_counters_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    use(monkeypatch, FakeNcu(said))
    with pytest.raises(CounterUnavailable, match="ERR_NVGPUCTRPERM"):
        counter.count(JOBS, GPU)
    use(monkeypatch, FakeNcu(""))
    with pytest.raises(CounterUnavailable, match="counted nothing"):
        counter.count(JOBS, GPU)


def test_an_ncu_that_hangs_or_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: Sequence[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, counter.MAX_S)

    use(monkeypatch, hang)
    with pytest.raises(CounterUnavailable, match="timed out"):
        counter.count(JOBS, GPU)
    monkeypatch.setattr(counter.shutil, "which", lambda _: None)
    with pytest.raises(CounterUnavailable, match="not installed"):
        counter.count(JOBS, GPU)
    with pytest.raises(CounterUnavailable, match="a CPU's"):
        counter.count(JOBS, CPU)


def test_counts_reach_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counter, "count", lambda *_: ("ncu 1", {JOBS[0]: 1234}))
    results = run(*CASES)
    assert results.counter == "ncu 1" and results.no_counter_reason is None
    assert [row.counted_bytes for row in results.rows] == [1234, None, None, None]
    text = printed(results)
    assert "Counted by ncu 1." in text and "0.001" in text


# --- tables -----------------------------------------------------------------------------------------------------------


def printed(results: IoResults) -> str:
    console = Console(file=io.StringIO(), width=300, color_system=None)
    table.print_results(results, console)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_bounds_are_labelled_as_such() -> None:
    results = run(*CASES)
    text = printed(results)
    assert "Not counted: a CPU's memory counters are not open to ordinary programs." in text
    assert "an upper bound" in text and summary.WHAT_A_GPU_ADDS in text
    for row in results.rows:
        assert row.bound_bytes and f"{row.predicted_bytes / row.bound_bytes:.1%}" in text


def test_findings_compare_the_longest() -> None:
    def row(peer: str, predicted_bytes: int, counted_bytes: int | None, ms: float) -> IoRow:
        timed = timing.Timing(median_ms=ms, q25_ms=ms, q75_ms=ms, rounds=3)
        return IoRow(
            case=CASE,
            peer=peer,
            status="ok",
            timing=timed,
            predicted={"all": predicted_bytes},
            counted_bytes=counted_bytes,
            bound_bytes=10**6,
        )

    rows = (row(FLASHTILE, 100, 200, 2.0), row(NAIVE, 1000, 1000, 3.0))
    found = replace(run(CASE), rows=rows)
    assert summary.findings(found)[0] == (
        "Forward, 64 tokens, causal: the naive formula moves at least 10.0x the bytes of tiles by prediction, 5.0x by "
        "count, and takes 1.5x the time."
    )
    assert "interrupted" in summary.findings(replace(found, is_complete=False))[-1]


@pytest.mark.gpu
def test_on_a_gpu_bytes_are_counted_or_the_reason_is_known() -> None:
    cases = tuple(replace(case, dtype="bfloat16", seqlen=512) for case in CASES)
    clock = timing.clock_for(GPU)
    empty = kernels.start(cases, PEERS, GPU, clock, budget_s=0.05)
    results = list(measuring.run(empty, cases, PEERS, GPU, clock, min_rounds=2))[-1]
    assert [row.status for row in results.rows] == ["ok"] * 4
    assert (results.counter is None) != (results.no_counter_reason is None)
    if results.counter is not None:
        assert all(row.counted_bytes is not None for row in results.rows)  # 0 where the L2 cache holds everything

"""Compiling ahead: what is to be done, by how many processes, and that nothing that goes wrong there matters."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch

from flashtile.bench import compile_ahead
from flashtile.bench.baselines import FLASHTILE, FLEX, PEERS
from flashtile.bench.cases import BenchCase, default_grids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = BenchCase(
    direction="forward",
    dtype="bfloat16",
    head_dim=16,
    seqlen=32,
    is_causal=True,
    batch=1,
    heads_q=2,
    heads_kv=2,
)


def test_jobs_are_the_calls_that_wait_for_a_compiler_backwards_first() -> None:
    backward = replace(CASE, direction="backward")
    assert compile_ahead.jobs([CASE, backward], PEERS, CUDA) == (
        (backward, FLASHTILE, "cuda"),
        (backward, FLEX, "cuda"),
        (CASE, FLASHTILE, "cuda"),
        (CASE, FLEX, "cuda"),
    )
    assert [name for _, name, _ in compile_ahead.jobs([CASE], PEERS, CPU)] == [FLASHTILE]


def test_processes_are_as_many_as_pay_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    cases = [case for grid in default_grids("cuda", is_quick=False) for case in grid.cases()]
    assert compile_ahead.default_num_processes(len(compile_ahead.jobs(cases, PEERS, CUDA))) == 12
    assert compile_ahead.default_num_processes(9) == 9
    assert compile_ahead.default_num_processes(4) == 0, "they would start for longer than they save"
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert compile_ahead.default_num_processes(100) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert compile_ahead.default_num_processes(100) == 1


@pytest.mark.slow
def test_a_failure_in_a_process_is_a_line_and_the_others_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[int] = []
    backward = replace(CASE, direction="backward")
    huge = replace(CASE, seqlen=2**50)
    jobs = ((huge, FLASHTILE, "cpu"), (CASE, "nobody", "cpu"), (backward, FLASHTILE, "cpu"), (CASE, "naive", "cpu"))
    failures = compile_ahead.run(jobs, 1, on_done=steps.append)
    assert steps == [1, 2, 3, 4]
    assert len(failures) == 2
    assert f"flashtile, {huge.label}: RuntimeError" in failures[0]
    assert "nobody" in failures[1]
    assert "Traceback" not in capfd.readouterr().err


def test_what_takes_too_long_is_left() -> None:
    begin = time.monotonic()
    failures = compile_ahead.run([(CASE, FLASHTILE, "cpu")] * 2, 1, max_s=0.01)
    assert failures == ["2 of 2 first calls were left after 0.01 s"]
    assert time.monotonic() - begin < 30

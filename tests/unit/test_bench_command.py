"""``flashtile bench kernels`` from its arguments to files, output and exit code."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashtile import InvalidArgument, MissingExtra
from flashtile.bench import baselines, command, compile_ahead, documents, environment, results, session, timing
from flashtile.bench.baselines import NAIVE, Peer
from flashtile.bench.documents import Document
from flashtile.bench.formula import AttentionFn
from flashtile.bench.results import KernelResults
from flashtile.bench.tensors import CaseTensors

TINY = ["--device", "cpu", "--head-dim", "16", "--dtype", "fp32", "--budget-s", "0.001", "--quick"]
FORMULA = next(peer for peer in baselines.PEERS if peer.name == NAIVE)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No ceilings, and the current folder is empty."""
    monkeypatch.setattr(timing, "matmul_ceiling_tflops", lambda *_: 2.0)
    monkeypatch.setattr(timing, "copy_ceiling_gb_per_s", lambda *_: 3.0)
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="flashtile bench")
    command.add_arguments(parser)
    return command.run(parser.parse_args(["kernels", *arguments]))


def interrupting(monkeypatch: pytest.MonkeyPatch, *, at_seqlen: int) -> None:
    """Has one peer, which presses Ctrl-C when it is asked for that length."""

    def prepare(tensors: CaseTensors) -> AttentionFn:
        if tensors.case.seqlen == at_seqlen:
            raise KeyboardInterrupt
        return FORMULA.prepare(tensors)

    monkeypatch.setattr(baselines, "PEERS", (Peer(name=NAIVE, prepare=prepare),))


def test_tables_on_stdout_progress_on_stderr_results_in_the_default_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*TINY, "--seqlen", "16", "32", "--direction", "forward") == 0
    out, err = capsys.readouterr()
    assert "forward, float32" in out and "Worst against naive at 32 tokens, causal" in out
    assert "[4/4] forward float32 head_dim=16 seqlen=32 causal" in err
    assert "Results are in out/bench_kernels_cpu.json" in err
    found = results.load(Path("out/bench_kernels_cpu.json"), KernelResults)
    assert found.is_complete and found.budget_s == 0.001
    assert [row.peer for row in found.rows] == ["flashtile", "naive", "sdpa"] * 4
    assert found.missing_peers["flex"] == "needs a GPU"


def test_json_is_alone_on_stdout_and_writes_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench(*TINY, "--seqlen", "16", "--direction", "forward+backward", "--filter", "causal", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["case"]["direction"] for row in document["rows"]} == {"forward+backward"}
    assert len(document["rows"]) == 3
    assert list(tmp_path.iterdir()) == []


def test_json_and_out_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*TINY, "--seqlen", "16", "--filter", "causal and forward", "--json", "--out", "new/a.json") == 0
    assert Path("new/a.json").read_text() == capsys.readouterr().out


def test_options_replace_the_axes_of_the_grid(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--heads-per-kv", "1", "4", "--direction", "forward", "backward", "--seqlen", "16"]
    assert bench(*TINY, *options, "--json") == 0
    cases = [row["case"] for row in json.loads(capsys.readouterr().out)["rows"] if row["peer"] == NAIVE]
    assert len(cases) == 2 * 2 * 2
    assert {(case["heads_q"], case["heads_kv"]) for case in cases} == {(32, 32), (32, 8)}


def test_options_are_chosen_with_commas_or_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seqlen", "16", "--direction", "forward", "--json", "--filter", "full"]
    for options in (["plain,bias", "alibi"], ["alibi,", "bias", "plain"]):
        assert bench(*TINY, *arguments, "--options", *options) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["case"]["option"] for row in rows if row["peer"] == NAIVE] == ["plain", "bias", "alibi"]
        assert {row["status"] for row in rows} == {"ok"}


def test_options_can_be_filtered(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seqlen", "16", "--direction", "forward", "--json"]
    assert bench(*TINY, *arguments, "--options", "mask,window", "--filter", "causal and not mask") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["case"]["option"], row["case"]["is_causal"]) for row in rows} == {("window", True)}


def test_peers_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seqlen", "16", "--direction", "forward", "--filter", "causal", "--json"]
    assert bench(*TINY, *arguments, "--peers", "sdpa", "flex") == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["peer"] for row in document["rows"]] == ["flashtile", "sdpa"]
    assert document["missing_peers"] == {"flex": "needs a GPU"}


def test_the_commit_is_recorded_where_git_knows_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    arguments = ["--seqlen", "16", "--direction", "forward", "--filter", "causal", "--json"]
    assert bench(*TINY, *arguments, "--commit", "0123456789" * 4) == 0
    assert json.loads(capsys.readouterr().out)["environment"]["commit"] == "0123456789" * 4


def test_compiling_ahead_is_for_gpus_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, int]] = []

    def pretend(jobs: Sequence[object], num_processes: int) -> list[str]:
        asked.append((len(jobs), num_processes))
        return ["flex, some case: it broke"]

    monkeypatch.setattr(compile_ahead, "run", pretend)
    arguments = ["--seqlen", "16", "--direction", "forward", "--json"]
    assert bench(*TINY, *arguments) == 0
    assert asked == []
    assert bench(*TINY, *arguments, "--compile-processes", "3") == 0
    assert asked == [(2, 3)]
    err = capsys.readouterr().err
    assert "Compiling ahead: 2 first calls in 3 processes\n  flex, some case: it broke\n" in err


def test_ctrl_c_while_compiling_ahead_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_ahead, "run", interrupt)
    assert bench(*TINY, "--seqlen", "16", "--compile-processes", "1") == session.EXIT_INTERRUPTED
    assert "Interrupted; 0 of 4 cases" in capsys.readouterr().err


def test_the_file_grows_with_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, bool]] = []
    save = documents.save

    def watch(path: Path, found: Document) -> None:
        save(path, found)
        sizes.append((len(results.load(path, KernelResults).rows), found.is_complete))

    monkeypatch.setattr(documents, "save", watch)
    assert bench(*TINY, "--seqlen", "16", "--direction", "forward") == 0
    assert sizes[:2] == [(3, False), (6, True)]


@pytest.mark.parametrize("is_json", [False, True])
def test_ctrl_c_keeps_the_finished_cases(
    is_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupting(monkeypatch, at_seqlen=32)
    options = ["--seqlen", "16", "32", "48", "--direction", "forward", "--out", "a.json", *["--json"] * is_json]
    assert bench(*TINY, *options) == session.EXIT_INTERRUPTED == 130
    out, err = capsys.readouterr()
    found = results.load(Path("a.json"), KernelResults)
    assert [row.case.seqlen for row in found.rows] == [16] and not found.is_complete
    assert "Interrupted; 1 of 6 cases are finished and kept." in err
    assert json.loads(out)["is_complete"] is False if is_json else "The run was interrupted" in out


def test_ctrl_c_before_the_first_case_touches_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*TINY, "--seqlen", "16", "--out", "a.json") == 0
    before = Path("a.json").read_text()
    capsys.readouterr()
    interrupting(monkeypatch, at_seqlen=16)
    assert bench(*TINY, "--seqlen", "16", "--out", "a.json") == 130
    assert Path("a.json").read_text() == before
    out, err = capsys.readouterr()
    assert out == "" and "Interrupted; 0 of 4 cases" in err


def test_a_file_that_is_not_ours_is_not_replaced() -> None:
    Path("notes.txt").write_text("dear diary")
    with pytest.raises(InvalidArgument, match="no results file"):
        bench(*TINY, "--out", "notes.txt")
    assert Path("notes.txt").read_text() == "dear diary"


def test_a_folder_that_cannot_be_made_is_refused_before_measuring() -> None:
    Path("file").write_text("")
    with pytest.raises(InvalidArgument, match=r"--out.*choose another folder"):
        bench(*TINY, "--out", "file/a.json")


def test_a_filter_that_selects_nothing_is_refused_before_measuring() -> None:
    with pytest.raises(InvalidArgument, match="--filter"):
        bench(*TINY, "--filter", "causal and full")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--head-dim", "0"],
        ["--seqlen", "many"],
        ["--dtype", "int8"],
        ["--direction", "sideways"],
        ["--budget-s", "-1"],
        ["--budget-s", "inf"],
        ["--device", "tpu"],
        ["--options", "plain,softcap"],
        ["--options", ","],
        ["--peers", "flash"],
        ["--compile-processes", "-1"],
        ["--commit", "HEAD"],
    ],
)
def test_arguments_are_checked_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_benchmark_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "BENCHMARK" in capsys.readouterr().err


def test_tables_need_rich_and_json_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec, load = importlib.util.find_spec, builtins.__import__

    def without_rich(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError(name)
        return load(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    monkeypatch.setattr(builtins, "__import__", without_rich)
    with pytest.raises(MissingExtra, match=r"flashtile\[bench\]"):
        bench(*TINY)
    assert bench(*TINY, "--seqlen", "16", "--filter", "causal", "--json") == 0
    assert json.loads(capsys.readouterr().out)["is_complete"]


def test_importing_the_command_needs_torch_alone() -> None:
    script = "import sys, flashtile.bench.command; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert not {"rich", "matplotlib", "jinja2", "triton"} & set(done.stdout.split())


def test_a_bar_with_the_time_left_is_drawn_for_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "write", lambda text: drawn.append(text) or len(text), raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    assert bench(*TINY, "--seqlen", "16", "--direction", "forward") == 0
    text = "".join(drawn)
    assert "2/2 forward float32 head_dim=16 seqlen=16 causal" in text
    assert "100%" in text and "left" in text

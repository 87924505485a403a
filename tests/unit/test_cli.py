"""The command ``flashtile``: commands, exit codes, and that errors are messages rather than tracebacks."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import ModuleType
from unittest.mock import Mock

import pytest

import flashtile
from flashtile import cli
from flashtile.errors import InvalidArgument, MissingExtra

EXPLAIN = ["explain", "--batch", "1", "--seqlen", "16384", "--heads", "16", "--head-dim", "128", "--causal"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHTILE_BACKEND", "FLASHTILE_STRICT", "FLASHTILE_CHECK_VALUES"):
        monkeypatch.delenv(name, raising=False)


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


# --- commands ---------------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"flashtile {flashtile.__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["doctor"], ["explain"], ["support"], ["bench"], ["bench", "kernels"], ["report"], ["demo"]]
)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main([*command, "--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith("usage: flashtile")


def test_explain_prints_what_the_function_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*EXPLAIN, "--device", "h200"]) == 0
    expected = flashtile.explain(batch=1, seqlen_q=16384, heads_q=16, head_dim=128, causal=True, device="h200")
    assert capsys.readouterr().out == f"{expected}\n"


def test_explain_passes_every_option_on(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "explain --batch 2 --seqlen-q 64 --seqlen-kv 96 --heads-q 8 --heads-kv 2 --head-dim 48 --head-dim-v 32 "
        "--dtype fp32 --window 16 none --bias 8 1 96 --mask --alibi --sinks --softcap 20 --dropout 0.25 "
        "--deterministic --with-lse --gradients q bias sinks --backend naive --device a100 --json"
    )
    assert cli.main(line.split()) == 0
    expected = flashtile.explain(
        batch=2,
        seqlen_q=64,
        seqlen_kv=96,
        heads_q=8,
        heads_kv=2,
        head_dim=48,
        head_dim_v=32,
        dtype=cli.DTYPES["float32"],
        window=(16, None),
        bias_shape=(8, 1, 96),
        mask_shape=(2, 8, 64, 96),
        has_alibi=True,
        has_sinks=True,
        softcap=20.0,
        dropout_p=0.25,
        deterministic=True,
        with_lse=True,
        gradients=("q", "bias", "sinks"),
        backend="naive",
        device="a100",
    )
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_explain_forward_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*EXPLAIN, "--forward-only", "--device", "t4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"]["gradients"] == []
    assert [cost["direction"] for cost in found["costs"]] == ["forward"]


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "probes passed." in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_healthy"] is True


def test_doctor_reports_trouble_in_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHTILE_STRICT", "perhaps")
    assert cli.main(["doctor"]) == 1
    assert "wanted 0 or 1" in capsys.readouterr().out


def test_support(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["support"]) == 0
    assert capsys.readouterr().out == f"{flashtile.support_matrix()}\n"
    assert cli.main(["support", "--markdown", "--device", "t4"]) == 0
    assert capsys.readouterr().out == f"{flashtile.support_matrix(['t4']).to_markdown()}\n"
    assert cli.main(["support", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == ["cpu", "h200", "mi300x"]


@pytest.mark.parametrize(
    ("command", "module"), [(["bench", "kernels"], cli.bench), (["report"], cli.report), (["demo"], cli.demo)]
)
def test_bench_report_and_demo_run_their_own_command(command: list[str], module: ModuleType) -> None:
    assert cli.build_parser().parse_args(command).run is module.run


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*EXPLAIN, "--device", "h300"], "device: got 'h300'; wanted one of h200"),
        ([*EXPLAIN, "--heads-kv", "3"], "heads_kv: got 3"),
        ([*EXPLAIN, "--window", "-1", "0"], "window: got left = -1"),
        ([*EXPLAIN, "--dropout", "1.5"], "dropout_p: got 1.5"),
        ([*EXPLAIN, "--bias", "3", "5"], "bias: got shape [3, 5]"),
        ([*EXPLAIN, "--backend", "cuda"], "backend: got 'cuda'"),
        (["support", "--device", "x"], "device: got 'x'"),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else "",
)
def test_an_error_of_ours_is_one_message_and_exit_code_1(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith(f"flashtile: {words}") and "Remedy: " in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["explain"], "--seqlen"),
        ([*EXPLAIN, "--window", "4096"], "expected 2 arguments"),
        ([*EXPLAIN, "--window", "all", "0"], "'all' is neither a number of tokens nor 'none'"),
        ([*EXPLAIN, "--dtype", "int8"], "invalid choice: 'int8'"),
        ([*EXPLAIN, "--gradients", "lse"], "invalid choice: 'lse'"),
        ([*EXPLAIN, "--gradients", "q", "--forward-only"], "not allowed with"),
        (["support", "--json", "--markdown"], "not allowed with"),
        (["report", "--out"], "expected one argument"),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in usage_error(arguments, capsys)


def raising(error: BaseException) -> argparse.ArgumentParser:
    """A parser whose only command raises ``error``."""

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=Mock(side_effect=error))
    return parser


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (KeyboardInterrupt(), 130, "flashtile: interrupted\n"),
        (
            MissingExtra("matplotlib", "bench"),
            1,
            "flashtile: matplotlib is not installed. Remedy: pip install 'flashtile[bench]'\n",
        ),
        (
            InvalidArgument("x", got="1", wanted="2", remedy="pass 2"),
            1,
            "flashtile: x: got 1; wanted 2. Remedy: pass 2\n",
        ),
    ],
    ids=["Ctrl-C", "missing extra", "invalid argument"],
)
def test_what_a_command_raises_decides_the_exit_code(
    error: BaseException,
    exit_code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "build_parser", lambda: raising(error))
    assert cli.main([]) == exit_code
    assert capsys.readouterr().err == message


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "build_parser", lambda: raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main([])


# --- as a process -----------------------------------------------------------------------------------------------------


def test_the_installed_command_runs() -> None:
    command = [sys.executable, "-m", "flashtile.cli", *EXPLAIN, "--device", "h200", "--forward-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "least time (roofline)" in done.stdout


def test_a_reader_that_stops_reading_is_no_error() -> None:
    command = [sys.executable, "-m", "flashtile.cli", "support", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == ""
        assert process.wait() == cli.EXIT_BROKEN_PIPE

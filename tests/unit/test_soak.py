"""``scripts/soak.py`` runs random problems on a CPU, tells which ones go wrong, and runs one of them alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_loader import SCRIPTS, load_script
from torch import Tensor

from flashtile import UnsupportedProblem
from flashtile.backends.naive import launch

SCRIPT = SCRIPTS / "soak.py"
LONGEST = 40
ANSWERS_NEVER = f"""
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("soak", {str(SCRIPT)!r})
soak = sys.modules["soak"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)
soak.check = lambda *_: time.sleep(100)
soak.main(sys.argv[1:])
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("soak", monkeypatch)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "soak.log"


def arguments(log: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--longest", str(LONGEST), "--log", str(log), *more]


def seed_of_a_problem_with_rows(script: ModuleType) -> str:
    seeds = (f"1.0.{problem_idx}" for problem_idx in range(100))
    return next(seed for seed in seeds if sum(script.draw(seed, LONGEST).spec.lengths_q))


def test_some_problems_have_few_queries_of_many_keys(script: ModuleType) -> None:
    specs = [script.draw(f"1.{mix}.{number}", LONGEST).spec for mix in range(10) for number in range(20)]
    few = [spec for spec in specs if spec.lengths_kv and max(spec.lengths_kv) > LONGEST]
    assert len(few) > 5
    for spec in few:
        assert not spec.is_packed and 1 <= spec.lengths_q[0] <= script.MOST_FEW_QUERIES
        assert len({*spec.lengths_kv}) == 1 and max(spec.lengths_kv) <= 4 * LONGEST


# `capfd` and not `capsys`: the watchdog writes to the file descriptor of stderr.


@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_a_few_seconds_find_nothing(
    script: ModuleType, backend: str, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--backend", backend, "--minutes", "0.05", "--per-mix", "4", "--seed", "1")
    assert script.main(arguments(log, *more)) == script.OK
    summary = capfd.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"\d+ s: (\d+) problems in (\d+) mixes, 0 declined, 0 mismatches", summary)
    assert found and int(found[1]) > int(found[2]) > 1
    assert len(log.read_text().splitlines()) == int(found[1])


def test_it_finds_a_mistake_and_finds_it_again(
    script: ModuleType, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward = launch.forward

    def wrong_forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*args)
        return out * 1.5, lse

    def run(*more: str) -> int:
        return script.main(arguments(log, "--backend", "naive", *more))

    monkeypatch.setattr(launch, "forward", wrong_forward)
    assert run("--seed", "1", "--per-mix", "3") == script.MISMATCH
    printed = capfd.readouterr().out
    assert f"{script.MOST_MISMATCHES} mismatches" in printed
    assert re.search(r"CallSpec\(lengths_q=.*\n  out \(torch\.\w+, shape .*: error .*, allowed", printed)
    seed = re.findall(r"again: python scripts/soak.py .* --only (\S+)", printed)[0]
    assert run("--only", seed) == script.MISMATCH
    assert "1 problems" in capfd.readouterr().out
    monkeypatch.setattr(launch, "forward", forward)
    assert run("--only", seed) == script.OK


def test_it_finds_a_forward_that_is_not_the_same_again(
    script: ModuleType, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    attend = script.attend
    num_calls = 0

    def attend_otherwise_the_third_time(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        nonlocal num_calls
        num_calls += 1
        out, lse = attend(*args, **options)
        return (out + 1 if num_calls == 3 else out), lse

    monkeypatch.setattr(script, "attend", attend_otherwise_the_third_time)
    assert script.main(arguments(log, "--only", seed_of_a_problem_with_rows(script))) == script.MISMATCH
    assert re.search(r"out: \d+ bytes differ when the forward runs again", capfd.readouterr().out)


def test_any_other_error_is_told_with_its_problem(
    script: ModuleType, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(script, "check", fail)
    assert script.main(arguments(log, "--seed", "1")) == script.MISMATCH
    printed = capfd.readouterr().out
    assert "seed='1.0.0'" in printed and "RuntimeError: an illegal memory access" in printed


def test_a_hang_ends_the_process_and_the_log_has_its_problem(log: Path) -> None:
    command = [sys.executable, "-c", ANSWERS_NEVER, *arguments(log, "--seed", "7", "--hang-s", "0.5")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in run_mixes" in done.stderr
    assert log.read_text().startswith("Problem(seed='7.0.0', spec=CallSpec(")


def test_ctrl_c_ends_it_with_the_summary(
    script: ModuleType, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "check", interrupt)
    assert script.main(arguments(log)) == script.OK
    assert "0 problems in 0 mixes, 0 declined, 0 mismatches" in capfd.readouterr().out


def test_what_the_backend_declines_is_counted(
    script: ModuleType, log: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def check_with_two_mixes_declined(problem: Any, *_: Any) -> None:
        if problem.seed in ("1.0.0", "1.1.0", "1.2.1"):
            raise UnsupportedProblem("no", {})
        if problem.seed == "1.2.3":
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "check", check_with_two_mixes_declined)
    assert script.main(arguments(log, "--seed", "1")) == script.OK
    assert "2 problems in 1 mixes, 3 declined, 0 mismatches" in capfd.readouterr().out


def test_it_says_where_the_backend_does_not_run(
    script: ModuleType, log: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert script.main(arguments(log, "--backend", "hopper")) == script.NOT_HERE
    assert "hopper: runs on Hopper GPUs" in capfd.readouterr().err


def test_problems_of_a_mix_share_what_is_compiled(script: ModuleType) -> None:
    for mix_idx in range(30):
        specs = [script.draw(f"1.{mix_idx}.{problem_idx}", LONGEST).spec for problem_idx in range(5)]
        fixed = [
            {name: getattr(spec, name) for name in spec.__slots__ if name not in (*script.DRAWN_EVERY_TIME, "window")}
            for spec in specs
        ]
        assert all(fields == fixed[0] for fields in fixed)
        assert len({spec.window is None for spec in specs}) == 1
        assert len({spec.seed for spec in specs}) == 5
        for spec in specs:
            few = script.MOST_FEW_QUERIES if max(spec.lengths_kv, default=0) > LONGEST else 0
            assert max(spec.lengths_q, default=0) <= max(LONGEST, few)
        assert specs[1] == script.draw(f"1.{mix_idx}.1", LONGEST).spec

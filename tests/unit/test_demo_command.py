"""``flashtile demo`` as a user meets it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.demo import command, model, training
from flashtile.errors import InvalidArgument, MissingExtra


@pytest.fixture(autouse=True)
def _in_an_empty_directory_with_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def demo(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_quick_does_everything_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--quick", "--device", "cpu", "--steps", "4", "--json", "numbers.json") == 0
    printed = capsys.readouterr().out
    for expected in (
        "standard library of Python",
        "backend cpu",
        "4/4",
        "tokens per second",
        "attention per step, backward",
        "attention's share of a step",
        "peak memory of a step",
        "loss at the last step",
        "Largest difference of the losses",
        "continues held-out text",
        "report.html",
    ):
        assert expected in printed, expected
    html = Path("report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 4
    numbers = json.loads(Path("numbers.json").read_text())
    assert len(numbers["naive"]["steps"]) == len(numbers["flashtile"]["steps"]) == 4
    assert numbers["settings"]["attention_dtype"] == "float32"
    assert numbers["loss_difference"]["largest"] < 1e-4
    assert numbers["naive"]["peak_bytes"] > 0


@pytest.mark.gpu
def test_quick_runs_on_a_gpu_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--quick", "--json", "numbers.json") == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers["settings"]["attention_dtype"] == "bfloat16"
    for run in (numbers["naive"], numbers["flashtile"]):
        assert run["peak_bytes"] > 0
        assert all(step["attention_forward_s"] > 0 and step["attention_backward_s"] > 0 for step in run["steps"])


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even if a shell started the tests in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_ends_cleanly_with_a_report_of_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def interrupted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # two for the measurement of memory, two steps, and the third
            signal.raise_signal(signal.SIGINT)
        return model.flashtile_attention(q, k, v)

    monkeypatch.setitem(training.ATTENTION_FUNCTIONS, "flashtile", interrupted)
    assert demo("--quick", "--device", "cpu", "--out", "partial.html") == 130
    assert "Interrupted after 2 of 6 steps" in capsys.readouterr().out
    assert "Interrupted after 2 of 6 steps" in Path("partial.html").read_text(encoding="utf-8")


def test_ctrl_c_before_the_first_step_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setitem(training.ATTENTION_FUNCTIONS, "naive", interrupted)
    assert demo("--quick", "--device", "cpu") == 130
    assert "nothing to report" in capsys.readouterr().out
    assert not Path("report.html").exists()


def test_a_naive_run_out_of_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setitem(training.ATTENTION_FUNCTIONS, "naive", fail)
    assert demo("--quick", "--device", "cpu", "--steps", "2") == 0
    assert "The naive run stopped: out of memory" in capsys.readouterr().out
    html = Path("report.html").read_text(encoding="utf-8")
    assert "Tried to allocate 64.00 GiB." in html
    assert "total capacity" not in html


def test_both_runs_out_of_memory_is_said_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for name in ("naive", "flashtile"):
        monkeypatch.setitem(training.ATTENTION_FUNCTIONS, name, fail)
    assert demo("--quick", "--device", "cpu") == 1
    printed = capsys.readouterr().out
    assert "The naive run stopped: out of memory" in printed
    assert "The flashtile run stopped: out of memory" in printed
    assert not Path("report.html").exists()


def test_a_wrong_attention_function_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sees_the_future(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v)

    monkeypatch.setitem(training.ATTENTION_FUNCTIONS, "flashtile", sees_the_future)
    assert demo("--quick", "--device", "cpu") == 1
    assert "do not agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("--steps", "0"), "--steps"),
        (("--seqlen", "-1"), "--seqlen"),
        (("--batch", "0"), "--batch"),
        (("--layers", "0"), "--layers"),
        (("--heads", "0"), "--heads"),
        (("--d-model", "0"), "--d-model"),
        (("--heads", "3"), "--d-model"),
        (("--heads", "32"), "--d-model"),
        (("--seed", "-1"), "--seed"),
        (("--seed", str(2**63)), "--seed"),
        (("--out", os.devnull), "--out"),
        (("--out", "."), "--out"),
        (("--json", "."), "--json"),
        (("--text", "missing.txt"), "--text"),
        (("--device", "cuda"), "--device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_refused_before_any_training(
    words: tuple[str, ...], flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(training, "compare")
    with pytest.raises(InvalidArgument) as caught:
        demo("--quick", *words)
    assert caught.value.argument == flag


def test_the_remedy_for_a_width_that_heads_do_not_divide_works() -> None:
    with pytest.raises(InvalidArgument, match=r"--d-model 30$"):
        demo("--quick", "--d-model", "32", "--heads", "3")


@pytest.mark.parametrize("package", ["rich", "matplotlib", "jinja2"])
def test_a_missing_extra_is_named_before_any_training(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr(training, "compare")
    with pytest.raises(MissingExtra, match=rf"{package}.*flashtile\[bench\]"):
        demo("--quick")


def test_the_command_is_declared_with_torch_alone() -> None:
    program = (
        "import sys, argparse\n"
        "for name in ('rich', 'matplotlib', 'jinja2'): sys.modules[name] = None\n"
        "from flashtile.demo import command\n"
        "command.add_arguments(argparse.ArgumentParser())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

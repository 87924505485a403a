"""``flashtile bench models`` and ``bench io`` from their arguments to files, output and exit code."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashtile import InvalidArgument
from flashtile.bench import command, documents, results, timing
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.documents import Document
from flashtile.bench.models import cases, peers
from flashtile.bench.models.peers import ModelPeer
from flashtile.bench.models.summary import WHAT_A_GPU_ADDS
from flashtile.bench.results import IoResults, ModelResults
from flashtile.bench.traffic import summary as io_summary
from flashtile.bench.transformer import ModelShape

TINY = ["--device", "cpu", "--budget-s", "0.001", "--quick"]


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No ceilings, a model that takes milliseconds, and an empty current folder."""
    monkeypatch.setattr(timing, "matmul_ceiling_tflops", lambda *_: 2.0)
    monkeypatch.setattr(timing, "copy_ceiling_gb_per_s", lambda *_: 3.0)
    monkeypatch.setitem(cases.SIZES, "tiny", ModelShape(layers=1, d_model=16, heads=2, vocabulary=31))
    monkeypatch.chdir(tmp_path)


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="flashtile bench")
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_print_tables_and_write_the_default_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("models", *TINY, "--seqlen", "8") == 0
    out, err = capsys.readouterr()
    for part in (
        "tiny, train",
        "tiny, prefill",
        "tiny, decode",
        "largest training step",
        "people quote",
        WHAT_A_GPU_ADDS,
    ):
        assert part in out
    assert "[1/5] train tiny layers=1 seqlen=8 batch=64 float32" in err
    assert "[4/5] limits tiny largest-batch seqlen=512 float32" in err
    found = results.load(Path("out/bench_models_cpu.json"), ModelResults)
    assert found.is_complete and len(found.rows) == 9 and len(found.limits) == 6


def test_models_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [
        "--mode",
        "train",
        "decode",
        "--seqlen",
        "8",
        "12",
        "--batch",
        "2",
        "--filter",
        "decode and seqlen=12",
        "--json",
    ]
    assert bench("models", *TINY, *arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "flashtile.bench.models"
    (case,) = {json.dumps(row["case"]) for row in document["rows"]}
    assert (json.loads(case)["mode"], json.loads(case)["seqlen"], json.loads(case)["batch"]) == ("decode", 12, 2)
    assert document["limits"] == [] and list(tmp_path.iterdir()) == []


def test_models_out_of_memory_is_a_row_and_ctrl_c_keeps_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        if q.shape[1] == 16:
            raise KeyboardInterrupt
        raise torch.OutOfMemoryError("CUDA out of memory.")

    kept = tuple(peer for peer in peers.PEERS if peer.name != NAIVE)
    monkeypatch.setattr(peers, "PEERS", (*kept, ModelPeer(name=NAIVE, make=lambda: greedy)))
    sizes: list[int] = []
    save = documents.save

    def watch(path: Path, found: Document) -> None:
        save(path, found)
        sizes.append(len(results.load(path, ModelResults).rows))

    monkeypatch.setattr(documents, "save", watch)
    arguments = ["--mode", "train", "--seqlen", "8", "12", "16", "20", "--out", "a.json"]
    assert bench("models", *TINY, *arguments) == 130
    out, err = capsys.readouterr()
    found = results.load(Path("a.json"), ModelResults)
    assert not found.is_complete and "The run was interrupted" in out
    assert "Interrupted; 2 of 4 cases are finished and kept." in err
    assert [(row.peer, row.status) for row in found.rows] == [
        (FLASHTILE, "ok"),
        (SDPA, "ok"),
        (NAIVE, "out_of_memory"),
    ] * 2
    assert sizes == [3, 6, 6], "row by row, and once more at the end"


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "--mode", "dream"],
        ["models", "--size", "huge"],
        ["models", "--batch", "0"],
        ["models", "--dtype", "int8"],
        ["io", "--seqlen", "0"],
        ["io", "--commit", "HEAD"],
    ],
)
def test_arguments_are_checked_by_the_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench(*arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_results_of_another_benchmark_are_not_replaced() -> None:
    assert bench("io", *TINY, "--seqlen", "16", "--filter", "causal and forward", "--json", "--out", "a.json") == 0
    before = Path("a.json").read_text()
    with pytest.raises(InvalidArgument, match="'flashtile bench models' to replace"):
        bench("models", *TINY, "--out", "a.json")
    assert Path("a.json").read_text() == before


@pytest.mark.parametrize("benchmark", ["models", "io"])
def test_a_wrong_filter_names_the_words_there_are(benchmark: str) -> None:
    with pytest.raises(InvalidArgument, match=r"--filter.*seqlen="):
        bench(benchmark, *TINY, "--filter", "backwards")


def test_importing_the_commands_needs_torch_alone() -> None:
    modules = "flashtile.bench.models.command, flashtile.bench.traffic.command"
    script = f"import sys, {modules}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert not {"rich", "matplotlib", "jinja2", "triton"} & set(done.stdout.split())


# --- io ---------------------------------------------------------------------------------------------------------------


def test_io_prints_tables_and_writes_the_default_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("io", *TINY, "--seqlen", "32", "64", "--head-dim", "16") == 0
    out, err = capsys.readouterr()
    assert "forward, float32" in out and "backward, float32" in out and io_summary.WHAT_A_GPU_ADDS in out
    assert "[1/8] forward float32 head_dim=16 seqlen=32 full" in err
    found = results.load(Path("out/bench_io_cpu.json"), IoResults)
    assert found.is_complete and len(found.rows) == 16 and found.copy_gb_per_s == 3.0
    assert (
        found.counter is None and found.no_counter_reason == "a CPU's memory counters are not open to ordinary programs"
    )


def test_io_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench("io", *TINY, "--seqlen", "32", "--filter", "backward and causal", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "flashtile.bench.io"
    assert [row["peer"] for row in document["rows"]] == [FLASHTILE, NAIVE]
    assert list(tmp_path.iterdir()) == []

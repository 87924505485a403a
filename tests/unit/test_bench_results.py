"""Results files: what is written is read back, whole or not at all, and what is not ours is refused by name."""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile
from flashtile import InvalidArgument
from flashtile.bench import documents, environment, results
from flashtile.bench.cases import BenchCase
from flashtile.bench.documents import InvalidResults
from flashtile.bench.environment import Environment
from flashtile.bench.results import Ceilings, KernelResults, KernelRow
from flashtile.bench.timing import Timing

CASE = BenchCase(
    direction="backward",
    dtype="float32",
    head_dim=64,
    seqlen=1024,
    is_causal=True,
    batch=1,
    heads_q=8,
    heads_kv=8,
)
ROW = KernelRow(
    case=CASE,
    peer="flashtile",
    status="ok",
    timing=Timing(median_ms=2.0, q25_ms=1.5, q75_ms=2.5, rounds=9),
    tflops=1.25,
    percent_of_ceiling=62.5,
    peak_extra_bytes=4096,
    difference=1e-7,
    speedup_over_naive=3.0,
    speedup_over_sdpa=1.1,
    kernel="cpu/tiled",
    kernel_reason="a bias",
)
REFUSED = KernelRow(case=CASE, peer="<b>peer</b> é", status="refused", reason='says "no"')
RESULTS = KernelResults(
    environment=Environment(
        device="cpu",
        device_name="A CPU",
        num_threads=2,
        platform="Linux x86_64",
        versions={"python": "3.12.0", "torch": "2.13.0"},
        commit="0" * 40,
        commit_is_dirty=False,
    ),
    created_utc="2026-01-02T03:04:05+00:00",
    budget_s=5.0,
    ceilings=Ceilings(matmul_tflops={"float32": 2.0}, copy_gb_per_s=30.0),
    missing_peers={"xformers": "xformers is not installed"},
    is_complete=True,
    rows=(ROW, REFUSED),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    documents.save(path, RESULTS)
    return path


def test_round_trip(saved: Path) -> None:
    assert results.load(saved) == RESULTS


def test_the_document_names_its_schema_and_version_first(saved: Path) -> None:
    document = json.loads(saved.read_text(encoding="utf-8"))
    assert list(document)[:2] == ["schema", "version"]
    assert (document["schema"], document["version"]) == ("flashtile.bench.kernels", KernelResults.version)


def test_saving_replaces_and_leaves_nothing_else(saved: Path) -> None:
    documents.save(saved, replace(RESULTS, rows=()))
    assert results.load(saved, KernelResults).rows == ()
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_save_leaves_the_old_file_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_path: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        documents.save(saved, replace(RESULTS, rows=()))
    assert results.load(saved) == RESULTS
    assert list(saved.parent.iterdir()) == [saved]


def edit(change: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(documents.to_json(RESULTS))
    change(document)
    return json.dumps(document)


def put(value: Any, *place: str | int) -> str:
    """The document with ``value`` at a place such as ("rows", 0, "peer")."""

    def change(document: Any) -> None:
        for step in place[:-1]:
            document = document[step]
        document[place[-1]] = value

    return edit(change)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSONDecodeError"),
        (documents.to_json(RESULTS)[:-40], "JSONDecodeError"),
        ("[1, 2]", "schema None"),
        ('{"name": "somebody else\'s"}', "schema None"),
        (put("pytest-benchmark", "schema"), "schema 'pytest-benchmark'"),
        (put(2, "version"), "upgrade flashtile"),
        (put("1", "version"), "schema version '1'"),
        (put(True, "version"), "schema version True"),
        (put(0, "version"), "run the benchmark again"),
        (edit(lambda document: document.pop("rows")), "results without rows"),
        (edit(lambda document: document["rows"][0].pop("peer")), r"results.rows\[0\] without peer"),
        (put(1, "extra"), "results with the unknown extra"),
        (put(None, "rows"), "results.rows = None; wanted a list"),
        (put([3], "rows"), r"results.rows\[0\] = 3; wanted an object"),
        (put("quick", "rows", 0, "timing", "median_ms"), "median_ms = 'quick'; wanted a finite number"),
        (put(True, "rows", 0, "timing", "median_ms"), "median_ms = True"),
        (put(float("nan"), "rows", 0, "tflops"), "tflops = nan"),
        (put(1.5, "rows", 0, "timing", "rounds"), "rounds = 1.5; wanted a int"),
        (put("great", "rows", 0, "status"), "status = 'great'; wanted one of ok, unavailable"),
        (put("sideways", "rows", 1, "case", "direction"), "direction = 'sideways'"),
        (put("softcap", "rows", 1, "case", "option"), "option = 'softcap'; wanted one of plain, bias"),
        (put(1, "rows", 1, "case", "is_causal"), "is_causal = 1"),
        (put(None, "rows", 0, "timing"), "a timing exactly if ok"),
        (put("ok", "rows", 1, "status"), "a timing exactly if ok"),
        (put("x" * 500, "budget_s"), r"'x+\.\.\.; wanted"),
        (put(["float32"], "ceilings", "matmul_tflops"), "wanted an object"),
        (put("fast", "ceilings", "matmul_tflops", "float32"), r"matmul_tflops\['float32'\] = 'fast'"),
    ],
)
def test_a_broken_foreign_or_newer_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidResults, match=said) as caught:
        results.load(path)
    assert isinstance(caught.value, InvalidArgument)
    assert str(path) in str(caught.value) and caught.value.remedy


def test_a_missing_file_a_folder_and_a_binary_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", tmp_path, binary):
        with pytest.raises(InvalidResults, match="a readable JSON file"):
            results.load(path)


def test_a_whole_number_is_read_as_a_float(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    path.write_text(put(2, "rows", 0, "tflops"), encoding="utf-8")
    tflops = results.load(path, KernelResults).rows[0].tflops
    assert tflops == 2.0 and isinstance(tflops, float)


def test_a_file_of_before_the_options_is_read_as_plain_calls(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(edit(lambda document: [row["case"].pop("option") for row in document["rows"]]), encoding="utf-8")
    assert results.load(path) == RESULTS
    stored = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("cpu_*.json"))
    assert stored and all(
        {row.case.option for row in results.load(path, KernelResults).rows} == {"plain"} for path in stored
    )


def test_the_option_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    found = replace(RESULTS, rows=(replace(ROW, case=replace(CASE, option="alibi")),))
    documents.save(path, found)
    assert results.load(path) == found


def test_the_error_survives_pickling() -> None:
    error = InvalidResults("a.json", got="x", wanted="y", remedy="z")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- the environment --------------------------------------------------------------------------------------------------


def test_environment_of_this_process() -> None:
    found = environment.describe(torch.device("cpu"))
    assert found.device == "cpu" and found.num_threads == torch.get_num_threads()
    assert found.device_name and "CPU" in found.device_name
    assert found.versions["torch"] == torch.__version__
    assert found.versions["flashtile"] == flashtile.__version__
    assert found.commit is None or len(found.commit) == 40


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    found = environment.describe(torch.device("cpu"))
    assert (found.commit, found.commit_is_dirty) == (None, False)


def test_a_commit_that_git_does_not_know_is_taken_from_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    assert environment.describe(torch.device("cpu"), commit="a" * 40).commit == "a" * 40
    monkeypatch.setattr(environment, "_git", lambda *_: "b" * 40)
    assert environment.describe(torch.device("cpu"), commit="a" * 40).commit == "b" * 40


def test_a_package_installed_inside_another_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    package = tmp_path / "lib" / "flashtile" / "bench"
    package.mkdir(parents=True)
    (package / "environment.py").write_text("")
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    assert environment.describe(torch.device("cpu")).commit is None

    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    clean = environment.describe(torch.device("cpu"))
    assert clean.commit is not None and not clean.commit_is_dirty
    (package / "environment.py").write_text("changed")
    assert environment.describe(torch.device("cpu")).commit_is_dirty


def test_available_memory_is_the_least_that_anyone_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8 kB\n"}
    monkeypatch.setattr(environment, "_text_of", lambda path: files.get(path, ""))
    assert environment.available_host_bytes() == 8192
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert environment.available_host_bytes() == 4000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert environment.available_host_bytes() == 8192
    files.clear()
    assert environment.available_host_bytes() is None


def test_available_memory_of_a_gpu_counts_what_torch_keeps_for_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
    assert environment.available_bytes(torch.device("cuda")) == 1300
    monkeypatch.setattr(environment, "available_host_bytes", lambda: 7)
    assert environment.available_bytes(torch.device("cpu")) == 7


def test_devices_are_found_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.find_device("auto").type == environment.find_device("cpu").type == "cpu"
    with pytest.raises(InvalidArgument, match="flashtile doctor"):
        environment.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment.find_device("auto").type == environment.find_device("cuda").type == "cuda"
    assert environment.find_device("cpu").type == "cpu"

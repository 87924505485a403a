"""The page docs/performance.md: that of the files that are there, and that of a GPU's once there is one."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flashtile.bench import documents, markdown, results
from flashtile.bench.baselines import FLASHTILE, FLEX, NAIVE, SDPA_CUDNN, SDPA_FLASH
from flashtile.bench.cases import BenchCase
from flashtile.bench.environment import Environment
from flashtile.bench.results import Ceilings, KernelResults, KernelRow, ModelResults
from flashtile.bench.timing import Timing

ROOT = Path(__file__).parents[2]
CASE = BenchCase(
    direction="forward",
    dtype="bfloat16",
    head_dim=128,
    seqlen=4096,
    is_causal=False,
    batch=4,
    heads_q=16,
    heads_kv=16,
)
BIAS = replace(CASE, option="bias", is_causal=True)


def ok(case: BenchCase, peer: str, median_ms: float) -> KernelRow:
    timing = Timing(median_ms=median_ms, q25_ms=median_ms, q75_ms=median_ms, rounds=9)
    return KernelRow(case=case, peer=peer, status="ok", timing=timing, tflops=1000 / median_ms)


GPU = KernelResults(
    environment=Environment(
        device="cuda",
        device_name="A | GPU <1>",
        num_threads=16,
        platform="Linux x86_64",
        versions={"torch": "2.11.0", "cuda": "13.0"},
        commit="abcdef0123456789" + "0" * 24,
        commit_is_dirty=False,
    ),
    created_utc="2026-01-02T03:04:05+00:00",
    budget_s=1.0,
    ceilings=Ceilings(matmul_tflops={"bfloat16": 790.0}, copy_gb_per_s=4300.0),
    missing_peers={"xformers": "xformers is not installed"},
    is_complete=True,
    rows=(
        ok(CASE, FLASHTILE, 2.0),
        ok(CASE, NAIVE, 8.0),
        ok(CASE, SDPA_FLASH, 3.0),
        ok(CASE, SDPA_CUDNN, 1.8),
        ok(CASE, FLEX, 2.5),
        ok(BIAS, FLASHTILE, 4.0),
        KernelRow(case=BIAS, peer=NAIVE, status="out_of_memory", reason="needs at least 9 GiB: not tried"),
        KernelRow(case=BIAS, peer=SDPA_FLASH, status="unavailable", reason="takes no bias as it is called here"),
        KernelRow(case=BIAS, peer=SDPA_CUDNN, status="wrong_result", reason="differs", difference=0.5),
        ok(BIAS, FLEX, 3.99),
    ),
)


def sections(page: str) -> dict[str, list[str]]:
    """The lines under each heading."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in page.splitlines():
        if line.startswith("#"):
            lines = found.setdefault(line.lstrip("# "), [])
        elif line:
            lines.append(line)
    return found


def test_the_page_is_that_of_the_files(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "performance_page.py"))
    assert script["main"](["--out", str(tmp_path / "page.md")]) == 0
    written, stored = (
        path.read_text(encoding="utf-8") for path in (tmp_path / "page.md", ROOT / "docs/performance.md")
    )
    assert stored == written, "run 'make performance'"
    pictures = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in pictures] == sorted(path.name for path in (ROOT / "docs").glob("performance_*.svg"))
    for path in pictures:
        of_files, of_docs = (
            ElementTree.parse(folder / path.name).getroot()[:2] for folder in (tmp_path, ROOT / "docs")
        )  # title and description: lines are drawn a little differently by each matplotlib
        assert [each.text for each in of_docs] == [each.text for each in of_files], "run 'make performance'"
        assert f"({path.name})" in stored
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if isinstance(results.load(path), KernelResults):
            assert f"(../benchmarks/results/{path.name})" in stored


def test_files_of_other_benchmarks_are_left_out_and_damaged_ones_are_not(tmp_path: Path) -> None:
    read: Any = runpy.run_path(str(ROOT / "scripts" / "performance_page.py"))["kernel_results"]
    models = {"environment": GPU.environment, "created_utc": GPU.created_utc, "budget_s": 1.0, "is_complete": True}
    documents.save(tmp_path / "a.json", ModelResults(**models, rows=(), limits=()))
    documents.save(tmp_path / "b.json", GPU)
    assert read(tmp_path) == {"b.json": GPU}
    (tmp_path / "c.json").write_text(json.dumps({"schema": KernelResults.schema(), "version": 1}))
    with pytest.raises(documents.InvalidResults, match=r"c\.json"):
        read(tmp_path)


def test_a_gpu_s_tables_have_figures_and_ratios_to_each_peer() -> None:
    page = sections(markdown.page({"gpu.json": GPU}))
    heading, _, only = page["Forward, bfloat16"]
    assert [cell.strip() for cell in heading.strip("|").split("|")] == [
        *("call", "head_dim", "tokens", "batch", "heads", "flashtile"),
        *("FlexAttention", "FA2 in torch", "cuDNN in torch", "naive formula"),
    ]
    assert only == "| full | 128 | 4096 | 4 | 16 | 500 | 400 · 1.25x | 333 · 1.50x | 556 · **0.90x** | 125 · 4.00x |"
    bias = page["Forward, bfloat16, with options"][2]
    assert bias == (
        "| bias, causal | 128 | 4096 | 4 | 16 | 250 | 251 · **1.00x** | - | WRONG RESULT | out of memory |"
    ), "what is below 1 is bold even where it rounds to 1"


def test_means_are_geometric_and_say_of_how_many() -> None:
    other = replace(CASE, seqlen=1024)
    more = replace(GPU, rows=(*GPU.rows, ok(other, FLASHTILE, 1.0), ok(other, FLEX, 5.0)))
    means = sections(markdown.page({"gpu.json": more}))["Geometric means of flashtile's speed over each peer's"]
    assert means[2] == "| forward | bfloat16 | plain | 2.50x (2) | 1.50x (1) | **0.90x** (1) | 4.00x (1) |"
    assert means[3] == "| forward | bfloat16 | bias | **1.00x** (1) |  |  |  |"


def test_what_is_slower_is_said_first() -> None:
    slower = sections(markdown.page({"gpu.json": GPU}))["Where flashtile is slower"]
    where = "forward, bfloat16, head_dim 128, 4096 tokens"
    assert slower == [
        "- FlexAttention: slower in 1 of 2 cases, by more than 5% in 0; at worst 1.00x its speed "
        f"({where}, causal, bias).",
        f"- FA2 in torch: in none of 1 cases; the closest is 1.50x its speed ({where}, full).",
        f"- cuDNN in torch: slower in 1 of 1 cases, by more than 5% in 1; at worst 0.90x its speed ({where}, full).",
        f"- naive formula: in none of 1 cases; the closest is 4.00x its speed ({where}, full).",
    ]


def test_conditions_and_gaps_are_stated_and_no_text_breaks_the_page() -> None:
    page = sections(markdown.page({"gpu.json": GPU}))
    conditions = "\n".join(page["A \\| GPU &lt;1&gt;"])
    assert "[gpu.json](../benchmarks/results/gpu.json), 2026-01-02, commit abcdef012345.\n" in conditions
    assert "torch 2.11.0, cuda 13.0" in conditions and "790 TFLOP/s in bfloat16; copy 4,300 GB/s" in conditions
    assert "Option bias: an additive bias [1, heads_q, seqlen, seqlen]" in conditions
    gaps = "\n".join(page["Gaps"])
    assert "xformers: xformers is not installed" in gaps
    assert f"sdpa-flash: takes no bias as it is called here ({BIAS.label})" in gaps
    assert "naive: out of memory: needs at least 9 GiB: not tried" in gaps


def test_an_unclean_or_interrupted_run_says_so() -> None:
    environment = replace(GPU.environment, commit=None, commit_is_dirty=True)
    page = markdown.page({"gpu.json": replace(GPU, environment=environment, is_complete=False)})
    assert "no known commit with changes on top; the run was interrupted" in page


def test_gpus_come_first_and_each_run_has_its_own_peers() -> None:
    cpu_rows = (ok(CASE, FLASHTILE, 1.0), ok(CASE, "sdpa", 0.5))
    cpu = replace(GPU, environment=replace(GPU.environment, device="cpu", device_name="A CPU"), rows=cpu_rows)
    page = markdown.page({"a.json": cpu, "b.json": GPU})
    first, second = page.index("## A \\| GPU"), page.index("## A CPU")
    assert first < second
    assert "torch's default" in page[second:] and "FlexAttention" not in page[second:]


def test_a_run_without_flashtile_claims_nothing() -> None:
    page = sections(markdown.page({"gpu.json": replace(GPU, rows=GPU.rows[1:5], missing_peers={})}))
    assert page["Where flashtile is slower"] == ["Nothing to compare with."]
    assert page["Forward, bfloat16"][2].startswith("| full | 128 | 4096 | 4 | 16 |  | 400 |")
    assert "Gaps" not in page

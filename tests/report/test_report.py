"""``flashtile report``: what it says of a run, what it refuses, and what it writes where."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import measured
import pytest
from reading import HOSTILE_TEXTS, Reader, assert_safe

from flashtile.bench import documents, results
from flashtile.bench.documents import Document, InvalidResults
from flashtile.errors import InvalidArgument, MissingExtra
from flashtile.report import command, explanation, page, provenance
from flashtile.report.kernels import section as kernels
from flashtile.report.models import section as models
from flashtile.report.page import Section, Table
from flashtile.report.traffic import section as traffic

STORED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))
NO_EXPLANATION = '<section id="how-it-works"></section>'


@pytest.fixture(autouse=True)
def _short_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has tests of its own."""
    monkeypatch.setattr(explanation, "html", lambda: NO_EXPLANATION)


def report(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def saved(folder: Path, document: Document, name: str = "results.json") -> str:
    documents.save(folder / name, document)
    return str(folder / name)


def table_with(found: Section, heading: str) -> Table:
    """The section's table that has such a column."""
    tables = [table for part in found.parts for table in part.tables]
    (table,) = [table for table in tables if heading in [column.heading for column in table.columns]]
    return table


def column(table: Table, heading: str) -> list[str]:
    idx = [column.heading for column in table.columns].index(heading)
    return [row[idx].text for row in table.rows]


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_summary_of_a_kernel_run_names_who_is_faster_and_who_is_slower() -> None:
    found = kernels.section("a.json", "run-1", measured.kernels())
    assert found.summary == (
        "10.00x the naive formula's speed forward and 10.00x backward, with up to 254x less memory. "
        "Faster than FlexAttention (1.25x forward and 1.25x backward). "
        "Slower than cuDNN in torch (0.80x forward and 0.80x backward). "
        "Geometric means of flashtile's speed over the other's, for calls without options."
    )
    values = {(headline.value, headline.is_behind) for headline in found.headlines}
    assert {("10.0x", False), ("254x less", False), ("0.80x", True), ("57%", False)} == values
    slower = next(part for part in found.parts if part.heading == "Where flashtile is slower")
    assert [point.term for point in slower.points] == ["FlexAttention", "cuDNN in torch", "naive formula"]
    assert slower.points[1].text.startswith("slower in 8 of 8 cases, by more than 5% in 8; at worst 0.80x")
    assert found.warnings == ()


def test_ratios_and_figures_of_a_stored_run_are_those_of_its_file() -> None:
    """Computed here once more, from the JSON itself."""
    (path,) = [path for path in STORED if path.name == "h200.json"]
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    times: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["timing"] is not None:
            times[json.dumps(row["case"]), row["peer"]] = row["timing"]["median_ms"]
    forward = [
        times[case, "naive"] / time
        for (case, peer), time in times.items()
        if peer == "flashtile" and '"direction": "forward"' in case and '"option": "plain"' in case
    ]
    loaded = results.load(path)
    assert isinstance(loaded, results.KernelResults)
    found = kernels.section(path.name, "run-1", loaded)
    assert found.headlines[0].value == f"{geometric_mean(forward):.1f}x"
    assert found.headlines[0].detail.endswith(f"{min(forward):.2f}x to {max(forward):.2f}x")
    everything = table_with(found, "implementation")
    assert len(everything.rows) == len(rows)
    medians = [row[[c.heading for c in everything.columns].index("ms")].value for row in everything.rows]
    assert medians == [row["timing"] and row["timing"]["median_ms"] for row in rows]
    each = table_with(found, "x naive formula")
    assert len(each.rows) == len({json.dumps(row["case"]) for row in rows})


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_every_stored_run_makes_a_page(path: Path) -> None:
    (title,) = re.findall(r'<section id="run-1" class="run">\s*<h2>(.*?)</h2>', command.document([path]))
    assert results.load(path).environment.device_name in title


def test_every_case_is_a_row_and_what_all_share_is_said_once() -> None:
    found = kernels.section("a.json", "run-1", measured.kernels())
    table = table_with(found, "x FlexAttention")
    headings = [column.heading for column in table.columns]
    assert headings == [
        *("direction", "mask", "option", "tokens", "heads"),
        *("TFLOP/s", "x FlexAttention", "x cuDNN in torch", "x naive formula", "% of ceiling", "memory"),
    ]
    assert table.caption.endswith("All rows: dtype bfloat16, head_dim 128, batch 4.")
    assert column(table, "heads") == ["16"] * 8 + ["16/4"]
    assert [row[headings.index("x cuDNN in torch")].tone for row in table.rows[:1]] == ["behind"]
    last = table.rows[-1]
    assert [cell.text for cell in last[6:9]] == ["1.25x", "-", "out of memory"]
    assert last[8].hint == "needs at least 9 GiB: not tried" and last[8].value is None


def test_views_have_a_chart_for_each_head_dim_and_causal_ones_come_first() -> None:
    (part,) = [part for part in kernels.section("a.json", "run-1", measured.kernels()).parts if part.views]
    assert [view.name for view in part.views] == [
        "Forward, causal",
        "Forward, full",
        "Backward, causal",
        "Backward, full",
    ]
    (row,) = part.views[0].rows
    assert [chart.heading for chart in row.charts] == ["Speed, head_dim 128", "Memory, head_dim 128"]
    assert [key.label for key in row.legend] == ["flashtile", "FlexAttention", "cuDNN in torch", "naive formula"]
    assert len({key.color for key in row.legend}) == 4
    assert "% of a matrix product" in Reader(row.charts[0].svg).text


def test_several_head_dims_stand_side_by_side_memory_below_speed() -> None:
    run = measured.kernels()
    some = [row for row in run.rows if row.case.direction == "forward" and row.case.is_causal]
    wider = [replace(row, case=replace(row.case, head_dim=256)) for row in some]
    found = kernels.section("a.json", "run-1", replace(run, rows=(*some, *wider)))
    (view,) = [view for part in found.parts for view in part.views]
    assert [[chart.heading for chart in row.charts] for row in view.rows] == [
        ["Speed, head_dim 128", "Speed, head_dim 256"],
        ["Memory, head_dim 128", "Memory, head_dim 256"],
    ]


def test_a_single_length_is_drawn_as_bars() -> None:
    run = measured.kernels()
    short = replace(run, rows=tuple(row for row in run.rows if row.case.seqlen == 1024))
    (part,) = [part for part in kernels.section("a.json", "run-1", short).parts if part.views]
    ((row,),) = [view.rows for view in part.views[:1]]
    assert [chart.heading for chart in row.charts] == ["Speed at 1,024 tokens", "Memory at 1,024 tokens"]


def test_a_run_of_models_shows_claims_limits_and_where_memory_ended() -> None:
    found = models.section("a.json", "run-1", measured.models())
    assert "In 2 cases the naive formula ran out of memory and flashtile did not." in found.summary
    assert (
        "Training step: 1.25x to 2.39x as fast as with the naive formula, with up to 11.2x less memory."
        in found.summary
    )
    assert "1.03x to 1.26x as fast as with torch's default." in found.summary
    assert found.summary.endswith(" The largest batch: 2.0x as large as with the naive formula, to train.")
    claims = table_with(found, "claim")
    assert claims.rows[0][0].text == "small (12 layers) at 512 tokens: 100 ms → 25 ms (4x faster)"
    assert [cell.text for cell in claims.rows[0][1:3]] == ["40.0 ms → 32.0 ms (1.25x) at batch 2", "no"]
    each = table_with(found, "x torch's default")
    assert column(each, "naive formula, ms") == ["40.0", "880", "out of memory"] * 2
    assert column(each, "attention's share of naive") == ["25%", "73%", ""] * 2
    limits = table_with(found, "largest")
    assert column(limits, "largest") == ["100", "50", ""]
    assert column(limits, "how it is known") == ["tried", "extrapolated", "nobody says how much"]
    (part,) = [part for part in found.parts if part.views]
    assert [view.name for view in part.views] == ["Training step", "One more token"]
    (row,) = part.views[0].rows
    assert [chart.heading for chart in row.charts] == [
        "Speed-up over naive, small",
        "Time, small",
        "Peak memory, small",
    ]


def test_a_run_that_asked_for_limits_alone_tells_of_these() -> None:
    run = measured.models()
    ours, naive, _ = run.limits
    longest = replace(ours.case, axis="seqlen", other=1)
    limits = (
        *(ours, naive),
        replace(ours, case=longest, largest=9000, too_large=9100),
        replace(naive, case=longest, status="tried", largest=3000, too_large=3100),
        replace(ours, case=replace(longest, size="large")),  # of the naive one nobody knows
        replace(naive, case=replace(longest, size="large"), status="tried", too_large=None),
    )
    found = models.section("a.json", "run-1", replace(run, rows=(), limits=limits))
    assert found.lead == "The largest training steps that fit."
    assert found.summary == (
        "The largest sequence: 3.0x as long as with the naive formula, to train. "
        "The largest batch: 2.0x as large as with the naive formula, to train."
    )
    (headline,) = found.headlines
    assert (headline.value, headline.detail) == ("3.0x", "9,000 tokens instead of 3,000: small, batch 1")
    assert [part.heading for part in found.parts if part.tables] == ["The largest training step that fits"]


@pytest.mark.parametrize("is_counted", [True, False])
def test_a_run_of_io_sets_the_measured_bytes_beside_the_predicted(is_counted: bool) -> None:
    found = traffic.section("a.json", "run-1", measured.io(is_counted=is_counted))
    table = table_with(found, "at copy speed")
    headings = [column.heading for column in table.columns]
    assert ("counted" in headings) == ("counted / predicted" in headings) == is_counted, "no empty column"
    assert not is_counted or column(table, "counted / predicted") == ["1.10x"] * 4
    assert column(table, "at copy speed") == ["50%"] * 4
    predicted = table.rows[1][headings.index("predicted")]
    assert predicted.hint == "q, k, v, out: 16.4 MB; scores: 1.05 GB"
    assert found.summary.startswith("Forward, 4096 tokens, causal: the naive formula moves at least 257.0x the bytes")
    (part,) = [part for part in found.parts if part.views]
    labels = {key.label for key in part.views[0].rows[0].legend}
    assert labels == {
        f"{who}, {how}"
        for who in ("flashtile", "naive formula")
        for how in ("predicted", "counted" if is_counted else "at most")
    }
    assert found.facts["counter"] == ("ncu 2025.3" if is_counted else "none: ncu is not installed")


MAKERS = [(kernels.section, measured.kernels), (models.section, measured.models), (traffic.section, measured.io)]


@pytest.mark.parametrize(("section", "make"), MAKERS, ids=["kernels", "models", "io"])
def test_every_section_says_where_its_figures_come_from(
    section: Callable[..., Section], make: Callable[[], Any]
) -> None:
    found = section("some name.json", "run-1", make())
    assert found.origin == "some name.json · 2026-01-02 · commit abcdef012345 · flashtile 0.1.0 · torch 2.11.0"
    assert found.facts["results file"] == "some name.json"
    assert found.facts["measured"] == "2026-01-02 03:04:05+00:00"
    assert found.facts["device"] == "A GPU" and found.facts["commit"] == measured.ENVIRONMENT.commit
    assert found.facts["software"] == "python 3.12.3, torch 2.11.0, flashtile 0.1.0"


def of_peer(run: Any, peer: str) -> Any:
    """What a run has of one peer."""
    fields = {"rows", "limits"} & {field.name for field in dataclasses.fields(run)}
    return replace(run, **{name: tuple(row for row in getattr(run, name) if row.peer == peer) for name in fields})


@pytest.mark.parametrize(("section", "make"), MAKERS, ids=["kernels", "models", "io"])
def test_an_interrupted_run_says_so_and_an_empty_one_claims_nothing(
    section: Callable[..., Section], make: Callable[[], Any]
) -> None:
    empty = section("a.json", "run-1", replace(of_peer(make(), "nobody"), is_complete=False))
    assert provenance.INTERRUPTED in empty.warnings
    assert empty.summary == "There is nothing to compare flashtile with in this run."
    assert empty.lead == "No case was finished." and empty.headlines == ()
    assert not any(part.charts or part.views for part in empty.parts)
    page.render("report/report.html", sections=[empty], explanation="")


@pytest.mark.parametrize(("section", "make"), MAKERS, ids=["kernels", "models", "io"])
@pytest.mark.parametrize("peer", ["flashtile", "naive"])
def test_a_run_without_one_side_still_makes_a_page(
    section: Callable[..., Section], make: Callable[[], Any], peer: str
) -> None:
    alone = section("a.json", "run-1", of_peer(make(), peer))
    assert alone.summary == "There is nothing to compare flashtile with in this run."
    page.render("report/report.html", sections=[alone], explanation="")


def test_a_wrong_result_of_ours_is_a_warning_and_changes_on_top_of_a_commit_are_told() -> None:
    run = measured.kernels()
    wrong = results.KernelRow(
        case=measured.CALL, peer="flashtile", status="wrong_result", reason="differs", difference=0.5
    )
    environment = replace(run.environment, commit_is_dirty=True)
    found = kernels.section("a.json", "run-1", replace(run, environment=environment, rows=(wrong, *run.rows[1:])))
    assert found.warnings == ("flashtile's result was wrong in 1 of 9 cases. This is a bug.",)
    assert found.facts["commit"].endswith(" with changes on top") and "with changes on top" in found.origin


# --- hostile files ----------------------------------------------------------------------------------------------------


def with_every_text(value: Any, text: str) -> Any:
    """A results object with ``text`` in each field that may hold any string."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = {field.name: str(field.type) for field in dataclasses.fields(value)}
        changed = {
            name: text if type(found) is str and _is_free(hint) else with_every_text(found, text)
            for name, hint in hints.items()
            for found in [getattr(value, name)]
        }
        return replace(value, **changed)
    if isinstance(value, dict):
        return {f"{text}{key}": text if isinstance(found, str) else found for key, found in value.items()}
    if isinstance(value, tuple):
        return tuple(with_every_text(item, text) for item in value)
    return value


def _is_free(hint: str) -> bool:
    """Whether a field takes any string, not one of a few."""
    return hint in ("str", "str | None")


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=["markup", "characters"])
@pytest.mark.parametrize("make", [measured.kernels, measured.models, measured.io])
def test_no_text_of_a_results_file_is_obeyed(make: Callable[[], Document], text: str, tmp_path: Path) -> None:
    path = saved(tmp_path, with_every_text(make(), text))
    assert report(path, "--out", str(tmp_path / "page.html")) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = assert_safe(html, num_scripts=1)
    shown = text.encode("utf-8", errors="replace").decode()
    assert reader.text.count(shown) > 5, "what it means is shown"


def test_the_name_of_a_file_is_text_too(tmp_path: Path) -> None:
    path = saved(tmp_path, measured.io(), name="<img src=x onerror=alert(1)>.json")
    report(path, "--out", str(tmp_path / "page.html"))
    reader = assert_safe((tmp_path / "page.html").read_text(encoding="utf-8"), num_scripts=1)
    assert "<img src=x onerror=alert(1)>.json" in reader.text


# --- files in and out -------------------------------------------------------------------------------------------------


def test_several_runs_make_one_page_gpus_first_models_before_kernels(tmp_path: Path) -> None:
    cpu = replace(measured.io(), environment=replace(measured.ENVIRONMENT, device="cpu", device_name="A CPU"))
    paths = [
        saved(tmp_path, cpu, "1.json"),
        saved(tmp_path, measured.io(), "2.json"),
        saved(tmp_path, measured.kernels(), "3.json"),
        saved(tmp_path, measured.models(), "4.json"),
    ]
    html = command.document([Path(path) for path in (*paths, paths[0])])
    reader = assert_safe(html, num_scripts=1)
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "In short",
        "Whole transformers on A GPU",
        "Attention kernels on A GPU: triton",
        "Memory traffic on A GPU",
        "Memory traffic on A CPU",
    ]
    assert {"run-1", "run-2", "run-3", "run-4", "short", "how-it-works"} <= set(reader.values("id"))
    assert "run-5" not in reader.values("id"), "a file that is named twice counts once"
    assert "default-src 'none'" in html, "and no browser would let it ask for anything"
    assert set(re.findall(r"var\((--[\w-]+)", html)) <= set(re.findall(r"(--[\w-]+):", html)), "all colours are defined"


def test_files_of_the_same_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [Path(saved(tmp_path / folder, measured.io())) for folder in ("a", "b")]
    html = command.document(paths)
    assert all(str(path) in html for path in paths)
    assert str(tmp_path) not in command.document(paths[:1]), "a page that is passed on does not tell where it was made"


def test_without_results_the_page_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--out", str(tmp_path / "page.html")) == 0
    printed = capsys.readouterr().out
    assert "No results were given" in printed and f"Report: {tmp_path / 'page.html'}" in printed
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert NO_EXPLANATION in html and "In short" not in html


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "JSONDecodeError"),
        ("[" * 200_000, "RecursionError"),
        ("9" * 5000, "ValueError"),
        ('{"schema": "somebody.else", "version": 1}', "schema 'somebody.else'"),
        ('{"schema": "flashtile.bench.models", "version": 99}', "upgrade flashtile"),
        ('{"schema": "flashtile.bench.io", "version": 1}', "flashtile bench io --out FILE"),
    ],
)
def test_a_broken_foreign_or_newer_file_is_refused_and_nothing_is_written(
    content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InvalidResults, match=re.escape(said)) as caught:
        report(saved(tmp_path, measured.io()), str(path), "--out", str(tmp_path / "page.html"))
    assert str(path) in str(caught.value) and caught.value.remedy
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 0, "timing", "median_ms"), 0),
        (("rows", 0, "timing", "median_ms"), -1.5),
        (("rows", 0, "timing", "q75_ms"), 1e300),
        (("rows", 0, "case", "heads_kv"), 0),
        (("rows", 0, "case", "seqlen"), 10**400),
        (("rows", 0, "peak_extra_bytes"), 10**400),
    ],
)
def test_figures_that_nobody_can_have_measured_are_refused(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    document = json.loads(documents.to_json(measured.kernels()))
    holder = document
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = value
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidResults, match=r"odd\.json"):
        report(str(path), "--out", str(tmp_path / "page.html"))


@pytest.mark.parametrize("content", [b"", b"a report of old"])
def test_only_pages_of_ours_and_empty_files_are_replaced(content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_bytes(content)
    if not content:
        assert report("--out", str(out)) == 0
        before = out.read_bytes()
        assert report(saved(tmp_path, measured.io()), "--out", str(out)) == 0, "and once more, over a page of ours"
        assert out.read_bytes() != before
        return
    with pytest.raises(InvalidArgument, match="is no page of flashtile's") as caught:
        report("--out", str(out))
    assert caught.value.argument == "--out" and out.read_bytes() == content


def test_results_are_not_replaced_by_a_slip_of_the_hand(tmp_path: Path) -> None:
    path = saved(tmp_path, measured.io())
    before = Path(path).read_bytes()
    with pytest.raises(InvalidArgument, match="--out"):
        report("--out", path)
    assert Path(path).read_bytes() == before


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(command, "document")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "page.html", Path(os.devnull), tmp_path / ("x" * 300)):
        with pytest.raises(InvalidArgument, match="--out"):
            report("--out", str(out))


def test_missing_folders_are_made_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link.html").symlink_to(tmp_path / "new" / "page.html")
    assert report("--out", str(tmp_path / "new" / "page.html")) == 0
    assert report("--out", str(tmp_path / "link.html")) == 0
    assert (tmp_path / "link.html").is_symlink()


def test_an_interrupt_leaves_the_old_page_and_no_half_of_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    report("--out", str(out))
    before, path = out.read_bytes(), saved(tmp_path, measured.io())

    def interrupt(_path: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report(path, "--out", str(out))
    assert out.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "results.json"}


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "markdown_it", "pygments"])
def test_a_missing_extra_is_named_before_the_work(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delattr(command, "document")
    with pytest.raises(MissingExtra, match=rf"{package}.*flashtile\[bench\]"):
        report("--out", str(tmp_path / "page.html"))


def test_the_command_is_declared_with_torch_alone() -> None:
    program = (
        "import sys, argparse\n"
        "for name in ('rich', 'matplotlib', 'jinja2', 'markdown_it', 'pygments'): sys.modules[name] = None\n"
        "from flashtile.report import command\n"
        "command.add_arguments(argparse.ArgumentParser())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)

"""support_matrix(): generated from the backends' own answers, and complete."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import flashtile
from flashtile import dispatch
from flashtile.backends.cpu import plan as cpu
from flashtile.errors import InvalidArgument
from flashtile.spec import devices
from flashtile.spec.problem import AttentionProblem
from flashtile.support import feature_problems


class Fussy(ModuleType):
    """A backend that declines softcap and everything on AMD, and plans like the CPU's."""

    def rejects(self, problem: AttentionProblem, device: devices.DeviceSpec) -> tuple[str, ...]:
        reasons = ["no softcap here"] if problem.softcap > 0 else []
        return (*reasons, *(["NVIDIA only"] if device.kind == "rocm" else []))

    def plan(self, problem: AttentionProblem, device: devices.DeviceSpec) -> dispatch.Plan:
        planned = cpu.plan(problem, device)
        kernel = dataclasses.replace(planned.forward, kernel="fussy_kernel")
        return dataclasses.replace(planned, backend="fussy", forward=kernel, backward=kernel, reason="it is fussy")


def test_every_option_of_a_problem_has_a_row() -> None:
    plain, *others = feature_problems().values()
    varied = {
        field.name
        for field in dataclasses.fields(AttentionProblem)
        if any(getattr(problem, field.name) != getattr(plain, field.name) for problem in others)
    }
    sizes_that_follow = {"batch", "seqlen_q", "heads_q", "tokens_q"}  # any size will do for these
    assert varied | sizes_that_follow >= {field.name for field in dataclasses.fields(AttentionProblem)}


def test_the_last_row_has_every_option_at_once() -> None:
    plain, everything = feature_problems()["forward"], feature_problems()["all of these at once"]
    for name in ("layout", "heads_kv", "head_dim_v", "mask", "softcap", "bias_shape", "mask_shape", "dropout_p"):
        assert getattr(everything, name) != getattr(plain, name), name
    assert everything.has_alibi and everything.has_sinks and everything.deterministic
    assert everything.gradients == {"q", "k", "v", "bias", "sinks", "lse"}


def test_each_cell_is_what_dispatch_would_choose() -> None:
    matrix = flashtile.support_matrix(list(devices.DEVICES))
    problems = feature_problems()
    assert matrix.devices == tuple(devices.DEVICES)
    assert [row.feature for row in matrix.rows] == list(problems)
    for row in matrix.rows:
        for cell, name in zip(row.cells, matrix.devices, strict=True):
            problem, device = problems[row.feature], devices.by_name(name)
            plan = dispatch.choose(problem, device)
            assert (cell.device, cell.backend, cell.reason) == (name, plan.backend, plan.reason)
            assert {*cell.accepts, *(backend for backend, _ in cell.rejects)} == set(dispatch.BACKENDS)
            for backend, reasons in cell.rejects:
                assert reasons == dispatch.BACKENDS[backend].rejects(problem, device)


def test_a_backends_answers_reach_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", {"fussy": Fussy("fussy"), **dispatch.BACKENDS})
    matrix = flashtile.support_matrix(["a100", "mi300x"])
    shown = {row.feature: tuple(map(str, row.cells)) for row in matrix.rows}
    assert shown["causal"] == ("fussy/fussy_kernel", "triton/forward")
    assert shown["softcap"] == ("triton/forward", "triton/forward")
    assert shown["float64"] == ("fussy/fussy_kernel", "naive/formula")
    text = str(matrix)
    assert "fussy declines: NVIDIA only; no softcap here." in text
    assert "fussy/fussy_kernel: it is fussy." in text


def test_gpus_run_triton_kernels_but_for_float64() -> None:
    matrix = flashtile.support_matrix(["a100", "mi300x"])
    others = {row.feature for row in matrix.rows if {cell.backend for cell in row.cells} != {"triton"}}
    assert others == {"float64"}
    (float64,) = [row.cells for row in matrix.rows if row.feature == "float64"]
    assert [str(cell) for cell in float64] == ["naive/formula", "naive/formula"]
    assert all("not float64" in reason for cell in float64 for reason in dict(cell.rejects)["triton"])


def test_hopper_kernels_leave_the_rest_to_triton() -> None:
    matrix = flashtile.support_matrix(["h200"])
    left = {row.feature: row.cells[0] for row in matrix.rows if row.cells[0].backend != "hopper"}
    assert {"float32", "float64", "bias", "boolean mask", "dropout"} <= left.keys()
    assert all(dict(cell.rejects)["hopper"] for cell in left.values())
    assert {cell.backend for feature, cell in left.items() if feature != "float64"} == {"triton"}


def test_what_nothing_takes_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", {"fussy": Fussy("fussy")})
    matrix = flashtile.support_matrix(["h200"])
    cell = next(row.cells[0] for row in matrix.rows if row.feature == "softcap")
    assert (cell.backend, cell.kernel, cell.accepts, str(cell)) == (None, None, (), "-")
    assert cell.rejects == (("fussy", ("no softcap here",)),)


def test_strict_mode_does_not_change_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = flashtile.support_matrix()
    monkeypatch.setenv("FLASHTILE_STRICT", "1")
    monkeypatch.setenv("FLASHTILE_BACKEND", "naive")
    assert flashtile.support_matrix() == before


def test_the_text_is_an_aligned_table() -> None:
    matrix = flashtile.support_matrix()
    header, rule, *lines = str(matrix).splitlines()
    table = lines[: len(matrix.rows)]
    assert set(rule) == {"-"} and header.split() == ["feature", "cpu", "h200", "mi300x"]
    columns = [header.index(name) for name in ("cpu", "h200", "mi300x")]
    for row, line in zip(matrix.rows, table, strict=True):
        assert line.startswith(row.feature)
        for column, cell in zip(columns, row.cells, strict=True):
            assert line[column:].startswith(str(cell)) and line[column - 2 : column] == "  "


def test_the_markdown_table_has_a_line_for_each_row() -> None:
    matrix = flashtile.support_matrix(["cpu"])
    header, rule, *rows = matrix.to_markdown().splitlines()
    assert (header, rule) == ("| feature | cpu |", "| --- | --- |")
    assert rows == [f"| {row.feature} | {row.cells[0]} |" for row in matrix.rows]


def test_json_has_every_reason() -> None:
    found = flashtile.support_matrix(["h200"]).to_dict()
    json.dumps(found)
    assert found["rows"][0]["cells"][0]["rejects"] == (("cpu", ("runs on CPU tensors only, these are on h200",)),)


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(InvalidArgument, match="h300"):
        flashtile.support_matrix(["h300"])


def test_the_page_is_what_the_backends_say(tmp_path: Path) -> None:
    """In a process of its own: Triton's interpreter, which these tests run under, takes CPU tensors."""
    root, out = Path(__file__).parents[2], tmp_path / "support.md"
    settings = ("TRITON_INTERPRET", "FLASHTILE_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    subprocess.run([sys.executable, root / "scripts" / "support_page.py", "--out", out], env=environment, check=True)
    stored = (root / "docs" / "support.md").read_text(encoding="utf-8")
    assert stored == out.read_text(encoding="utf-8"), "run 'make support'"

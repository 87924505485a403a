"""``scripts/host_time.py`` times eager calls of every backend there is beside torch's SDPA, on any device."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_loader import load_script

SMALL = ("--device", "cpu", "--seqlen", "2", "--heads", "1", "--head-dim", "8", "--rounds", "3", "--calls", "2")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("host_time", monkeypatch)


@pytest.mark.parametrize("more", [(), ("--causal",)])
def test_every_mode_and_backend_has_its_figures(
    script: ModuleType, more: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*SMALL, *more, "--json", str(tmp_path / "found.json")]) == 0
    head, _, *rows = capfd.readouterr().out.splitlines()
    assert head == "| microseconds, median (least) | auto | cpu | naive | sdpa |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {mode}" for mode in script.MODES]
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["call"]["causal"] == bool(more) and written["environment"]["device"] == "cpu"
    assert all(len(times) == 3 and min(times) > 0 for mode in written["us"].values() for times in mode.values())


@pytest.mark.parametrize("mode_idx", range(3))
def test_candidates_compute_the_same(script: ModuleType, mode_idx: int) -> None:
    sizes = {"seqlen": 5, "heads": 2, "head_dim": 8, "causal": True}
    calls = script.candidates(script.MODES[mode_idx], torch.device("cpu"), **sizes)
    results = {name: call() for name, call in calls.items()}
    theirs = results["sdpa"]
    for name in ("auto", "cpu", "naive"):
        if mode_idx < 2:
            assert results[name].requires_grad == theirs.requires_grad == (mode_idx == 1)
            torch.testing.assert_close(results[name], theirs.transpose(1, 2), atol=0.05, rtol=0.05)
        else:
            for ours, each in zip(results[name], theirs, strict=True):
                torch.testing.assert_close(ours, each.transpose(1, 2), atol=0.05, rtol=0.05)

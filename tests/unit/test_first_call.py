"""What a first call costs is measured by ``scripts/first_call.py``, on a GPU; and what keeps that cost low."""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from script_loader import load_script

from flashtile import ops
from flashtile.backends import gpu


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("first_call", monkeypatch)


def test_it_says_that_it_needs_a_gpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "CUDA GPU" in capsys.readouterr().err


def test_each_cache_is_measured_in_processes_of_its_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used: list[Path] = []

    def report(_backend: str, kernels: Path, _bytecode: Path) -> dict[str, float]:
        used.append(kernels)
        return dict.fromkeys(script.PARTS, 0.25 if used.count(kernels) > 1 else 2.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(script, "in_fresh_process", report)
    assert script.main(["--repeats", "3", "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    for backend in script.BACKENDS:
        assert f"| {backend} | empty | forward | 2.00 (2.00 to 2.00) |" in printed
        assert f"| {backend} | filled | forward | 0.25 (0.25 to 0.25) |" in printed
    assert "a GPU" in (tmp_path / "found.json").read_text()


@pytest.mark.parametrize("collects", [True, False])
def test_python_collects_garbage_afterwards_as_before(collects: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with gpu.garbage_kept():
            assert not gc.isenabled()
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_nobody_searches_for_garbage_while_kernels_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "import_module", lambda name: (name, gc.isenabled()))
    ops._launcher.cache_clear()
    try:
        assert ops._launcher("cpu") == ("flashtile.backends.cpu.launch", False)
    finally:
        ops._launcher.cache_clear()


def test_nobody_searches_for_garbage_while_a_kernel_is_compiled() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from flashtile.backends.launcher import KernelLauncher

    class Kernel:
        collects: bool | None = None

        def __getitem__(self, _grid: tuple[int, ...]) -> Any:
            def compile_and_launch(*_: Any, **__: Any) -> None:
                self.collects = gc.isenabled()

            return compile_and_launch

    kernel = Kernel()
    KernelLauncher(kernel)("key", (1,), (torch.zeros(1),), lambda tensor: (tensor,), num_warps=4)
    assert kernel.collects is False

"""doctor(): finds what is here, sees what is broken, and never raises."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from flashtile import dispatch, doctor, functional, ops, repeats
from flashtile.doctor import Diagnosis
from flashtile.spec import devices

ENVIRONMENT = (
    *("FLASHTILE_BACKEND", "FLASHTILE_STRICT", "FLASHTILE_CHECK_VALUES"),
    *("CXX", "OMP_NUM_THREADS", "TRITON_INTERPRET"),
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def on_cpu(diagnosis: Diagnosis) -> list[Any]:
    return [probe for probe in diagnosis.probes if probe.device == "cpu"]


def test_this_machine_is_healthy() -> None:
    diagnosis = doctor()
    assert diagnosis.is_healthy, str(diagnosis)
    probed = [(probe.backend, probe.options) for probe in on_cpu(diagnosis)]
    assert probed == [(backend, options) for backend in dispatch.BACKENDS for options in ("causal", "every option")]
    status = {probe.backend: probe.status for probe in on_cpu(diagnosis)}
    assert status == {"cpu": "ok", "hopper": "declines", "triton": "declines", "naive": "ok"}
    versions = dict(diagnosis.versions)
    assert versions["torch"].startswith(torch.__version__)
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert set(versions) == {"flashtile", "python", "torch", "triton"}
    assert next(name for name, _ in diagnosis.devices) == "cpu"


def test_triton_says_why_it_declines_a_cpu() -> None:
    details = {probe.detail for probe in on_cpu(doctor()) if probe.backend == "triton"}
    assert len(details) == 1 and "runs on GPUs" in details.pop()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="interprets Triton kernels")
def test_interpreted_triton_is_probed_on_a_cpu() -> None:
    script = (
        "import flashtile; probes = flashtile.doctor().probes; "
        "print([probe.status for probe in probes if (probe.device, probe.backend) == ('cpu', 'triton')])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "['ok', 'ok']"


def test_the_text_has_every_section_and_the_count() -> None:
    text = str(doctor())
    for title in ("Versions", "Devices", "Environment", "Backends", "Missing"):
        assert f"\n{title}\n" in f"\n{text}"
    assert "probes passed." in text
    assert max(map(len, text.splitlines())) <= 120
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_json_survives_a_round_trip() -> None:
    found = json.loads(json.dumps(doctor().to_dict()))
    assert found["is_healthy"] is True
    assert found["versions"]["torch"] == dict(doctor().versions)["torch"]
    assert found["probes"][0]["status"] == "ok"


# --- what is broken ---------------------------------------------------------------------------------------------------


def test_a_backend_that_raises_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = functional.attention

    def broken(*args: Any, backend: str, **options: Any) -> torch.Tensor:
        if backend == "cpu":
            raise RuntimeError("the kernel is broken\nand says so at length")
        return attention(*args, backend=backend, **options)

    monkeypatch.setattr(functional, "attention", broken)
    diagnosis = doctor()
    failures = [probe for probe in diagnosis.probes if probe.is_failure]
    assert [(probe.backend, probe.options, probe.status) for probe in failures] == [("cpu", "causal", "error")]
    assert failures[0].detail == "RuntimeError: the kernel is broken"
    assert not diagnosis.is_healthy
    assert "3 of 4 probes passed." in str(diagnosis)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_backend_that_computes_the_wrong_numbers_is_wrong(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = functional.attention

    def slightly_off(*args: Any, backend: str, **options: Any) -> torch.Tensor:
        out = attention(*args, backend=backend, **options)
        return out * factor if backend == "cpu" else out

    monkeypatch.setattr(functional, "attention", slightly_off)
    wrong = [probe for probe in doctor().probes if probe.is_failure]
    assert [(probe.backend, probe.status) for probe in wrong] == [("cpu", "wrong")]
    assert wrong[0].detail.startswith("out is off by")


def test_a_wrong_gradient_is_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_with_lse = functional.attention_with_lse

    def wrong_d_sinks(*, sinks: torch.Tensor, backend: str, **options: Any) -> Any:
        if backend == "cpu":  # the same value, with another gradient
            sinks = 1.01 * sinks - 0.01 * sinks.detach()
        return attention_with_lse(**options, sinks=sinks, backend=backend)

    monkeypatch.setattr(functional, "attention_with_lse", wrong_d_sinks)
    wrong = [probe for probe in doctor().probes if probe.is_failure]
    assert [(probe.backend, probe.options, probe.status) for probe in wrong] == [("cpu", "every option", "wrong")]
    assert "gradient of sinks" in wrong[0].detail


def test_nothing_that_breaks_makes_it_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = Mock(side_effect=RuntimeError("driver gone"))
    for owner, name in (
        (torch.cuda, "is_available"),
        (torch, "get_num_threads"),
        (shutil, "which"),
        (metadata, "version"),
        (metadata, "requires"),
        (functional, "attention"),
        (functional, "attention_with_lse"),
    ):
        monkeypatch.setattr(owner, name, fails)
    diagnosis = doctor()
    assert not diagnosis.is_healthy
    assert str(diagnosis).count("driver gone") >= 6
    json.dumps(diagnosis.to_dict())


def forget_plans() -> None:
    dispatch._choose.cache_clear()
    ops._prepared.clear()
    repeats._known.clear()


def test_a_declined_probe_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.BACKENDS["cpu"], "rejects", Mock(return_value=("not on Sundays",)))
    forget_plans()
    try:
        diagnosis = doctor()
    finally:
        forget_plans()
    declined = [probe for probe in on_cpu(diagnosis) if probe.backend == "cpu"]
    assert {probe.status for probe in declined} == {"declines"}
    assert [probe.detail for probe in declined] == ["not on Sundays", "not on Sundays"]
    assert diagnosis.is_healthy
    assert "2 of 2 probes passed." in str(diagnosis)
    (missing,) = [missing for missing in diagnosis.missing if "tiled backend for cpu" in missing.what]
    assert "naive" in missing.purpose


# --- environment ------------------------------------------------------------------------------------------------------


def test_settings_that_are_fine_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_STRICT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    diagnosis = doctor()
    assert {(variable.name, variable.value, variable.complaint) for variable in diagnosis.environment} >= {
        ("FLASHTILE_STRICT", "1", ""),
        ("OMP_NUM_THREADS", "2", ""),
    }
    assert diagnosis.is_healthy


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("FLASHTILE_STRICT", "yes", "wanted 0 or 1"),
        ("FLASHTILE_BACKEND", "cuda", "wanted 'auto' or 'cpu' or 'hopper' or 'triton' or 'naive'"),
        ("FLASHTILE_STRICTT", "1", "no such setting; there are FLASHTILE_BACKEND"),
    ],
)
def test_settings_that_are_wrong_are_told(
    name: str, value: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    diagnosis = doctor()
    (found,) = [variable for variable in diagnosis.environment if variable.name == name]
    assert complaint in found.complaint
    assert not diagnosis.is_healthy
    assert "An environment variable is wrong" in str(diagnosis)


# --- what is missing --------------------------------------------------------------------------------------------------


def missing_for(diagnosis: Diagnosis, purpose: str) -> Any:
    return next((missing for missing in diagnosis.missing if purpose in missing.purpose), None)


def test_a_missing_extra_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(package: str) -> str:
        if package in ("matplotlib", "rich"):
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    missing = missing_for(doctor(), "flashtile bench and demo")
    assert missing.what == "matplotlib, rich"
    assert missing.remedy == "pip install 'flashtile[bench]'"


def test_the_extras_are_read_from_the_packages_own_metadata() -> None:
    declared = {
        requirement.split(">")[0] for requirement in metadata.requires("flashtile") or [] if "bench" in requirement
    }
    assert {"matplotlib", "rich", "jinja2"} <= declared
    assert missing_for(doctor(), "flashtile bench and demo") is None  # they are installed where tests run


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", Mock(return_value=None))
    assert "g++" in missing_for(doctor(), "torch.compile on the CPU").remedy
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert missing_for(doctor(), "torch.compile on the CPU") is None


def test_a_missing_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", Mock(return_value=None))
    assert "explain" in missing_for(doctor(), "everything works on the CPU").remedy


def test_a_torch_without_cuda_beside_a_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "reinstall torch" in missing_for(doctor(), "this machine's NVIDIA GPU").remedy


@pytest.mark.parametrize(("has_gpu", "has_triton"), [(True, True), (True, False), (False, True), (False, False)])
def test_triton_is_missing_only_beside_a_gpu(has_gpu: bool, has_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    find_spec = importlib.util.find_spec

    def pretended(name: str, package: str | None = None) -> object:
        return (object() if has_triton else None) if name == "triton" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", pretended)
    missing = missing_for(doctor(), "our kernels")
    if has_gpu and not has_triton:
        assert missing.what == "triton" and missing.remedy.startswith("pip install triton")
    else:
        assert missing is None


@pytest.mark.parametrize("package", ["triton", "triton-windows", "pytorch-triton-rocm"])
def test_triton_is_found_under_each_of_its_names(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if "triton" not in name:
            return installed(name)
        if name != package:
            raise metadata.PackageNotFoundError(name)
        return "9.8.7"

    monkeypatch.setattr(metadata, "version", version)
    assert dict(doctor().versions)["triton"] == "9.8.7"


def test_each_gpu_is_listed_and_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pretended GPU, whose probes must fail: there is none to run on."""
    if torch.cuda.is_available():
        pytest.skip("pretends a GPU, and this machine has a real one")
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=150 * 10**9,
        shared_memory_per_block_optin=232448,
        L2_cache_size=62914560,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda", 0): properties}.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", {torch.device("cuda", 0): "NVIDIA H200"}.get)
    diagnosis = doctor()
    devices.detect.cache_clear()
    assert dict(diagnosis.devices)["cuda:0"].startswith("NVIDIA H200, sm_90, 132 SMs, 140 GiB, table entry h200")
    assert {probe.status for probe in diagnosis.probes if probe.device == "cuda:0"} == {"error"}
    assert not diagnosis.is_healthy


@pytest.mark.gpu
def test_the_gpu_of_this_machine_works() -> None:
    probes = [probe for probe in doctor().probes if probe.device == "cuda:0"]
    assert {probe.status for probe in probes} <= {"ok", "declines"}
    assert "ok" in {probe.status for probe in probes}

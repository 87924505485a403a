"""The device table, and how a GPU that is found gets its entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashtile.errors import InvalidArgument
from flashtile.spec import devices
from flashtile.spec.devices import DEVICES, GB, KIB, MIB, TFLOP

GPUS = [spec for spec in DEVICES.values() if spec.kind in ("cuda", "rocm")]
SMEM_KIB = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227}


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    devices.detect.cache_clear()
    yield
    devices.detect.cache_clear()


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    *,
    sms: int,
    memory_gib: float,
    capability: tuple[int, int] = (9, 0),
    smem_kib: int = 227,
    is_rocm: bool = False,
    memory_clock: tuple[int, int] | None = None,
) -> devices.DeviceSpec:
    """The spec that a machine with this GPU would detect."""
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=sms,
        total_memory=int(memory_gib * 1024**3),
        shared_memory_per_block_optin=smem_kib * KIB,
        L2_cache_size=60 * MIB,
    )
    if memory_clock is not None:
        properties.memory_clock_rate, properties.memory_bus_width = memory_clock
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda", 0): properties}.get)
    monkeypatch.setattr(torch.version, "hip", "6.4" if is_rocm else None)
    return devices.detect(torch.device("cuda", 0))


def test_the_table_is_keyed_by_name_and_every_row_cites_its_source() -> None:
    assert {name: spec.name for name, spec in DEVICES.items()} == {name: name for name in DEVICES}
    assert all(len(spec.source) > 10 for spec in DEVICES.values())
    assert [spec.name for spec in DEVICES.values() if spec.is_guess] == ["cpu"]


def test_figures_that_the_h200_datasheet_prints() -> None:
    h200 = devices.by_name("h200")
    assert (h200.memory_bytes, h200.bytes_per_s) == (141 * GB, 4.8e12)
    assert h200.flops_per_s(torch.bfloat16) == pytest.approx(1979e12 / 2, rel=1e-3)  # printed with sparsity
    assert h200.flops_per_s(torch.float32) == h200.flops_per_s(torch.float64) == 67e12


@pytest.mark.parametrize("spec", [spec for spec in GPUS if spec.kind == "cuda"], ids=lambda spec: spec.name)
def test_shared_memory_is_what_the_compute_capability_allows(spec: devices.DeviceSpec) -> None:
    assert spec.compute_capability is not None
    assert spec.shared_memory_bytes == SMEM_KIB[spec.compute_capability] * KIB


@pytest.mark.parametrize("spec", GPUS, ids=lambda spec: spec.name)
def test_rates_are_in_the_units_that_the_fields_name(spec: devices.DeviceSpec) -> None:
    # A misplaced factor of 1000 would leave these ranges; every chip of these years is inside.
    assert 0.2e12 < spec.bytes_per_s < 10e12
    assert 50 * TFLOP < spec.flops_per_s_16bit < 3000 * TFLOP
    assert spec.flops_per_s_16bit >= 1.5 * spec.flops_per_s_32bit
    assert spec.flops_per_s_32bit >= spec.flops_per_s_64bit > 0.1 * TFLOP
    assert 10 * GB < spec.memory_bytes < 300 * GB
    assert MIB < spec.l2_bytes < 300 * MIB
    # A vector unit multiplies and adds 128 or 256 float32 numbers per cycle and SM, at 1 to 3 GHz.
    assert 0.5e9 < spec.flops_per_s_32bit / spec.num_sms / 256 < 4e9


def test_each_dtype_has_its_rate() -> None:
    t4 = devices.by_name("t4")
    rates = [t4.flops_per_s(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    assert rates == [65e12, 65e12, 8.1e12, 0.25e12]


def test_only_nvidia_chips_before_sm_80_lack_bfloat16() -> None:
    assert [spec.name for spec in DEVICES.values() if not spec.has_matrix_units_for(torch.bfloat16)] == ["t4"]
    assert all(spec.has_matrix_units_for(torch.float16) for spec in DEVICES.values())


def test_specs_are_frozen_and_hashable() -> None:
    h200: Any = devices.by_name("H200")
    assert len({h200, devices.by_name("h200"), devices.by_name("h100")}) == 2
    with pytest.raises(FrozenInstanceError):
        h200.num_sms = 1


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument) as raised:
        devices.by_name("h300")
    assert raised.value.argument == "device"
    assert "'h300'" in raised.value.got
    assert all(name in raised.value.wanted for name in DEVICES)


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", None])
def test_a_cpu_is_fast_in_bfloat16_only_if_it_has_the_units(
    capability: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"num_physical_cores": 7, "l2_cache_size": 12345, "avx512_bf16": False}
    found |= {} if capability is None else {capability: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    devices.detect.cache_clear()
    spec = devices.detect(torch.device("cpu"))
    devices.detect.cache_clear()
    assert (spec.name, spec.num_sms, spec.shared_memory_bytes) == ("cpu", 7, 12345)
    assert (spec.flops_per_s_16bit > spec.flops_per_s_32bit) is (capability is not None)


def test_any_other_device_is_a_guess_of_kind_other() -> None:
    found = devices.detect(torch.device("meta"))
    assert (found.name, found.kind, found.is_guess) == ("meta", "other", True)


@pytest.mark.parametrize(
    ("name", "sms", "memory_gib", "entry"),
    [
        ("NVIDIA H200", 132, 139.8, "h200"),
        ("NVIDIA H100 80GB HBM3", 132, 79.2, "h100"),
        ("NVIDIA B200", 148, 178.4, "b200"),
        ("NVIDIA A100-SXM4-80GB", 108, 79.3, "a100"),
        ("NVIDIA L40S", 142, 44.4, "l40s"),
        ("NVIDIA L4", 58, 22.0, "l4"),
        ("NVIDIA A10G", 80, 22.2, "a10g"),
        ("NVIDIA GeForce RTX 4090", 128, 23.5, "rtx4090"),
        ("Tesla T4", 40, 14.6, "t4"),
    ],
)
def test_a_gpu_of_the_table_gets_the_tables_rates(
    name: str, sms: int, memory_gib: float, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pretend_gpu(monkeypatch, name, sms=sms, memory_gib=memory_gib)
    assert (found.name, found.is_guess) == (entry, False)
    assert found.flops_per_s_16bit == DEVICES[entry].flops_per_s_16bit
    assert found.bytes_per_s == DEVICES[entry].bytes_per_s
    assert found.memory_bytes == int(memory_gib * 1024**3)


@pytest.mark.parametrize(
    ("name", "sms", "memory_gib", "entry"),
    [
        ("NVIDIA H100 PCIe", 114, 79.6, "h100"),
        ("NVIDIA H100 NVL", 132, 93.1, "h100"),
        ("NVIDIA A100-SXM4-40GB", 108, 39.4, "a100"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 14, 9.5, "a100"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, 15.7, "rtx4090"),
    ],
)
def test_a_lesser_variant_keeps_the_name_but_is_a_guess(
    name: str, sms: int, memory_gib: float, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pretend_gpu(monkeypatch, name, sms=sms, memory_gib=memory_gib)
    assert (found.name, found.is_guess, found.num_sms) == (entry, True, sms)
    assert found.flops_per_s_16bit == pytest.approx(DEVICES[entry].flops_per_s_16bit * sms / DEVICES[entry].num_sms)
    assert name in found.source


@pytest.mark.parametrize(
    ("name", "capability", "smem_kib", "model"),
    [
        ("NVIDIA L40", (8, 9), 99, "l40s"),  # contains "l4"
        ("NVIDIA T400 4GB", (7, 5), 64, "t4"),  # contains "t4"
        ("NVIDIA GH200 480GB", (9, 0), 227, "h200"),  # contains "h200"
        ("NVIDIA GeForce RTX 5090", (12, 0), 99, "l40s"),  # newer than b200, built like the consumer chips
        ("Tesla V100-SXM2-32GB", (7, 0), 96, "a10g"),
    ],
)
def test_a_gpu_that_is_not_in_the_table_is_a_guess_after_the_nearest(
    name: str, capability: tuple[int, int], smem_kib: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pretend_gpu(monkeypatch, name, sms=60, memory_gib=30, capability=capability, smem_kib=smem_kib)
    assert (found.name, found.is_guess, found.compute_capability) == (name, True, capability)
    assert found.bytes_per_s == DEVICES[model].bytes_per_s
    assert name in found.source and model in found.source


def test_a_guess_takes_the_bandwidth_from_the_memory_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    # 6251 MHz and 384 bits are those of an A10, whose datasheet says 600 GB/s.
    found = pretend_gpu(
        monkeypatch, "NVIDIA A10", sms=72, memory_gib=22, capability=(8, 6), memory_clock=(6251000, 384)
    )
    assert found.is_guess and found.bytes_per_s == pytest.approx(600e9, rel=0.01)


def test_amd_gpus_have_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pretend_gpu(monkeypatch, "AMD Instinct MI300X", sms=304, memory_gib=192, smem_kib=64, is_rocm=True)
    assert (found.name, found.kind, found.compute_capability, found.is_guess) == ("mi300x", "rocm", None, False)
    devices.detect.cache_clear()
    unknown = pretend_gpu(monkeypatch, "AMD Instinct MI250", sms=104, memory_gib=64, smem_kib=64, is_rocm=True)
    assert (unknown.name, unknown.kind, unknown.is_guess) == ("AMD Instinct MI250", "rocm", True)


@pytest.mark.gpu
def test_the_gpu_of_this_machine_agrees_with_its_table_entry() -> None:
    found = devices.detect(torch.device("cuda", 0))
    assert found.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    if not found.is_guess:
        entry = DEVICES[found.name]
        assert (found.num_sms, found.compute_capability) == (entry.num_sms, entry.compute_capability)
        assert (found.shared_memory_bytes, found.l2_bytes) == (entry.shared_memory_bytes, entry.l2_bytes)
        measurable = devices._bytes_per_s(torch.cuda.get_device_properties(0))
        assert measurable == 0 or entry.bytes_per_s == pytest.approx(measurable, rel=0.02)

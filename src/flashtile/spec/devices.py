"""What the planners and the cost model know about each device: one literal table, and the entry of this machine.

Peak rates are the vendors' dense datasheet figures for the SXM or otherwise largest variant, in FLOP/s and bytes/s;
they bound the roofline, nothing is tuned on them. CPUs vary too much for a table: their entry is a guess and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from flashtile.errors import InvalidArgument

GB = 10**9
TFLOP = 10**12
KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One kind of device; hashable, so that plans can be cached by it."""

    name: str
    kind: Literal["cpu", "cuda", "rocm", "other"]
    compute_capability: tuple[int, int] | None = None
    """(major, minor) on NVIDIA GPUs."""
    num_sms: int
    """Streaming multiprocessors, compute units, or cores."""
    shared_memory_bytes: int
    """Largest shared memory of one program; on a CPU, the L2 cache of one core."""
    l2_bytes: int
    memory_bytes: int
    bytes_per_s: float
    flops_per_s_16bit: float
    """Dense matrix rate in bfloat16 (float16 where there is no bfloat16)."""
    flops_per_s_32bit: float
    is_guess: bool = False
    """Whether the rates are placeholders rather than a datasheet's."""

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Matrix rate for a dtype; float64 counts as half of float32."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.flops_per_s_16bit
        return self.flops_per_s_32bit / (2 if dtype == torch.float64 else 1)


def _nvidia(name: str, capability: tuple[int, int], sms: int, smem_kib: int, l2_mib: int, **rates: float) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        kind="cuda",
        compute_capability=capability,
        num_sms=sms,
        shared_memory_bytes=smem_kib * KIB,
        l2_bytes=l2_mib * KIB * KIB,
        memory_bytes=int(rates["memory_gb"] * GB),
        bytes_per_s=rates["gb_per_s"] * GB,
        flops_per_s_16bit=rates["tflops_16bit"] * TFLOP,
        flops_per_s_32bit=rates["tflops_32bit"] * TFLOP,
    )


DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        _nvidia("h200", (9, 0), 132, 227, 50, memory_gb=141, gb_per_s=4800, tflops_16bit=989, tflops_32bit=67),
        _nvidia("h100", (9, 0), 132, 227, 50, memory_gb=80, gb_per_s=3350, tflops_16bit=989, tflops_32bit=67),
        _nvidia("b200", (10, 0), 148, 227, 126, memory_gb=180, gb_per_s=8000, tflops_16bit=2250, tflops_32bit=75),
        _nvidia("a100", (8, 0), 108, 163, 40, memory_gb=80, gb_per_s=2039, tflops_16bit=312, tflops_32bit=19.5),
        _nvidia("l40s", (8, 9), 142, 99, 96, memory_gb=48, gb_per_s=864, tflops_16bit=362, tflops_32bit=91.6),
        _nvidia("l4", (8, 9), 58, 99, 48, memory_gb=24, gb_per_s=300, tflops_16bit=121, tflops_32bit=30.3),
        _nvidia("a10g", (8, 6), 80, 99, 6, memory_gb=24, gb_per_s=600, tflops_16bit=70, tflops_32bit=35),
        _nvidia("rtx4090", (8, 9), 128, 99, 72, memory_gb=24, gb_per_s=1008, tflops_16bit=165, tflops_32bit=82.6),
        _nvidia("t4", (7, 5), 40, 64, 4, memory_gb=16, gb_per_s=320, tflops_16bit=65, tflops_32bit=8.1),
        DeviceSpec(
            name="mi300x",
            kind="rocm",
            num_sms=304,
            shared_memory_bytes=64 * KIB,
            l2_bytes=256 * KIB * KIB,
            memory_bytes=192 * GB,
            bytes_per_s=5300 * GB,
            flops_per_s_16bit=1307 * TFLOP,
            flops_per_s_32bit=163.4 * TFLOP,
        ),
        DeviceSpec(
            name="cpu",
            kind="cpu",
            num_sms=2,
            shared_memory_bytes=1024 * KIB,
            l2_bytes=32 * KIB * KIB,
            memory_bytes=16 * GB,
            bytes_per_s=40 * GB,
            flops_per_s_16bit=0.8 * TFLOP,
            flops_per_s_32bit=0.18 * TFLOP,
            is_guess=True,
        ),
    )
}


def by_name(name: str) -> DeviceSpec:
    """The table's entry, for example ``by_name("h200")``."""
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise InvalidArgument(
            "device",
            got=repr(name),
            wanted="one of " + ", ".join(DEVICES),
            remedy="pick the closest entry, or run on that device and pass its tensors",
        ) from None


@lru_cache(maxsize=64)
def detect(device: torch.device) -> DeviceSpec:
    """The spec of a device of this machine: the rates of the table's matching entry, sizes as the device reports."""
    if device.type == "cpu":
        return DEVICES["cpu"]
    if device.type == "cuda":
        return _detect_gpu(device)
    return DeviceSpec(
        name=device.type,
        kind="other",
        num_sms=1,
        shared_memory_bytes=0,
        l2_bytes=0,
        memory_bytes=0,
        bytes_per_s=DEVICES["cpu"].bytes_per_s,
        flops_per_s_16bit=DEVICES["cpu"].flops_per_s_16bit,
        flops_per_s_32bit=DEVICES["cpu"].flops_per_s_32bit,
        is_guess=True,
    )


def _detect_gpu(device: torch.device) -> DeviceSpec:
    found = torch.cuda.get_device_properties(device)
    marketing_name = found.name.lower().replace(" ", "")
    known = next((spec for name, spec in DEVICES.items() if name in marketing_name), None)
    is_rocm = torch.version.hip is not None
    model = known or DEVICES["mi300x" if is_rocm else "t4"]
    return DeviceSpec(
        name=known.name if known else found.name,
        kind="rocm" if is_rocm else "cuda",
        compute_capability=None if is_rocm else (found.major, found.minor),
        num_sms=found.multi_processor_count,
        shared_memory_bytes=getattr(found, "shared_memory_per_block_optin", model.shared_memory_bytes),
        l2_bytes=getattr(found, "L2_cache_size", model.l2_bytes),
        memory_bytes=found.total_memory,
        bytes_per_s=model.bytes_per_s,
        flops_per_s_16bit=model.flops_per_s_16bit,
        flops_per_s_32bit=model.flops_per_s_32bit,
        is_guess=known is None,
    )

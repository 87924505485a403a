"""What the planners and the cost model know about each device: one literal table, and the entry of this machine.

Peak rates are the vendors' dense datasheet figures for the SXM or otherwise largest variant, in FLOP/s and bytes/s;
they bound the roofline, nothing is tuned on them. CPUs vary too much for a table: their entry is a guess and says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch

from flashtile.errors import InvalidArgument

GB = 10**9
TFLOP = 10**12
KIB = 1024
MIB = 1024 * KIB


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
    """The last cache before device memory, whatever the vendor calls it; on a CPU, the L3."""
    memory_bytes: int
    bytes_per_s: float
    flops_per_s_16bit: float
    """Dense matrix rate in bfloat16 (float16 where there is no bfloat16), accumulated in float32."""
    flops_per_s_32bit: float
    """True float32, not TF32: what the contracts promise for float32 inputs."""
    flops_per_s_64bit: float
    """The matrix units' rate where they take float64, else the vector units'."""
    is_guess: bool = False
    """Whether the rates are placeholders rather than a datasheet's."""
    source: str
    """Where the figures come from."""

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Matrix rate for operands of a dtype."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.flops_per_s_16bit
        return self.flops_per_s_64bit if dtype == torch.float64 else self.flops_per_s_32bit

    def has_matrix_units_for(self, dtype: torch.dtype) -> bool:
        """Whether ``flops_per_s`` is reachable in a dtype: NVIDIA's matrix units take bfloat16 from sm_80 on."""
        return dtype != torch.bfloat16 or self.compute_capability is None or self.compute_capability >= (8, 0)


def _nvidia(
    name: str,
    capability: tuple[int, int],
    *,
    sms: int,
    smem_kib: int,
    l2_mib: int,
    memory: tuple[int, int],
    tflops: tuple[float, float, float],
    source: str,
) -> DeviceSpec:
    """A row of the table: memory in (GB, GB/s), rates for (16, 32, 64) bits."""
    flops_per_s = [rate * TFLOP for rate in tflops]
    return DeviceSpec(
        name=name,
        kind="cuda",
        compute_capability=capability,
        num_sms=sms,
        shared_memory_bytes=smem_kib * KIB,
        l2_bytes=l2_mib * MIB,
        memory_bytes=memory[0] * GB,
        bytes_per_s=memory[1] * GB,
        flops_per_s_16bit=flops_per_s[0],
        flops_per_s_32bit=flops_per_s[1],
        flops_per_s_64bit=flops_per_s[2],
        source=source,
    )


# Shared memory per program is the CUDA programming guide's "maximum amount of shared memory per thread block" of the
# compute capability. Datasheets that print matrix rates with 2:4 sparsity are halved here. Where a datasheet leaves
# float64 out, the rate is the architecture whitepaper's fraction of float32: 1/64 on sm_86 and sm_89, 1/32 on sm_75.
DEVICES: dict[str, DeviceSpec] = {
    spec.name: spec
    for spec in (
        _nvidia(
            "h200",
            (9, 0),
            sms=132,
            smem_kib=227,
            l2_mib=60,
            memory=(141, 4800),
            tflops=(989, 67, 67),
            source="NVIDIA H200 datasheet (SXM); L2 as the driver reports it",
        ),
        _nvidia(
            "h100",
            (9, 0),
            sms=132,
            smem_kib=227,
            l2_mib=50,
            memory=(80, 3350),
            tflops=(989, 67, 67),
            source="NVIDIA H100 datasheet (SXM5) and Hopper whitepaper",
        ),
        _nvidia(
            "b200",
            (10, 0),
            sms=148,
            smem_kib=227,
            l2_mib=126,
            memory=(180, 8000),
            tflops=(2250, 75, 37),
            source="NVIDIA HGX B200 datasheet, an eighth of it; L2 from the Blackwell tuning guide",
        ),
        _nvidia(
            "a100",
            (8, 0),
            sms=108,
            smem_kib=163,
            l2_mib=40,
            memory=(80, 2039),
            tflops=(312, 19.5, 19.5),
            source="NVIDIA A100 80GB datasheet (SXM4) and Ampere whitepaper",
        ),
        _nvidia(
            "l40s",
            (8, 9),
            sms=142,
            smem_kib=99,
            l2_mib=96,
            memory=(48, 864),
            tflops=(362, 91.6, 1.43),
            source="NVIDIA L40S datasheet; L2 from the Ada whitepaper",
        ),
        _nvidia(
            "l4",
            (8, 9),
            sms=58,
            smem_kib=99,
            l2_mib=48,
            memory=(24, 300),
            tflops=(121, 30.3, 0.47),
            source="NVIDIA L4 datasheet; L2 from the Ada whitepaper",
        ),
        _nvidia(
            "a10g",
            (8, 6),
            sms=80,
            smem_kib=99,
            l2_mib=6,
            memory=(24, 600),
            tflops=(70, 35, 0.55),
            source="NVIDIA A10G datasheet; L2 of the GA102 whitepaper",
        ),
        _nvidia(
            "rtx4090",
            (8, 9),
            sms=128,
            smem_kib=99,
            l2_mib=72,
            memory=(24, 1008),
            tflops=(165.2, 82.6, 1.29),
            source="NVIDIA Ada whitepaper, GeForce RTX 4090",
        ),
        _nvidia(
            "t4",
            (7, 5),
            sms=40,
            smem_kib=64,
            l2_mib=4,
            memory=(16, 320),
            tflops=(65, 8.1, 0.25),
            source="NVIDIA T4 datasheet and Turing whitepaper",
        ),
        DeviceSpec(
            name="mi300x",
            kind="rocm",
            num_sms=304,
            shared_memory_bytes=64 * KIB,
            l2_bytes=256 * MIB,
            memory_bytes=192 * GB,
            bytes_per_s=5300 * GB,
            flops_per_s_16bit=1307.4 * TFLOP,
            flops_per_s_32bit=163.4 * TFLOP,
            flops_per_s_64bit=163.4 * TFLOP,
            source="AMD Instinct MI300X data sheet, matrix rates; the last cache is its Infinity Cache",
        ),
        DeviceSpec(
            name="cpu",
            kind="cpu",
            num_sms=2,
            shared_memory_bytes=1 * MIB,
            l2_bytes=32 * MIB,
            memory_bytes=16 * GB,
            bytes_per_s=40 * GB,
            flops_per_s_16bit=0.8 * TFLOP,
            flops_per_s_32bit=0.18 * TFLOP,
            flops_per_s_64bit=0.09 * TFLOP,
            is_guess=True,
            source="a guess: two server cores with AVX-512 and bfloat16 instructions",
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
        return _detect_cpu()
    if device.type == "cuda":
        return _detect_gpu(device)
    return replace(
        DEVICES["cpu"],
        name=device.type,
        kind="other",
        num_sms=1,
        shared_memory_bytes=0,
        l2_bytes=0,
        memory_bytes=0,
        source="a guess: the table has no such device, the rates are those of its CPU",
    )


def _detect_cpu() -> DeviceSpec:
    model = DEVICES["cpu"]
    found = torch.cpu.get_capabilities()
    has_bfloat16_units = any(name.endswith("bf16") and is_there for name, is_there in found.items())
    return replace(
        model,
        num_sms=found.get("num_physical_cores", model.num_sms),
        shared_memory_bytes=found.get("l2_cache_size", model.shared_memory_bytes),
        flops_per_s_16bit=model.flops_per_s_16bit if has_bfloat16_units else model.flops_per_s_32bit,
    )


def _detect_gpu(device: torch.device) -> DeviceSpec:
    found = torch.cuda.get_device_properties(device)
    is_rocm = torch.version.hip is not None
    same_kind = [spec for spec in DEVICES.values() if spec.kind == ("rocm" if is_rocm else "cuda")]
    smem_bytes = getattr(found, "shared_memory_per_block_optin", 0)
    named = DEVICES.get(_table_name(found.name) or "")
    model = named or min(same_kind, key=lambda spec: _distance(spec, smem_bytes, (found.major, found.minor)))

    # PCIe, laptop, NVL and partitioned (MIG) variants carry the name of the table's entry, but not its rates.
    is_table_variant = (
        named is not None
        and found.multi_processor_count == named.num_sms
        and abs(found.total_memory / named.memory_bytes - 1) < 0.15
    )
    speed = 1.0 if is_table_variant else found.multi_processor_count / model.num_sms
    return replace(
        model,
        name=model.name if named else found.name,
        compute_capability=None if is_rocm else (found.major, found.minor),
        num_sms=found.multi_processor_count,
        shared_memory_bytes=smem_bytes or model.shared_memory_bytes,
        l2_bytes=getattr(found, "L2_cache_size", 0) or model.l2_bytes,
        memory_bytes=found.total_memory,
        bytes_per_s=model.bytes_per_s if is_table_variant or is_rocm else _bytes_per_s(found) or model.bytes_per_s,
        flops_per_s_16bit=model.flops_per_s_16bit * speed,
        flops_per_s_32bit=model.flops_per_s_32bit * speed,
        flops_per_s_64bit=model.flops_per_s_64bit * speed,
        is_guess=not is_table_variant,
        source=model.source if is_table_variant else f"a guess: {found.name} is not in the table, {model.name} is near",
    )


def _bytes_per_s(properties: Any) -> float:
    """An NVIDIA GPU's datasheet bandwidth, two transfers per clock of its memory; 0 if torch does not tell."""
    kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2 * kilohertz * 1000 * bits / 8


def _table_name(marketing_name: str) -> str | None:
    """``"h200"`` for ``"NVIDIA H200"``, ``"rtx4090"`` for ``"NVIDIA GeForce RTX 4090"``; None if no entry is named."""
    words = re.split(r"[^a-z0-9]+", marketing_name.lower())
    names = {*words, *(first + second for first, second in pairwise(words))}
    return next((name for name in DEVICES if name in names), None)


def _distance(spec: DeviceSpec, smem_bytes: int, capability: tuple[int, int]) -> tuple[int, int]:
    """Shared memory tells data-centre chips from the others of their generation, so it counts before the version."""
    major, minor = spec.compute_capability or (0, 0)
    version = abs(10 * major + minor - 10 * capability[0] - capability[1])
    return abs(spec.shared_memory_bytes - smem_bytes), version

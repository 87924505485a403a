"""GPUs that are not there: a driver that only knows the target, and what a kernel compiled for it needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEVICES = {"sm_80": "a100", "sm_86": "l40s", "sm_90": "h200", "gfx942": "mi300x"}
"""A device of flashtile's table for each target."""


class TargetOnly:
    """A Triton driver that can say which GPU to compile for, and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002  (the interface that Triton calls)
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def pretend(family: str) -> None:
    """From here on Triton compiles for the family's target."""
    driver.set_active(cast(Any, TargetOnly(TARGETS[family])))


def needs(kernel: Any) -> dict[str, int]:
    """Registers, bytes spilled and bytes of shared memory, as the compiler's output states them."""
    found = {"shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        assembly = kernel.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, not into memory.
        spilled = [int(count) for count in re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
        assert registers is not None and spilled
        return found | {"registers": int(registers[1]), "spills": 4 * max(spilled)}
    usage = cuobjdump(kernel, "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    unwritten = reads_of_nothing(cuobjdump(kernel, "--dump-sass"))
    assert not unwritten, f"ptxas reads uniform registers that nothing has written: {unwritten}"
    return found | {"registers": int(match[1]), "spills": int(match[2])}


def reads_of_nothing(sass: str) -> list[str]:
    """Instructions whose uniform registers no instruction above them has written.

    The operands of asynchronous products are described in four such registers in a row. The first two are left out
    where the left operand lies in registers, so they are not looked at.
    """
    written: set[str] = set()
    found = []
    for name, operands in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9.]+)\s*([^;]*);", sass):
        places = [place.strip() for place in operands.split(",")]
        while places and re.fullmatch(r"U?P(\d|T)", places[0]):  # a predicate is written too
            places.pop(0)
        result = re.fullmatch(r"UR(\d+)", places[0]) if places else None
        is_written = result is not None and re.match(r"U|R2UR|S2UR|VOTEU|REDUX|CREDUX", name)
        sources = places[1:] if is_written else places
        described = re.search(r"gdesc\[UR(\d+)\]", operands)
        read = re.findall(r"\bUR\d+", " ".join(sources))
        if described is not None:
            read = [f"UR{int(described[1]) + word}" for word in (2, 3)]
        if not written.issuperset(read):
            found.append(f"{name} {operands}")
        if result is not None and is_written:
            words = 2 if ".64" in name or ".WIDE" in name else 1
            written |= {f"UR{int(result[1]) + word}" for word in range(words)}
    return found


def cuobjdump(kernel: Any, option: str) -> str:
    """What NVIDIA's tool, which comes with Triton, prints about the compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

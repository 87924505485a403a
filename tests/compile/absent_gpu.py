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
    return found | {"registers": int(match[1]), "spills": int(match[2])}


def cuobjdump(kernel: Any, option: str) -> str:
    """What NVIDIA's tool, which comes with Triton, prints about the compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

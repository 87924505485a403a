"""What the demo needs to know about the machine: which device, how much memory, which versions."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import flashtile
from flashtile.errors import InvalidArgument

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def pick_device(wanted: str) -> torch.device:
    """The device for ``--device``; ``auto`` takes the GPU if there is one.

    Raises:
        InvalidArgument: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise InvalidArgument(
            "--device",
            got="'cuda', and torch sees no GPU",
            wanted="a device of this machine",
            remedy="use --device cpu, or install a torch build for your GPU; 'flashtile doctor' says what is missing",
        )
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """What produced the numbers."""
    return {
        "flashtile": flashtile.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def available_bytes() -> int | None:
    """Main memory that this process may still take, where Linux says so; else None."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # in a container
        limit = int((_CGROUP / "memory.max").read_text()) - int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return available
    return max(0, min(available, limit))


def human_bytes(count: float) -> str:
    """For example ``67.1 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"

"""How the demo words what it ran on: the device and the versions."""

from __future__ import annotations

import platform

import torch

import flashtile


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

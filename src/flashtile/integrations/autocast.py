"""What ``torch.autocast`` would do to attention's inputs, where torch itself does not see the call."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which torch would compute: under autocast, floating-point numbers but float64 are cast."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or device not in ("cpu", "cuda"):
        return tensor.dtype  # the devices are named: torch 2.11 cannot compile torch.amp.is_autocast_available
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

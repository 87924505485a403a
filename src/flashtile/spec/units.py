"""Numbers as people read them: bytes, FLOPs, times, dtypes."""

from __future__ import annotations

import torch


def in_bytes(count: float) -> str:
    """``"1.50 GiB"``: binary units, three significant digits."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def in_decimal_bytes(count: float) -> str:
    """``"1.5 GB"``: decimal units as most people say them, at most three significant digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 999.5:  # so that three digits never round up to four
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def in_flops(count: float) -> str:
    """``"1.10 TFLOP"``: decimal units, three significant digits."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def in_seconds(seconds: float) -> str:
    """``"12.3 ms"``: three significant digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    exponent = 0
    while count >= base and exponent < len(units) - 1:
        count, exponent = count / base, exponent + 1
    number = f"{count:.0f}" if exponent == 0 else _three_digits(count)
    return f"{number} {units[exponent]}"


def _three_digits(number: float) -> str:
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"

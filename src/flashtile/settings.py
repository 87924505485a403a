"""Every environment variable that flashtile reads; three are its own.

| variable | values | meaning |
|---|---|---|
| ``FLASHTILE_BACKEND`` | a backend's name, or ``auto`` | what ``backend="auto"`` means in this process |
| ``FLASHTILE_STRICT`` | ``0`` or ``1`` | with ``1``, falling back to the naive formula is an error |
| ``FLASHTILE_CHECK_VALUES`` | ``0`` or ``1`` | with ``1``, tensor values on a GPU are checked too; it synchronises |
| ``TRITON_INTERPRET`` | ``0`` or ``1`` | Triton's own: with ``1`` its kernels are interpreted, on CPU tensors too |
| ``TRITON_PTXAS_BLACKWELL_PATH`` | a path | Triton's own: the assembler for Hopper GPUs; else we choose |
"""

from __future__ import annotations

import os

from flashtile.errors import InvalidArgument


def default_backend() -> str:
    """The backend that ``backend="auto"`` stands for."""
    return os.environ.get("FLASHTILE_BACKEND", "auto") or "auto"


def is_strict() -> bool:
    """Whether falling back to the naive formula is an error."""
    return _flag("FLASHTILE_STRICT")


def checks_values_on_gpu() -> bool:
    """Whether the values inside ``cu_seqlens`` on a GPU are read and checked at every call."""
    return _flag("FLASHTILE_CHECK_VALUES")


def interprets_triton() -> bool:
    """Whether Triton interprets kernels in Python instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def names_assembler() -> bool:
    """Whether Triton has been told which assembler to take for Hopper GPUs."""
    return bool(os.environ.get("TRITON_PTXAS_BLACKWELL_PATH"))


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0") or "0"
    if value not in ("0", "1"):
        raise InvalidArgument(
            name, got=repr(value), wanted="0 or 1", remedy=f"set the environment variable {name} to 0 or 1, or unset it"
        )
    return value == "1"

"""A kernel that is launched again without Triton's look-up of its compiled form, which takes longer than the launch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from flashtile.backends.gpu import COMPILER_OPTIONS

MOST_FORMS = 4096


class Launcher:
    """A kernel with the compiled forms that calls have found."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self, form: Hashable, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: int | bool
    ) -> None:
        """Launches the kernel on the current device.

        Args:
            form: all that the compiled kernel depends on: device, dtypes, which numbers are 1 or multiples of 16, which
                addresses are multiples of 16 bytes, and what is ``None``.
            constants: the kernel's compile-time numbers, in the order of its parameters, which end with them.
        """
        compiled = self._compiled.get(form)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
            return
        if len(self._compiled) >= MOST_FORMS:
            self._compiled.clear()
        self._compiled[form] = self.kernel[grid](*arguments, **constants, num_warps=4, **COMPILER_OPTIONS)

"""Whether peers compute the same: each result is compared with the first one that there was."""

from __future__ import annotations

from torch import Tensor

TOLERATED_DIFFERENCE = {"float16": 0.05, "bfloat16": 0.05, "float32": 0.005, "float64": 1e-6}
"""Relative to the largest magnitude of a result; catches wrong masks and wrong heads, not lost digits."""


class Checker:
    """Compares each result with the first finite one."""

    def __init__(self) -> None:
        self.reference: str | None = None
        self._expected: tuple[Tensor, ...] = ()

    def difference(self, name: str, result: tuple[Tensor, ...]) -> float | None:
        """Largest difference over the reference's largest magnitude, the worst of all tensors; 0 for the reference,
        None for a result that is not finite."""
        if not all(bool(tensor.isfinite().all()) for tensor in result):
            return None
        if self.reference is None:
            self.reference, self._expected = name, tuple(tensor.detach() for tensor in result)
        return max(
            float((got.detach() - expected).abs().max() / expected.abs().max())
            for got, expected in zip(result, self._expected, strict=True)
        )

    def fault(self, difference: float | None, tolerated: float) -> str | None:
        """What is wrong with a result that differs so much; None if it is right."""
        if difference is None:
            return "has NaN or infinite values"
        if difference > tolerated:
            return f"differs from {self.reference} by {difference:.2g} of the largest magnitude"
        return None

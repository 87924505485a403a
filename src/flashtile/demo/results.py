"""What a demo's two runs gave: records, their medians, and what they show side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one training step of one run gave and took."""

    loss: float  # nats per byte
    seconds: float
    attention_forward_s: float
    attention_backward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One of the two runs, complete or as far as it came. Medians over its steps: a shared machine has slow moments."""

    name: str
    tokens_per_step: int
    steps: tuple[StepRecord, ...]
    peak_bytes: int | None
    """Peak memory of one forward and backward pass beyond what was live before it; None if never measured."""
    validation_loss: float | None
    failure: str | None
    """Why the run stopped before its last step; None if it did not fail."""

    @property
    def step_s(self) -> float:
        return self._median(lambda step: step.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s

    @property
    def attention_forward_s(self) -> float:
        return self._median(lambda step: step.attention_forward_s)

    @property
    def attention_backward_s(self) -> float:
        return self._median(lambda step: step.attention_backward_s)

    @property
    def attention_s(self) -> float:
        return self.attention_forward_s + self.attention_backward_s

    @property
    def attention_share(self) -> float:
        """Attention's part of a step's time."""
        return self.attention_s / self.step_s

    @property
    def final_loss(self) -> float:
        return self.steps[-1].loss

    def _median(self, of: Callable[[StepRecord], float]) -> float:
        return statistics.median(map(of, self.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Text from the validation part, and how the model trained with flashtile went on."""

    prompt: str
    continuation: str
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossDifference:
    """Where the two loss curves lie furthest apart."""

    largest: float
    at_step: int  # counted from 1
    first: float
    """At the first step, whose weights are equal: rounding alone, not yet amplified by training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both runs and what they show together."""

    naive: RunResult
    flashtile: RunResult
    sample: Sample | None
    was_interrupted: bool

    @property
    def runs(self) -> tuple[RunResult, RunResult]:
        return self.naive, self.flashtile

    @property
    def loss_differences(self) -> list[float]:
        """Absolute difference of the two losses at each step that both made."""
        pairs = zip(self.naive.steps, self.flashtile.steps, strict=False)
        return [abs(naive.loss - flashtile.loss) for naive, flashtile in pairs]

    @property
    def loss_difference(self) -> LossDifference | None:
        """None if there is no step that both made."""
        differences = self.loss_differences
        if not differences:
            return None
        largest = max(differences)
        return LossDifference(largest=largest, at_step=differences.index(largest) + 1, first=differences[0])

"""The comparison in words and numbers, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashtile.backends.base import Plan
from flashtile.demo.results import Comparison, LossDifference, RunResult
from flashtile.demo.training import TrainingSettings
from flashtile.report.page import Headline
from flashtile.spec.units import in_decimal_bytes

NOTHING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far rounding can part the two losses, in nats per byte; attention that is wrong parts them further."""

    at_first_step: float
    at_any_step: float
    """Looser: some hundred training steps amplify rounding, the more of it there is."""


AGREEMENT = {
    torch.float32: Agreement(at_first_step=1e-4, at_any_step=1e-2),
    torch.bfloat16: Agreement(at_first_step=1e-2, at_any_step=0.3),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    label: str
    naive: str
    flashtile: str
    verdict: str
    """What flashtile is in comparison; empty where there is nothing to compare."""


def table(comparison: Comparison) -> list[Row]:
    """Both runs side by side; a dash where a run has no such number."""
    return [
        _row("tokens per second", comparison, lambda run: run.tokens_per_s, "{:,.0f}".format, ("slower", "faster")),
        _row("time per step", comparison, lambda run: run.step_s, milliseconds, ("faster", "slower")),
        _row(
            "attention per step, forward",
            comparison,
            lambda run: run.attention_forward_s,
            milliseconds,
            ("faster", "slower"),
        ),
        _row(
            "attention per step, backward",
            comparison,
            lambda run: run.attention_backward_s,
            milliseconds,
            ("faster", "slower"),
        ),
        _row("attention's share of a step", comparison, lambda run: run.attention_share, "{:.0%}".format, None),
        _row("peak memory of a step", comparison, lambda run: run.peak_bytes, in_decimal_bytes, ("less", "more")),
        _row("loss at the last step", comparison, lambda run: run.final_loss, "{:.4f}".format, None),
        _row("validation loss", comparison, lambda run: run.validation_loss, "{:.4f}".format, None),
    ]


def headlines(comparison: Comparison) -> list[Headline]:
    """The few numbers that the demo is about; empty if either run has none."""
    naive, flashtile = comparison.runs
    difference = comparison.loss_difference
    if difference is None:
        return []
    chosen = [
        Headline(
            value=f"{difference.largest:.1g}",
            label="largest difference of the losses",
            detail=f"nats per byte, at step {difference.at_step} of {len(comparison.loss_differences)}",
        ),
        _compared(
            "attention",
            (naive.attention_s, flashtile.attention_s),
            ("faster", "slower"),
            f"{milliseconds(naive.attention_s)} naive, {milliseconds(flashtile.attention_s)} flashtile",
        ),
        _compared(
            "the whole training step",
            (naive.step_s, flashtile.step_s),
            ("faster", "slower"),
            f"{naive.tokens_per_s:,.0f} tokens/s naive, {flashtile.tokens_per_s:,.0f} flashtile",
        ),
    ]
    if naive.peak_bytes and flashtile.peak_bytes:
        said = f"{in_decimal_bytes(naive.peak_bytes)} naive, {in_decimal_bytes(flashtile.peak_bytes)} flashtile"
        memory = naive.peak_bytes, flashtile.peak_bytes
        chosen.append(_compared("peak memory of a step", memory, ("less", "more"), said))
    return chosen


def _compared(label: str, both: tuple[float, float], words: tuple[str, str], detail: str) -> Headline:
    """Of the naive run and flashtile's."""
    value = factor(*both, words)
    return Headline(value=value, label=label, detail=detail, is_behind=value.endswith(words[1]))


def notes(comparison: Comparison, settings: TrainingSettings) -> list[str]:
    """What a reader must know before the numbers: failures, and runs that stopped early."""
    found = [f"The {run.name} run stopped: {run.failure}" for run in comparison.runs if run.failure]
    difference = comparison.loss_difference
    if difference is not None and not agrees(difference, settings):
        limit = AGREEMENT[settings.attention_dtype]
        found.append(
            f"The losses do not agree: they differ by {difference.first:.2g} at the first step and by "
            f"{difference.largest:.2g} at most, and rounding explains {limit.at_first_step:g} and "
            f"{limit.at_any_step:g}. This is a bug; please report it."
        )
    if comparison.was_interrupted:
        done = min((len(run.steps) for run in comparison.runs if not run.failure), default=0)
        found.append(f"Interrupted after {done} of {settings.steps} steps: this is what there was until then.")
    return found


def agrees(difference: LossDifference, settings: TrainingSettings) -> bool:
    """Whether rounding can explain the difference of the two loss curves."""
    limit = AGREEMENT[settings.attention_dtype]
    return difference.first <= limit.at_first_step and difference.largest <= limit.at_any_step


def why_not_zero(difference: LossDifference, settings: TrainingSettings) -> str:
    """Why the two loss curves are not equal to the last digit."""
    if difference.largest == 0:
        return "The losses are equal to the last digit in every step."
    dtype = str(settings.attention_dtype).removeprefix("torch.")
    return (
        f"Why it is not zero: both compute the same function but add its terms in a different order, and {dtype} "
        f"rounds every sum. At the first step, with equal weights, the losses differ by {difference.first:.1g}. Each "
        f"step then starts from slightly different weights, and training amplifies that, here to "
        f"{difference.largest:.1g} at most."
    )


def how_flashtile_ran(plan: Plan) -> str:
    """The plan in a sentence, and a warning if it promises nothing."""
    said = f"flashtile's plan: backend {plan.backend}, kernel {plan.forward.kernel}, because {plan.reason}."
    if plan.backend == "naive":
        declined = "; ".join(f"{name}: {', '.join(why)}" for name, why in plan.rejected)
        said += f" Expect no gain: this is the formula too. What declined: {declined}."
    return said


def factor(naive: float, flashtile: float, words: tuple[str, str]) -> str:
    """For example ``2.5x faster``; ``words`` says what a smaller and what a larger number of flashtile's means."""
    if not naive or not flashtile:
        return ""
    smaller, larger = words
    times, word = (naive / flashtile, smaller) if flashtile <= naive else (flashtile / naive, larger)
    return "about equal" if times < 1.05 else f"{times:.1f}x {word}"


def milliseconds(seconds: float) -> str:
    """For example ``12.3 ms``."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"


def _row(
    label: str,
    comparison: Comparison,
    of: Callable[[RunResult], float | None],
    written: Callable[[float], str],
    words: tuple[str, str] | None,
) -> Row:
    naive, flashtile = (of(run) if run.steps else None for run in comparison.runs)
    return Row(
        label=label,
        naive=NOTHING if naive is None else written(naive),
        flashtile=NOTHING if flashtile is None else written(flashtile),
        verdict="" if naive is None or flashtile is None or words is None else factor(naive, flashtile, words),
    )

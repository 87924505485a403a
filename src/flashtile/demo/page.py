"""Writes the demo's report: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashtile.backends.base import Plan
from flashtile.bench import plots
from flashtile.bench.plots import Axis, Bars, Line
from flashtile.demo import summary
from flashtile.demo.corpus import Corpus
from flashtile.demo.machine import device_name, versions
from flashtile.demo.results import Comparison, RunResult
from flashtile.demo.training import TrainingSettings
from flashtile.report import page
from flashtile.report.page import Chart
from flashtile.spec.units import in_decimal_bytes


def render(comparison: Comparison, settings: TrainingSettings, corpus: Corpus, plan: Plan) -> str:
    """The report as one HTML document.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
    """
    difference = comparison.loss_difference
    agrees = difference is not None and summary.agrees(difference, settings)
    return page.render(
        "demo/page.html",
        notes=summary.notes(comparison, settings),
        shown_headlines=summary.headlines(comparison),
        shown_charts=[chart for chart in _charts(comparison) if chart is not None],
        table=summary.table(comparison),
        why_not_zero=summary.why_not_zero(difference, settings) if difference and agrees else None,
        memory=_memory_facts(settings),
        time=_time_facts(comparison.naive),
        is_tiled=plan.backend != "naive",
        how_flashtile_ran=summary.how_flashtile_ran(plan),
        sample=comparison.sample,
        shown_facts=_facts(settings, corpus),
    )


def _charts(comparison: Comparison) -> list[Chart | None]:
    runs = [run for run in comparison.runs if run.steps]
    return [
        _losses(runs),
        _differences(comparison),
        _step_times(runs),
        _speeds(runs),
        _memory([run for run in comparison.runs if run.peak_bytes]),
    ]


def _losses(runs: Sequence[RunResult]) -> Chart:
    lines = [
        Line(
            label=run.name,
            x=range(1, len(run.steps) + 1),
            y=[step.loss for step in run.steps],
            weight="pale" if run.name == "naive" else "normal",
            color_idx=_color_idx(run),
        )
        for run in runs
    ]
    return Chart(
        heading="Loss",
        svg=plots.line_chart(
            lines, title="Training loss by step", x=Axis(label="step"), y=Axis(label="loss (nats per byte)")
        ),
        caption="Same seed, same batches: the thin flashtile line lies on the broad naive one.",
    )


def _differences(comparison: Comparison) -> Chart | None:
    differences = comparison.loss_differences
    if not any(differences):
        return None
    line = Line(label="difference", x=range(1, len(differences) + 1), y=differences, color_idx=2)
    return Chart(
        heading="Difference of the losses",
        svg=plots.line_chart(
            [line],
            title="Absolute difference of the two losses by step",
            x=Axis(label="step"),
            y=Axis(label="nats per byte", is_log=True),
        ),
        caption="Logarithmic axis. Steps at which the losses are equal to the last bit leave a gap.",
    )


def _step_times(runs: Sequence[RunResult]) -> Chart:
    forward = [run.attention_forward_s * 1e3 for run in runs]
    backward = [run.attention_backward_s * 1e3 for run in runs]
    rest = [(run.step_s - run.attention_s) * 1e3 for run in runs]
    return Chart(
        heading="Where a step's time goes",
        svg=plots.bar_chart(
            [
                Bars(label="attention forward", values=forward, color_idx=2),
                Bars(label="attention backward", values=backward, color_idx=3),
                Bars(label="the rest", values=rest, color_idx=4),
            ],
            [run.name for run in runs],
            title="Median time of a training step, by part",
            x_label="milliseconds per step",
            is_stacked=True,
            format_value=lambda total: summary.milliseconds(total / 1e3),
        ),
        caption="Medians over the steps. The rest (projections, MLP, optimizer) is the same work in both.",
    )


def _speeds(runs: Sequence[RunResult]) -> Chart:
    return Chart(
        heading="Training speed",
        svg=_simple_bars(
            runs, [run.tokens_per_s for run in runs], "Training speed", "tokens per second", "{:,.0f}".format
        ),
        caption="One token is one byte of text.",
    )


def _memory(runs: Sequence[RunResult]) -> Chart | None:
    if not runs:
        return None
    megabytes = [(run.peak_bytes or 0) / 1e6 for run in runs]
    return Chart(
        heading="Peak memory of a step",
        svg=_simple_bars(runs, megabytes, "Peak memory of a training step", "MB", _megabytes),
        caption="Forward and backward pass, beyond weights and optimizer state. Exact: torch's own allocations.",
    )


def _megabytes(count: float) -> str:
    return in_decimal_bytes(count * 1e6)


def _simple_bars(
    runs: Sequence[RunResult], values: Sequence[float], title: str, x_label: str, format_value: Callable[[float], str]
) -> str:
    return plots.bar_chart(
        [Bars(label=title, values=values)],
        [run.name for run in runs],
        title=title,
        x_label=x_label,
        format_value=format_value,
    )


def _color_idx(run: RunResult) -> int:
    return plots.COLOR_OF_NAIVE if run.name == "naive" else plots.COLOR_OF_FLASHTILE


def _memory_facts(settings: TrainingSettings) -> dict[str, str]:
    numbers = settings.batch * settings.shape.heads * settings.seqlen**2
    return {
        "numbers": f"{settings.batch} x {settings.shape.heads} x {settings.seqlen} x {settings.seqlen} = {numbers:,}",
        "scores": in_decimal_bytes(settings.score_matrix_bytes),
        "layers": "1 layer" if settings.shape.layers == 1 else f"{settings.shape.layers} layers",
        "scores_of_all_layers": in_decimal_bytes(settings.score_matrix_bytes * settings.shape.layers),
        "lse": in_decimal_bytes(settings.lse_bytes),
        "doubled_scores": in_decimal_bytes(settings.score_matrix_bytes * 4),
        "doubled_lse": in_decimal_bytes(settings.lse_bytes * 2),
    }


def _time_facts(naive: RunResult) -> dict[str, str] | None:
    """How much faster attention alone can make a step; None if it was not timed."""
    if not naive.steps or naive.attention_share >= 1:
        return None
    return {"share": f"{naive.attention_share:.0%}", "limit": f"{1 / (1 - naive.attention_share):.1f}x"}


def _facts(settings: TrainingSettings, corpus: Corpus) -> dict[str, str]:
    dtype = str(settings.attention_dtype).removeprefix("torch.")
    return {
        "text": corpus.description,
        "device": device_name(settings.device),
        "attention": f"causal, {dtype}, head dimension {settings.shape.head_dim}",
        "model": f"{settings.shape.layers} layers, width {settings.shape.d_model}, {settings.shape.heads} heads",
        "steps": f"{settings.steps}, each {settings.batch} x {settings.seqlen} bytes",
        "seed": str(settings.seed),
        **versions(),
    }

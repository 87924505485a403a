"""The demo's report: safe with any text, whole without a network, honest about what is missing."""

from __future__ import annotations

from dataclasses import replace

import torch
from reading import HOSTILE_TEXTS, Reader, assert_safe

from flashtile.backends.base import Plan
from flashtile.bench.transformer import ModelShape
from flashtile.demo import page, summary, training
from flashtile.demo.corpus import Corpus
from flashtile.demo.results import Comparison, RunResult, Sample, StepRecord
from flashtile.demo.training import TrainingSettings

TEXT = HOSTILE_TEXTS[0]
SETTINGS = TrainingSettings(
    device=torch.device("cpu"),
    steps=3,
    batch=2,
    seqlen=1000,
    shape=ModelShape(layers=3, d_model=32, heads=2),
    seed=0,
    sample_bytes=8,
)


def run_result(name: str, speed: float, losses: tuple[float, ...] = (5.5, 4.0, 3.0)) -> RunResult:
    return RunResult(
        name=name,
        tokens_per_step=2000,
        steps=tuple(
            StepRecord(
                loss=loss, seconds=0.4 / speed, attention_forward_s=0.1 / speed, attention_backward_s=0.2 / speed
            )
            for loss in losses
        ),
        peak_bytes=int(80e6 / speed),
        validation_loss=3.25,
        failure=None,
    )


COMPARISON = Comparison(
    naive=run_result("naive", 1.0),
    flashtile=run_result("flashtile", 4.0, (5.5, 4.0001, 3.0003)),
    sample=Sample(prompt=TEXT, continuation=TEXT, temperature=0.7),
    was_interrupted=False,
)


def render(comparison: Comparison = COMPARISON, source: str = "a test", plan: Plan | None = None) -> str:
    nothing = torch.zeros(10, dtype=torch.uint8)
    text = Corpus(source=source, num_files=1, is_cut=False, train=nothing, validation=nothing)
    return page.render(comparison, SETTINGS, text, plan or training.plan_of(SETTINGS))


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    comparison = replace(COMPARISON, naive=replace(COMPARISON.naive, failure=TEXT))
    reader = assert_safe(render(comparison, source=TEXT), num_scripts=1)
    assert reader.text.count(TEXT) == 4, "prompt, continuation, source of the text, failure"


def test_the_page_has_every_chart_number_and_setting() -> None:
    reader = Reader(render())
    assert reader.values("class").count("chart") == 5
    for expected in (
        "4.0x faster",
        "4.0x less",
        "80 MB",
        "20 MB",
        "0.0003",
        "at step 3 of 3",
        "75%",  # attention's share of the naive step
        "4.0x faster, and no more",
        "2 x 2 x 1000 x 1000 = 4,000,000",
        "16 MB",  # of float32 scores in each layer,
        "48 MB",  # in all three,
        "64 MB",  # at twice the length
        "16 kB",  # of lse
        torch.__version__,
        "3 layers, width 32, 2 heads",
    ):
        assert expected in reader.text, expected


def test_a_failed_run_is_reported_beside_the_other() -> None:
    naive = replace(
        COMPARISON.naive, steps=(), peak_bytes=None, validation_loss=None, failure="out of memory: 1 TB wanted"
    )
    comparison = replace(COMPARISON, naive=naive)
    reader = Reader(render(comparison))
    assert "The naive run stopped: out of memory: 1 TB wanted" in reader.text
    assert "80 MB" not in reader.text
    assert "20 MB" in reader.text
    assert "no more" not in reader.text, "no share of a step that was not timed"
    assert [row.naive for row in summary.table(comparison)] == [summary.NOTHING] * 8
    assert summary.headlines(comparison) == []


def test_an_interrupted_run_says_how_far_it_came() -> None:
    flashtile = replace(COMPARISON.flashtile, steps=COMPARISON.flashtile.steps[:2])
    comparison = replace(COMPARISON, flashtile=flashtile, sample=None, was_interrupted=True)
    reader = Reader(render(comparison))
    assert "Interrupted after 2 of 3 steps" in reader.text
    assert "What the model writes" not in reader.text


def test_a_slower_flashtile_is_called_slower() -> None:
    comparison = replace(COMPARISON, flashtile=run_result("flashtile", 0.5))
    verdicts = {row.label: row.verdict for row in summary.table(comparison)}
    assert verdicts["tokens per second"] == verdicts["time per step"] == "2.0x slower"
    assert verdicts["peak memory of a step"] == "2.0x more"
    assert [headline.is_behind for headline in summary.headlines(comparison)] == [False, True, True, True]
    equal = replace(COMPARISON, flashtile=run_result("flashtile", 0.99))
    assert not any(headline.is_behind for headline in summary.headlines(equal))
    assert {row.verdict for row in summary.table(equal)} == {"about equal", ""}


def test_a_plan_that_is_the_formula_itself_promises_nothing() -> None:
    plan = replace(training.plan_of(SETTINGS), backend="naive", rejected=(("cpu", ("runs on CPU tensors only",)),))
    text = Reader(render(plan=plan)).text
    assert "Expect no gain" in text
    assert "cpu: runs on CPU tensors only" in text
    assert "streams the scores" not in text
    text = Reader(render()).text
    assert "Expect no gain" not in text
    assert "streams the scores" in text


def test_losses_that_rounding_cannot_explain_are_called_a_bug() -> None:
    comparison = replace(COMPARISON, flashtile=run_result("flashtile", 4.0, (5.5, 4.0, 3.02)))
    text = Reader(render(comparison)).text
    assert "do not agree: they differ by 0 at the first step and by 0.02 at most" in text
    assert "Why it is not zero" not in text
    at_once = replace(COMPARISON, flashtile=run_result("flashtile", 4.0, (5.501, 4.0, 3.0)))
    assert "by 0.001 at the first step" in Reader(render(at_once)).text
    assert summary.notes(COMPARISON, SETTINGS) == []


def test_equal_losses_are_called_equal() -> None:
    comparison = replace(COMPARISON, flashtile=run_result("flashtile", 4.0))
    reader = Reader(render(comparison))
    assert "equal to the last digit in every step" in reader.text
    assert reader.values("class").count("chart") == 4, "no logarithm of nothing but zeros"

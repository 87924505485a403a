"""The demo's two runs: equal where they must be, measured where they differ, stopped without losing what there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.bench import attention_clock, environment
from flashtile.bench.transformer import ModelShape, Transformer
from flashtile.demo import model, training
from flashtile.demo.corpus import Corpus
from flashtile.demo.results import Comparison
from flashtile.demo.training import TrainingSettings

SETTINGS = TrainingSettings(
    device=torch.device("cpu"),
    steps=6,
    batch=2,
    seqlen=96,
    shape=ModelShape(layers=2, d_model=32, heads=2),
    seed=0,
    sample_bytes=8,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread, on a busy machine a lot of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text() -> Corpus:
    line = b"for index, value in enumerate(values):\n    total += index * value  # and so on\n"
    data = torch.frombuffer(bytearray(line * 50), dtype=torch.uint8)
    return Corpus(source="a test", num_files=1, is_cut=False, train=data[:3000], validation=data[3000:])


def compare(text: Corpus, settings: TrainingSettings = SETTINGS, **callbacks: Any) -> Comparison:
    callbacks = {"on_stage": lambda _: None, "on_step": lambda _: None, **callbacks}
    return training.compare(text, settings, **callbacks)


def test_the_same_seed_gives_the_same_losses_up_to_rounding(text: Corpus) -> None:
    comparison = compare(text)
    assert [len(run.steps) for run in comparison.runs] == [SETTINGS.steps] * 2
    difference = comparison.loss_difference
    assert difference is not None
    assert difference.largest < 1e-4
    naive, flashtile = comparison.runs
    assert naive.final_loss < naive.steps[0].loss - 0.1, "it learns"
    assert flashtile.validation_loss == pytest.approx(naive.validation_loss, abs=1e-4)
    assert comparison.sample is not None
    assert not comparison.was_interrupted
    repeated = compare(text)
    assert [step.loss for step in repeated.flashtile.steps] == [step.loss for step in flashtile.steps]
    other = compare(text, replace(SETTINGS, seed=1))
    assert other.naive.steps[0].loss != naive.steps[0].loss


def test_the_two_attention_functions_are_one_function() -> None:
    q, k, v = (torch.randn(2, 70, 3, 16, requires_grad=True) for _ in range(3))
    d_out = torch.randn(2, 70, 3, 16)
    results = []
    for attention in training.ATTENTION_FUNCTIONS.values():
        out = attention(q, k, v)
        results.append((out, *torch.autograd.grad(out, (q, k, v), d_out)))
    for naive, flashtile in zip(*results, strict=True):
        torch.testing.assert_close(flashtile, naive, atol=1e-5, rtol=1e-5)


class Delay(torch.autograd.Function):
    """The identity, which lets a pretended clock run on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, now: SimpleNamespace, in_forward: float, in_backward: float) -> Tensor:
        ctx.now, ctx.in_backward = now, in_backward
        now.seconds += in_forward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.now.seconds += ctx.in_backward
        return grads[0], None, None, None


def test_the_clock_sees_the_attention_calls_forward_and_backward_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(attention_clock.time, "perf_counter", lambda: now.seconds)
    watch = attention_clock.AttentionClock(torch.device("cpu"))
    attention = watch.around(lambda q, k, v: Delay.apply(q + k * v, now, 3.0, 5.0))
    x = torch.ones(1, 4, 1, 2, requires_grad=True)
    for _ in range(2):
        y = Delay.apply(x, now, 100.0, 1000.0)
        y = attention(y, y, y)
        y = Delay.apply(y, now, 100.0, 1000.0)
        y = attention(y, x, y)
        Delay.apply(y, now, 100.0, 1000.0).sum().backward()
        seconds = watch.take()
        assert (seconds.forward, seconds.backward) == (6.0, 10.0)


def test_the_clock_changes_no_gradient() -> None:
    q, k, v = (torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    timed = attention_clock.AttentionClock(torch.device("cpu")).around(model.naive_attention)
    plain = torch.autograd.grad(model.naive_attention(q, k, v).pow(2).sum(), (q, k, v))
    assert all(map(torch.equal, torch.autograd.grad(timed(q, k, v).pow(2).sum(), (q, k, v)), plain))


def test_every_step_has_its_times_and_they_add_up(text: Corpus) -> None:
    for run in compare(text).runs:
        for step in run.steps:
            assert step.attention_forward_s > 0
            assert step.attention_backward_s > 0
            assert step.attention_forward_s + step.attention_backward_s < step.seconds


def test_peak_memory_shows_the_score_matrices(text: Corpus) -> None:
    settings = replace(SETTINGS, steps=1, seqlen=512)
    naive, flashtile = compare(text, settings).runs
    assert naive.peak_bytes is not None
    assert flashtile.peak_bytes is not None
    assert naive.peak_bytes - flashtile.peak_bytes > settings.score_matrix_bytes * settings.shape.layers


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["full-gpu", "full-main-memory"],
)
def test_a_naive_run_out_of_memory_leaves_the_other_alone(
    text: Corpus, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise error

    monkeypatch.setitem(training.ATTENTION_FUNCTIONS, "naive", fail)
    comparison = compare(text)
    assert comparison.naive.failure is not None
    assert str(error) in comparison.naive.failure
    assert comparison.naive.steps == ()
    assert len(comparison.flashtile.steps) == SETTINGS.steps
    assert comparison.loss_difference is None


def test_a_size_that_cannot_fit_is_refused_before_linux_ends_the_process(
    text: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "available_host_bytes", lambda: SETTINGS.score_matrix_bytes)
    comparison = compare(text)
    assert comparison.naive.failure is not None
    assert "score matrices alone" in comparison.naive.failure
    assert len(comparison.flashtile.steps) == SETTINGS.steps


def test_other_errors_are_not_mistaken_for_a_lack_of_memory(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setitem(training.ATTENTION_FUNCTIONS, "flashtile", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        compare(text)


def test_an_interrupt_keeps_what_there_is(text: Corpus) -> None:
    done = []

    def on_step(losses: dict[str, float]) -> None:
        done.append(losses)
        if len(done) == 3:
            raise KeyboardInterrupt

    comparison = compare(text, on_step=on_step)
    assert comparison.was_interrupted
    assert [len(run.steps) for run in comparison.runs] == [3, 3]
    assert comparison.sample is None
    assert set(done[-1]) == {"naive", "flashtile"}


def test_sampling_repeats_with_its_seed_and_reads_a_bounded_context() -> None:
    shape = ModelShape(layers=1, d_model=16, heads=2)
    lengths = []

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append(q.shape[1])
        return model.flashtile_attention(q, k, v)

    writer = Transformer(
        shape, attention=watched, attention_dtype=torch.float32, generator=torch.Generator().manual_seed(0)
    )
    texts = {
        model.sample(
            writer,
            b"prompt",
            num_bytes=12,
            temperature=1.0,
            max_seqlen=10,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    }
    assert len(texts) == 2
    assert all(len(text) == 12 for text in texts)
    assert max(lengths) == 10


def test_the_model_cannot_see_the_future() -> None:
    writer = Transformer(
        ModelShape(layers=2, d_model=16, heads=2),
        attention=model.flashtile_attention,
        attention_dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
    )
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] += 1
    before, after = writer(tokens), writer(changed % 256)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_printed_text_has_no_control_characters() -> None:
    shown = model.printable(b"a\x1b[31mred\x07\r\n\ttab \xff \xc3\xa9 \x00\xe2\x80\xae")
    assert "\x1b" not in shown
    assert all(char in "\n\t" or char.isprintable() for char in shown)
    assert "\n\ttab" in shown
    assert "é" in shown


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = replace(SETTINGS, steps=100)
    rates = [settings.learning_rate(step) for step in range(100)]
    assert rates[0] < rates[4] == max(rates) == training.PEAK_LEARNING_RATE
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0.05 < rates[-1] / training.PEAK_LEARNING_RATE < 0.15
    wide = replace(settings, shape=ModelShape(layers=1, d_model=2 * training.TUNED_WIDTH, heads=2))
    assert wide.learning_rate(4) == training.PEAK_LEARNING_RATE / 2

"""Trains the same model twice, step by step in turn: with naive attention and with flashtile."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flashtile import dispatch
from flashtile.backends.base import Plan
from flashtile.bench import environment, timing
from flashtile.bench.attention_clock import AttentionClock
from flashtile.bench.formula import AttentionFn
from flashtile.bench.transformer import NUM_BYTES, ModelShape, Transformer
from flashtile.demo.corpus import Corpus, draw_batch
from flashtile.demo.model import flashtile_attention, naive_attention, printable, sample
from flashtile.demo.results import Comparison, RunResult, Sample, StepRecord
from flashtile.spec import devices
from flashtile.spec.problem import AttentionProblem, MaskSpec
from flashtile.spec.units import in_decimal_bytes
from flashtile.testing import peak_extra_bytes

PEAK_LEARNING_RATE, TUNED_WIDTH = 3e-3, 128
"""The fastest of 2e-3, 3e-3, 5e-3 and 8e-3 at this width; wider models want less, in proportion."""
WARM_UP_SHARE = 0.05
WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
VALIDATION_BATCHES = 4
TEMPERATURE = 0.7
PROMPT_BYTES = 160

ATTENTION_FUNCTIONS: dict[str, AttentionFn] = {"naive": naive_attention, "flashtile": flashtile_attention}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Everything that decides the two runs, besides the text."""

    device: torch.device
    steps: int
    batch: int
    seqlen: int
    shape: ModelShape
    seed: int
    sample_bytes: int

    @property
    def attention_dtype(self) -> torch.dtype:
        """The dtype of q, k, v: the GPU's matrix units want 16 bits, a CPU has none."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seqlen

    @property
    def score_matrix_bytes(self) -> int:
        """One [batch, heads, seqlen, seqlen] float32 tensor: what the naive formula stores per layer, at least once."""
        return self.batch * self.shape.heads * self.seqlen**2 * torch.float32.itemsize

    @property
    def lse_bytes(self) -> int:
        """What flashtile stores per layer in its place: one float32 per query and head."""
        return self.batch * self.shape.heads * self.seqlen * torch.float32.itemsize

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth of the peak."""
        peak = PEAK_LEARNING_RATE * min(1.0, TUNED_WIDTH / self.shape.d_model)
        warm_up = max(1, round(self.steps * WARM_UP_SHARE))
        if step < warm_up:
            return peak * (step + 1) / warm_up
        progress = (step - warm_up) / max(1, self.steps - warm_up)
        return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


class _Run:
    """One model in training."""

    def __init__(self, name: str, settings: TrainingSettings) -> None:
        self.name, self.settings = name, settings
        self.clock = AttentionClock(settings.device)
        self.model = Transformer(
            settings.shape,
            attention=self.clock.around(ATTENTION_FUNCTIONS[name]),
            attention_dtype=settings.attention_dtype,
            generator=torch.Generator().manual_seed(settings.seed),
        ).to(settings.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate(0), betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
        )
        self.steps: list[StepRecord] = []
        self.peak_bytes: int | None = None
        self.validation_loss: float | None = None
        self.failure: str | None = None

    def guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Calls ``action`` unless this run has failed; running out of memory is a failure, and ends this run only."""
        if self.failure is not None:
            return
        try:
            action(*args)
        except (RuntimeError, MemoryError) as error:
            if not timing.is_out_of_memory(error):
                raise
            what = str(error).strip().splitlines()[0].split(" GPU ")[0]  # torch's advice on its allocator follows
            self._fail(f"out of memory: {what}")

    def measure_memory(self, inputs: Tensor, targets: Tensor) -> None:
        """Finds the peak memory of a step; changes nothing in the model."""
        self._refuse_hopeless_size()

        def forward_and_backward() -> None:
            self._loss(inputs, targets).backward()

        forward_and_backward()  # so that what the first call sets up is not counted
        self.optimizer.zero_grad()
        self.peak_bytes = peak_extra_bytes(forward_and_backward, self.settings.device)
        self.optimizer.zero_grad()
        self._synchronize()
        self.clock.take()

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """Trains on one batch and records it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(len(self.steps))
        self._synchronize()
        begin = time.perf_counter()
        loss = self._loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        seconds = time.perf_counter() - begin
        attention = self.clock.take()
        self.steps.append(
            StepRecord(
                loss=loss.item(),
                seconds=seconds,
                attention_forward_s=attention.forward,
                attention_backward_s=attention.backward,
            )
        )

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.validation_loss = statistics.fmean(self._loss(*batch).item() for batch in batches)

    def result(self) -> RunResult:
        return RunResult(
            name=self.name,
            tokens_per_step=self.settings.tokens_per_step,
            steps=tuple(self.steps),
            peak_bytes=self.peak_bytes,
            validation_loss=self.validation_loss,
            failure=self.failure,
        )

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self.settings.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = self.model(inputs.to(device))
        return cross_entropy(logits.float().view(-1, NUM_BYTES), targets.to(device).reshape(-1))

    def _synchronize(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize(self.settings.device)

    def _refuse_hopeless_size(self) -> None:
        """Fails before Linux ends the whole process: it grants memory that it does not have, and kills later."""
        if self.name != "naive" or self.settings.device.type != "cpu":
            return
        least, available = (
            self.settings.score_matrix_bytes * (self.settings.shape.layers + 1),
            environment.available_host_bytes(),
        )
        if available is not None and least > available:
            raise MemoryError(
                f"its score matrices alone need {in_decimal_bytes(least)}, and {in_decimal_bytes(available)} are "
                f"available"
            )

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self.optimizer.zero_grad()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()


def compare(
    corpus: Corpus,
    settings: TrainingSettings,
    *,
    on_stage: Callable[[str], None],
    on_step: Callable[[Mapping[str, float]], None],
) -> Comparison:
    """Trains both models, in turn on the same batches, so that a slow moment of the machine meets both.

    Args:
        corpus: what to train on.
        settings: the rest.
        on_stage: called with the name of each stage as it begins.
        on_step: called after each step with the newest loss of each run that still goes on.

    Returns:
        Everything recorded; after a KeyboardInterrupt, what was recorded until then.
    """
    naive, flashtile = runs = [_Run(name, settings) for name in ATTENTION_FUNCTIONS]
    text: Sample | None = None
    was_interrupted = False
    generator = torch.Generator().manual_seed(settings.seed)
    try:
        held_out = [_draw(corpus.validation, settings, generator) for _ in range(VALIDATION_BATCHES)]
        on_stage("measuring memory")
        for run in runs:
            run.guarded(run.measure_memory, *held_out[0])
        on_stage("training")
        for _ in range(settings.steps):
            batch = _draw(corpus.train, settings, generator)
            for run in runs:
                run.guarded(run.step, *batch)
            on_step({run.name: run.steps[-1].loss for run in runs if run.failure is None})
        on_stage("validating")
        for run in runs:
            run.guarded(run.validate, held_out)
        if flashtile.failure is None:
            on_stage("writing text")
            text = _continue_text(flashtile.model, corpus, settings)
        on_stage("done")
    except KeyboardInterrupt:
        was_interrupted = True
    return Comparison(naive=naive.result(), flashtile=flashtile.result(), sample=text, was_interrupted=was_interrupted)


def plan_of(settings: TrainingSettings) -> Plan:
    """What flashtile decides for the attention of these runs, and why."""
    shape = settings.shape
    problem = AttentionProblem(
        batch=settings.batch,
        seqlen_q=settings.seqlen,
        seqlen_kv=settings.seqlen,
        tokens_q=settings.tokens_per_step,
        tokens_kv=settings.tokens_per_step,
        heads_q=shape.heads,
        heads_kv=shape.heads,
        head_dim=shape.head_dim,
        head_dim_v=shape.head_dim,
        dtype=settings.attention_dtype,
        scale=shape.head_dim**-0.5,
        mask=MaskSpec(right=0),
        gradients=frozenset("qkv"),
    )
    return dispatch.choose(problem, devices.detect(settings.device))


def _draw(data: Tensor, settings: TrainingSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return draw_batch(data, batch=settings.batch, seqlen=settings.seqlen, generator=generator)


def _continue_text(model: Transformer, corpus: Corpus, settings: TrainingSettings) -> Sample:
    held_out = bytes(corpus.validation[: 4 * PROMPT_BYTES].tolist())
    begin = held_out.find(b"\n") + 1  # 0, the very beginning, if there is no line end
    prompt = held_out[begin : begin + PROMPT_BYTES] or held_out[:PROMPT_BYTES]
    with torch.autocast(settings.device.type, dtype=torch.bfloat16, enabled=settings.device.type == "cuda"):
        continuation = sample(
            model,
            prompt,
            num_bytes=settings.sample_bytes,
            temperature=TEMPERATURE,
            max_seqlen=settings.seqlen,
            generator=torch.Generator().manual_seed(settings.seed),
        )
    return Sample(prompt=printable(prompt), continuation=printable(continuation), temperature=TEMPERATURE)

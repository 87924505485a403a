"""What runs: a training step, a prefill, or one more token of one model, with any attention function.

All peers run on one and the same model, with the same weights at every step: the optimizer's learning rate is 0, so a
step computes everything that a step computes and changes nothing. A peer's peak memory therefore holds one model, and
every peer's result can be compared with every other's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flashtile.bench.formula import AttentionFn, naive_attention
from flashtile.bench.models.cases import ModelCase
from flashtile.bench.transformer import KVCache, Transformer
from flashtile.testing.memory import peak_extra_bytes


class Workload(Protocol):
    """Something that a model does, again and again alike."""

    @property
    def state_bytes(self) -> int:
        """What it holds between two runs."""
        ...

    def run(self, attention: AttentionFn) -> None:
        """Does it once: the step to measure."""
        ...

    def probe(self, attention: AttentionFn) -> tuple[Tensor, ...]:
        """Results in which a mistake of the attention function shows, and roundings of many layers do not add up."""
        ...


def build(case: ModelCase, device: torch.device) -> Workload:
    """The case with random weights and tokens, the same each time."""
    return Training(case, device) if case.mode == "train" else Inference(case, device)


class Training:
    """Forward, loss, backward and optimizer, as mixed precision is used: float32 weights under autocast."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self._device, self._dtype = device, case.torch_dtype
        self.model = _random_model(case, device)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=device.type == "cuda")
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        self._optimizer.step()  # makes its sums, which are no cost of the first peer's first step
        self._optimizer.zero_grad()
        self._tokens = _random_tokens(case, device, seqlen=case.seqlen + 1)

    def resized(self, case: ModelCase) -> Training:
        """The same model and optimizer, from now on with tokens of another batch and length."""
        self.model.attention = naive_attention  # the last one may keep a mask of the old length
        self._tokens = _random_tokens(case, self._device, seqlen=case.seqlen + 1)
        return self

    @property
    def state_bytes(self) -> int:
        sums = (value for state in self._optimizer.state.values() for value in state.values())
        return _num_bytes([*self.model.parameters(), *sums, self._tokens])

    def run(self, attention: AttentionFn) -> None:
        try:
            self._loss(attention).backward()
            self._optimizer.step()
        finally:  # who runs out of memory leaves no gradients to the next
            self._optimizer.zero_grad()

    def probe(self, attention: AttentionFn) -> tuple[Tensor, ...]:
        """The loss, and the gradient of the first layer's projections, which every later layer has a part in."""
        loss = self._loss(attention)
        return loss.detach(), *torch.autograd.grad(loss, self.model.get_parameter("blocks.0.to_qkv.weight"))

    def activation_bytes(self, attention: AttentionFn) -> int:
        """The peak of forward and backward beyond the state and the gradients.

        In a step that is large enough this is the whole step's peak beyond the state: when the backward begins, all
        activations are there and no gradient is yet.
        """
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight)
        try:
            return peak_extra_bytes(lambda: self._loss(attention).backward(), self._device)
        finally:
            self._optimizer.zero_grad()

    def step_bytes(self, attention: AttentionFn) -> int:
        """The peak of a whole step beyond the state."""
        return peak_extra_bytes(partial(self.run, attention), self._device)

    def _loss(self, attention: AttentionFn) -> Tensor:
        self.model.attention = attention
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits = self.model(self._tokens[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), self._tokens[:, 1:].flatten())


class Inference:
    """Reads a prompt into the cache, or one more token of each sequence where the cache holds all before it."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self._model = _random_model(case, device).to(case.torch_dtype)
        num_new = case.seqlen if case.mode == "prefill" else 1
        self._num_before = case.seqlen - num_new
        self._tokens = _random_tokens(case, device, seqlen=num_new)
        self._cache = KVCache(case.shape, batch=case.batch, capacity=case.seqlen, dtype=case.torch_dtype, device=device)
        generator = torch.Generator(device).manual_seed(1)
        for stored in (self._cache.k, self._cache.v):
            stored.normal_(generator=generator)

    @property
    def state_bytes(self) -> int:
        return _num_bytes([*self._model.parameters(), self._cache.k, self._cache.v, self._tokens])

    @torch.inference_mode()
    def run(self, attention: AttentionFn) -> None:
        self._model.attention = attention
        self._cache.length = self._num_before
        self._model.logits(self._model.features(self._tokens, self._cache)[:, -1])

    def probe(self, attention: AttentionFn) -> tuple[Tensor, ...]:
        """What attention returns in the first layer, where every function gets the same."""
        first: list[Tensor] = []

        def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attention(q, k, v)
            if not first:
                first.append(out)
            return out

        self.run(watched)
        return tuple(first)


def _random_model(case: ModelCase, device: torch.device) -> Transformer:
    with device:
        return Transformer(
            case.shape,
            attention=naive_attention,  # until a run sets its own
            attention_dtype=case.torch_dtype,
            generator=torch.Generator(device).manual_seed(0),
        )


def _random_tokens(case: ModelCase, device: torch.device, *, seqlen: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(case.shape.vocabulary, (case.batch, seqlen), generator=generator, device=device)


def _num_bytes(tensors: Iterable[Tensor | nn.Parameter]) -> int:
    return sum(tensor.nbytes for tensor in tensors)

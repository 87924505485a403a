"""Time-stamps taken where an attention call begins and ends, in the forward and in the backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashtile.bench.formula import AttentionFn


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSeconds:
    """Time between the stamps, summed over the attention calls of one step."""

    forward: float
    backward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passes:
    """When each attention call of one direction began and ended, in order: seconds on a CPU, events on a GPU."""

    begins: list[Any] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)


class AttentionClock:
    """Measures an attention function from outside, without knowing what it does.

    Identity functions stand before and after the call. Autograd runs them forwards in the forward pass and, because
    the chain rule walks backwards, the one after the call first and the one before it last in the backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._forward, self._backward = _Passes(), _Passes()

    def around(self, attention: AttentionFn) -> AttentionFn:
        """``attention``, timed."""

        def timed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = _Stamp.apply(self._stamping(self._forward.begins), self._stamping(self._backward.ends), q, k, v)
            out = attention(q, k, v)
            (out,) = _Stamp.apply(self._stamping(self._forward.ends), self._stamping(self._backward.begins), out)
            return out

        return timed

    def take(self) -> AttentionSeconds:
        """The seconds since the last call of this method. On a GPU, synchronise first."""
        seconds = AttentionSeconds(forward=self._total(self._forward), backward=self._total(self._backward))
        self._forward, self._backward = _Passes(), _Passes()
        return seconds

    def _total(self, passes: _Passes) -> float:
        pairs = zip(passes.begins, passes.ends, strict=True)
        if self._is_gpu:
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        return sum(end - begin for begin, end in pairs)

    def _stamping(self, stamps: list[Any]) -> Callable[[], None]:
        def stamp() -> None:
            if self._is_gpu:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                stamps.append(event)
            else:
                stamps.append(time.perf_counter())

        return stamp


class _Stamp(torch.autograd.Function):
    """The identity on tensors, which calls one function in the forward and one in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, in_forward: Callable[[], None], in_backward: Callable[[], None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.in_backward = in_backward
        in_forward()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.in_backward()
        return (None, None, *grads)

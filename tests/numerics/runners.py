"""The kernels under test, each as a function from a call to its results; the numerics tests take them from here.

A backend that joins the library joins these tests with one line in ``BACKENDS``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import pytest
import torch
from hypothesis import currently_in_test_context, reject
from torch import Tensor

import flashtile
from flashtile import UnsupportedProblem, dispatch
from flashtile.backends.base import Launcher, Plan, Saved, TileConfig
from flashtile.backends.triton import plan as triton_plan
from flashtile.backends.triton.tiles import KERNELS, GpuTiles
from flashtile.spec import devices, validation
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem
from flashtile.testing import Call, CallSpec, Results, assert_results_within_budget, poisoned_allocations

NO_OPTIONS: dict[str, Any] = {
    "causal": False,
    "window": None,
    "scale": None,
    "softcap": 0.0,
    "bias": None,
    "mask": None,
    "alibi_slopes": None,
    "sinks": None,
    "dropout_p": 0.0,
    "dropout_seed": None,
    "deterministic": False,
}


def with_leaves(call: Call) -> Call:
    """The call on leaves of autograd that share its tensors' memory and strides."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.differentiable.items()}
    options = call.options | {name: leaf for name, leaf in leaves.items() if name in call.options}
    return Call(q=leaves["q"], k=leaves["k"], v=leaves["v"], options=options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A backend as users reach it, by name through the public functions."""

    name: str
    device: str
    declines: tuple[torch.dtype, ...] = ()
    """Dtypes that it does not take; ``check`` asks for the next best in their place."""
    scores_dtype: torch.dtype = torch.float32
    """What it rounds scores to; CPU products of 16-bit tiles have 16-bit results."""

    def forward(self, call: Call) -> Tensor:
        """out, differentiable if the call's tensors are."""
        function = flashtile.attention_varlen if call.is_packed else flashtile.attention
        return function(call.q, call.k, call.v, backend=self.name, **call.options)

    def forward_with_lse(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse), differentiable if the call's tensors are."""
        function = flashtile.attention_varlen_with_lse if call.is_packed else flashtile.attention_with_lse
        return function(call.q, call.k, call.v, backend=self.name, **call.options)

    def run(self, call: Call, d_out: Tensor | None, d_lse: Tensor | None) -> Results:
        """Results with the gradients of everything differentiable; out or the lse may be left without a gradient.

        Without ``d_lse``, out and gradients come from the function that returns no lse, which other kernels may serve.
        """
        leaves = with_leaves(call)
        if d_lse is None:
            out = self.forward(leaves)
            with torch.no_grad():
                lse = self.forward_with_lse(call)[1]
        else:
            out, lse = self.forward_with_lse(leaves)
        used = [(result, gradient) for result, gradient in ((out, d_out), (lse, d_lse)) if gradient is not None]
        results, upstream = zip(*used, strict=True)
        inputs = leaves.differentiable
        gradients = torch.autograd.grad(results, list(inputs.values()), upstream)
        return Results(out=out.detach(), lse=lse.detach(), gradients=dict(zip(inputs, gradients, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialBackend(Backend):
    """A backend that leaves calls to others: a test of a call that it declines is skipped, for the reasons it gives."""

    def forward(self, call: Call) -> Tensor:
        with skipped_if_declined():
            return Backend.forward(self, call)

    def forward_with_lse(self, call: Call) -> tuple[Tensor, Tensor]:
        with skipped_if_declined():
            return Backend.forward_with_lse(self, call)

    def reasons(self, spec: CallSpec, device: DeviceSpec | None = None) -> tuple[str, ...]:
        """Why it declines the call with all gradients, on the device under test or another; empty if it does not."""
        call = with_leaves(spec.build("meta"))
        problem, _ = validation.check_call(
            call.q, call.k, call.v, **(NO_OPTIONS | call.options), wants_lse=True, is_packed=call.is_packed
        )
        return dispatch.BACKENDS[self.name].rejects(problem, device or devices.detect(torch.device(self.device)))


FEWER_OPTIONS: tuple[dict[str, Any], ...] = (
    {"bias_axes": None},
    {"mask_axes": None},
    {"dropout_p": 0.0},
    {"scale": None},
    {"softcap": 0.0},
    {"dtype": torch.float16},
)


def nearest(runner: Runner, spec: CallSpec, device: DeviceSpec | None = None) -> CallSpec:
    """The call, for a partial backend without those options that it declines; for calls that were drawn at random."""
    if not isinstance(runner, PartialBackend):
        return spec
    reasons = runner.reasons(spec, device)
    for change in FEWER_OPTIONS:
        simpler = replace(spec, **change)
        if len(remaining := runner.reasons(simpler, device)) < len(reasons):
            spec, reasons = simpler, remaining
    return spec


@contextmanager
def skipped_if_declined() -> Iterator[None]:
    """Skips the test, or the example that hypothesis has drawn, if a backend declines the call."""
    try:
        yield
    except UnsupportedProblem as declined:
        if currently_in_test_context():
            reject()
        pytest.skip(str(declined))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of a backend with tiles of the test's choice, past the planner that would choose others."""

    backend: str
    kernel: str
    tiles: TileConfig
    device: str = "cpu"
    declines: tuple[torch.dtype, ...] = ()
    scores_dtype: torch.dtype = torch.float32

    def forward_with_lse(self, call: Call) -> tuple[Tensor, Tensor]:
        """(out, lse), without a graph for autograd."""
        problem, operands, plan, launcher = self._stated(call, wants_lse=False)
        with torch.no_grad():
            return launcher.forward(problem, operands, plan)

    def run(self, call: Call, d_out: Tensor | None, d_lse: Tensor | None) -> Results:
        """Results with the gradients of everything differentiable."""
        leaves = with_leaves(call)
        problem, operands, plan, launcher = self._stated(leaves, wants_lse=d_lse is not None)
        with torch.no_grad():
            out, lse = launcher.forward(problem, operands, plan)
            found = launcher.backward(problem, operands, Saved(out=out, lse=lse), d_out, d_lse, plan)
        return Results(out=out, lse=lse, gradients={name: getattr(found, name) for name in leaves.differentiable})

    def _stated(self, call: Call, *, wants_lse: bool) -> tuple[AttentionProblem, Operands, Plan, Launcher]:
        options = NO_OPTIONS | call.options
        problem, operands = validation.check_call(
            call.q, call.k, call.v, **options, wants_lse=wants_lse, is_packed=call.is_packed
        )
        plan = self._plan(problem, devices.detect(call.q.device))
        return problem, operands, plan, cast(Launcher, import_module(f"flashtile.backends.{self.backend}.launch"))

    def _plan(self, problem: AttentionProblem, device: DeviceSpec) -> Plan:
        plan = dispatch.choose(problem, device, self.backend)
        return replace(
            plan,
            forward=replace(plan.forward, kernel=self.kernel, tiles=self.tiles),
            backward=replace(plan.backward, kernel=self.kernel, tiles=self.tiles),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonKernels(Kernel):
    """All Triton kernels, with small tiles: on a GPU if there is one, else in Triton's interpreter."""

    def _plan(self, problem: AttentionProblem, device: DeviceSpec) -> Plan:
        tiles = GpuTiles(block_q=self.tiles.block_q, block_kv=self.tiles.block_kv, num_warps=4, num_stages=2)
        return triton_plan.plan_with(problem, device, dict.fromkeys((*KERNELS, "row_statistics"), tiles))


Runner = Backend | Kernel

HAS_GPU = torch.cuda.is_available()


@contextmanager
def interpreted_without_gpu() -> Iterator[None]:
    """Triton functions that are defined inside are interpreted if there is no GPU: their definition decides it."""
    if HAS_GPU:
        yield
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]


with interpreted_without_gpu():
    import_module("flashtile.backends.triton.launch")

CPU = Backend(name="cpu", device="cpu")
NAIVE = Backend(name="naive", device="cpu")
SMALL_TILES = TileConfig(block_q=8, block_kv=16)
TILED = Kernel(backend="cpu", kernel="tiled", tiles=SMALL_TILES)
TILED_16BIT = Kernel(backend="cpu", kernel="tiled_16bit", tiles=SMALL_TILES, scores_dtype=torch.bfloat16)
FUSED = Kernel(backend="cpu", kernel="torch_fused", tiles=SMALL_TILES)
TRITON = Backend(name="triton", device="cuda", declines=(torch.float64,))
HOPPER = PartialBackend(name="hopper", device="cuda", declines=(torch.float64, torch.float32))
TRITON_SMALL = TritonKernels(
    backend="triton",
    kernel="",
    tiles=TileConfig(block_q=16, block_kv=32),
    device="cuda" if HAS_GPU else "cpu",
    # The interpreter multiplies bfloat16 as if its bits were integers.
    declines=(torch.float64,) if HAS_GPU else (torch.float64, torch.bfloat16),
)

_other_gpu = HOPPER.reasons(CallSpec(lengths_q=(1,), lengths_kv=(1,), dtype=torch.float16)) if HAS_GPU else ()
HOPPER_MARKS = [pytest.mark.gpu, pytest.mark.skipif(bool(_other_gpu), reason=f"hopper: {'; '.join(_other_gpu)}")]

BACKENDS = [
    pytest.param(CPU, id="cpu"),
    pytest.param(NAIVE, id="naive"),
    pytest.param(TRITON, id="triton", marks=pytest.mark.gpu),
    pytest.param(HOPPER, id="hopper", marks=HOPPER_MARKS),
]
"""Every backend, through the public functions. A GPU backend's entry has ``marks=pytest.mark.gpu``."""

RUNNERS = [
    *BACKENDS,
    pytest.param(TILED, id="cpu-tiled-8x16"),
    pytest.param(TRITON_SMALL, id="triton-16x32", marks=pytest.mark.gpu),
]
"""What takes every problem, or skips it. The small tiles let short sequences cross many of them."""


def finest_dtype(runner: Runner) -> torch.dtype:
    """float64, or float32 where the runner declines it, for tests that compare results with each other."""
    return torch.float32 if torch.float64 in runner.declines else torch.float64


def assert_same(found: Tensor, expected: Tensor, runner: Runner, name: str) -> None:
    """Bitwise, where one program computed both; GPUs run one compiled for the strides and options of each call."""
    if runner.device == "cpu":
        assert torch.equal(found, expected), name
    else:
        rounding = 8 * torch.finfo(found.dtype).eps
        largest = expected[expected.isfinite()].abs().max().item()
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * largest, msg=name)


def check(
    runner: Runner, spec: CallSpec, *, is_small: bool = True, has_d_out: bool = True, has_d_lse: bool = True
) -> Results:
    """Runs the call that ``spec`` describes on poisoned memory, asserts the numerics contract, returns the results."""
    if spec.dtype in runner.declines:
        is_float32_next = spec.dtype == torch.float64 and torch.float32 not in runner.declines
        spec = replace(spec, dtype=torch.float32 if is_float32_next else torch.float16)
    call = spec.build()
    d_out, d_lse = spec.build_upstream()
    d_out, d_lse = d_out if has_d_out else None, d_lse if has_d_lse else None
    with poisoned_allocations():
        results = runner.run(call, d_out, d_lse)
    assert_results_within_budget(
        results, call, d_out=d_out, d_lse=d_lse, is_small=is_small, scores_dtype=runner.scores_dtype
    )
    assert_dtypes(results, call)
    if spec.unused_rows:
        for name in ("q", "k", "v"):
            assert bool((results.gradients[name][-spec.unused_rows :] == 0).all()), f"d_{name} of unused rows is not 0"
        assert bool((results.out[-spec.unused_rows :] == 0).all()), "out of unused rows is not 0"
    return results


def assert_dtypes(results: Results, call: Call) -> None:
    """out has q's dtype, lse float32 (float64 for float64), each gradient the dtype of its input."""
    assert results.out.dtype == call.q.dtype
    assert results.lse.dtype == (torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    for name, gradient in results.gradients.items():
        assert gradient.dtype == call.differentiable[name].dtype, name

"""Bugs that other attention kernels shipped with, and that a test here keeps out: strides, and what autograd asks for.

Docstrings cite the report where it has a number: FA flash-attention, PT PyTorch, XF xformers, HF transformers,
TR Triton.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import combinations
from typing import cast, get_args

import pytest
import torch
from runners import BACKENDS, FUSED, NO_OPTIONS, RUNNERS, Backend, Runner, assert_same, check, with_leaves

from flashtile import dispatch
from flashtile.backends.base import Launcher, Saved
from flashtile.spec import devices, validation
from flashtile.testing import Call, CallSpec, assert_within_budget, make_tensor, reference
from flashtile.testing.inputs import Strides

SPEC = CallSpec(lengths_q=(20, 20), lengths_kv=(33, 33), heads_kv=2, heads_per_kv=2, head_dim=16, head_dim_v=16)


@pytest.mark.parametrize("strides", get_args(Strides))
@pytest.mark.parametrize("runner", [*RUNNERS, pytest.param(FUSED, id="cpu-torch-fused")])
def test_strides_of_the_upstream_gradient(runner: Runner, strides: Strides) -> None:
    """FA#355: d_out that is transposed, sliced, expanded (stride 0), or not contiguous in its last axis."""
    check(runner, replace(SPEC, strides_d_out=strides), has_d_lse=runner is not FUSED)
    if runner is not FUSED:
        packed = replace(SPEC, lengths_q=(20, 7), lengths_kv=(9, 33), is_packed=True)
        check(runner, replace(packed, strides_d_out=strides))


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_of_a_sum(backend: Backend) -> None:
    """``out.sum().backward()`` sends a d_out whose every stride is 0."""
    call = with_leaves(SPEC.build())
    out, lse = backend.forward_with_lse(call)
    gradients = torch.autograd.grad(out.sum() + 2 * lse.sum(), [call.q, call.k, call.v])
    d_out, d_lse = torch.ones(call.out_shape), 2 * torch.ones(call.lse_shape)
    exact = reference(call, d_out=d_out, d_lse=d_lse)
    naive = reference(call, dtype=torch.float32, d_out=d_out, d_lse=d_lse)
    for name, found in zip(("q", "k", "v"), gradients, strict=True):
        assert_within_budget(found, exact=exact.gradients[name], naive=naive.gradients[name], floor=1e-5, name=name)


@pytest.mark.parametrize("strides_v", get_args(Strides))
@pytest.mark.parametrize("strides_k", get_args(Strides))
@pytest.mark.parametrize("runner", RUNNERS)
def test_different_strides_of_keys_and_values(runner: Runner, strides_k: Strides, strides_v: Strides) -> None:
    """PT#119500: k and v of different strides."""
    check(runner, replace(SPEC, strides_q="heads_first", strides_k=strides_k, strides_v=strides_v, causal=True))


@pytest.mark.parametrize("kernel", ["tiled", "torch_fused", "formula"])
def test_saved_output_that_is_not_contiguous(kernel: str) -> None:
    """The backward's preprocessing assumed that the saved out and lse are contiguous."""
    backend = "naive" if kernel == "formula" else "cpu"
    call = with_leaves(SPEC.build())
    d_out = make_tensor(call.out_shape, seed=5)
    problem, operands = validation.check_call(
        call.q, call.k, call.v, **(NO_OPTIONS | call.options), wants_lse=False, is_packed=False
    )
    plan = dispatch.choose(problem, devices.detect(call.q.device), backend)
    plan = replace(plan, backward=replace(plan.backward, kernel=kernel))
    launcher = cast(Launcher, import_module(f"flashtile.backends.{backend}.launch"))
    with torch.no_grad():
        out, lse = launcher.forward(problem, operands, plan)
        strided = Saved(
            out=out.transpose(1, 3).contiguous().transpose(1, 3), lse=lse.mT.contiguous().mT.expand(lse.shape)
        )
        expected, found = (
            launcher.backward(problem, operands, saved, d_out, None, plan)
            for saved in (Saved(out=out, lse=lse), strided)
        )
    assert not strided.out.is_contiguous() and not strided.lse.is_contiguous()
    for name in ("q", "k", "v"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


WANTED = [names for size in (1, 2) for names in combinations(("q", "k", "v", "bias", "sinks"), size)]


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_inputs_require_a_gradient(backend: Backend, wanted: tuple[str, ...]) -> None:
    """PT#148476: only the bias requires a gradient; and every other one or two inputs alone."""
    call = replace(SPEC, bias_axes="hk", has_sinks=True, causal=True).build()
    d_out = make_tensor(call.out_shape, seed=5)
    everything = backend.run(call, d_out, None).gradients
    some = {name: call.differentiable[name].detach().requires_grad_() for name in wanted}
    partly = Call(
        q=some.get("q", call.q),
        k=some.get("k", call.k),
        v=some.get("v", call.v),
        options=call.options | {name: leaf for name, leaf in some.items() if name in call.options},
    )
    gradients = torch.autograd.grad(backend.forward(partly), list(some.values()), d_out)
    for name, found in zip(some, gradients, strict=True):
        assert torch.equal(found, everything[name]), name


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_gradient_of_a_plain_call(backend: Backend, wanted: str) -> None:
    """One gradient alone where the CPU may choose torch's fused op."""
    call = replace(SPEC, lengths_kv=SPEC.lengths_q, causal=True).build()
    d_out = make_tensor(call.out_shape, seed=5)
    everything = backend.run(call, d_out, None).gradients
    partly = replace(call, **{wanted: call.differentiable[wanted].detach().requires_grad_()})
    (found,) = torch.autograd.grad(backend.forward(partly), [partly.differentiable[wanted]], d_out)
    torch.testing.assert_close(found, everything[wanted])


@pytest.mark.parametrize("seqlen_kv", [43, 498])
@pytest.mark.parametrize("runner", RUNNERS)
def test_bias_whose_last_axis_is_odd(runner: Runner, seqlen_kv: int) -> None:
    """XF#813: a bias whose last dimension is 43 or 498."""
    spec = replace(SPEC, lengths_q=(21, 21), lengths_kv=(seqlen_kv, seqlen_kv), bias_axes="bhqk")
    check(runner, spec)
    check(runner, replace(spec, dtype=torch.bfloat16, bias_dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 4, 20, 33), (2, 1, 1, 33), (2, 1, 20, 1), (1, 1, 1, 1), (4, 1, 33), (33,), ()])
@pytest.mark.parametrize("runner", RUNNERS)
def test_broadcast_biases(runner: Runner, shape: tuple[int, ...]) -> None:
    """Biases [1, H, N, N], [B, 1, 1, N] and every other broadcast, whose gradient is summed over the rest."""
    call = SPEC.build()
    bias = make_tensor((1, *shape, 1), seed=9).reshape(shape)
    call = replace(call, options={"bias": bias})
    d_out, d_lse = SPEC.build_upstream()
    results = runner.run(call, d_out, d_lse)
    exact = reference(call, d_out=d_out, d_lse=d_lse)
    assert results.gradients["bias"].shape == shape
    torch.testing.assert_close(results.gradients["bias"], exact.gradients["bias"].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runner", RUNNERS)
def test_expanded_bias_and_mask(runner: Runner) -> None:
    """A bias or mask with strides 0 has a gradient of its full, expanded shape."""
    call = SPEC.build()
    bias = make_tensor((1, 1, 1, 33), seed=9).expand(2, 4, 20, 33)
    mask = (torch.arange(33) % 4 != 0).expand(2, 4, 20, 33)
    d_out, d_lse = SPEC.build_upstream()
    expanded = runner.run(replace(call, options={"bias": bias, "mask": mask}), d_out, d_lse)
    stored = runner.run(replace(call, options={"bias": bias.clone(), "mask": mask.clone()}), d_out, d_lse)
    for name, found in expanded.named().items():
        assert_same(found, stored.named()[name], runner, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_query_key_and_value(backend: Backend) -> None:
    """Self-attention on one tensor: its gradient is the sum of three."""
    x = make_tensor((1, 20, 2, 8)).requires_grad_()
    d_out = make_tensor((1, 20, 2, 8), seed=5)
    call = Call(q=x, k=x, v=x, options={"causal": True})
    (found,) = torch.autograd.grad(backend.forward(call), [x], d_out)
    parts = backend.run(call, d_out, None).gradients
    torch.testing.assert_close(found, parts["q"] + parts["k"] + parts["v"])
